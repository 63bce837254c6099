#!/usr/bin/env bash
# Builds, tests, tunes and measures on a machine with an NVIDIA GPU; no network needed.
#
#   bench/gpu.sh                    every stage
#   bench/gpu.sh build test         only these
#
# Stages: build, test, sanitize, tune, bench. Needs torch with CUDA, nvcc, cmake, ninja, scikit-build-core, pybind11, pytest and
# pytest-benchmark in the current Python; tests run in 8 processes where pytest-xdist is there. Results (JSON, logs) go to $OUT,
# by default build/gpu.
#
# All stages end within VTOK_GPU_SECONDS (530) of the start: every command has a limit of its own and gets at most what is left.
# Benchmarks leave the JSON of what they have measured; those named last may not get their turn. A stage that fails is named at
# the end, and the ones behind it still run, except after a failed build.
#
#   VTOK_PREBUILT=1                 no build: the module that lies in the checkout, vtok_ext/_C*.so
#   VTOK_BENCH_COMPILED=1           also measure torch.compile, which takes minutes
set -uo pipefail
cd "$(dirname "$0")/.." || exit
OUT=${OUT:-build/gpu}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
stages=("$@")
[ ${#stages[@]} -gt 0 ] || stages=(build test sanitize tune bench)
export VTOK_REQUIRE_CUDA=1 PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
if [ "${VTOK_PREBUILT:-0}" = 1 ]; then
  site=$PWD
else
  site=$(mktemp -d)/site
fi
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"

# Runs a command for at most $1 seconds, or for what is left of the whole.
limited() {
  local seconds=$1 left=$((${VTOK_GPU_SECONDS:-530} - SECONDS)) status=0
  shift
  [ "$left" -ge "$seconds" ] || seconds=$left
  if [ "$seconds" -lt 10 ]; then
    echo "gpu.sh: no time left for: $*"
    return 124
  fi
  timeout --kill-after=5 "$seconds" "$@" || status=$?
  [ "$status" -ne 124 ] || echo "gpu.sh: cut off after $seconds s: $*"
  return "$status"
}

stage_build() {
  local capability
  if [ "${VTOK_PREBUILT:-0}" != 1 ]; then
    capability=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') || return
    case "$capability" in 90) capability=90a ;; esac
    limited 500 "$python" -m pip install . --no-build-isolation --no-deps --no-index --quiet --target "$site" \
      -C cmake.define.CMAKE_CUDA_ARCHITECTURES="$capability-real" || return
  fi
  (cd / && "$python" -c '
import vtok_ext as vt
info = vt.build_info()
print(info)
assert info["cuda_version"], "the module was built without CUDA"')
}

# Tests run against the installed package, which PYTHONPATH puts before the checkout.
stage_test() {
  local workers=()
  if "$python" -c 'import xdist' 2>/dev/null; then workers=(-n 8); fi
  limited 180 "$python" -m pytest python_tests -m cuda -q --tb=short -p no:cacheprovider "${workers[@]}"
}

# A small subset: every op's first sample, forward and backward, in every dtype; and every tile of the convolution in bfloat16,
# those of wgmma too.
stage_sanitize() {
  local tool status=0
  if ! command -v compute-sanitizer >/dev/null; then
    echo "sanitize: compute-sanitizer is not installed here, skipped"
    return
  fi
  for tool in memcheck racecheck; do
    limited 60 compute-sanitizer --tool "$tool" --error-exitcode 1 --target-processes all \
      "$python" -m pytest python_tests/ops/test_ops.py -m "cuda and first_sample" -q --tb=short \
      -p no:cacheprovider -k "(forward_matches or gradients_match) and contiguous" || status=$?
    limited 45 compute-sanitizer --tool "$tool" --error-exitcode 1 --target-processes all \
      "$python" -m pytest python_tests/ops/test_causal_conv3d_tiles.py -m cuda -q --tb=short \
      -p no:cacheprovider -k "test_every_tile and bf16 and 16-1" || status=$?
  done
  return "$status"
}

stage_tune() {
  limited 90 "$python" bench/tune_causal_conv3d.py --save "$OUT/conv_tile_times.json"
}

# One benchmark: its name, its limit in seconds, and variables of its environment.
bench() {
  local name=$1 seconds=$2 status=0
  shift 2
  limited "$seconds" env VTOK_BENCH_OUT="$OUT" VTOK_BENCH_COMPILED="${VTOK_BENCH_COMPILED:-0}" "$@" \
    "$python" -m pytest "bench/bench_$name.py" -q --tb=short -p no:cacheprovider --benchmark-disable-gc || status=$?
  [ "$status" -eq 124 ] || return "$status" # what was cut off is no failure
}

stage_bench() {
  local status=0
  bench fsq 30 || status=1
  bench triplane_gather 40 || status=1
  bench norm_act 40 || status=1
  bench temporal_resample 40 || status=1
  bench alpha_blend 30 || status=1
  bench fsq_entropy 30 || status=1
  bench residual_pool 30 || status=1
  bench causal_conv3d 120 VTOK_BENCH_SIZES=256 || status=1
  bench models 90 VTOK_BENCH_SIZES=256 VTOK_BENCH_TRAIN_SIZES=256 VTOK_BENCH_ROUNDS=3 || status=1
  bench coordtok 60 VTOK_BENCH_FRAMES=128 VTOK_BENCH_ROUNDS=3 || status=1
  bench diffusers 60 || status=1
  return "$status"
}

needs_build=true
for stage in "${stages[@]}"; do [ "$stage" = build ] && needs_build=false; done
if $needs_build; then stages=(build "${stages[@]}"); fi
failed=()
for stage in "${stages[@]}"; do
  start=$SECONDS
  echo "== $stage"
  "stage_$stage" 2>&1 | tee "$OUT/$stage.log" || failed+=("$stage")
  echo "== $stage took $((SECONDS - start)) s"
  if [ "$stage" = build ] && [ ${#failed[@]} -gt 0 ]; then break; fi
done
if [ ${#failed[@]} -gt 0 ]; then
  echo "== failed: ${failed[*]}"
  exit 1
fi
