"""Paths that nothing but the frames themselves predicts: accelerations, reversals, a moving camera.

    v[t+1] = v[t] + a,  x[t+1] = x[t] + v[t+1]

The acceleration a is drawn anew every few frames; at some of these moments, and at least once in
12 frames, the velocity turns around instead. Walls reflect. A clip of constant velocities can be
reconstructed from a few of its frames; these cannot, which is what temporal compression is about.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

# Lengths are fractions of the shorter side of the picture, times are frames. At 32 pixels the
# fastest shape moves 2 pixels a frame.
_SHAPE_SPEED = 0.06
_CAMERA_SPEED = 0.02
_CAMERA_EXTENT = 0.3
_SEGMENT_FRAMES = (2, 6)
_REVERSAL_CHANCE = 0.3
_LONGEST_WITHOUT_REVERSAL = 12
_LARGEST_ROLL = 0.25
_LARGEST_ZOOM = 0.2


@dataclass(frozen=True)
class Pose:
    """Where something is: its centre, its angle in radians, and its size as a factor."""

    x: float
    y: float
    angle: float = 0.0
    scale: float = 1.0


def erratic_shape(seed: str, num_frames: int, extent: tuple[float, float]) -> list[Pose]:
    """Returns the pose of a shape in every frame; it turns as erratically as it moves.

    Args:
        seed: of all random numbers; more frames do not change the first ones.
        num_frames: frames, >= 1.
        extent: largest |x| and |y| of the centre.
    """
    xy = _path(random.Random(f"{seed}/place"), num_frames, _SHAPE_SPEED, extent)
    turn = _path(random.Random(f"{seed}/angle"), num_frames, 0.2, (math.pi, math.pi))
    return [Pose(x, y, angle) for (x, y), (angle, _) in zip(xy, turn, strict=True)]


def erratic_camera(seed: str, num_frames: int) -> list[Pose]:
    """Returns the pose of the camera in every frame: it pans, rolls and zooms.

    Args:
        seed: of all random numbers; more frames do not change the first ones.
        num_frames: frames, >= 1.
    """
    extent = (_CAMERA_EXTENT, _CAMERA_EXTENT)
    xy = _path(random.Random(f"{seed}/pan"), num_frames, _CAMERA_SPEED, extent)
    limits = (_LARGEST_ROLL, _LARGEST_ZOOM)
    lens = _path(random.Random(f"{seed}/lens"), num_frames, 0.01, limits)
    return [Pose(x, y, roll, math.exp(zoom)) for (x, y), (roll, zoom) in zip(xy, lens, strict=True)]


def _path(
    generator: random.Random, num_frames: int, speed: float, extent: tuple[float, float]
) -> list[tuple[float, float]]:
    """Returns positions that start anywhere within `extent` and stay there."""
    place = [generator.uniform(-0.8, 0.8) * limit for limit in extent]
    heading = generator.uniform(0, 2 * math.pi)
    fast = speed * generator.uniform(0.4, 1.0)
    velocity = [fast * math.cos(heading), fast * math.sin(heading)]
    acceleration = [0.0, 0.0]
    left, since_reversal = 0, 0
    found = []
    for _ in range(num_frames):
        found.append((place[0], place[1]))
        if left == 0:
            left = generator.randint(*_SEGMENT_FRAMES)
            direction = generator.uniform(0, 2 * math.pi)
            strength = 0.3 * speed * generator.random()
            acceleration = [strength * math.cos(direction), strength * math.sin(direction)]
            due = since_reversal + left > _LONGEST_WITHOUT_REVERSAL
            if due or generator.random() < _REVERSAL_CHANCE:
                velocity, since_reversal = [-v for v in velocity], 0
        for axis in (0, 1):
            velocity[axis] += acceleration[axis]
        length = math.hypot(*velocity)
        if length > speed:
            velocity = [v * speed / length for v in velocity]
        for axis in (0, 1):
            place[axis] += velocity[axis]
            if abs(place[axis]) > extent[axis]:
                place[axis] = math.copysign(2 * extent[axis] - abs(place[axis]), place[axis])
                velocity[axis] = -velocity[axis]
        left -= 1
        since_reversal += 1
    return found
