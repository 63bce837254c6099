"""Reads the attributes of a scene back from its frames, by rules: no learned part.

colour     the palette colour nearest to a pixel, if it is nearer than the background
shape      the template that overlaps best with the colour's area around its centre
direction  sign and axis of the median step of the centre from frame to frame
speed      size of that step, against the mean of the two speeds
events     frames in which a colour is away, or moves against its direction
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vtok_ext.data.captioned.scene import (
    BACKGROUND,
    COLOURS,
    KINDS,
    RADIUS,
    REVERSAL,
    SPEEDS,
    Scene,
    _distance,
    event_frames,
)

# A colour is there from this part of the smallest shape's area on: a cross has 2.4 squared radii.
_LEAST_AREA = 0.35 * 2.4 * RADIUS**2
# A pixel counts if it is at most this far (of 441) from its colour; two colours are 97 apart or
# more.
_NEAR = 70.0


@dataclass(frozen=True)
class SeenShape:
    """A shape that was read; `direction` and `speed` are None of one that was seen too shortly."""

    colour: str
    kind: str
    direction: str | None
    speed: str | None


@dataclass(frozen=True)
class SceneReading:
    """What the checker sees.

    Attributes:
        lasting: shapes that are there for most of the clip, by colour.
        appearing: the one that is there for a moment, None if there is none.
        reversed_colour, blinking_colour: who turned and who blinked, None if nobody.
        leaves: whether a lasting shape is away at the end.
        blink_first: whether the blink came before the appearance; None if one is missing.
    """

    lasting: dict[str, SeenShape]
    appearing: SeenShape | None
    reversed_colour: str | None
    blinking_colour: str | None
    leaves: bool
    blink_first: bool | None


def colour_masks(
    clip: Tensor,  # [3, T, H, W] uint8
) -> dict[str, Tensor]:
    """Returns for every colour the pixels [T, H, W] that are nearest to it."""
    palette = torch.tensor([BACKGROUND, *COLOURS.values()], dtype=torch.float32)
    pixels = clip.float().flatten(1).mT  # [T H W, 3]
    distance, nearest = torch.cdist(pixels, palette).min(1)
    nearest = torch.where(distance < _NEAR, nearest, 0).view(clip.shape[1:])
    return {name: _in_one_quarter(nearest == i) for i, name in enumerate(COLOURS, start=1)}


def _in_one_quarter(mask: Tensor) -> Tensor:
    """Returns a mask [T, H, W] cut down to its fullest quarter: shapes do not leave theirs, and the
    edge of one, mixed with background, may be near another's colour."""
    height, width = mask.shape[1] // 2, mask.shape[2] // 2
    halves = [(slice(0, size), slice(size, None)) for size in (height, width)]
    quarters = [(rows, columns) for rows in halves[0] for columns in halves[1]]
    rows, columns = max(quarters, key=lambda at: int(mask[:, at[0], at[1]].sum()))
    kept = torch.zeros_like(mask)
    kept[:, rows, columns] = mask[:, rows, columns]
    return kept


def cover_of(
    clip: Tensor,  # [3, T, H, W] uint8
    colour: str,
    mask: Tensor,  # [T, H, W] bool
) -> Tensor:
    """Returns [T, H, W]: how much of each pixel in or beside the mask is the colour, 0 to 1.

    Whole pixels would make a slow shape jump; edges tell where it is between them.
    """
    background = torch.tensor(BACKGROUND, dtype=torch.float32).view(3, 1, 1, 1)
    span = torch.tensor(COLOURS[colour], dtype=torch.float32).view(3, 1, 1, 1) - background
    cover = ((clip.float() - background) * span).sum(0) / span.square().sum()
    near = F.max_pool2d(mask.float()[:, None], 3, stride=1, padding=1)[:, 0]
    return cover.clamp(0, 1) * near


def read_scene(
    clip: Tensor,  # [3, T, H, W] uint8
) -> SceneReading:
    """Returns what is in a clip, from its pixels alone.

    Args:
        clip: rendered or decoded frames.

    Raises:
        TypeError, ValueError: frames in [-1, 1], which would read as an empty scene, or none.
    """
    if clip.dtype != torch.uint8:
        raise TypeError(f"read_scene: clip must be uint8, got {clip.dtype}")
    if clip.dim() != 4 or clip.shape[0] != 3 or 0 in clip.shape:
        raise ValueError(f"read_scene: clip must be [3, T, H, W], got {list(clip.shape)}")
    clip = clip.cpu()  # rules with many small steps
    num_frames, height, width = clip.shape[1:]
    lasting, appearing, presence = {}, None, {}
    reversed_colour: tuple[float, str] | None = None
    for colour, mask in colour_masks(clip).items():
        area = mask.flatten(1).sum(1) / (height * width)
        present = area > _LEAST_AREA
        count = int(present.sum())
        if count < 2:
            continue
        cover = cover_of(clip, colour, mask)
        centres = _centres(cover, present)
        kind = _kind(cover, present, centres)
        if count <= num_frames // 3:
            found = SeenShape(colour, kind, None, None)
            if appearing is None or count > int(presence[appearing.colour].sum()):
                appearing = found
            presence[colour] = present
            continue
        direction, speed, back = _motion(centres, num_frames)
        lasting[colour] = SeenShape(colour, kind, direction, speed)
        presence[colour] = present
        if back > REVERSAL / 2 and (reversed_colour is None or back > reversed_colour[0]):
            reversed_colour = back, colour
    blinks = {c: at for c in lasting if (at := _blink(presence[c])) is not None}
    blinking = min(blinks, key=lambda c: blinks[c]) if blinks else None
    leaves = any(not bool(presence[c][-1]) for c in lasting)
    first = None
    if blinking is not None and appearing is not None:
        first = blinks[blinking] < int(presence[appearing.colour].nonzero()[0])
    return SceneReading(
        lasting,
        appearing,
        None if reversed_colour is None else reversed_colour[1],
        blinking,
        leaves,
        first,
    )


def _centres(weight: Tensor, present: Tensor) -> Tensor:
    """Returns [T, 2]: mean row and column of weights [T, H, W] in parts of the sides, NaN where
    nothing is present."""
    height, width = weight.shape[1:]
    total = weight.flatten(1).sum(1).clamp(min=1e-6)
    rows = (torch.arange(height) + 0.5) / height
    columns = (torch.arange(width) + 0.5) / width
    row = (weight.sum(2) * rows).sum(1) / total
    column = (weight.sum(1) * columns).sum(1) / total
    return torch.where(present[:, None], torch.stack([row, column], 1), torch.nan)


def _motion(centres: Tensor, num_frames: int) -> tuple[str | None, str | None, float]:
    """Returns direction, speed, and the longest way backwards, in parts of the side."""
    steps = centres[1:] - centres[:-1]
    steps = steps[steps.isfinite().all(1)]
    if len(steps) < 3:
        return None, None, 0.0
    # The run backwards is three times as fast as a fast shape: what is slower is plain motion.
    limit = 0.5 * REVERSAL / event_frames(num_frames)
    plain = steps[steps.abs().amax(1) < limit]
    mean = plain.mean(0) if len(plain) else steps.median(0).values
    axis = int(mean.abs().argmax())
    sign = 1.0 if mean[axis] > 0 else -1.0
    direction = {(0, -1.0): "up", (0, 1.0): "down", (1, -1.0): "left", (1, 1.0): "right"}
    travelled = float(mean[axis].abs()) * num_frames
    slow, fast = SPEEDS["slowly"], SPEEDS["fast"]
    speed = "slowly" if travelled < (slow + fast) / 2 else "fast"
    along = centres[:, axis][centres[:, axis].isfinite()] * sign
    back = float((along.cummax(0).values - along).max())
    return direction[axis, sign], speed, back


def _blink(present: Tensor) -> int | None:
    """Returns the first frame of a gap that ends before the clip does, None without one."""
    gaps = (~present).nonzero().flatten().tolist()
    for frame in gaps:
        if bool(present[:frame].any()) and bool(present[frame:].any()):
            return int(frame)
    return None


def _kind(cover: Tensor, present: Tensor, centres: Tensor) -> str:
    """Returns the kind whose outline overlaps best, over up to eight frames."""
    height, width = cover.shape[1:]
    frames = present.nonzero().flatten()
    frames = frames[torch.linspace(0, len(frames) - 1, min(8, len(frames))).long()]
    rows = (torch.arange(height) + 0.5) / height
    columns = (torch.arange(width) + 0.5) / width
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    score = torch.zeros(len(KINDS))
    for frame in frames.tolist():
        seen = cover[frame]
        for number, kind in enumerate(KINDS):
            # A template's centre of area is not its centre: both are moved to the same place.
            template = _template(kind, y, x, centres[frame])
            union = torch.maximum(seen, template).sum()
            score[number] += torch.minimum(seen, template).sum() / union
    return KINDS[int(score.argmax())]


def _template(kind: str, y: Tensor, x: Tensor, centre: Tensor) -> Tensor:
    """Returns how much of each pixel a shape covers whose centre of area is at `centre`."""
    # Of the kinds only the triangle is not symmetric: base 0.8, tip 1.15 radii from its origin, so
    # that its centre of area is (2 * 0.8 - 1.15) / 3 radii below.
    shift = (2 * 0.8 - 1.15) / 3 * RADIUS if kind == "triangle" else 0.0
    distance = _distance(kind, y - (centre[0] - shift), x - centre[1])
    return (0.5 - distance * min(y.shape)).clamp(0, 1)


def caption_matches(scene: Scene, reading: SceneReading) -> dict[str, float]:
    """Returns for colour, shape, direction and speed the part of the scene's lasting shapes that
    the reading agrees with, or of those seen, if these are more; for `count` 1 or 0. A shape of a
    missing colour agrees in nothing.

    Args:
        scene: what was asked for.
        reading: what is there.
    """
    found = {"colour": 0.0, "shape": 0.0, "direction": 0.0, "speed": 0.0}
    for shape in scene.lasting:
        seen = reading.lasting.get(shape.colour)
        if seen is None:
            continue
        found["colour"] += 1
        found["shape"] += seen.kind == shape.kind
        found["direction"] += seen.direction == shape.direction
        found["speed"] += seen.speed == shape.speed
    count = len(scene.lasting)
    # Who shows all colours has not shown what was asked for.
    matches = {name: value / max(count, len(reading.lasting)) for name, value in found.items()}
    return {**matches, "count": float(len(reading.lasting) == count)}
