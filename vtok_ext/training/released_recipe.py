"""VidTok's released YAML files as recipes: their losses, optimiser, precision and clips.

The network is read from the file by `create_model`; what else decides a training is translated
here. Counts of optimiser steps become batches (two of them per batch). Nothing in the file is
executed, `target:` names are not imported. What the file leaves open is taken from the paper: the
end of the training (`max_epochs: 1000` of a data set of unknown size) becomes 50,000 batches. Paths
and sizes are placeholders in the released files and replaced like any value, by `data.folder=...`.

Source: microsoft/VidTok, configs/ of releases 1.0 and 1.1; specification sections 7 to 9.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vtok_ext.models._config import closest
from vtok_ext.training.losses import batches_of_global_steps

_PUBLISHED_BATCHES = 50_000
_LOSS = "vidtok.modules.losses.GeneralLPIPSWithDiscriminator"
# Names of the loss, theirs and ours.
_LOSS_FIELDS = {
    "perceptual_weight": "perceptual_weight",
    "disc_weight": "discriminator_weight",
    "disc_type": "discriminator",
    "disc_loss": "discriminator_loss",
    "learn_logvar": "learn_logvar",
    "logvar_init": "logvar",
    "gen_loss_cross_entropy": "generator_cross_entropy",
    "lecam_loss_weight": "lecam_weight",
}
_LOSS_FIXED = {"dims": 3, "disc_factor": 1.0, "disc_num_layers": 3, "disc_in_channels": 3}
# Not used by the published loss.
_LOSS_UNUSED = ("pixelloss_weight", "pixel_weight")
_PRECISIONS = {
    "bf16-mixed": "bfloat16",
    "16-mixed": "float16",
    "32": "float32",
    "32-true": "float32",
}
# Names of the clips, theirs and ours.
_CLIP_FIELDS = {
    "input_height": "height",
    "input_width": "width",
    "sample_num_frames": "num_frames",
}


def is_released(values: Mapping[str, Any]) -> bool:
    """Returns whether the content of a YAML file is that of a released one."""
    model = values.get("model")
    return isinstance(model, Mapping) and "target" in model


def released_recipe(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Returns the values of a recipe.

    Args:
        values: content of the file.
        path: of the file.

    Raises:
        ValueError: an option of the loss or of the trainer that has no counterpart here.
    """
    model = values["model"]
    params = _section(model, "params")
    network = _section(params, "encoder_config", "params")
    if network.get("fix_decoder"):
        raise _error("fix_decoder", "false, nothing can be trained then", True)
    if params.get("ckpt_path"):
        raise _error(
            "model.params.ckpt_path",
            "absent: model.name=null model.weights=FOLDER trains on what vtok convert made of it",
            params["ckpt_path"],
        )
    trainer = _section(values, "lightning", "trainer")
    lr = float(model.get("base_learning_rate", 1e-5))
    return {
        "task": "tokenizer",
        "model": {
            "name": str(path),
            "freeze": ["encoder"] if network.get("fix_encoder") else [],
        },
        "loss": _loss(params),
        "optimizer": {
            "lr": lr * float(params.get("lr_g_factor", 1.0)),
            "discriminator_lr": lr,
            "ema_decay": params.get("ema_decay"),
        },
        "data": _data(values),
        "run": {
            **_run(values, trainer),
            "checkpoint_activations": bool(network.get("use_checkpoint", False)),
            "compile": bool(params.get("compile_model", False)),
        },
    }


def require_clips(recipe: Mapping[str, Any], path: Path, overrides: Sequence[str]) -> None:
    """Returns None unless a released file names no clips: others would be made up instead.

    Args:
        recipe: of `released_recipe`.
        path: of the file.
        overrides: "data.folder=..." names clips too, and null asks for procedural ones.

    Raises:
        ValueError: neither the file nor an override names clips.
    """
    if not recipe["data"]["folder"] and not any(o.startswith("data.folder=") for o in overrides):
        raise ValueError(
            f"recipe: {path} must have data.params.train.params.meta_path or data_dir, or "
            "data.folder=... be given, got neither"
        )


def _loss(params: Mapping[str, Any]) -> dict[str, Any]:
    config = _section(params, "loss_config")
    if config.get("target", _LOSS) != _LOSS:
        raise _error("loss_config.target", _LOSS, config["target"])
    fields: dict[str, Any] = {}
    known = [*_LOSS_FIELDS, *_LOSS_FIXED, *_LOSS_UNUSED, "disc_start", "regularization_weights"]
    for name, value in _section(config, "params").items():
        if name in _LOSS_FIELDS:
            fields[_LOSS_FIELDS[name]] = value
        elif name == "disc_start":
            fields["discriminator_start"] = batches_of_global_steps(int(value))
        elif name == "regularization_weights":
            fields |= {term.replace("_loss", "_weight"): weight for term, weight in value.items()}
        elif name in _LOSS_FIXED and value != _LOSS_FIXED[name]:
            raise _error(f"loss_config.params.{name}", str(_LOSS_FIXED[name]), value)
        elif name not in known:
            raise ValueError(
                f"recipe: loss_config.params must be among {', '.join(known)}, "
                f"got {name!r}{closest(name, known)}"
            )
    return fields


def _data(values: Mapping[str, Any]) -> dict[str, Any]:
    params = _section(values, "data", "params")
    parts = [_section(params, part, "params") for part in ("train", "validation")]
    train, held_out = parts
    clips = _section(train, "video_params")
    found = {_CLIP_FIELDS[name]: value for name, value in clips.items() if name in _CLIP_FIELDS}
    # A list of videos lies in `meta_path`, its paths begin in `data_dir`; each part has its own.
    roots = [p.get("data_dir") if p.get("meta_path") else None for p in parts]
    rate, held_out_rate = (_section(p, "video_params").get("sample_fps") for p in (train, held_out))
    size = [_section(held_out, "video_params").get(f"input_{side}") for side in ("height", "width")]
    return {
        **found,
        "folder": train.get("meta_path") or train.get("data_dir"),
        "root": roots[0],
        "fps": [] if rate is None else [float(rate)],
        "sampling": "timestamps" if rate is None else "reference",
        "fraction": float(train.get("data_frac", 1.0)),
        "validation_folder": held_out.get("meta_path") or held_out.get("data_dir"),
        "validation_root": roots[1],
        # Placeholders left as they are mean the size of the training clips.
        "validation_size": size if all(isinstance(side, int) for side in size) else [],
        "validation_fps": None if held_out_rate is None else float(held_out_rate),
        "num_workers": params.get("num_workers", 0),
    }


def _run(values: Mapping[str, Any], trainer: Mapping[str, Any]) -> dict[str, Any]:
    precision = str(trainer.get("precision", "32"))
    if precision not in _PRECISIONS:
        raise _error("lightning.trainer.precision", f"one of {', '.join(_PRECISIONS)}", precision)
    # Lightning counts the steps of both optimisers, except for validation.
    saving = _section(values, "lightning", "modelcheckpoint", "params")
    shown = _section(values, "lightning", "callbacks", "image_logger", "params")
    steps = int(trainer.get("max_steps", -1))
    return {
        "steps": batches_of_global_steps(steps) if steps > 0 else _PUBLISHED_BATCHES,
        "batch_size": _section(values, "data", "params").get("batch_size", 1),
        "accumulate": trainer.get("accumulate_grad_batches", 1),
        "precision": _PRECISIONS[precision],
        "validate_every": trainer.get("val_check_interval", 2000),
        "checkpoint_every": batches_of_global_steps(saving.get("every_n_train_steps", 5000)),
        "sample_every": 0 if shown.get("disabled") else shown.get("batch_frequency", 0),
        "sample_clips": shown.get("max_samples", 2),
    }


def _section(values: Any, *names: str) -> Mapping[str, Any]:
    """Returns a section of a section, empty where there is none."""
    for name in names:
        values = values.get(name, {}) if isinstance(values, Mapping) else {}
    return values if isinstance(values, Mapping) else {}


def _error(name: str, requirement: str, value: Any) -> ValueError:
    return ValueError(f"recipe: {name} must be {requirement}, got {value!r}")
