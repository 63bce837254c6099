"""Models on disk: a folder of config.json and model.safetensors, strict in both directions.

config.json names the model class, its configuration, the version of the reference behaviour that
the weights were made for, and the package version that wrote it. Nothing in a folder is executed.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vtok_ext.models.base import VideoTokenizer
    from vtok_ext.models.generator import LatentGenerator

Saved = TypeVar("Saved", bound="VideoTokenizer | LatentGenerator")

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
FORMAT_VERSION = 1
# In the header of a weights file: the version of the reference behaviour they were made for.
VERSION_KEY = "reference_version"
# A config.json is a few hundred bytes; more than this is not one.
MAX_CONFIG_BYTES = 1 << 20
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[str]:
    """Yields a temporary name that becomes `path` on success and is removed otherwise."""
    target = os.path.abspath(os.fspath(path))
    if os.path.isdir(target):
        raise IsADirectoryError(f"save: {target!r} must be a file name, got a directory")
    if not os.path.isdir(os.path.dirname(target)):
        raise FileNotFoundError(f"save: the folder of {target!r} must exist, got none")
    handle, temporary = tempfile.mkstemp(
        prefix=f".{os.path.basename(target)}.", suffix=".tmp", dir=os.path.dirname(target)
    )
    os.close(handle)
    try:
        yield temporary
        # mkstemp makes private files; give the result the permissions that open() would have.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def package_version() -> str:
    """Returns the version of the installed vtok_ext, "unknown" in an uninstalled source tree."""
    try:
        return importlib.metadata.version("vtok_ext")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def save_model(
    model: VideoTokenizer | LatentGenerator,
    folder: str | os.PathLike,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Writes config.json and model.safetensors into `folder`, creating it; both appear complete.

    Args:
        model: what is saved.
        folder: where to.
        facts: further entries of config.json, JSON values.
    """
    from safetensors.torch import save_file

    weights = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    description = {
        "format_version": FORMAT_VERSION,
        "model": type(model).__name__,
        "name": model.name,
        "reference_version": model.reference_version,
        "vtok_ext_version": package_version(),
        "config": model.config.to_dict(),
        **(facts or {}),
    }
    is_new = not os.path.isdir(folder)
    os.makedirs(folder, exist_ok=True)
    try:
        # Both are written before either is renamed, config.json last: a full disk leaves the old
        # model, and a folder with a config.json is a complete one.
        with (
            atomic_path(os.path.join(folder, CONFIG_NAME)) as config_file,
            atomic_path(os.path.join(folder, WEIGHTS_NAME)) as weights_file,
        ):
            text = json.dumps(description, indent=2) + "\n"
            Path(config_file).write_text(text, encoding="utf-8")
            save_file(weights, weights_file, {VERSION_KEY: model.reference_version})
    except BaseException:
        if is_new:
            with contextlib.suppress(OSError):
                os.rmdir(folder)
        raise


def resolve_folder(
    source: str | os.PathLike, patterns: Sequence[str] = (CONFIG_NAME, "*.safetensors")
) -> str:
    """Returns the local folder of a saved model.

    Args:
        source: a folder, or a hub id, which is downloaded.
        patterns: of the files to download.

    Raises:
        FileNotFoundError: there is no such folder, and no hub id has this form, or huggingface_hub,
            which downloads those, is not installed.
    """
    if os.path.isdir(source):
        return os.fspath(source)
    if os.path.exists(source) or not _HUB_ID.fullmatch(str(source)):
        raise FileNotFoundError(
            f"from_pretrained: source must be a folder of save_pretrained or a hub id "
            f"(owner/name), got {os.fspath(source)!r}"
        )
    try:
        hub = require_hub("from_pretrained")
    except ImportError as error:
        raise FileNotFoundError(
            f"from_pretrained: source must be an existing folder, got {os.fspath(source)!r}; as a "
            "hub id it needs huggingface_hub (pip install huggingface_hub)"
        ) from error
    return hub.snapshot_download(str(source), allow_patterns=list(patterns))


def check_source(op: str, source: str) -> None:
    """Raises FileNotFoundError unless `source` is a folder, or in form a hub id of transformers,
    which may have no owner."""
    if not os.path.isdir(source) and not _HUB_ID.fullmatch(source) and not _NAME.fullmatch(source):
        raise FileNotFoundError(f"{op}: source must be a folder or a hub id, got {source!r}")


def require_hub(op: str):
    """Returns the module huggingface_hub. Raises ImportError with the remedy when it is absent."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            f"{op}: huggingface_hub must be installed (pip install huggingface_hub), got no module"
        ) from error
    return huggingface_hub


def read_description(folder: str) -> dict[str, Any]:
    """Returns the parsed config.json of `folder`. Raises FileNotFoundError or ValueError."""
    path = os.path.join(folder, CONFIG_NAME)
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"from_pretrained: {folder!r} must hold {CONFIG_NAME}, got a folder without it"
        )
    if os.path.getsize(path) > MAX_CONFIG_BYTES:
        raise ValueError(f"from_pretrained: {path!r} must be <= 1 MiB, got a larger file")
    try:
        description = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"from_pretrained: {path!r} must be JSON, got {error}") from error
    if isinstance(description, dict) and "_class_name" in description:
        raise ValueError(
            f"from_pretrained: {folder!r} must be a folder of this package, got one of diffusers' "
            f"{description['_class_name']}; vt.wrap_diffusers takes the model that diffusers loads"
        )
    if not isinstance(description, dict) or not isinstance(description.get("config"), dict):
        raise ValueError(f"from_pretrained: {path!r} must be an object with `config`, got another")
    if description.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"from_pretrained: format_version must be {FORMAT_VERSION}, "
            f"got {description.get('format_version')!r}"
        )
    return description


def read_safetensors(path: str, op: str) -> dict[str, Tensor]:
    """Returns the tensors of a safetensors file. Raises FileNotFoundError or ValueError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not os.path.isfile(path):
        raise FileNotFoundError(f"{op}: {path!r} must be a file, got none")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{op}: {path!r} must be a safetensors file, got {error}") from error


def recorded_version(path: str) -> str | None:
    """Returns the reference version that a weights file of `save_model` records, None elsewhere."""
    from safetensors import safe_open

    if not path.lower().endswith(".safetensors"):
        return None
    with safe_open(path, framework="pt") as file:
        return (file.metadata() or {}).get(VERSION_KEY)


def load_weights(
    model: VideoTokenizer | LatentGenerator, weights: Mapping[str, Tensor], op: str
) -> None:
    """Copies `weights` into `model`, which keeps its dtype. All names and shapes must agree.

    Raises:
        ValueError: one message with counts and the first missing, unexpected and misshapen tensors.
    """
    expected = model.state_dict()
    missing = [k for k in expected if k not in weights]
    unexpected = [k for k in weights if k not in expected]
    misshapen = [
        f"{k} {list(weights[k].shape)} instead of {list(v.shape)}"
        for k, v in expected.items()
        if k in weights and weights[k].shape != v.shape
    ]
    found = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for names, what in (
            (missing, "missing"),
            (unexpected, "unexpected"),
            (misshapen, "of another shape"),
        )
        if names
    ]
    if found:
        raise ValueError(f"{op}: weights must be those of {model.name}, got {'; '.join(found)}")
    with torch.no_grad():
        for key, target in expected.items():
            target.copy_(weights[key])


def read_model(model_class: type[Saved], folder: str | os.PathLike) -> tuple[Saved, dict[str, Any]]:
    """Returns (model of that class with the weights saved in `folder`, in eval mode, config.json).

    Raises:
        FileNotFoundError, ValueError: as `VideoTokenizer.from_pretrained`.
    """
    description = read_description(os.fspath(folder))
    if description.get("model") != model_class.__name__:
        raise ValueError(
            f"from_pretrained: model must be {model_class.__name__}, "
            f"got {description.get('model')!r}"
        )
    name = description.get("name")
    config = model_class.config_class.from_dict(description["config"])
    model: Any = model_class(config, name if isinstance(name, str) else None)
    if description.get("reference_version") != model.reference_version:
        raise ValueError(
            f"from_pretrained: reference_version must be {model.reference_version!r}, "
            f"got {description.get('reference_version')!r}"
        )
    weights = read_safetensors(os.path.join(folder, WEIGHTS_NAME), "from_pretrained")
    load_weights(model, weights, "from_pretrained")
    return model.eval(), description
