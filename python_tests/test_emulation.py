"""The host emulation of CUDA finds every fault in wrong kernels and none in right ones.

The kernels are in csrc/emulation (right_kernels.cu, wrong_kernels.cu); a module with them is built
on demand, for these tests only.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOAT32_ROUNDING = 2.0**-24
TF32_ROUNDING = 2.0**-11


def _find_tool(name: str) -> str | None:
    beside_python = Path(sys.executable).parent / name
    return str(beside_python) if beside_python.exists() else shutil.which(name)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"


@pytest.fixture(scope="session")
def emulation() -> ModuleType:
    """The compiled test module; a second run only rebuilds what changed."""
    compiler = (
        os.environ.get("CXX")
        or shutil.which("c++")
        or shutil.which("g++")
        or shutil.which("clang++")
    )
    if compiler is None:
        message = "the emulation tests need a C++ compiler"
        if os.environ.get("VTOK_REQUIRE_EMULATION") == "1":
            pytest.fail(message)
        pytest.skip(message)
    cmake = _find_tool("cmake")
    assert cmake is not None, "the emulation tests need cmake: pip install vtok_ext[test]"
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    folder = ROOT / "build" / "emulation-tests" / suffix.split(".")[1]
    configure = [cmake, "-S", str(ROOT / "csrc" / "emulation"), "-B", str(folder)]
    ninja = _find_tool("ninja")
    if ninja is not None and not (folder / "CMakeCache.txt").exists():
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    _run([*configure, f"-DPython_EXECUTABLE={sys.executable}"])
    _run([cmake, "--build", str(folder), "--parallel", "2"])
    spec = importlib.util.spec_from_file_location(
        "_emulation_tests", folder / f"_emulation_tests{suffix}"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def default_options(emulation: ModuleType):
    emulation.emulation_take_reports()
    yield
    emulation.emulation_set_options()


def run_everywhere(emulation: ModuleType, call: Callable[[], np.ndarray]) -> list[np.ndarray]:
    """The results of `call` under every configuration, each without a report."""
    results = []
    for options in emulation.emulation_configurations():
        emulation.emulation_set_options(**options)
        results.append(call())
        assert emulation.emulation_take_reports() == [], options
    return results


def check_everywhere(
    emulation: ModuleType, call: Callable[[], np.ndarray], expected: np.ndarray
) -> None:
    for result in run_everywhere(emulation, call):
        np.testing.assert_array_equal(result, expected)


def random_floats(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def to_bfloat16_bits(values: np.ndarray) -> np.ndarray:
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bfloat16_bits(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


# Right kernels


@pytest.mark.parametrize("block_size", [32, 256, 1024])
def test_block_sum(emulation, block_size):
    x = np.random.default_rng(0).integers(-9, 9, (5, block_size)).astype(np.float32)

    def call():
        sums = np.empty(5, np.float32)
        emulation.block_sum(x, sums)
        return sums

    check_everywhere(emulation, call, x.sum(1))


def check_matmul(emulation, function, a, b, exact_a, exact_b, input_rounding):
    """c = a b^T, of which the error is at most (input rounding + k roundings of a sum) |a|
    |b|^T."""
    a64, b64 = exact_a.astype(np.float64), exact_b.astype(np.float64)
    bound = (2 * input_rounding + a.shape[1] * FLOAT32_ROUNDING) * (abs(a64) @ abs(b64).T) + 1e-30

    def call():
        c = np.empty((a.shape[0], b.shape[0]), np.float32)
        function(a, b, c)
        return c

    results = run_everywhere(emulation, call)
    assert (abs(results[0] - a64 @ b64.T) <= bound).all()
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


SHAPES = [(64, 64, 32), (1, 1, 8), (100, 67, 200), (130, 5, 24)]


@pytest.mark.parametrize("m, n, k", SHAPES)
def test_matmul_f16(emulation, m, n, k):
    a, b = (random_floats(rows, k, seed=rows).astype(np.float16) for rows in (m, n))
    check_matmul(emulation, emulation.matmul_f16, a, b, a, b, 0.0)


@pytest.mark.parametrize("m, n, k", SHAPES)
def test_matmul_bf16(emulation, m, n, k):
    a, b = (to_bfloat16_bits(random_floats(rows, k, seed=rows)) for rows in (m, n))
    exact = from_bfloat16_bits(a), from_bfloat16_bits(b)
    check_matmul(emulation, emulation.matmul_bf16, a, b, *exact, 0.0)


@pytest.mark.parametrize("m, n, k", SHAPES)
def test_matmul_tf32(emulation, m, n, k):
    a, b = (random_floats(rows, k, seed=rows) for rows in (m, n))
    check_matmul(emulation, emulation.matmul_tf32, a, b, a, b, TF32_ROUNDING)
    # The inputs are really rounded: a float32 product would be closer than this.
    c = np.empty((m, n), np.float32)
    emulation.matmul_tf32(a, b, c)
    assert abs(c - a.astype(np.float64) @ b.T).max() > 1e-6


def test_transposing_ldmatrix(emulation):
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-8, 8, (16, columns)).astype(np.float16) for columns in (16, 8))

    def call():
        c = np.empty((16, 8), np.float32)
        emulation.transposed_matmul(a, b, c)
        return c

    check_everywhere(emulation, call, a.astype(np.float32).T @ b)


def test_mma_m16n8k8(emulation):
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-8, 8, (rows, 8)).astype(np.float32) for rows in (16, 8))

    def call():
        c = np.empty((16, 8), np.float32)
        emulation.small_matmul(to_bfloat16_bits(a), to_bfloat16_bits(b), c)
        return c

    check_everywhere(emulation, call, a @ b + a @ b.T)


def test_histogram(emulation):
    values = np.random.default_rng(0).integers(0, 37, 5000).astype(np.int32)

    def call():
        counts = np.empty(37, np.int32)
        emulation.histogram(values, counts)
        return counts

    check_everywhere(emulation, call, np.bincount(values, minlength=37))


def test_ballot_compaction(emulation):
    values = np.random.default_rng(0).integers(-50, 50, 1000).astype(np.int32)
    num_blocks = 4
    expected = np.full((num_blocks, 256), -1, np.int32)
    for block in range(num_blocks):
        kept = values[256 * block : 256 * (block + 1)]
        kept = kept[kept >= 0]
        expected[block, : len(kept)] = kept

    def call():
        kept, counts = np.empty((num_blocks, 256), np.int32), np.empty(num_blocks, np.int32)
        emulation.compact(values, kept, counts)
        np.testing.assert_array_equal(counts, (expected >= 0).sum(1))
        return kept

    check_everywhere(emulation, call, expected)


@pytest.mark.parametrize("name, kib", [("large", 64), ("large", 99), ("sm90", 227)])
def test_dynamic_shared_memory_beyond_48_kib(emulation, name, kib):
    reverse = getattr(emulation, f"reverse_in_{name}_shared")
    x = random_floats(kib * 256)

    def call():
        y = np.empty_like(x)
        reverse(x, y)
        return y

    check_everywhere(emulation, call, x[::-1])


@pytest.mark.parametrize("name, limit", [("large", 101376), ("sm90", 232448)])
def test_dynamic_shared_memory_beyond_the_limit(emulation, name, limit):
    x = random_floats(limit // 4 + 4)
    message = f"too much dynamic shared memory: the limit is {limit} bytes, got {limit + 16}"
    with pytest.raises(RuntimeError, match=message):
        getattr(emulation, f"reverse_in_{name}_shared")(x, np.empty_like(x))


def test_lanes_may_exit_before_a_collective_on_the_others(emulation):
    x = np.random.default_rng(0).integers(-9, 9, 20).astype(np.float32)

    def call():
        y = np.empty_like(x)
        emulation.early_exit(x, y)
        return y

    check_everywhere(emulation, call, np.cumsum(x))


def test_halves_of_a_warp_may_use_different_collectives(emulation):
    x = np.arange(1, 33, dtype=np.int32)
    expected = np.concatenate([np.minimum(x[:16] + 1, 16) + 1, np.full(16, 20)]) + 31

    def call():
        y = np.empty_like(x)
        emulation.half_warps(x, y)
        return y

    check_everywhere(emulation, call, expected)


@pytest.mark.parametrize("num_threads", [1, 31, 33, 1024])
def test_barriers_with_votes(emulation, num_threads):
    x = np.arange(num_threads, dtype=np.int32)

    def call():
        y = np.empty(3, np.int32)
        emulation.barrier_votes(x, y)
        return y

    check_everywhere(emulation, call, np.array([num_threads > 7, 1, (num_threads + 1) // 2]))


def test_input_output_buffer_accumulates(emulation):
    x = np.random.default_rng(0).integers(-9, 9, 1000).astype(np.float32)

    def call():
        total = np.array([100.0], np.float32)
        emulation.add_to(x, total)
        return total

    check_everywhere(emulation, call, 100 + x.sum(keepdims=True))


# Device memory


def test_strided_arguments(emulation):
    x, large = random_floats(6, 11)[:, 2:7], random_floats(6, 9)
    y = large[:, 1:6]
    emulation.copy_elements(x, y, 0)
    assert emulation.emulation_take_reports() == []
    np.testing.assert_array_equal(y, x)
    np.testing.assert_array_equal(large[:, 6:], random_floats(6, 9)[:, 6:])


def test_write_between_strided_elements_is_reported(emulation):
    x, large = random_floats(6, 6), np.zeros((6, 9), np.float32)
    emulation.copy_elements(x, large[:, :5], 9)
    between, past_end = emulation.emulation_take_reports()[::-1]
    expected = "write between the elements of strided argument y, 5 elements after its first"
    assert expected in between
    assert "out-of-bounds write 0 bytes past the end of argument y" in past_end
    assert (large[:, 5:] == 0).all()


def test_host_alignment_is_kept(emulation):
    storage, y = random_floats(65), np.empty(64, np.float32)
    aligned = storage[(-storage.ctypes.data // 4) % 4 :][:60]
    emulation.copy_vectors(aligned, y[(-y.ctypes.data // 4) % 4 :][:60])
    with pytest.raises(RuntimeError, match="load_vector needs a multiple of 16 bytes"):
        emulation.copy_vectors(aligned[1:57], np.empty(56, np.float32))


def test_bytes_written_and_not_written(emulation):
    y = np.empty(1000, np.uint8)
    for value in range(0, 256, 5):  # no value of a byte is mistaken for poison
        emulation.fill_bytes(y, 1000, value)
        assert (y == value).all()
    assert emulation.emulation_take_reports() == []
    emulation.fill_bytes(y, 990, 1)
    (report,) = emulation.emulation_take_reports()
    assert "output argument y: element [990] was never written (10 of 1000 elements)" in report


def test_empty_arrays(emulation):
    emulation.fill_bytes(np.empty((3, 0), np.uint8), 0, 1)
    assert emulation.emulation_take_reports() == []


# Wrong kernels

EXITED = r"which has exited|returns from the kernel while other lanes of its warp wait for it"
SITE = r"\(wrong_kernels.cu:\d+\)"
ERRORS = {
    "read_out_of_bounds": r"\(255, 0, 0\): out-of-bounds read 0 bytes past the end of argument x",
    "read_far_out_of_bounds": r"out-of-bounds read \d+ bytes past the end of argument x",
    "read_before_start": r"out-of-bounds read \d+ bytes before the start of argument x",
    "write_out_of_bounds": r"\(7, 0, 0\): out-of-bounds write 0 bytes past the end of argument y",
    "write_to_input": r"thread \(5, 0, 0\): write to the input argument x, element \[5\]",
    "null_pointer": r"out-of-bounds read near the null pointer",
    "misaligned_vector_load": r"misaligned address: load_vector needs a multiple of 16 bytes",
    "misaligned_vector_store": r"misaligned address: store_vector needs a multiple of 8 bytes",
    "shared_out_of_bounds": r"shared memory, 0 bytes past the end of array 'values' \(1024 bytes\)",
    "dynamic_shared_out_of_bounds": r"shared memory: 0 bytes past the end of dynamic shared memory",
    "too_much_static_shared": r"too much static shared memory: with array 'second' .* 57344 bytes",
    "static_and_dynamic_shared": r"too much shared memory: 1024 static and 101376 dynamic bytes",
    "too_much_dynamic_shared": r"dynamic shared memory: the limit is 101376 bytes, got 102400",
    "shared_without_opt_in": r"24576 static and 30720 dynamic bytes, .* 49152 without opting in",
    "divergent_collective": rf"divergent collective: .* {SITE} while lane \d+ waits .* {SITE}",
    "barrier_in_divergent_code": rf"barrier in divergent code: .* __syncthreads {SITE} while",
    "barrier_against_warp_barrier": (
        r"deadlock, a collective is not reached by all its threads: "
        rf"16 threads wait at __syncthreads {SITE}.*16 threads wait at __syncwarp {SITE}, mask"
    ),
    "exited_lane_in_mask": EXITED,
    "lane_exits_while_awaited": EXITED,
    "mask_without_caller": r"mask 0x0000ffff does not name the calling lane",
    "shuffle_from_outside_mask": rf"__shfl_xor_sync {SITE} reads lane \d+, which takes no part",
    "misaligned_cp_async": r"misaligned address: cp.async source needs a multiple of 16 bytes",
    "cp_async_outside_shared": r"cp.async destination: 4 bytes at 0x\w+ are not inside one shared",
    "misaligned_ldmatrix": r"misaligned address: ldmatrix row needs a multiple of 16 bytes",
    "misaligned_operand": r"misaligned address: wgmma operand a needs a multiple of 1024 bytes",
    "stack_overflow": r"stack overflow",
    "division_by_zero": r"integer division by zero",
    "empty_grid": r"grid must not be empty, got \(0, 1, 1\)",
    "block_too_large": r"block must be at most .* and 1024 threads, got \(1025, 1, 1\)",
}

REPORTS = {
    "write_before_start": "out-of-bounds write 4 bytes before the start of argument y",
    "output_not_written": "argument y: element [253] was never written (3 of 256 elements)",
    "never_waited_group": "cp.async group never waited for: 1 copies are in flight when",
    "products_never_waited_for": "wgmma never waited for when the thread exits",
}

# Without a fault that could be named: the results differ between configurations, or are NaN.
DIFFERENCES = [
    "read_before_write",
    "write_after_read",
    "missing_warp_barrier",
    "racing_stores",
    "racing_blocks",
    "missing_wait",
    "wait_for_too_few",
    "overwritten_stage",
    "operand_overwritten_early",
    "operand_not_arrived",
]
ALWAYS_NAN = ["shared_read_without_write", "sums_used_early"]


def run_wrong(emulation, name: str) -> np.ndarray:
    x, y = random_floats(256), np.empty(256, np.float32)
    emulation.run_wrong_kernel(name, x, y)
    return y


def check_still_works(emulation) -> None:
    """A failed launch leaves nothing behind that disturbs the next one."""
    x, sums = np.ones((3, 256), np.float32), np.empty(3, np.float32)
    emulation.block_sum(x, sums)
    assert sums.tolist() == [256] * 3
    assert emulation.emulation_take_reports() == []


@pytest.mark.parametrize("name", ERRORS)
def test_wrong_kernel_stops_with_the_cause(emulation, name):
    for options in emulation.emulation_configurations():
        emulation.emulation_set_options(**options)
        with pytest.raises(RuntimeError, match=ERRORS[name]):
            run_wrong(emulation, name)
        check_still_works(emulation)


@pytest.mark.parametrize("name", REPORTS)
def test_wrong_kernel_is_reported(emulation, name):
    for options in emulation.emulation_configurations():
        emulation.emulation_set_options(**options)
        run_wrong(emulation, name)
        (report,) = emulation.emulation_take_reports()
        assert REPORTS[name] in report
        check_still_works(emulation)


@pytest.mark.parametrize("name", DIFFERENCES)
def test_wrong_kernel_depends_on_the_configuration(emulation, name):
    results = run_everywhere(emulation, lambda: run_wrong(emulation, name))
    assert any(not np.array_equal(result, results[0]) for result in results[1:])


@pytest.mark.parametrize("name", ALWAYS_NAN)
def test_wrong_kernel_reads_poison(emulation, name):
    results = run_everywhere(emulation, lambda: run_wrong(emulation, name))
    assert all(np.isnan(result).all() for result in results)


def test_copies_arrive_late(emulation):
    emulation.emulation_set_options(cp_async="late")
    assert np.isnan(run_wrong(emulation, "missing_wait")).all()
    emulation.emulation_set_options(cp_async="issue")
    assert not np.isnan(run_wrong(emulation, "missing_wait")).any()


# Options and speed


def test_seeds_give_different_orders(emulation):
    last_writers = set()
    for seed in range(8):
        emulation.emulation_set_options(order="seeded", seed=seed)
        last_writers.add(float(run_wrong(emulation, "racing_stores")[0]))
    assert len(last_writers) > 4


def test_options_are_checked(emulation):
    message = "order must be 'forward', 'reverse' or 'seeded', got 'random'"
    with pytest.raises(ValueError, match=message):
        emulation.emulation_set_options(order="random")
    with pytest.raises(ValueError, match="cp_async must be 'late' or 'issue', got 'never'"):
        emulation.emulation_set_options(cp_async="never")


def test_statistics_count_threads(emulation):
    before = emulation.emulation_statistics()
    emulation.many_threads(np.empty(256, np.float32), 10)
    after = emulation.emulation_statistics()
    assert {key: after[key] - before[key] for key in after} == {
        "launches": 1,
        "blocks": 10,
        "threads": 2560,
        "switches": 0,
    }


def test_speed(emulation):
    """Five million simple threads per second let whole suites run emulated (measured: 100)."""
    num_blocks, y = 8000, np.empty(256, np.float32)
    start = time.perf_counter()
    emulation.many_threads(y, num_blocks)
    assert num_blocks * 256 / (time.perf_counter() - start) > 5e6
