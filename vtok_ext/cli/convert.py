"""`vtok convert`: a model in any form that can be read becomes a folder, ours or of diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vtok_ext.data.atomic_output import check_output_folder, output_folder

from .console import Console

_WEIGHTS = ("model.safetensors", "diffusion_pytorch_model.safetensors")
FORMATS = ("vtok", "diffusers")


def run_convert(
    *,
    source: str,
    out: Path,
    to: str,
    name: str | None,
    ema: bool,
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
    model: Any = vt.load_model(source, name=name, ema=ema, trust_checkpoint=trust_checkpoint)
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
        "model_id": model.model_id,
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
