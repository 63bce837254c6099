#!/usr/bin/env bash
# Builds, tests and measures on a machine with an NVIDIA GPU; no network needed. All stages take under 9 minutes.
#
#   bench/gpu.sh                    every stage
#   bench/gpu.sh build test         only these
#
# Stages: build, test, sanitize, bench. Needs torch with CUDA, nvcc, cmake, ninja, scikit-build-core, pybind11, pytest and
# pytest-benchmark in the current Python. Results (JSON, logs) go to $OUT, by default build/gpu.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-build/gpu}
mkdir -p "$OUT"
stages=("$@")
[ ${#stages[@]} -gt 0 ] || stages=(build test sanitize bench)
export VTOK_REQUIRE_CUDA=1 PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
site=$(mktemp -d)/site
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"

stage_build() {
  local capability
  capability=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
  case "$capability" in 90) capability=90a ;; esac
  "$python" -m pip install . --no-build-isolation --no-deps --no-index --quiet --target "$site" \
    -C cmake.define.CMAKE_CUDA_ARCHITECTURES="$capability-real"
  (cd / && "$python" -c 'import vtok_ext as vt; print(vt.build_info())')
}

# Tests run against the installed package, which PYTHONPATH puts before the checkout.
stage_test() {
  "$python" -m pytest python_tests -m cuda -q -p no:cacheprovider
}

# A small subset: every op's first sample, forward and backward, in every dtype.
stage_sanitize() {
  local tool
  if ! command -v compute-sanitizer >/dev/null; then
    echo "sanitize: compute-sanitizer is not installed here, skipped"
    return
  fi
  for tool in memcheck racecheck; do
    timeout 150 compute-sanitizer --tool "$tool" --error-exitcode 1 --target-processes all \
      "$python" -m pytest python_tests/ops/test_ops.py -m "cuda and first_sample" -q \
      -p no:cacheprovider -x -k "(forward_matches or gradients_match) and contiguous"
  done
}

stage_bench() {
  VTOK_BENCH_OUT="$OUT" "$python" -m pytest bench -q -p no:cacheprovider --benchmark-disable-gc
}

needs_build=true
for stage in "${stages[@]}"; do [ "$stage" = build ] && needs_build=false; done
if $needs_build; then stages=(build "${stages[@]}"); fi
for stage in "${stages[@]}"; do
  start=$SECONDS
  echo "== $stage"
  "stage_$stage" 2>&1 | tee "$OUT/$stage.log"
  echo "== $stage took $((SECONDS - start)) s"
done
