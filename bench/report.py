"""Writes the benchmark tables of README.md and bench/RESULTS.md from the JSON under bench/results.

python bench/report.py           rewrite the tables between the <!-- bench:NAME --> markers
python bench/report.py --check   exit 1 when they are not what the JSON says

NAME is a benchmark, for all its cases, or "summary", for a line per op and direction.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / page for page in ("README.md", "bench/RESULTS.md", "docs/diffusers.md", "docs/vtok.md")
]
RESULTS = ROOT / "bench" / "results"
BLOCK = re.compile(r"(<!-- bench:(\w+) -->\n).*?(<!-- /bench -->)", re.DOTALL)
# What users run today. A convolution has no "eager": the best of its two forms stands for it.
EAGER = ("eager", "pad + conv, contiguous", "pad + conv, channels last")
BASELINES = (
    *EAGER,
    "eager in place",
    "compiled",
    "vector-quantize-pytorch",
    "diffusers",
    "gemm",
)
MODEL_BASELINES = (
    "diffusers",
    "diffusers, compiled",
    "reference",
    "reference, attention written out",
    "native, compiled",
)
NO_GPU = "GPU: not measured yet."
# JSON of other forms than cases, which no table of an op shows.
MODELS = {"models", "models_256", "coordtok"}
CONVOLUTIONS = {"causal_conv3d", "causal_conv3d_256"}
NOT_OPS = {"causal_conv3d_256", "threads", "systems", "conv_tile_times", "max_batch", *MODELS}


def load(name: str) -> list[dict]:
    """Results of every device for one benchmark, CPUs first."""
    paths = sorted(
        RESULTS.glob(f"*/{name}.json"), key=lambda p: (not p.parent.name.startswith("cpu"), p)
    )
    return [json.loads(path.read_text()) for path in paths]


def times(case: dict) -> dict[tuple[str, str], dict]:
    """Measurements of a case by (provider, allocation)."""
    return {(m["provider"], m["allocation"]): m for m in case["measurements"]}


def row(case: dict) -> str:
    """One line of a table: times of the native op and how many times faster it is than each
    baseline."""
    by_name = times(case)
    cells = []
    for allocation in ("preallocated", "tuned", "default"):
        native = by_name.get(("native", allocation))
        found = False
        for baseline in BASELINES:
            other = by_name.get((baseline, allocation))
            if native and other:
                cells.append(f"{other['median_ms'] / native['median_ms']:.1f}x {baseline}")
                found = True
        if found:
            cells[-1] += f" ({allocation})"
    native = by_name.get(("native", "preallocated")) or by_name["native", "default"]
    start = f"| {case['direction']} | {case['shape']} | {case['dtype']} "
    end = f"| {native['median_ms']:.3f} ms | {'; '.join(cells)} | {native['floor_fraction']:.0%} |"
    if not case.get("gflop"):
        return start + end
    memory = "" if native["peak_mb"] is None else f"{native['peak_mb']:.0f} MB"
    return f"{start}{end} {case['gflop'] / native['median_ms']:.2f} | {memory} |"


def source(result: dict) -> str:
    """Where and with what a result was measured."""
    e = result["environment"]
    text = f"{machine(result)}, commit {e['commit']}, {e['date']}"
    return f"{text}, {result['source']}" if "source" in result else text


def machine(result: dict) -> str:
    """The device, and what its kernels were chosen or built for."""
    e = result["environment"]
    kernels = f"CUDA {e['cuda']}" if is_gpu(result) else e["cpu_isa"]
    return f"{e['device']} ({kernels}), torch {e['torch']}"


def is_gpu(result: dict) -> bool:
    """Whether a result was measured on a GPU."""
    return not result["environment"]["device"].startswith("cpu")


def model_rows(case: dict) -> list[str]:
    """A line per allocator: the native model's time and memory, and what others take of both."""
    rows = []
    by_name = times(case)
    for allocation in ("default", "tuned"):
        native = by_name.get(("native", allocation))
        if native is None:
            continue
        frames, cells, peaks = native["num_frames"], [], []
        for name in MODEL_BASELINES:
            other = by_name.get((name, allocation))
            if other is None:
                continue
            returned = other["num_frames"]
            cell = f"{other['median_ms'] / native['median_ms']:.2f}x {name}"
            if returned != frames and case["direction"] != "encode":
                per_frame = other["median_ms"] / returned / (native["median_ms"] / frames)
                cell += f" ({returned} of {frames} frames; {per_frame:.2f}x per frame)"
            cells.append(cell)
            if native["peak_mb"] is not None and other["peak_mb"]:
                peaks.append(f"{native['peak_mb'] / other['peak_mb']:.0%} of {name}")
        memory = "" if native["peak_mb"] is None else f"{native['peak_mb'] / 1024:.2f} GB: "
        rows.append(
            f"| {case['direction']} | {case['shape']} | {case['dtype']} | {allocation} "
            f"| {native['median_ms'] / 1e3:.2f} s | {'; '.join(cells)} "
            f"| {memory}{', '.join(peaks)} "
            f"| {native['floor_fraction']:.0%} |"
        )
    return rows


def table(name: str) -> str:
    """The Markdown of one benchmark."""
    lines = []
    results = load(name)
    for result in results:
        head = ["direction", "shape", "dtype", "native", "faster than", "of copy speed"]
        is_models = name in MODELS
        rows = [row(case) for case in result["cases"] if not is_models]
        if is_models:
            head[3:] = ["allocator", *head[3:5], "peak memory", "of the arithmetic limit"]
            rows = [line for case in result["cases"] for line in model_rows(case)]
        elif name in CONVOLUTIONS:
            head[5:] = ["of the limit", "TFLOP/s", "peak memory"]
        lines += [
            f"{source(result)}:",
            "",
            f"| {' | '.join(head)} |",
            "|---" * len(head) + "|",
            *rows,
            "",
            *(convolution_sums(result) if name in CONVOLUTIONS else []),
        ]
    if not any(is_gpu(r) for r in results):
        lines += [NO_GPU, ""]
    return "\n".join(lines)


def convolution_sums(result: dict) -> list[str]:
    """Lines with the sum over all convolutions of a network, each as often as it runs."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for case in result["cases"]:
        network = case["shape"].partition(":")[0]
        groups.setdefault((network, case["direction"]), []).append(case)
    lines = []
    for (network, direction), cases in groups.items():
        for allocation in ("default", "tuned"):
            ratio = ratios(cases, EAGER, allocation, digits=2)
            if ratio != "-":
                lines.append(
                    f"- {network}, {direction}, {allocation} allocator: {ratio} the best of both "
                    f"PyTorch forms of each shape ({len(cases)} shapes)."
                )
    return [*lines, ""]


def ratios(
    cases: Iterable[dict], baselines: tuple[str, ...], allocation: str, digits: int = 1
) -> str:
    """The fastest baseline's time over the native op's, least to most (summed, with `digits` behind
    the point below ten); "-" where no case has both."""
    found, theirs, ours = [], 0.0, 0.0
    for case in cases:
        by_name = times(case)
        others = [
            by_name[name, allocation]["median_ms"]
            for name in baselines
            if (name, allocation) in by_name
        ]
        native = by_name.get(("native", allocation))
        if native is None or not others:
            continue
        found.append(min(others) / native["median_ms"])
        theirs += case.get("weight", 1) * min(others)
        ours += case.get("weight", 1) * native["median_ms"]
    if not found:
        return "-"
    least, most, summed = (
        f"{x:.{places}f}x" if x < 10 else f"{x:.0f}x"
        for x, places in ((min(found), 1), (max(found), 1), (theirs / ours, digits))
    )
    return f"{least} to {most} ({summed})" if len(found) > 1 else summed


def summary_rows(result: dict) -> list[str]:
    """A line per direction and dtype of one benchmark on one device."""
    groups: dict[tuple[str, str, str], list[dict]] = {}
    for case in result["cases"]:
        groups.setdefault((case["op"], case["direction"], case["dtype"]), []).append(case)
    rows = []
    for (op, direction, dtype), cases in groups.items():
        prepared = any(("native", "preallocated") in times(case) for case in cases)
        allocation = "preallocated" if prepared else "default"
        cells = [ratios(cases, EAGER, allocation), ratios(cases, ("compiled",), allocation)]
        default = ratios(cases, EAGER, "default") if prepared else cells[0]
        rows.append(f"| {op} | {direction} | {dtype} | {cells[0]} | {cells[1]} | {default} |")
    return rows


def summary() -> str:
    """One table for every device."""
    names = sorted({path.stem for path in RESULTS.glob("*/*.json")} - NOT_OPS - WHOLE_MODELS)
    by_device: dict[str, list[dict]] = {}
    without_gpu = []
    for name in names:
        results = load(name)
        if not any(map(is_gpu, results)):
            without_gpu.append(name)
        for result in results:
            by_device.setdefault(result["environment"]["device"], []).append(result)
    lines = []
    for results in sorted(by_device.values(), key=lambda results: is_gpu(results[0])):
        lines += [
            f"{machine(results[0])}:",
            "",
            "| op | direction | dtype | against eager | against torch.compile "
            "| against eager, default allocator |",
            "|---|---|---|---|---|---|",
            *(line for result in results for line in summary_rows(result)),
            "",
        ]
    if without_gpu:
        named = f"GPU: not measured yet: {', '.join(without_gpu)}."
        lines += [NO_GPU if without_gpu == names else named, ""]
    return "\n".join(lines)


def vae_table(name: str) -> str:
    """The Markdown of `bench_diffusers`: autoencoders as they are and patched."""
    lines = []
    results = load(name)
    for result in results:
        lines += [
            f"{source(result)}:",
            "",
            "| autoencoder | direction | diffusers | in channels last | patched | faster | "
            "peak memory | retained caches |",
            "|---|---|---|---|---|---|---|---|",
            *(vae_row(case) for case in result["cases"]),
            "",
        ]
    if not any(is_gpu(r) for r in results):
        lines += [NO_GPU, ""]
    return "\n".join(lines)


def vae_row(case: dict) -> str:
    """One line: times with the default allocator; the ratio with reused memory in brackets."""
    by_name = times(case)
    rows = [by_name[p, "default"] for p in ("diffusers", "diffusers, channels last", "native")]
    cells = [f"{row['median_ms']:.0f} ms" for row in rows]
    faster = f"{rows[0]['median_ms'] / rows[2]['median_ms']:.2f}x"
    if ("native", "preallocated") in by_name:
        reused = [by_name[p, "preallocated"]["median_ms"] for p in ("diffusers", "native")]
        faster += f" ({reused[0] / reused[1]:.2f}x)"
    memory = [
        " -> ".join("?" if row[key] is None else f"{row[key]:.0f}" for row in (rows[0], rows[2]))
        for key in ("peak_mb", "retained_mb")
    ]
    facts = " | ".join([*cells, faster, *(f"{m} MB" for m in memory)])
    return f"| {case['shape']} | {case['direction']} | {facts} |"


def seam_table(name: str) -> str:
    """The Markdown of `diffusers_seams.py`."""
    lines = []
    for result in load(name):
        lines += [
            f"{source(result)}, {result['clip']}, random weights:",
            "",
            "| autoencoder | borders | largest difference from the exact video | seam |",
            "|---|---|---|---|",
        ]
        for row in result["rows"]:
            seam = "none: the same video" if row["jump"] is None else f"{row['jump']:.2f}x"
            borders = f"every {row['frames']} frames"
            lines.append(f"| {row['name']} | {borders} | {row['difference']:.1e} | {seam} |")
        lines.append("")
    return "\n".join(lines)


def max_batch_table(name: str) -> str:
    """The Markdown of `vtok bench max-batch --json`: batches and what a clip takes, by length."""
    lines = []
    for path in sorted(RESULTS.glob(f"*/{name}.json")):
        result = json.loads(path.read_text())
        by_model: dict[str, list[dict]] = {}
        for row in result["rows"]:
            title = row["model"] + (", encoder recomputed" if row["recompute_encoder"] else "")
            by_model.setdefault(title, []).append(row)
        lengths = [row["frames"] for row in result["rows"][: len(next(iter(by_model.values())))]]
        head = ["model", *(f"{length} frames" for length in lengths)]
        head.append(f"{lengths[-1]} against {lengths[1]}")
        lines += [
            f"{result['memory_gib']:g} GiB, {result['precision']}, {result['size']}x"
            f"{result['size']}, operations as on {path.parent.name}, torch {result['torch']}; "
            + ("checked on a GPU:" if is_checked(result) else "predicted, not checked on a GPU:"),
            "",
            f"| {' | '.join(head)} |",
            "|---" * len(head) + "|",
            *(max_batch_row(title, rows) for title, rows in by_model.items()),
            "",
        ]
    return "\n".join(lines)


def is_checked(result: dict) -> bool:
    """Whether every prediction stands beside a peak measured on a GPU."""
    return all(row.get("measured_per_clip_gib") is not None for row in result["rows"])


def max_batch_row(title: str, rows: list[dict]) -> str:
    """One line: the largest batch, activations of a clip, and how these grow with the clip."""
    cells = []
    for row in rows:
        measured = row.get("measured_per_clip_gib")
        seen = "" if measured is None else f", measured {measured:.2f}"
        cells.append(f"{row['largest_batch']} ({row['per_clip_gib']:.2f} GiB{seen})")
    growth = rows[-1]["per_clip_gib"] / rows[1]["per_clip_gib"]
    return f"| {title} | {' | '.join(cells)} | {growth:.2f}x |"


# Columns of the table of systems.
SYSTEM_COLUMNS = {
    "million_parameters": "parameters, M",
    "tokens": "tokens",
    "bits": "bits",
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "boundary_jump": "boundary_jump",
    "encode_s": "encode, s",
    "decode_s": "decode, s",
    "peak_mb": "peak memory of coding above imports, MB",
}


def systems_table(name: str) -> str:
    """The Markdown of `bench/systems.py`, by device."""
    lines = []
    for path in sorted(RESULTS.glob(f"*/{name}.json")):
        result = json.loads(path.read_text())
        size = f"{result['size']}x{result['size']}"
        lines += [
            f"{path.parent.name}, torch {result['environment']['torch']}, means of "
            f"{result['clips']} clips of {result['frames']} frames of {size}:",
            "",
            systems_rows(result["rows"]),
            "",
        ]
    return "\n".join(lines)


def systems_rows(rows: list[dict]) -> str:
    """One line per system."""
    head = ["system", *SYSTEM_COLUMNS.values()]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [f"{row[key]:,.4g}" if key in row else "-" for key in SYSTEM_COLUMNS]
        lines.append(f"| {row['system']} | {' | '.join(cells)} |")
    return "\n".join(lines)


# Benchmarks with a form of their own; "_real" is the same at published widths.
WHOLE_MODELS = {"diffusers", "diffusers_real", "diffusers_seams"}


def block(name: str) -> str:
    """The Markdown between the markers of `name`."""
    if name == "summary":
        return summary()
    if name == "diffusers_seams":
        return seam_table(name)
    if name == "max_batch":
        return max_batch_table(name)
    if name == "systems":
        return systems_table(name)
    return vae_table(name) if name in WHOLE_MODELS else table(name)


def main() -> int:
    """Rewrites or checks the pages."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 if out of date"
    )
    arguments = parser.parse_args()
    status = 0
    for page in PAGES:
        before = page.read_text()
        after = BLOCK.sub(lambda m: m[1] + block(m[2]) + m[3], before)
        if not arguments.check:
            page.write_text(after)
        elif before != after:
            where = page.relative_to(ROOT)
            print(f"{where}: tables differ from bench/results; run python bench/report.py")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
