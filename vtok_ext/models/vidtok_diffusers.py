"""VidTok to and from diffusers' AutoencoderVidTok: names of tensors are the same, the rest differs.

    load_diffusers / save_diffusers   folders (config.json, diffusion_pytorch_model.safetensors)
    from_diffusers / to_diffusers     models in memory

That class always computes release 1.1 when causal and 1.0 otherwise, with LayerNorm and, for FSQ, 8
levels per channel; whatever else is refused, because its weights would load and give other videos.
Its `forward` extends a causal clip at the tail as `VidTok` does by default, but where T % f == 0 by
f frames more, so that there the last frames differ; without causality, to a multiple of 16 frames.
Its `encode` alone extends nothing: `encode(x)` there is `VidTok.encoder(x)`.
Source: diffusers 0.42.1, models/autoencoders/autoencoder_vidtok.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vtok_ext.models import _persistence
from vtok_ext.models._config import closest
from vtok_ext.models._optional import require
from vtok_ext.models.latent_statistics import read_statistics_file, write_statistics_file
from vtok_ext.models.vidtok import VidTok
from vtok_ext.models.vidtok_config import PRESETS, VidTokConfig

CLASS_NAME = "AutoencoderVidTok"
DIFFUSERS_VERSION = "0.42.1"  # the one whose class this file describes
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
_STEPS = ("spatial_ds", "spatial_us", "tempo_ds", "tempo_us")
# Fields of the class with their defaults, as far as they are not named like ours.
_DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "ch": 128,
    "ch_mult": (1, 2, 4, 4),
    "z_channels": 4,
    "double_z": True,
    "num_res_blocks": 2,
    **dict.fromkeys(_STEPS),
    "dropout": 0.0,
    "regularizer": "kl",
    "codebook_size": 262144,
    "is_causal": True,
}
_LEVELS = 8


def is_diffusers_folder(folder: str | os.PathLike) -> bool:
    """Returns whether `folder` holds a saved AutoencoderVidTok."""
    path = os.path.join(folder, _persistence.CONFIG_NAME)
    if not os.path.isfile(path) or os.path.getsize(path) > _persistence.MAX_CONFIG_BYTES:
        return False
    try:
        description = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(description, dict) and description.get("_class_name") == CLASS_NAME


def diffusers_config(folder: str | os.PathLike) -> VidTokConfig:
    """Returns the configuration of the AutoencoderVidTok saved in `folder`."""
    path = os.path.join(folder, _persistence.CONFIG_NAME)
    fields = json.loads(Path(path).read_text(encoding="utf-8"))
    return config_from_diffusers({k: v for k, v in fields.items() if not k.startswith("_")})


def load_diffusers(folder: str | os.PathLike) -> VidTok:
    """Returns the model of a folder that AutoencoderVidTok.save_pretrained wrote, in eval mode.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: another class, values that `VidTokConfig` cannot express, or other weights.
    """
    if not is_diffusers_folder(folder):
        raise ValueError(
            f"load_diffusers: folder must hold a saved {CLASS_NAME}, got {os.fspath(folder)!r}"
        )
    config = diffusers_config(folder)
    model = VidTok(config, _preset_name(config))
    weights_path = os.path.join(folder, WEIGHTS_NAME)
    weights = _persistence.read_safetensors(weights_path, "load_diffusers")
    _persistence.load_weights(model, weights, "load_diffusers")
    model.latent_statistics = read_statistics_file(folder, "load_diffusers")
    return model.eval()


def save_diffusers(model: VidTok, folder: str | os.PathLike) -> None:
    """Writes a folder that AutoencoderVidTok.from_pretrained reads, creating it.

    `latent_statistics`, which that class has no place for, are a file beside the weights.

    Raises:
        ValueError: a model that AutoencoderVidTok does not compute; see `config_to_diffusers`.
        OSError: writing failed.
    """
    from safetensors.torch import save_file

    description = {
        "_class_name": CLASS_NAME,
        "_diffusers_version": DIFFUSERS_VERSION,
        **config_to_diffusers(model.config),
    }
    weights = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    header = {"format": "pt", _persistence.VERSION_KEY: model.reference_version}
    os.makedirs(folder, exist_ok=True)
    with (
        _persistence.atomic_path(os.path.join(folder, _persistence.CONFIG_NAME)) as config_file,
        _persistence.atomic_path(os.path.join(folder, WEIGHTS_NAME)) as weights_file,
    ):
        Path(config_file).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        save_file(weights, weights_file, header)
    write_statistics_file(model.latent_statistics, folder)


def from_diffusers(vae: Any, *, share: bool = False) -> VidTok:
    """Returns a VidTok with the weights of an AutoencoderVidTok, in its mode and dtype.

    Args:
        vae: the model.
        share: have the very parameters of `vae` instead of copies.

    Raises:
        TypeError: another class.
        ValueError: values that `VidTokConfig` cannot express, or parameters of an adapter.
    """
    if type(vae).__name__ != CLASS_NAME:
        raise TypeError(f"from_diffusers: vae must be {CLASS_NAME}, got {type(vae).__name__}")
    fields = {k: v for k, v in dict(vae.config).items() if not k.startswith("_")}
    config = config_from_diffusers(fields)
    first = next(vae.parameters())
    model = VidTok(config, _preset_name(config)).to(first.device, first.dtype)
    _persistence.load_weights(model, vae.state_dict(), "from_diffusers")
    if share:
        model.load_state_dict(vae.state_dict(keep_vars=True), assign=True)
    return model.train(vae.training)


def to_diffusers(model: VidTok) -> Any:
    """Returns an AutoencoderVidTok with copies of the weights of `model`, in its mode and dtype.

    Raises:
        ImportError: diffusers, or its AutoencoderVidTok, is not installed, or not for this torch.
        ValueError: a model that AutoencoderVidTok does not compute.
    """
    fields = config_to_diffusers(model.config)
    diffusers = require("to_diffusers", "diffusers")
    if not hasattr(diffusers, CLASS_NAME):
        raise ImportError(
            f"to_diffusers: diffusers must be >= {DIFFUSERS_VERSION} (pip install "
            f"'vtok_ext[diffusers]'), got {diffusers.__version__} without {CLASS_NAME}"
        )
    first = next(model.parameters())
    vae = diffusers.AutoencoderVidTok(**fields).to(first.device)
    if first.dtype != torch.get_default_dtype():  # asking for the dtype it has makes it warn
        vae = vae.to(first.dtype)
    vae.load_state_dict(model.state_dict(), strict=True)
    return vae.train(model.training)


def config_to_diffusers(config: VidTokConfig) -> dict[str, Any]:
    """Returns the arguments of AutoencoderVidTok for `config`.

    Raises:
        ValueError: AutoencoderVidTok computes something else: causal models of version 1.0 (it
            precedes clips by copies of the first frame, not zeros), group norm, level counts other
            than 8, regularisers other than KL and FSQ, an ablated architecture.
    """
    wanted = {
        "version": "1.1" if config.causal else "1.0",
        "interpolation": "linear" if config.causal else "nearest",
        "norm_type": "layernorm",
        "architecture": "vidtok",
    }
    for name, value in wanted.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"config_to_diffusers: {name} must be {value!r}, all that {CLASS_NAME} computes "
                f"{'when causal' if config.causal else 'without causality'}, "
                f"got {getattr(config, name)!r}"
            )
    if config.regularizer not in ("kl", "fsq") or any(n != _LEVELS for n in config.levels):
        raise ValueError(
            f"config_to_diffusers: regularizer must be kl, or fsq with {_LEVELS} levels per "
            f"channel, got {config.regularizer} {config.levels or ''}"
        )
    fields = {
        **{name: list(config.steps(name)) for name in _STEPS},
        "in_channels": config.in_channels,
        "out_channels": config.out_ch,
        "ch": config.ch,
        "ch_mult": list(config.ch_mult),
        "z_channels": config.latent_channels,
        "double_z": config.regularizer == "kl",
        "num_res_blocks": config.num_res_blocks,
        "regularizer": config.regularizer,
        "is_causal": config.causal,
    }
    if config.is_discrete:
        fields["codebook_size"] = _LEVELS**config.latent_channels
    return fields


def config_from_diffusers(fields: Mapping[str, Any]) -> VidTokConfig:
    """Returns the configuration of an AutoencoderVidTok with these arguments, others as default.

    Raises:
        ValueError: an unknown argument, or values that contradict each other or are refused.
    """
    for name in fields:
        if name not in _DEFAULTS:
            raise ValueError(
                f"config_from_diffusers: field must be one of {', '.join(_DEFAULTS)}, "
                f"got {name!r}{closest(name, _DEFAULTS)}"
            )
    given = {**_DEFAULTS, **fields}
    kind, z_channels, causal = given["regularizer"], given["z_channels"], given["is_causal"]
    required: dict[str, Any] = {"dropout": 0.0, "double_z": kind == "kl"}
    if kind == "fsq":
        required["codebook_size"] = _LEVELS**z_channels
    for name, value in required.items():
        if given[name] != value:
            raise ValueError(f"config_from_diffusers: {name} must be {value}, got {given[name]!r}")
    config = VidTokConfig.from_dict(
        {
            "regularizer": kind,
            "z_channels": z_channels,
            "levels": (_LEVELS,) * z_channels if kind == "fsq" else (),
            "out_ch": given["out_channels"],
            "causal": causal,
            "version": "1.1" if causal else "1.0",
            "interpolation": "linear" if causal else "nearest",
            **{name: given[name] for name in ("in_channels", "ch", "ch_mult", "num_res_blocks")},
            **{name: given[name] for name in _STEPS},
        }
    )
    preset = _preset_name(config)
    return config if preset is None else PRESETS[preset]


def _preset_name(config: VidTokConfig) -> str | None:
    """Returns the released configuration with the same networks, None if there is none."""

    def explicit(c: VidTokConfig) -> VidTokConfig:
        return c.replace(z_channels=c.latent_channels, **{name: c.steps(name) for name in _STEPS})

    wanted = explicit(config)
    return next((name for name, preset in PRESETS.items() if explicit(preset) == wanted), None)
