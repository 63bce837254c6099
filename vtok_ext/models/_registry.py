"""Names of models: `list_models`, `create_model` and `load_model`."""

from __future__ import annotations

import fnmatch
import os
import re
from typing import Any

from vtok_ext.models import _checkpoint, _persistence
from vtok_ext.models._config import closest
from vtok_ext.models.base import VideoTokenizer
from vtok_ext.models.coordtok import CoordTok
from vtok_ext.models.promag import ProMAG
from vtok_ext.models.promag_grown import Grown
from vtok_ext.models.vidtok import VidTok
from vtok_ext.models.vidtok_diffusers import (
    diffusers_config,
    is_diffusers_folder,
    load_diffusers,
)
from vtok_ext.models.vidtok_released import YAML_SUFFIXES, released_config
from vtok_ext.models.vtok import VTok

# Class names as they stand in config.json; a file can name nothing outside this table.
MODEL_CLASSES: dict[str, type[VideoTokenizer]] = {
    "CoordTok": CoordTok,
    "Grown": Grown,
    "ProMAG": ProMAG,
    "VidTok": VidTok,
    "VTok": VTok,
}


def _presets() -> dict[str, tuple[type[VideoTokenizer], Any]]:
    return {
        name: (model_class, config)
        for model_class in MODEL_CLASSES.values()
        for name, config in model_class.presets.items()
    }


def list_models(pattern: str = "*", *, discrete: bool | None = None) -> list[str]:
    """Returns the names that `create_model` knows, sorted.

    Args:
        pattern: shell pattern, such as "vidtok_fsq*".
        discrete: only models with (True) or without (False) a codebook.
    """
    return [
        name
        for name, (_, config) in sorted(_presets().items())
        if fnmatch.fnmatchcase(name, pattern) and discrete in (None, config.is_discrete)
    ]


def create_model(name: str | os.PathLike, **overrides: Any) -> VideoTokenizer:
    """Returns a model with random weights, in training mode.

    Args:
        name: one of `list_models()`, or the path of a released YAML file of VidTok.
        **overrides: fields of the configuration to change, such as `ch=16`.

    Raises:
        FileNotFoundError: there is no such YAML file.
        ValueError: an unknown name or field (the message names the closest) or a rejected value.
    """
    name = os.fspath(name)
    if name.lower().endswith(YAML_SUFFIXES):
        stem = os.path.splitext(os.path.basename(name))[0]
        return VidTok(released_config(name).replace(**overrides), stem)
    presets = _presets()
    if name not in presets:
        raise ValueError(
            f"create_model: name must be one of {', '.join(sorted(presets))}, "
            f"got {name!r}{closest(name, presets)}"
        )
    model_class, config = presets[name]
    return model_class(config.replace(**overrides), name)


def load_model(
    source: str | os.PathLike,
    name: str | os.PathLike | None = None,
    *,
    ema: bool = False,
    trust_checkpoint: bool = False,
    **overrides: Any,
) -> VideoTokenizer:
    """Returns a model with weights, in eval mode.

    Args:
        source: a folder of `save_pretrained` or of diffusers' AutoencoderVidTok, a hub id
            `owner/name` of one, or, with `name`, a released checkpoint (.ckpt, .pth, .pt,
            .safetensors).
        name: which of `list_models()` a checkpoint belongs to, or the path of its released YAML
            file. Versions share names and shapes, so the weights themselves cannot tell.
        ema: take a checkpoint's moving averages (`model_ema.*`) instead of its last weights.
        trust_checkpoint: read a pickled checkpoint with torch < 2.6, whose `weights_only` loading
            can be made to run code (CVE-2025-32434).
        **overrides: configuration fields by which a checkpoint deviates from `name`.

    Raises:
        FileNotFoundError: there is no such folder or file.
        ValueError: not a model, an unknown name or field, weights with other names or shapes, of
            another version as far as that can be known, or without moving averages.
    """
    path = os.fspath(source)
    if _checkpoint.is_checkpoint(path):
        if name is None:
            raise ValueError(
                f"load_model: name must say which model the checkpoint {path!r} belongs to, "
                "got None"
            )
        weights = _checkpoint.read_checkpoint(path, trust_checkpoint, ema)
        model = create_model(name, **overrides)
        _check_version(path, model)
        _persistence.load_weights(model, weights, "load_model")
        return model.eval()
    if name is not None or overrides:
        raise ValueError(
            f"load_model: name and overrides must be absent for a saved model, got {name!r}, "
            f"{overrides}"
        )
    if ema:
        raise ValueError("load_model: ema must be False for a saved model, got True")
    folder = _persistence.resolve_folder(path)
    if is_diffusers_folder(folder):
        return load_diffusers(folder)
    model_name = _persistence.read_description(folder).get("model")
    if model_name not in MODEL_CLASSES:
        raise ValueError(
            f"load_model: model must be one of {', '.join(MODEL_CLASSES)}, got {model_name!r}"
        )
    return MODEL_CLASSES[model_name].from_pretrained(folder)


def _check_version(path: str, model: VideoTokenizer) -> None:
    """Raises when the file says that its weights belong to another version than `model`.

    Files saved by this package record it; diffusers' configuration beside the file knows it; of
    others the name may say it.
    """
    said, hint = _persistence.recorded_version(path), ""
    folder = os.path.dirname(path) or "."
    if said is None and is_diffusers_folder(folder):
        said = diffusers_config(folder).version
    if said is None:
        said = _version_in_name(os.path.splitext(os.path.basename(path))[0])
        hint = "; a file with other weights than its name says must be renamed"
    if said not in (None, model.reference_version):
        raise ValueError(
            f"load_model: name must be that of a version {said} model for the checkpoint {path!r}, "
            f"got {model.name}, version {model.reference_version}{hint}"
        )


def _version_in_name(stem: str) -> str | None:
    """Returns the version that the name of a checkpoint says its weights have, None if none.

    Released files carry the name of their configuration, to which 1.1 adds "v1_1". Copies have
    something before or behind it, such as "_ema" or " (1)", or write "v1.1".
    """
    written = re.search(r"(?<![a-z])v1[._-]([01])(?!\d)", stem.lower())
    if written:
        return f"1.{written[1]}"
    words = "_".join(re.findall("[a-z0-9]+", stem.lower()))
    named = any(f"_{name}_" in f"_{words}_" for name in VidTok.presets)
    return "1.0" if named else None
