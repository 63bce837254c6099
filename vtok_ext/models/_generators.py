"""Names of generators: `list_generators`, `create_generator` and `load_generator`.

They have a registry of their own: what `create_model` returns encodes and decodes videos, which a
generator does not.
"""

from __future__ import annotations

import fnmatch
import os
from typing import Any

from torch import Tensor

from vtok_ext.models import _checkpoint, _persistence
from vtok_ext.models._config import closest
from vtok_ext.models.generator import LatentGenerator
from vtok_ext.models.gpt import GPT
from vtok_ext.models.latent_statistics import LatentStatistics
from vtok_ext.models.sit import SiT
from vtok_ext.models.sit_config import SIT_PRESETS, square_input_size

# Class names as they stand in config.json; a file can name nothing outside this table.
GENERATOR_CLASSES: dict[str, type[LatentGenerator]] = {"GPT": GPT, "SiT": SiT}


def _presets() -> dict[str, tuple[type[LatentGenerator], Any]]:
    return {
        name: (model_class, config)
        for model_class in GENERATOR_CLASSES.values()
        for name, config in model_class.presets.items()
    }


def list_generators(pattern: str = "*") -> list[str]:
    """Returns the names that `create_generator` knows, sorted.

    Args:
        pattern: shell pattern, such as "sit_b*".
    """
    return [name for name in sorted(_presets()) if fnmatch.fnmatchcase(name, pattern)]


def create_generator(name: str, **overrides: Any) -> LatentGenerator:
    """Returns a generator with random weights, in training mode.

    Args:
        name: one of `list_generators()`.
        **overrides: fields of the configuration to change, such as `depth=4`.

    Raises:
        ValueError: an unknown name or field (the message names the closest) or a rejected value.
    """
    presets = _presets()
    if name not in presets:
        raise ValueError(
            f"create_generator: name must be one of {', '.join(sorted(presets))}, "
            f"got {name!r}{closest(name, presets)}"
        )
    model_class, config = presets[name]
    return model_class(config.replace(**overrides), name)


def load_generator(
    source: str | os.PathLike,
    name: str | None = None,
    *,
    ema: bool = True,
    statistics: LatentStatistics | None = None,
    trust_checkpoint: bool = False,
    **overrides: Any,
) -> LatentGenerator:
    """Returns a generator with weights, in eval mode.

    Args:
        source: a folder of `save_pretrained`, a hub id `owner/name` of one, or, with `name`, a
            released checkpoint (.pt, .safetensors), whose pickled arguments are read as data only.
        name: which of `list_generators()` a checkpoint belongs to.
        ema: a checkpoint's moving averages, as the released sampler takes, or its last weights;
            a saved generator has one set of weights only.
        statistics: of the latents, which a released checkpoint of a SiT does not hold; see
            `read_statistics`.
        trust_checkpoint: read a pickled checkpoint with torch < 2.6, which is unsafe.
        **overrides: configuration fields by which a checkpoint deviates from `name`; the size of
            square planes is found in its weights.

    Raises:
        FileNotFoundError: there is no such folder or file.
        ValueError: not a generator, an unknown name or field, weights with other names or
            shapes, options of a checkpoint for a saved generator, or statistics for a GPT.
    """
    path = os.fspath(source)
    if _checkpoint.is_checkpoint(path):
        if name is None:
            raise ValueError(
                f"load_generator: name must say which generator the checkpoint {path!r} belongs "
                "to, got None"
            )
        weights = _checkpoint.read_generator_checkpoint(path, trust_checkpoint, ema)
        model = create_generator(name, **{**_found_in(weights, name), **overrides})
        _persistence.load_weights(model, weights, "load_generator")
        _set_statistics(model, statistics)
        return model.eval()
    if name is not None or overrides or not ema:
        raise ValueError(
            f"load_generator: name, overrides and ema=False (--last) must be absent for a saved "
            f"generator, got {name!r}, {overrides}, ema={ema}"
        )
    folder = _persistence.resolve_folder(path)
    class_name = _persistence.read_description(folder).get("model")
    if class_name not in GENERATOR_CLASSES:
        raise ValueError(
            f"load_generator: model must be one of {', '.join(GENERATOR_CLASSES)}, "
            f"got {class_name!r}"
        )
    model = GENERATOR_CLASSES[class_name].from_pretrained(folder)
    _set_statistics(model, statistics)
    return model


def _found_in(weights: dict[str, Tensor], name: str) -> dict[str, Any]:
    """Returns the fields of a SiT's configuration that the weights of a checkpoint tell."""
    preset = SIT_PRESETS.get(name)
    xy, t = weights.get("pos_embed_xy"), weights.get("pos_embed_t")
    if preset is None or xy is None or t is None or xy.dim() != 3 or t.dim() != 3:
        return {}
    size = square_input_size(preset.patch_size, xy.shape[1], t.shape[1])
    return {} if size is None else {"input_size": size}


def _set_statistics(model: LatentGenerator, statistics: LatentStatistics | None) -> None:
    if statistics is None:
        return
    if isinstance(model, GPT):
        raise ValueError(
            f"load_generator: statistics must be absent for a GPT, whose tokens need none, "
            f"got some for {model.name}"
        )
    model.set_statistics(statistics, "load_generator")
