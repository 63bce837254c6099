#!/usr/bin/env bash
# Trains the models of the table of systems with `vtok`, then measures them: bench/systems/train.sh OUT
#
# An encoder, five small tokenizers and two growths, minutes of two CPU cores each; what is interrupted goes on where it was.
# Any further argument goes to bench/systems.py.
set -euo pipefail

out=${1:?usage: bench/systems/train.sh OUT [OPTION of bench/systems.py]...}
shift
here=$(dirname "${BASH_SOURCE[0]}")

train() {  # NAME [OVERRIDE]...
  local name=$1
  shift
  [ -f "$out/$name/model/config.json" ] && return
  vtok train "$here/$name.yaml" "$@" -o "$out/$name" --resume auto
}

grow() {  # FROM NAME STEPS
  [ -f "$out/$2/model/config.json" ] && return
  vtok grow "$out/$1/model" --recipe "$here/grow.yaml" -o "$out/$2" --resume auto
}

train vidtok
train windows
train coordtok
train vtok_encoder
train vtok "encoder=$out/vtok_encoder/model"
train promag
grow promag promag8x
grow promag8x promag16x
python "$here/../systems.py" "vidtok=$out/vidtok/model" "windows=$out/windows/model@16" \
  "coordtok=$out/coordtok/model" "promag 4x=$out/promag/model" "promag 16x=$out/promag16x/model" \
  "vtok=$out/vtok/model" --size 64 "$@"
