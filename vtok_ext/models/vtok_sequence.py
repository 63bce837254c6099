"""Sequences of text and visual tokens for the unified model, and which of them are trained on.

    understanding  <bos> <user> <vision> v_1 .. v_L </vision> prompt <assistant> answer <eos>
                   loss on the answer and <eos>
    generation     <bos> <user> prompt <assistant> <vision> v_1 .. v_L </vision> <eos>
                   loss on the visual tokens

Nothing is ever learnt of a prompt. Source: VTok (arXiv 2602.04202), second-hand notes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtok_ext.models.vtok_text import TextTokenizer

IGNORED = -100
UNDERSTANDING, GENERATION = "understanding", "generation"


@dataclass(frozen=True)
class Turn:
    """What one sample asks.

    Attributes:
        task: "understanding" or "generation".
        prompt: the question, or the text of the video.
        answer: of a question; "" when it is wanted, and for generation.
    """

    task: str
    prompt: str
    answer: str = ""

    def __post_init__(self) -> None:
        """Checks the task and that all else is text."""
        for name in ("prompt", "answer"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"Turn: {name} must be text, got {getattr(self, name)!r}")
        if self.task not in (UNDERSTANDING, GENERATION):
            raise ValueError(
                f"Turn: task must be {UNDERSTANDING!r} or {GENERATION!r}, got {self.task!r}"
            )


@dataclass(frozen=True)
class Sequences:
    """A batch of sequences; short ones are padded at the end.

    Attributes:
        ids: [B, N] of text; <pad> where a visual token stands.
        is_visual: [B, N], True where one stands, in the order of the visual tokens.
        labels: [B, N], ids that are to be predicted from what precedes them, else IGNORED.
        is_target: [B, N], True at visual tokens that are to be predicted.
        attended: [B, N], False at padding.
    """

    ids: Tensor
    is_visual: Tensor
    labels: Tensor
    is_target: Tensor
    attended: Tensor


def check_one_per_clip(op: str, name: str, values: Sequence[Any], video: Tensor) -> None:
    """Raises unless `values`, an argument of that name, has one value per clip of a video.

    Raises:
        TypeError: a video that is no tensor, or one text instead of a list.
        ValueError: no clips, or another number of values.
    """
    check_list(op, name, values)
    if not isinstance(video, Tensor):
        raise TypeError(f"{op}: video must be a torch.Tensor, got {type(video).__name__}")
    if video.dim() != 5:
        raise ValueError(f"{op}: video must be [B, 3, T, H, W], got {list(video.shape)}")
    if len(values) != video.shape[0]:
        raise ValueError(f"{op}: {name} must be one per clip ({video.shape[0]}), got {len(values)}")


def check_list(op: str, name: str, values: Sequence[Any]) -> None:
    """Raises TypeError for one text, whose letters would count as texts."""
    if isinstance(values, str):
        raise TypeError(f"{op}: {name} must be a list of text, got {values!r}")


def build_sequences(
    turns: Sequence[Turn],
    num_visual: Sequence[int],
    text: TextTokenizer,
    *,
    begin_only: bool = False,
    left: bool = False,
) -> Sequences:
    """Returns the sequences of a batch, on the CPU.

    Args:
        turns: one per sample.
        num_visual: visual tokens of each sample.
        text: gives the ids.
        begin_only: stop where the model goes on: after <assistant>, or after <vision>.
        left: pad at the beginning, so that all samples go on at the same place.

    Raises:
        ValueError: no turn, or other numbers of turns and counts.
    """
    if not turns:
        raise ValueError("build_sequences: turns must be at least one, got none")
    rows = [
        _row(turn, count, text, begin_only) for turn, count in zip(turns, num_visual, strict=True)
    ]
    longest = max(len(ids) for ids, *_ in rows)
    fill = (text.special["<pad>"], False, IGNORED, False)
    columns = []
    for column, value in enumerate(fill):
        padded = []
        for row in rows:
            gap = [value] * (longest - len(row[0]))
            padded.append([*gap, *row[column]] if left else [*row[column], *gap])
        columns.append(torch.tensor(padded))
    lengths = torch.tensor([len(ids) for ids, *_ in rows])
    places = torch.arange(longest)
    if left:
        attended = places >= (longest - lengths)[:, None]
    else:
        attended = places < lengths[:, None]
    ids, is_visual, labels, is_target = columns
    return Sequences(ids, is_visual, labels, is_target, attended)


Row = tuple[list[int], list[bool], list[int], list[bool]]


def _row(turn: Turn, count: int, text: TextTokenizer, begin_only: bool) -> Row:
    """Returns ids, is_visual, labels and is_target of one sample."""
    special = text.special
    ids: list[int] = []
    visual: list[bool] = []
    labels: list[int] = []
    target: list[bool] = []

    def add(tokens: list[int], *, learnt: bool = False) -> None:
        ids.extend(tokens)
        visual.extend([False] * len(tokens))
        labels.extend(tokens if learnt else [IGNORED] * len(tokens))
        target.extend([False] * len(tokens))

    def add_visual(learnt: bool) -> None:
        ids.extend([special["<pad>"]] * count)
        visual.extend([True] * count)
        labels.extend([IGNORED] * count)
        target.extend([learnt] * count)

    prompt = text.encode(turn.prompt)
    add([special["<bos>"], special["<user>"]])
    if turn.task == UNDERSTANDING:
        add([special["<vision>"]])
        add_visual(learnt=False)
        add([special["</vision>"], *prompt, special["<assistant>"]])
        if not begin_only:
            add([*text.encode(turn.answer), special["<eos>"]], learnt=True)
    else:
        add([*prompt, special["<assistant>"], special["<vision>"]])
        if not begin_only:
            add_visual(learnt=True)
            add([special["</vision>"], special["<eos>"]])
    return ids, visual, labels, target
