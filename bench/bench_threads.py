"""Alternating torch and vtok ops: two thread pools that took turns would lose time at every switch.

Measures N torch ops then N vtok ops against the same ops one by one in turn; the ratio is what
sharing one OpenMP runtime is worth (1.0 = switching costs nothing, at most 1.05 is the target).
"""

import pytest
import torch
from harness import Case, measure

import vtok_ext as vt

REPEATS = 20


def bench_alternating_ops(device, record, benchmark):
    if device != "cpu":
        pytest.skip("about CPU thread pools")
    z = torch.randn(4, 6, 5, 64, 64)
    out = torch.empty_like(z)

    def torch_op():
        torch.tanh(z, out=out)

    def vtok_op():
        vt.fsq(z, [8] * 6, channel_dim=1)

    def grouped():
        for op in (torch_op, vtok_op):
            for _ in range(REPEATS):
                op()

    def alternating():
        for _ in range(REPEATS):
            torch_op()
            vtok_op()

    bytes_moved = REPEATS * 4 * z.numel() * z.element_size()
    case = Case("threads", "4x6x5x64x64", "float32", "forward", bytes_moved)
    with torch.no_grad():
        measure(
            case, {("grouped", "default"): grouped, ("alternating", "default"): alternating}, device
        )
        record(case)
        benchmark.pedantic(alternating, rounds=3)
