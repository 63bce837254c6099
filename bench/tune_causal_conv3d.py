"""Measures every tile of the CUDA convolution on the models' shapes and fits the tables of choices.

python bench/tune_causal_conv3d.py                     print the tables that this GPU asks for
python bench/tune_causal_conv3d.py --save times.json   keep what was measured
python bench/tune_causal_conv3d.py --load times.json   fit again, without a GPU
    ... --write    put the tables into csrc/causal_conv3d/causal_conv3d_tiles.h

There is a table for tiles of mma.sync and one for those of wgmma. A row of a table holds up to a
number of output channels and of 64 x 64 blocks per multiprocessor. Between two limits the tile with
the least summed time counts, each shape relative to its own best. Tiles of the weight's gradient
are measured too; their choice is a rule in causal_conv3d_cuda_gradient.cu.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

HEADER = Path(__file__).parent.parent / "csrc" / "causal_conv3d" / "causal_conv3d_tiles.h"
COLUMN_LIMITS = {"mma": (16, 64, None), "wgmma": (64, 128, None)}
BLOCK_LIMITS = (1, 2, 4, 8, 16, 32, 64, 128, None)


@dataclass(frozen=True)
class Timing:
    """Times in ms of every tile for one product."""

    columns: int
    blocks: int  # of 64 x 64, per multiprocessor
    times: dict[int, float]


def interval(value: int, limits: Sequence[int | None]) -> int:
    """Index of the first limit that is not below `value`."""
    return next(i for i, limit in enumerate(limits) if limit is None or value <= limit)


def fit(timings: Sequence[Timing], kind: str = "mma") -> list[tuple[int | None, int | None, int]]:
    """Rows (most columns, most blocks, tile) for tiles of a kind; None is no limit. Empty intervals
    join the next measured one, or else the one before."""
    rows: list[tuple[int | None, int | None, int]] = []
    limits = COLUMN_LIMITS[kind]
    for c, column_limit in enumerate(limits):
        own = [t for t in timings if interval(t.columns, limits) == c]
        best: list[int | None] = []
        for b in range(len(BLOCK_LIMITS)):
            here = [t for t in own if interval(t.blocks, BLOCK_LIMITS) == b]
            cost = {
                tile: sum(t.times[tile] / min(t.times.values()) for t in here)
                for tile in (here[0].times if here else ())
                if all(tile in t.times for t in here)
            }
            best.append(min(cost, key=lambda tile: cost[tile]) if cost else None)
        measured = [tile for tile in best if tile is not None]
        if not measured:
            continue
        for b in reversed(range(len(best))):
            if best[b] is None:
                best[b] = best[b + 1] if b + 1 < len(best) else measured[-1]
        for b, tile in enumerate(best):
            if b + 1 == len(best) or best[b + 1] != tile:
                rows.append((column_limit, BLOCK_LIMITS[b], tile))
    return rows


def table_text(rows: Sequence[tuple[int | None, int | None, int]]) -> str:
    """The rows as C++."""
    lines = []
    for columns, blocks, tile in rows:
        most_columns = "INT32_MAX" if columns is None else str(columns)
        most_blocks = "INT64_MAX" if blocks is None else str(blocks)
        lines.append(f"    {{{most_columns}, {most_blocks}, {tile}}},\n")
    return "".join(lines)


def rewrite(
    source: str, rows: Sequence[tuple[int | None, int | None, int]], kind: str = "mma"
) -> str:
    """`source` with the rows between the markers of a kind."""
    marked = re.compile(rf"(// <tuned {kind}>\n)(.*?)( *// </tuned {kind}>)", re.DOTALL)
    if not marked.search(source):
        raise ValueError(f"tune: the header must have a table <tuned {kind}>, got none")
    return marked.sub(lambda m: m[1] + table_text(rows) + m[3], source)


def num_tiles(source: str, name: str) -> int:
    """How many tiles the header lists under `name`."""
    body = re.search(rf"{name}\[\] = \{{(.*?)\}};", source, re.DOTALL)
    assert body is not None
    return len(re.findall(r"^ *\{[\d, ]+\},", body[1], re.MULTILINE))


def of_kind(timings: Sequence[Timing], kind: str) -> list[Timing]:
    """The timings of tiles of a kind alone, without shapes that have none."""
    first = num_tiles(HEADER.read_text(), "kConvTiles")
    kept = [
        replace(t, times={i: ms for i, ms in t.times.items() if (i >= first) == (kind == "wgmma")})
        for t in timings
    ]
    return [t for t in kept if t.times]


def measure_all() -> tuple[list[Timing], list[Timing]]:
    """Times of every tile for every shape of the models, in bfloat16 on the current GPU: of the
    products, and of the weight's gradient."""
    import torch
    from conv_shapes import PROMAG_SHAPES, vidtok_shapes
    from harness import Timer

    import vtok_ext as vt
    from vtok_ext import _native
    from vtok_ext.ops import _causal_conv3d_cuda as cuda

    timer = Timer("cuda")
    properties = torch.cuda.get_device_properties(0)
    header = HEADER.read_text()
    is_hopper = (properties.major, properties.minor) == (9, 0)
    counts = {
        kind: num_tiles(header, f"kConv{kind}Tiles")
        + (num_tiles(header, f"kConv{kind}WarpgroupTiles") if is_hopper else 0)
        for kind in ("", "Gradient")
    }

    def median(call) -> float:
        return sorted([timer.once(call) for _ in range(8)][3:])[2]

    def report(name: str, times: dict[int, float], flops: int) -> None:
        rate = flops / min(times.values()) / 1e9
        print(f"{name}: " + ", ".join(f"{k} {v:.3f} ms" for k, v in times.items()), end="")
        print(f"; {rate:.0f} TFLOP/s")

    products, gradients = [], []
    shapes = {*vidtok_shapes(128), *vidtok_shapes(256), *PROMAG_SHAPES}
    for shape in sorted(shapes, key=lambda s: s.flops):
        size = (1, shape.channels, shape.frames + shape.front, shape.height, shape.width)
        x = torch.randn(size, device="cuda", dtype=torch.bfloat16)
        x = x.contiguous(memory_format=torch.channels_last_3d)
        weight = torch.randn(shape.columns, shape.channels, *shape.kernel, device="cuda")
        weight = weight.bfloat16().contiguous(memory_format=torch.channels_last_3d)
        options = {"stride": shape.stride, "temporal": "valid"}
        options["spatial_padding"] = shape.spatial_padding
        convolve = partial(vt.causal_conv3d, x, weight, **options)
        with torch.no_grad():
            result = convolve()
        flops = 2 * weight.numel() * result.numel() // result.shape[1]
        cuda.forced_splits, times = 1, {}
        for cuda.forced_tile in range(counts[""]):
            with torch.no_grad():
                times[cuda.forced_tile] = median(convolve)
        cuda.forced_tile = cuda.forced_splits = None
        rows, columns = -(-result.numel() // result.shape[1] // 64), -(-shape.columns // 64)
        blocks = rows * columns // properties.multi_processor_count
        products.append(Timing(shape.columns, blocks, times))
        report(shape.name, times, flops)

        plan, module, times = cuda._weight_gradient_plan, _native.module(), {}
        positions = result.numel() // result.shape[1]
        depth = weight.numel() // shape.columns
        product = (positions, shape.columns, 1, depth)
        for tile in range(counts["Gradient"]):
            splits = module.causal_conv3d_weight_gradient_splits(*product, tile, 0)
            cuda._weight_gradient_plan = lambda *_, tile=tile, splits=splits: (tile, splits)
            leaf = weight.detach().requires_grad_()
            y = vt.causal_conv3d(x, leaf, **options)
            times[tile] = median(partial(torch.autograd.grad, y, leaf, result, retain_graph=True))
        cuda._weight_gradient_plan = plan
        gradients.append(Timing(shape.columns, positions, times))
        report("  weight gradient", times, flops)
    return products, gradients


def main() -> int:
    """Measures, prints and, where asked to, writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="rewrite the header")
    parser.add_argument("--save", type=Path, help="where to keep the times, as JSON")
    parser.add_argument("--load", type=Path, help="times to use in place of measuring")
    arguments = parser.parse_args()
    if arguments.load is None:
        timings, gradients = measure_all()
    else:
        found = json.loads(arguments.load.read_text())
        timings, gradients = (
            [
                Timing(t["columns"], t["blocks"], {int(k): v for k, v in t["times"].items()})
                for t in part
            ]
            for part in (found["products"], found["gradients"])
        )
    if arguments.save is not None:
        parts = {"products": timings, "gradients": gradients}
        text = json.dumps({k: [asdict(t) for t in part] for k, part in parts.items()}, indent=1)
        arguments.save.write_text(text + "\n")
    for kind in COLUMN_LIMITS:
        rows = fit(of_kind(timings, kind), kind)
        print(f"{kind}:\n{table_text(rows)}", end="")
        if arguments.write and rows:
            HEADER.write_text(rewrite(HEADER.read_text(), rows, kind))
    return 0


if __name__ == "__main__":
    sys.exit(main())
