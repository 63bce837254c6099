"""A VTokLM on disk, one folder:

tokenizer/          the VTok, as `save_pretrained` writes it
model.safetensors   language model, adapters, control tokens, projections, head, statistics
text.json           words, or text/ with a tokenizer of transformers
config.json         written last: a folder that has it is complete

All of it is written before anything of an older model is replaced.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

from vtok_ext.models import _persistence
from vtok_ext.models.vtok import VTok
from vtok_ext.models.vtok_lm import VTokLM
from vtok_ext.models.vtok_lm_config import VTokLMConfig
from vtok_ext.models.vtok_text import TEXT_FILE, TEXT_FOLDER, load_text

_TOKENIZER = "tokenizer"
_ENTRIES = (_TOKENIZER, TEXT_FILE, TEXT_FOLDER)


def _own_weights(model: VTokLM) -> dict[str, Tensor]:
    """Returns all tensors but the tokenizer's."""
    state = model.state_dict()
    return {name: value for name, value in state.items() if not name.startswith(f"{_TOKENIZER}.")}


def save(model: VTokLM, folder: str | os.PathLike) -> None:
    """Writes the folder; an older model stays when that fails.

    Raises:
        OSError: it cannot be written, or holds entries of these names that are of no such model.
    """
    is_new = not os.path.isdir(folder)
    foreign = [name for name in _ENTRIES if os.path.exists(os.path.join(folder, name))]
    if foreign and not is_saved_lm(folder):
        raise FileExistsError(
            f"save_pretrained: {os.fspath(folder)!r} must be empty or a saved VTokLM, "
            f"got {', '.join(foreign)} of something else"
        )
    os.makedirs(folder, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as new:
            _write(model, Path(new))
            _replace(Path(folder), Path(new))
    except BaseException:
        if is_new:
            with contextlib.suppress(OSError):
                os.rmdir(folder)
        raise


def _write(model: VTokLM, folder: Path) -> None:
    """Writes all files into an empty folder."""
    from safetensors.torch import save_file

    model.tokenizer.save_pretrained(folder / _TOKENIZER)
    model.text.save(os.fspath(folder))
    # Tied weights, such as GPT-2's output layer, are stored under each of their names.
    weights = {n: t.detach().cpu().clone().contiguous() for n, t in _own_weights(model).items()}
    save_file(weights, folder / _persistence.WEIGHTS_NAME)
    description = {
        "format_version": _persistence.FORMAT_VERSION,
        "model": type(model).__name__,
        "vtok_ext_version": _persistence.package_version(),
        "config": model.config.to_dict(),
    }
    text = json.dumps(description, indent=2) + "\n"
    (folder / _persistence.CONFIG_NAME).write_text(text, encoding="utf-8")


def _replace(folder: Path, new: Path) -> None:
    """Moves the entries of `new` into `folder`, from which an older model goes first."""
    # Without it the folder is none of a model, whatever happens next.
    (folder / _persistence.CONFIG_NAME).unlink(missing_ok=True)
    for name in _ENTRIES:  # the new model may have the other kind of text
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        (folder / name).unlink(missing_ok=True)
    entries = sorted(new.iterdir(), key=lambda path: path.name == _persistence.CONFIG_NAME)
    for path in entries:
        os.replace(path, folder / path.name)


def is_saved_lm(folder: str | os.PathLike) -> bool:
    """Returns whether a folder holds a VTokLM."""
    try:
        description = _persistence.read_description(os.fspath(folder))
    except (ValueError, OSError):
        return False
    return description.get("model") == VTokLM.__name__


def load(folder: str | os.PathLike) -> VTokLM:
    """Returns the model saved in `folder`, or of the hub id `owner/name`, in eval mode.

    Raises:
        FileNotFoundError: there is no such folder, or a file is missing in it.
        ValueError: another model, an unknown field, or weights with other names or shapes.
        ImportError: transformers, or peft for adapters, is not installed.
    """
    # The tokenizer and the text have folders of their own.
    patterns = ("*.json", "*.safetensors", f"{TEXT_FOLDER}/*")
    source = _persistence.resolve_folder(folder, patterns)
    description = _persistence.read_description(source)
    if description.get("model") != VTokLM.__name__:
        raise ValueError(
            f"VTokLM.from_pretrained: model must be VTokLM, got {description.get('model')!r}"
        )
    config = VTokLMConfig.from_dict(description["config"])
    tokenizer = VTok.from_pretrained(os.path.join(source, _TOKENIZER))
    if not isinstance(tokenizer, VTok):
        raise ValueError(f"VTokLM.from_pretrained: {_TOKENIZER} must be a VTok")
    # Models saved before these were refused had them without effect.
    tokenizer.config = tokenizer.config.replace(key_frame="first", cut_threshold=0.0)
    model = VTokLM(config, tokenizer, load_text(source))
    path = os.path.join(source, _persistence.WEIGHTS_NAME)
    weights = _persistence.read_safetensors(path, "VTokLM.from_pretrained")
    if model.control is not None:  # earlier versions had none, which is a change of 0
        for name, value in model.control.state_dict(prefix="control.").items():
            weights.setdefault(name, value.detach())
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
