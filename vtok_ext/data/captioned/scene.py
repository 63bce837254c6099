"""Scenes of coloured shapes: what is in a clip, drawn at random, and its frames.

A clip has one to three lasting shapes, each of its own colour and kind in its own quarter of the
frame, moving left, right, up or down, slowly or fast; and three events that last a few frames:

    reversal     one shape runs backwards, then goes on
    blink        one shape is away
    appearance   a shape of another colour and any kind shows up in an empty quarter

In half of the clips one shape leaves for good. Everything is drawn uniformly. Clips are split by
(colour, kind, quarter, direction, speed): only all five together tell what is held out. Colour,
kind and quarter, which one picture shows, say nothing about direction or speed: see `in_split`.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 235),
    "yellow": (235, 220, 50),
    "magenta": (215, 60, 205),
    "cyan": (60, 210, 220),
    "white": (240, 240, 240),
    "orange": (240, 135, 30),
}
KINDS = ("circle", "square", "triangle", "cross")
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # (row, column)
SPEEDS = {"slowly": 0.07, "fast": 0.17}  # of the side, over a whole clip
BACKGROUND = (45, 45, 50)
SPLITS = ("train", "test")

# Parts of the side. A shape and its way fit into a quarter: 2 * 0.115 + 0.17 + 0.06 < 0.5.
RADIUS, REVERSAL = 0.115, 0.06
MIN_FRAMES = 24


@dataclass(frozen=True)
class Shape:
    """A shape that lasts for the clip.

    Attributes:
        colour, kind, direction, speed: names of the tables above.
        quarter: 0 .. 3, in rows.
    """

    colour: str
    kind: str
    direction: str
    speed: str
    quarter: int


@dataclass(frozen=True)
class Event:
    """Something short: `name` is "reversal", "blink" or "appearance"; frames begin .. end - 1.

    Attributes:
        shape: index of the shape it happens to; of an appearance the number of lasting shapes.
    """

    name: str
    shape: int
    begin: int
    end: int


@dataclass(frozen=True)
class Scene:
    """What is in a clip.

    Attributes:
        shapes: the lasting ones, then the one that appears for a moment.
        events: reversal, blink and appearance, in order of time.
        num_frames: T.
        leaving: (index of a shape, frame from which on it is away), or None.
    """

    shapes: tuple[Shape, ...]
    events: tuple[Event, ...]
    num_frames: int
    leaving: tuple[int, int] | None

    @property
    def lasting(self) -> tuple[Shape, ...]:
        """The shapes but the one that appears for a moment."""
        return self.shapes[:-1]

    def event(self, name: str) -> Event:
        """Returns the event of that name."""
        return next(event for event in self.events if event.name == name)


def in_split(shape: Shape, split: str) -> bool:
    """Returns whether a combination of attributes belongs to "train" or "test".

    Held out is (colour + kind + quarter + direction + 2 speed) mod 4 = 0, one combination in four.
    Of every (colour, kind, quarter, direction) at least one speed remains for training, so that
    directions, drawn first, are uniform there whatever one picture shows. In testing two directions
    remain, others for every (colour, kind, quarter).
    """
    place = list(COLOURS).index(shape.colour) + KINDS.index(shape.kind) + shape.quarter
    place += list(DIRECTIONS).index(shape.direction) + 2 * list(SPEEDS).index(shape.speed)
    return (place % 4 == 0) == (split == "test")


def event_frames(num_frames: int) -> int:
    """Returns how many frames an event lasts: a tenth of the clip, 3 or more."""
    return max(3, num_frames // 10)


def draw_scene(seed: int, num_frames: int = 32, split: str = "train") -> Scene:
    """Returns the scene of a seed; the same on every machine.

    Args:
        seed: chooses everything.
        num_frames: T >= 24, so that three events have room.
        split: "train" or "test", see `in_split`; every shape is of that split.

    Raises:
        ValueError: fewer frames, or another split.
    """
    if num_frames < MIN_FRAMES:
        raise ValueError(f"draw_scene: num_frames must be >= {MIN_FRAMES}, got {num_frames}")
    if split not in SPLITS:
        raise ValueError(f"draw_scene: split must be one of {SPLITS}, got {split!r}")
    rng = random.Random(f"captioned/{seed}/{split}")
    count = rng.randint(1, 3)
    quarters = rng.sample(range(4), count + 1)
    shapes = _draw_shapes(rng, quarters, split)
    length = event_frames(num_frames)
    # Three windows in the first three quarters of the clip, after a few frames of plain motion.
    names = rng.sample(["reversal", "blink", "appearance"], 3)
    room = num_frames * 3 // 4 - 3 * length - 5
    gaps = sorted(rng.randint(0, max(0, room)) for _ in names)
    events = []
    for place, (name, gap) in enumerate(zip(names, gaps, strict=True)):
        begin = 3 + gap + place * (length + 1)
        shape = count if name == "appearance" else rng.randrange(count)
        events.append(Event(name, shape, begin, begin + length))
    leaving = None
    if rng.random() < 0.5:
        leaving = rng.randrange(count), num_frames - num_frames // 8
    return Scene(tuple(shapes), tuple(events), num_frames, leaving)


def _draw_shapes(rng: random.Random, quarters: list[int], split: str) -> list[Shape]:
    """Returns shapes of different colours, all of the split; the lasting ones, which are all but
    the last, of different kinds."""
    colours = rng.sample(list(COLOURS), len(quarters))
    # Any kind appears, so that the lasting ones do not tell which.
    kinds = [*rng.sample(KINDS, len(quarters) - 1), rng.choice(KINDS)]
    shapes = []
    for colour, kind, quarter in zip(colours, kinds, quarters, strict=True):
        every = [Shape(colour, kind, d, speed, quarter) for d in DIRECTIONS for speed in SPEEDS]
        allowed = [shape for shape in every if in_split(shape, split)]
        directions = list(dict.fromkeys(shape.direction for shape in allowed))
        direction = rng.choice(directions)  # first, so that they are uniform: see `in_split`
        shapes.append(rng.choice([shape for shape in allowed if shape.direction == direction]))
    return shapes


def is_visible(scene: Scene, index: int, frame: int) -> bool:
    """Returns whether a shape of the scene is there at a frame."""
    if index == len(scene.shapes) - 1:
        appearance = scene.event("appearance")
        return appearance.begin <= frame < appearance.end
    if scene.leaving is not None and scene.leaving[0] == index and frame >= scene.leaving[1]:
        return False
    blink = scene.event("blink")
    return not (blink.shape == index and blink.begin <= frame < blink.end)


def offset(scene: Scene, index: int, frame: int) -> float:
    """Returns how far along its direction a shape is at a frame, in parts of the side."""
    per_frame = SPEEDS[scene.shapes[index].speed] / scene.num_frames
    reversal = scene.event("reversal")
    if reversal.shape != index:
        return per_frame * frame
    back = min(max(frame - reversal.begin, 0), reversal.end - reversal.begin)
    return per_frame * (frame - back) - REVERSAL / (reversal.end - reversal.begin) * back


def centre(scene: Scene, index: int, frame: int) -> tuple[float, float]:
    """Returns (row, column) of a shape's centre in parts of the side; the appearing one stands
    still."""
    shape = scene.shapes[index]
    row, column = 0.25 + 0.5 * (shape.quarter // 2), 0.25 + 0.5 * (shape.quarter % 2)
    if index == len(scene.shapes) - 1:
        return row, column
    # The way, with the reversal's 0.06 behind its beginning, lies in the middle of the quarter.
    along = offset(scene, index, frame) - (SPEEDS[shape.speed] - REVERSAL) / 2
    d_row, d_column = DIRECTIONS[shape.direction]
    return row + along * d_row, column + along * d_column


def render(scene: Scene, height: int = 64, width: int = 64) -> Tensor:
    """Returns the clip [3, T, H, W] uint8: flat colours with edges smooth over one pixel.

    Args:
        scene: what to draw.
        height, width: in pixels.

    Raises:
        ValueError: no pixels.
    """
    if height < 1 or width < 1:
        raise ValueError(f"render: height and width must be >= 1, got {height} and {width}")
    rows = (torch.arange(height) + 0.5) / height
    columns = (torch.arange(width) + 0.5) / width
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    pixel = 1 / min(height, width)
    clip = torch.empty(3, scene.num_frames, height, width)
    background = torch.tensor(BACKGROUND, dtype=torch.float32).view(3, 1, 1)
    for frame in range(scene.num_frames):
        picture = background.expand(3, height, width)
        for index, shape in enumerate(scene.shapes):
            if not is_visible(scene, index, frame):
                continue
            row, column = centre(scene, index, frame)
            distance = _distance(shape.kind, y - row, x - column)
            cover = (0.5 - distance / pixel).clamp(0, 1)
            colour = torch.tensor(COLOURS[shape.colour], dtype=torch.float32).view(3, 1, 1)
            picture = torch.lerp(picture, colour, cover)
        clip[:, frame] = picture
    return clip.round().to(torch.uint8)


def _distance(kind: str, v: Tensor, u: Tensor) -> Tensor:
    """Returns about the distance to the outline at (row v, column u), negative inside."""
    if kind == "circle":
        return torch.sqrt(u * u + v * v) - RADIUS
    if kind == "square":
        # 0.9: of about the area of the circle, so that size says little.
        return torch.maximum(u.abs(), v.abs()) - 0.9 * RADIUS
    if kind == "triangle":
        # Pointing up: base at 0.8 of the radius below the centre, tip at 1.15 above.
        slope = 1.15 / 1.95
        side = (u.abs() - slope * (v + 1.15 * RADIUS)) / math.sqrt(1 + slope * slope)
        return torch.maximum(side, v - 0.8 * RADIUS)
    bar = 0.36 * RADIUS
    upright = torch.maximum(u.abs() - bar, v.abs() - RADIUS)
    level = torch.maximum(v.abs() - bar, u.abs() - RADIUS)
    return torch.minimum(upright, level)
