"""Measures every tile of the CUDA convolution on the models' shapes and fits the table of choices.

python bench/tune_causal_conv3d.py            print the table that this GPU asks for
python bench/tune_causal_conv3d.py --write    put it into csrc/causal_conv3d/causal_conv3d_tiles.h

A row of the table holds up to a number of output channels and of 64 x 64 blocks per multiprocessor.
Between two limits the tile with the least summed time counts, each shape relative to its own best.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HEADER = Path(__file__).parent.parent / "csrc" / "causal_conv3d" / "causal_conv3d_tiles.h"
MARKED = re.compile(r"(// <tuned>\n)(.*?)( *// </tuned>)", re.DOTALL)
COLUMN_LIMITS = (16, 64, None)
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


def fit(timings: Sequence[Timing]) -> list[tuple[int | None, int | None, int]]:
    """Rows (most columns, most blocks, tile); None is no limit. Empty intervals join the next
    measured one, or else the one before."""
    rows: list[tuple[int | None, int | None, int]] = []
    for c, column_limit in enumerate(COLUMN_LIMITS):
        own = [t for t in timings if interval(t.columns, COLUMN_LIMITS) == c]
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


def rewrite(source: str, rows: Sequence[tuple[int | None, int | None, int]]) -> str:
    """`source` with the rows between its markers."""
    if not MARKED.search(source):
        raise ValueError("tune: the header must have lines between <tuned> and </tuned>, got none")
    return MARKED.sub(lambda m: m[1] + table_text(rows) + m[3], source)


def num_tiles(source: str) -> int:
    """How many tiles the header lists."""
    body = re.search(r"kConvTiles\[\] = \{(.*?)\};", source, re.DOTALL)
    assert body is not None
    return len(re.findall(r"^ *\{[\d, ]+\},", body[1], re.MULTILINE))


def measure_all() -> list[Timing]:
    """Times of every tile for every shape of the models, in bfloat16 on the current GPU."""
    import torch
    from conv_shapes import PROMAG_SHAPES, vidtok_shapes
    from harness import Timer

    import vtok_ext as vt
    from vtok_ext.ops import _causal_conv3d_cuda as cuda

    timer = Timer("cuda")
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    timings = []
    shapes = {*vidtok_shapes(128), *vidtok_shapes(256), *PROMAG_SHAPES}
    tiles = range(num_tiles(HEADER.read_text()))
    for shape in sorted(shapes, key=lambda s: s.flops):
        size = (1, shape.channels, shape.frames + shape.front, shape.height, shape.width)
        x = torch.randn(size, device="cuda", dtype=torch.bfloat16)
        x = x.contiguous(memory_format=torch.channels_last_3d)
        weight = torch.randn(shape.columns, shape.channels, *shape.kernel, device="cuda")
        weight = weight.bfloat16().contiguous(memory_format=torch.channels_last_3d)
        options = {"stride": shape.stride, "temporal": "valid"}
        options["spatial_padding"] = shape.spatial_padding
        times = {}
        cuda.forced_splits = 1
        for tile in tiles:
            cuda.forced_tile = tile
            with torch.no_grad():
                values = [
                    timer.once(lambda: vt.causal_conv3d(x, weight, **options))  # noqa: B023
                    for _ in range(8)
                ]
            times[tile] = sorted(values[3:])[2]
        t, h, w = shape.output
        blocks = -(-t * h * w // 64) * -(-shape.columns // 64) // multiprocessors
        timings.append(Timing(shape.columns, blocks, times))
        print(f"{shape.name}: " + ", ".join(f"{k} {v:.3f} ms" for k, v in times.items()))
    return timings


def main() -> int:
    """Measures, prints and, where asked to, writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="rewrite the header")
    arguments = parser.parse_args()
    rows = fit(measure_all())
    print(table_text(rows), end="")
    if arguments.write:
        HEADER.write_text(rewrite(HEADER.read_text(), rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
