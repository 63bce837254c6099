"""Writes the benchmark tables of README.md from the JSON under bench/results.

python bench/report.py           rewrite the tables between the <!-- bench:NAME --> markers
python bench/report.py --check   exit 1 when they are not what the JSON says
"""

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"
BLOCK = re.compile(r"(<!-- bench:(\w+) -->\n).*?(<!-- /bench -->)", re.DOTALL)
BASELINES = ("eager", "eager in place", "compiled", "vector-quantize-pytorch")


def load(name: str) -> list[dict]:
    """Results of every device for one benchmark, CPUs first."""
    paths = sorted(
        RESULTS.glob(f"*/{name}.json"), key=lambda p: (not p.parent.name.startswith("cpu"), p)
    )
    return [json.loads(path.read_text()) for path in paths]


def row(case: dict) -> str:
    """One line of a table: times of the native op and how many times faster it is than each
    baseline."""
    by_name = {(m["provider"], m["allocation"]): m for m in case["measurements"]}
    cells = []
    for allocation in ("preallocated", "default"):
        native = by_name.get(("native", allocation))
        for baseline in BASELINES:
            other = by_name.get((baseline, allocation))
            if native and other:
                cells.append(f"{other['median_ms'] / native['median_ms']:.1f}x {baseline}")
        if native and cells:
            cells[-1] += f" ({allocation})"
    native = by_name.get(("native", "preallocated")) or by_name["native", "default"]
    return (
        f"| {case['direction']} | {case['shape']} | {case['dtype']} | {native['median_ms']:.3f} ms "
        f"| {'; '.join(cells)} | {native['floor_fraction']:.0%} |"
    )


def table(name: str) -> str:
    """The Markdown of one benchmark."""
    lines = []
    results = load(name)
    for result in results:
        e = result["environment"]
        lines += [
            f"{e['device']} ({e['cpu_isa']}), torch {e['torch']}, commit {e['commit']}, "
            f"{e['date']}:",
            "",
            "| direction | shape | dtype | native | faster than | of copy speed |",
            "|---|---|---|---|---|---|",
            *(row(case) for case in result["cases"]),
            "",
        ]
    if not any(not r["environment"]["device"].startswith("cpu") for r in results):
        lines += ["GPU: not measured yet.", ""]
    return "\n".join(lines)


def main() -> int:
    """Rewrites or checks the README."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 if out of date"
    )
    arguments = parser.parse_args()
    before = README.read_text()
    after = BLOCK.sub(lambda m: m[1] + table(m[2]) + m[3], before)
    if arguments.check:
        if before != after:
            print(
                "README.md: benchmark tables differ from bench/results; run python bench/report.py"
            )
        return int(before != after)
    README.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
