"""Text for the unified model of VTok: words of a list, all else as bytes, turns of a chat.

    <bos> <user> ... <assistant> ... <eos>,  <vision> visual tokens </vision>

`WordTokenizer` needs nothing but its words, so a model can be trained with no download;
`HuggingFaceText` takes the tokenizer of a pretrained language model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from vtok_ext.models._optional import require
from vtok_ext.models._persistence import MAX_CONFIG_BYTES, atomic_path

SPECIAL = ("<pad>", "<bos>", "<eos>", "<user>", "<assistant>", "<vision>", "</vision>")
TEXT_FILE, TEXT_FOLDER = "text.json", "text"
_WORD = re.compile(r"[^\W_]+|[^\w\s]|_")


class TextTokenizer(Protocol):
    """What the unified model asks of a text tokenizer; `special` has the ids of SPECIAL."""

    special: dict[str, int]

    def __len__(self) -> int:
        """Number of ids."""

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without special ones."""

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids; special ones are left out."""

    def save(self, folder: str) -> None:
        """Writes what `load_text` reads."""


class WordTokenizer:
    """Ids of lower-case words and signs; unknown ones are spelt in bytes, so any text has ids.

    Args:
        words: in any order; duplicates count once.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.words = sorted({word.lower() for word in words})
        self.special = {name: number for number, name in enumerate(SPECIAL)}
        self._bytes = len(SPECIAL)
        first = self._bytes + 256
        self._ids = {word: first + number for number, word in enumerate(self.words)}

    def __len__(self) -> int:
        return self._bytes + 256 + len(self.words)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text."""
        ids = []
        for word in _WORD.findall(text.lower()):
            if word in self._ids:
                ids.append(self._ids[word])
            else:  # a space in front keeps two unknown words apart
                ids += [self._bytes + byte for byte in f" {word}".encode()]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids, words separated by spaces."""
        parts: list[str] = []
        spelt = bytearray()
        for number in [*ids, -1]:
            if self._bytes <= number < self._bytes + 256:
                spelt.append(number - self._bytes)
                continue
            parts += spelt.decode("utf-8", errors="replace").split()
            spelt.clear()
            if number >= self._bytes + 256:
                parts.append(self.words[number - self._bytes - 256])
        return " ".join(parts)

    def save(self, folder: str) -> None:
        """Writes text.json."""
        with atomic_path(Path(folder) / TEXT_FILE) as path:
            Path(path).write_text(json.dumps({"words": self.words}), encoding="utf-8")


class HuggingFaceText:
    """A tokenizer of `transformers`; what it lacks of SPECIAL is added to its vocabulary.

    Args:
        tokenizer: changed in place.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        own = {"<bos>": tokenizer.bos_token, "<eos>": tokenizer.eos_token}
        own["<pad>"] = tokenizer.pad_token or tokenizer.eos_token
        names = {name: own.get(name) or name for name in SPECIAL}
        tokenizer.add_special_tokens({"additional_special_tokens": sorted(set(names.values()))})
        self.special = {
            name: int(tokenizer.convert_tokens_to_ids(token)) for name, token in names.items()
        }

    def __len__(self) -> int:
        return len(self.tokenizer)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def save(self, folder: str) -> None:
        """Writes the folder text/."""
        self.tokenizer.save_pretrained(Path(folder) / TEXT_FOLDER)


def load_text(folder: str) -> WordTokenizer | HuggingFaceText:
    """Returns the text tokenizer saved in `folder`. Raises FileNotFoundError or ValueError."""
    path = Path(folder) / TEXT_FILE
    if path.is_file():
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError(f"load_text: {path} must be <= 1 MiB, got a larger file")
        try:
            words = json.loads(path.read_text(encoding="utf-8"))["words"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"load_text: {path} must be an object with `words`") from error
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ValueError(f"load_text: words in {path} must be a list of text")
        return WordTokenizer(words)
    if not (Path(folder) / TEXT_FOLDER).is_dir():
        raise FileNotFoundError(
            f"load_text: {folder} must hold {TEXT_FILE} or {TEXT_FOLDER}, got neither"
        )
    transformers = require("load_text", "transformers")
    return HuggingFaceText(transformers.AutoTokenizer.from_pretrained(Path(folder) / TEXT_FOLDER))
