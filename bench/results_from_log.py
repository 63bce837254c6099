"""Turns what benchmarks printed into JSON of the form that they write, for a run that was cut off.

python bench/results_from_log.py LOG... --device nvidia-h200 --torch 2.11.0+cu130 --cuda 13.0 \\
    --commit e7c5da4 --date 2026-11-29 [--vtok-ext 0.1.0] [--threads 16] [--cpu-isa avx512] \\
    [--out bench/results]

Writes OUT/<device>/<benchmark>.json. A case counts when pytest printed the dot of a test that
passed behind it. Numbers are as exact as their printed form. What a log does not hold is null: peak
memory and the rate of the fastest product. `bytes_moved` is GB/s times the median of the row where
the two are rounded least; how often a model runs a convolution, and its arithmetic, are read off
its label.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

SOURCE = "log of a run that its time limit cut off"
HEADER = re.compile(
    r"(?P<op>\w+) (?P<direction>[^,]+(?:, \d+ frames in front)?), (?P<shape>.+), (?P<dtype>\w+)"
)
ROW = re.compile(
    r"  (?P<provider>\S.*?)\s*(?P<allocation>preallocated|default|tuned)\s+(?P<median>[\d.]+) ms "
    r"\[(?P<p20>[\d.]+), (?P<p80>[\d.]+)\]\s*(?P<rate>[\d.]+) GB/s\s*(?P<share>\d+)% of the limit"
)
# As conftest.py prints them.
MS_STEP, GB_STEP = 0.001, 0.1
# "9 x 128->128 20x256x256 k1x3x3, 386.5 GFLOP", see bench_causal_conv3d.py.
LABEL = re.compile(r": (?P<count>\d+) x .*?(?P<folded> after 2x \w+)?, (?P<gflop>[\d.]+) GFLOP$")
# Of the label's arithmetic, what is left when taps on equal values are added up.
FOLDED = {None: 1.0, " after 2x time": 2 / 3, " after 2x space": 4 / 9}
FILE_NAMES = {"fsq_entropy_loss": "fsq_entropy"}  # where the benchmark is not called as its op


def read_cases(text: str) -> list[dict[str, Any]]:
    """Returns the cases of a log, in its order, without those of tests that did not pass."""
    cases: list[dict[str, Any]] = []
    pending: list[dict[str, Any]] = []
    for line in text.splitlines():
        row, header = ROW.fullmatch(line), HEADER.fullmatch(line)
        if row and pending:
            pending[-1]["measurements"].append(measurement(row))
        elif header and not line.startswith(" "):
            pending.append(empty_case(header))
        elif line.startswith("."):  # pytest: the test passed
            cases += [finished(case) for case in pending if case["measurements"]]
            pending = []
        elif line.strip():  # a failure's letter, or half a line
            pending = []
    return cases


def empty_case(header: re.Match[str]) -> dict[str, Any]:
    """Returns the case of a title, with the fields of `harness.Case`."""
    label = LABEL.search(header["shape"])
    return {
        "op": header["op"],
        "shape": header["shape"],
        "dtype": header["dtype"],
        "direction": header["direction"],
        "bytes_moved": None,
        "weight": int(label["count"]) if label else 1,
        "measurements": [],
        "gflop": float(label["gflop"]) * FOLDED[label["folded"]] if label else 0.0,
        "achievable_gflop_per_s": None if label else 0.0,
    }


def measurement(row: re.Match[str]) -> dict[str, Any]:
    """Returns one provider, with the fields of `harness.Measurement`."""
    return {
        "provider": row["provider"],
        "allocation": row["allocation"],
        "median_ms": float(row["median"]),
        "p20_ms": float(row["p20"]),
        "p80_ms": float(row["p80"]),
        "gb_per_s": float(row["rate"]),
        "floor_fraction": int(row["share"]) / 100,
        "peak_mb": None,
        "retained_mb": None,
        "num_frames": None,
        "error": None,
    }


def finished(case: dict[str, Any]) -> dict[str, Any]:
    """Returns the case with `bytes_moved`, null where every row is rounded to 0."""
    rows = [m for m in case["measurements"] if m["median_ms"] > 0 and m["gb_per_s"] > 0]
    if rows:
        best = min(rows, key=lambda m: MS_STEP / m["median_ms"] + GB_STEP / m["gb_per_s"])
        case["bytes_moved"] = round(best["median_ms"] * best["gb_per_s"] * 1e6)
    return case


def results(cases: Iterable[dict[str, Any]], environment: dict[str, Any]) -> dict[str, Any]:
    """Returns the JSON of every benchmark by its file's name."""
    found: dict[str, Any] = {}
    for case in cases:
        name = FILE_NAMES.get(case["op"], case["op"])
        empty = {"environment": environment, "source": SOURCE, "cases": []}
        found.setdefault(name, empty)["cases"].append(case)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the logs and writes the files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("logs", nargs="+", type=Path)
    for name in ("device", "torch", "commit", "date"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("cuda", "vtok-ext", "cpu-isa"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = vars(parser.parse_args(arguments))
    logs, out = options.pop("logs"), options.pop("out")
    names = ("device", "threads", "torch", "vtok_ext", "cpu_isa", "cuda", "commit", "date")
    environment = {name: options[name] for name in names}
    cases = [case for log in logs for case in read_cases(log.read_text())]
    folder = out / environment["device"]
    folder.mkdir(parents=True, exist_ok=True)
    for name, result in results(cases, environment).items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {path}: {len(result['cases'])} cases")


if __name__ == "__main__":
    main()
