"""Nested states (dicts, lists, numbers, tensors) as one safetensors file and one JSON file.

Nothing in either is executed when it is read, unlike in a pickle.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Marks what JSON has no form for: tensors, dicts whose keys are not text, tuples.
_TENSOR, _PAIRS, _TUPLE = "__tensor__", "__pairs__", "__tuple__"
_MARKS = {_TENSOR, _PAIRS, _TUPLE}


def write_tree(tree: Any, stem: Path) -> None:
    """Returns None after writing `stem`.safetensors and `stem`.json.

    Args:
        tree: dicts (keys text or integers), lists, tuples, tensors, numbers, text, None.
        stem: path without suffix.

    Raises:
        TypeError: the tree holds something else.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    plain = _pack(tree, tensors)
    save_file(tensors, stem.with_suffix(".safetensors"))
    stem.with_suffix(".json").write_text(json.dumps(plain), encoding="utf-8")


def read_tree(stem: Path) -> Any:
    """Returns the tree that `write_tree` wrote, tensors on the CPU.

    Raises:
        ValueError, OSError: the files are not those of a tree, or absent.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(stem.with_suffix(".safetensors"))
        return _unpack(json.loads(stem.with_suffix(".json").read_text(encoding="utf-8")), tensors)
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"read_tree: {stem} must be files of a tree, got {error}") from error


def _pack(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, Tensor):
        name = str(len(tensors))
        # A copy of its own: safetensors refuses tensors that share memory.
        tensors[name] = tree.detach().to("cpu", copy=True).contiguous()
        return {_TENSOR: name}
    if isinstance(tree, dict):
        if all(isinstance(key, str) for key in tree) and not _MARKS & set(tree):
            return {key: _pack(value, tensors) for key, value in tree.items()}
        return {_PAIRS: [[key, _pack(value, tensors)] for key, value in tree.items()]}
    if isinstance(tree, tuple):
        return {_TUPLE: [_pack(value, tensors) for value in tree]}
    if isinstance(tree, list):
        return [_pack(value, tensors) for value in tree]
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise TypeError(f"write_tree: a value must be a tensor or JSON, got {type(tree).__name__}")


def _unpack(plain: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(plain, list):
        return [_unpack(value, tensors) for value in plain]
    if not isinstance(plain, dict):
        return plain
    if set(plain) == {_TENSOR}:
        return tensors[plain[_TENSOR]]
    if set(plain) == {_PAIRS}:
        return {key: _unpack(value, tensors) for key, value in plain[_PAIRS]}
    if set(plain) == {_TUPLE}:
        return tuple(_unpack(value, tensors) for value in plain[_TUPLE])
    return {key: _unpack(value, tensors) for key, value in plain.items()}


def first_non_finite(tree: Any, name: str = "") -> str | None:
    """Returns the dotted name of the first floating tensor with a NaN or infinity, None if none."""
    if isinstance(tree, Tensor):
        return name if tree.is_floating_point() and not bool(torch.isfinite(tree).all()) else None
    if not isinstance(tree, dict | list | tuple):
        return None
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        found = first_non_finite(value, f"{name}.{key}" if name else str(key))
        if found is not None:
            return found
    return None
