"""`vtok doctor`: what this installation can use, and the reason where something cannot be used."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

from .console import Console
from .conv3d_advice import conv3d_state
from .cuda_use import cuda_obstacle

# One process with two OpenMP runtimes oversubscribes the cores and may deadlock after fork.
_OPENMP_LIBRARY = re.compile(r"/(lib(?:gomp|iomp5|omp)[^/]*\.so[^/]*)$")
_VIDEO_CODECS = ("libx264", "mpeg4", "h264", "hevc", "vp9", "libdav1d")


def run_doctor(*, as_json: bool) -> None:
    """Returns None after printing the report."""
    report = examine()
    Console(as_json).result(report, _lines(report))


def examine() -> dict[str, Any]:
    """Returns the report as nested plain values, ready for JSON."""
    import vtok_ext

    build = vtok_ext.build_info()
    openmp = loaded_openmp_runtimes()
    report = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": {
            "version": torch.__version__,
            "threads": torch.get_num_threads(),
            "cpu_isa": torch.backends.cpu.get_cpu_capability(),
            "cpus_usable": _usable_cpus(),
        },
        "vtok_ext": {"version": getattr(vtok_ext, "__version__", "unknown"), "build": build},
        "cuda": _cuda_state(),
        "conv3d": conv3d_state(),
        "openmp_runtimes": openmp,
        "video": _video_state(),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("VTOK_")},
    }
    report["warnings"] = _warnings(report)
    return report


def loaded_openmp_runtimes(maps: str | None = None) -> list[str]:
    """Returns the paths of the OpenMP runtimes mapped into this process, without duplicates.

    Args:
        maps: text in the format of /proc/self/maps; None reads that file (empty list where the
            system has none).
    """
    if maps is None:
        try:
            maps = Path("/proc/self/maps").read_text()
        except OSError:
            return []
    found: dict[tuple[str, str], str] = {}
    for line in maps.splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and _OPENMP_LIBRARY.search(fields[5]):
            found[fields[3], fields[4]] = fields[5]  # device and inode: links count once
    return sorted(found.values())


def _usable_cpus() -> int:
    """Returns the number of CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cuda_state() -> dict[str, Any]:
    """Returns torch's view of CUDA: usable, the devices, or the reason against it.

    `obstacles` says why the kernels of this package cannot run on devices that torch can use.
    """
    state: dict[str, Any] = {
        "usable": False,
        "torch_cuda": torch.version.cuda,
        "devices": [],
        "obstacles": [],
    }
    if torch.version.cuda is None:
        state["reason"] = "this torch is a CPU build"
        return state
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        state["reason"] = " ".join(str(error).split())
        return state
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        state["devices"].append(
            {
                "name": properties.name,
                "compute_capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
        )
        obstacle = cuda_obstacle(i)
        if obstacle is not None and obstacle not in state["obstacles"]:
            state["obstacles"].append(obstacle)
    state["usable"] = bool(state["devices"])
    if not state["usable"]:
        state["reason"] = "no CUDA device is visible"
    return state


def _video_state() -> dict[str, Any]:
    """Returns PyAV's version and which codecs its FFmpeg has."""
    try:
        import av
    except ImportError as error:
        return {"usable": False, "reason": str(error)}
    return {
        "usable": True,
        "pyav": av.__version__,
        "ffmpeg": {
            name: ".".join(map(str, version)) for name, version in av.library_versions.items()
        },
        "codecs": {name: name in av.codecs_available for name in _VIDEO_CODECS},
    }


def _warnings(report: dict[str, Any]) -> list[str]:
    warnings = []
    openmp = report["openmp_runtimes"]
    if len(openmp) > 1:
        warnings.append(
            f"{len(openmp)} OpenMP runtimes are loaded, which compete for the same cores; "
            f"import torch before other packages: {', '.join(openmp)}"
        )
    warnings += [f"the GPU is not used: {line}" for line in report["cuda"]["obstacles"]]
    warnings += [f"torch.nn.Conv3d: {line}" for line in report["conv3d"]["known_of_torch_conv3d"]]
    video = report["video"]
    if not video["usable"]:
        warnings.append(f"video files cannot be read: {video['reason']}")
    elif not video["codecs"]["libx264"]:
        warnings.append("FFmpeg has no libx264: videos are written as MPEG-4 part 2")
    threads, cpus = report["torch"]["threads"], report["torch"]["cpus_usable"]
    if threads > cpus:
        warnings.append(f"torch uses {threads} threads on {cpus} usable CPUs")
    return warnings


def _lines(report: dict[str, Any]) -> list[str]:
    """Returns the report as aligned lines: one per value, nested names joined by dots."""
    rows: list[tuple[str, str]] = []

    def collect(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                collect(f"{prefix}.{key}" if prefix else str(key), inner)
        elif isinstance(value, list | tuple):
            rows.append((prefix, ", ".join(map(str, value)) or "none"))
        else:
            rows.append((prefix, str(value) if value != {} else "none"))

    warnings = report["warnings"]
    collect("", {key: value for key, value in report.items() if key != "warnings"})
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    return lines + [f"warning: {line}" for line in warnings]
