"""`vtok convert`: a model in any form that can be read becomes a folder, ours or of diffusers.

A generator is told by `name`, one of `vt.list_generators()`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vtok_ext.data.atomic_output import check_output_folder, output_folder

from .console import Console
from .model_source import given_statistics
from .options import refuse_options

_WEIGHTS = ("model.safetensors", "diffusion_pytorch_model.safetensors")
FORMATS = ("vtok", "diffusers")


def run_convert(
    *,
    source: str,
    out: Path,
    to: str,
    name: str | None,
    overrides: dict[str, Any],
    ema: bool,
    statistics: Path | None,
    statistics_order: str | None,
    trust_checkpoint: bool,
    as_json: bool,
) -> None:
    """Returns None after writing the model; the folder appears complete or not at all."""
    import vtok_ext as vt
    from vtok_ext.models.vidtok import VidTok
    from vtok_ext.models.vidtok_diffusers import save_diffusers

    if to not in FORMATS:
        raise ValueError(f"convert: --to must be one of {', '.join(FORMATS)}, got {to}")
    check_output_folder(out, _is_model_folder, "convert")
    if not Path(source).exists() and source in vt.list_models():
        raise ValueError(f"convert: source must have weights, got the name of a preset, {source}")
    console = Console(as_json)
    options: dict[str, Any] = {"trust_checkpoint": trust_checkpoint, **overrides}
    model: Any
    if name in vt.list_generators():  # with the moving averages in any case, as its sampler has
        found = given_statistics("convert", statistics, statistics_order)
        model = vt.load_generator(source, name, statistics=found, **options)
    else:
        given = {"--statistics": statistics, "--statistics-order": statistics_order}
        refuse_options("convert", "for a tokenizer", given)
        model = vt.load_model(source, name=name, ema=ema, **options)
    if to == "diffusers" and not isinstance(model, VidTok):
        raise ValueError(f"convert: a model for diffusers must be a VidTok, got {model.name}")
    with output_folder(out, replaceable=_is_model_folder, op="convert") as partial:
        if to == "diffusers":
            save_diffusers(model, partial)
        else:
            model.save_pretrained(partial)
    report = {
        "source": source,
        "output": str(out),
        "format": to,
        "model": model.name,
        "model_id": getattr(model, "model_id", None),  # generators have none
        "version": model.reference_version,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    millions = report["parameters"] / 1e6
    line = f"{model.name}, version {model.reference_version}, {millions:.1f} M parameters"
    console.result(report, [line, f"wrote {out} ({to})"])


def _is_model_folder(folder: Path) -> bool:
    """Returns whether a folder holds nothing but a saved model."""
    from vtok_ext.models.latent_statistics import STATISTICS_NAME

    names = {path.name for path in folder.iterdir()}
    return "config.json" in names and names <= {"config.json", *_WEIGHTS, STATISTICS_NAME}
