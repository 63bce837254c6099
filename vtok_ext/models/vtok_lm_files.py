"""A VTokLM on disk, one folder:

tokenizer/          the VTok, as `save_pretrained` writes it
model.safetensors   language model, adapters, projections, head, statistics
text.json           words, or text/ with a tokenizer of transformers
config.json         written last: a folder that has it is complete
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from vtok_ext.models import _persistence
from vtok_ext.models._persistence import atomic_path
from vtok_ext.models.vtok import VTok
from vtok_ext.models.vtok_lm import VTokLM
from vtok_ext.models.vtok_lm_config import VTokLMConfig
from vtok_ext.models.vtok_text import load_text

_TOKENIZER = "tokenizer"


def _own_weights(model: VTokLM) -> dict[str, Tensor]:
    """Returns all tensors but the tokenizer's."""
    state = model.state_dict()
    return {name: value for name, value in state.items() if not name.startswith(f"{_TOKENIZER}.")}


def save(model: VTokLM, folder: str | os.PathLike) -> None:
    """Writes the folder. Raises OSError when that is impossible."""
    from safetensors.torch import save_file

    os.makedirs(folder, exist_ok=True)
    model.tokenizer.save_pretrained(os.path.join(folder, _TOKENIZER))
    model.text.save(os.fspath(folder))
    # Tied weights, such as GPT-2's output layer, are stored under each of their names.
    weights = {n: t.detach().cpu().clone().contiguous() for n, t in _own_weights(model).items()}
    with atomic_path(os.path.join(folder, _persistence.WEIGHTS_NAME)) as path:
        save_file(weights, path)
    description = {
        "format_version": _persistence.FORMAT_VERSION,
        "model": type(model).__name__,
        "vtok_ext_version": _persistence.package_version(),
        "config": model.config.to_dict(),
    }
    with atomic_path(os.path.join(folder, _persistence.CONFIG_NAME)) as path:
        Path(path).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def is_saved_lm(folder: str | os.PathLike) -> bool:
    """Returns whether a folder holds a VTokLM."""
    try:
        description = _persistence.read_description(os.fspath(folder))
    except (ValueError, OSError):
        return False
    return description.get("model") == VTokLM.__name__


def load(folder: str | os.PathLike) -> VTokLM:
    """Returns the model saved in `folder`, in eval mode.

    Raises:
        FileNotFoundError: there is no such folder, or a file is missing in it.
        ValueError: another model, an unknown field, or weights with other names or shapes.
        ImportError: transformers, or peft for adapters, is not installed.
    """
    source = _persistence.resolve_folder(folder)
    description = _persistence.read_description(source)
    if description.get("model") != VTokLM.__name__:
        raise ValueError(
            f"VTokLM.from_pretrained: model must be VTokLM, got {description.get('model')!r}"
        )
    config = VTokLMConfig.from_dict(description["config"])
    tokenizer = VTok.from_pretrained(os.path.join(source, _TOKENIZER))
    if not isinstance(tokenizer, VTok):
        raise ValueError(f"VTokLM.from_pretrained: {_TOKENIZER} must be a VTok")
    model = VTokLM(config, tokenizer, load_text(source))
    path = os.path.join(source, _persistence.WEIGHTS_NAME)
    weights = _persistence.read_safetensors(path, "VTokLM.from_pretrained")
    parts: Any = _Parts(model)
    _persistence.load_weights(parts, weights, "VTokLM.from_pretrained")
    return model.eval()


class _Parts:
    """What `load_weights` fills: everything but the tokenizer."""

    def __init__(self, model: VTokLM) -> None:
        self.model, self.name = model, "VTokLM"

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the tensors to fill."""
        return _own_weights(self.model)
