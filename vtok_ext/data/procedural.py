"""A seeded clip of moving textured shapes on a textured background, made with torch alone.

Textures are sums of a few random plane waves (smooth, band limited), shapes are signed distance
fields drawn with anti-aliased edges. Motion is translation on an ellipse plus rotation, or erratic
(see `erratic_motion`): enough structure to judge a reconstruction, with no file and no network.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from vtok_ext.data.erratic_motion import Pose, erratic_camera, erratic_shape

MOTIONS = ("orbit", "erratic")
_BACKGROUND_WAVES = 5
_SHAPE_WAVES = 4
# Longest and shortest texture wavelength, as a fraction of the shorter side.
_BACKGROUND_WAVELENGTHS = (0.9, 0.35)
_SHAPE_WAVELENGTHS = (0.45, 0.16)
# One cycle of the motion lasts this many frames, so that a clip of any length moves at one speed.
_CYCLE_FRAMES = 48


@dataclass(frozen=True)
class _Shape:
    """One moving shape; lengths are fractions of the shorter side, angles in radians."""

    kind: str
    radius: float
    centre: tuple[float, float]
    orbit: tuple[float, float]
    phase: float
    cycles: int
    spin: float
    tilt: float


def procedural_clip(
    num_frames: int = 17,
    height: int = 128,
    width: int = 128,
    *,
    seed: int = 0,
    num_shapes: int = 4,
    motion: str = "orbit",
    frame_step: int = 1,
    dtype: torch.dtype = torch.uint8,
) -> torch.Tensor:
    """Returns [3, T, H, W]: `num_shapes` textured shapes moving over a drifting background.

    The same arguments give the same clip on every machine (up to the last bit of `sin`).

    Args:
        num_frames: T >= 1.
        height, width: in pixels, >= 1.
        seed: chooses colours, textures, shapes and paths.
        num_shapes: shapes in front of the background, >= 0.
        motion: "orbit" for smooth motion that repeats; "erratic" for random accelerations,
            reversals and a camera that pans, rolls and zooms.
        frame_step: every how manieth frame is shown, >= 1: 10 turns 30 into 3 frames per second.
        dtype: torch.uint8 in 0..255, or a floating dtype in [-1, 1].

    Raises:
        ValueError: a size or frame_step below 1, num_shapes below 0, or another motion.
        TypeError: dtype is neither uint8 nor floating.
    """
    if min(num_frames, height, width) < 1:
        raise ValueError(
            f"procedural_clip: num_frames, height and width must be at least 1, "
            f"got {num_frames}, {height}, {width}"
        )
    if num_shapes < 0:
        raise ValueError(f"procedural_clip: num_shapes must be at least 0, got {num_shapes}")
    if motion not in MOTIONS:
        raise ValueError(f"procedural_clip: motion must be one of {MOTIONS}, got {motion!r}")
    if frame_step < 1:
        raise ValueError(f"procedural_clip: frame_step must be at least 1, got {frame_step}")
    if dtype != torch.uint8 and not dtype.is_floating_point:
        raise TypeError(f"procedural_clip: dtype must be uint8 or floating, got {dtype}")
    generator = torch.Generator().manual_seed(seed)
    background = _Texture(generator, _BACKGROUND_WAVES, _BACKGROUND_WAVELENGTHS, contrast=0.55)
    shapes = [_random_shape(generator, i) for i in range(num_shapes)]
    textures = [_Texture(generator, _SHAPE_WAVES, _SHAPE_WAVELENGTHS) for _ in shapes]
    x, y, pixel = _grid(height, width)
    aspect = (width / min(height, width), height / min(height, width))
    last = (num_frames - 1) * frame_step + 1
    scene = (_orbits if motion == "orbit" else _erratic)(shapes, seed, last, aspect)
    clip = torch.empty(3, num_frames, height, width)
    for t in range(num_frames):
        camera, poses = scene[t * frame_step]
        seen = _looked_through(camera, x, y)
        frame = background(*seen)
        for shape, pose, texture in zip(shapes, poses, textures, strict=True):
            # Orbits belong to the picture, whose background alone drifts.
            u, v = _shape_coordinates(pose, *(seen if motion == "erratic" else (x, y)))
            distance = _signed_distance(shape.kind, u, v, shape.radius)
            cover = (0.5 - distance / pixel).clamp(0, 1)
            # A soft dark rim keeps a shape readable where its colour meets a like background.
            rim = 1 - 0.35 * (1 - distance.abs() / (3 * pixel)).clamp(0, 1)
            frame = torch.lerp(frame, texture(u, v) * rim, cover)
        clip[:, t] = frame
    if dtype == torch.uint8:
        return (clip * 255).round().to(torch.uint8)
    return (clip * 2 - 1).to(dtype)


class _Texture:
    """A colour field [3, H, W] in [0, 1]: mean colour + sum of plane waves, each with a colour."""

    def __init__(
        self,
        generator: torch.Generator,
        num_waves: int,
        wavelengths: tuple[float, float],
        contrast: float = 1.0,
    ) -> None:
        def uniform(*size: int) -> torch.Tensor:
            return torch.rand(size, generator=generator)

        angle = 2 * math.pi * uniform(num_waves)
        longest, shortest = wavelengths
        wavelength = longest * (shortest / longest) ** torch.linspace(0, 1, num_waves)
        self.kx = 2 * math.pi / wavelength * torch.cos(angle)
        self.ky = 2 * math.pi / wavelength * torch.sin(angle)
        self.phase = 2 * math.pi * uniform(num_waves)
        self.mean = 0.25 + 0.5 * uniform(3)
        colours = uniform(num_waves, 3) * 2 - 1
        # Scaled so that the largest possible sum stays near the range: little is clipped.
        self.colours = contrast * 0.5 * colours / colours.abs().sum(0).clamp(min=1e-3)

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        field = self.mean.view(3, 1, 1).expand(3, *x.shape).clone()
        for kx, ky, phase, colour in zip(self.kx, self.ky, self.phase, self.colours, strict=True):
            field += colour.view(3, 1, 1) * torch.sin(kx * x + ky * y + phase)
        return field.clamp(0, 1)


def _grid(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Returns (x [H, W], y [H, W], size of a pixel), the shorter side spanning -0.5..0.5."""
    pixel = 1 / min(height, width)
    rows = (torch.arange(height) - (height - 1) / 2) * pixel
    columns = (torch.arange(width) - (width - 1) / 2) * pixel
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return x, y, pixel


def _random_shape(generator: torch.Generator, index: int) -> _Shape:
    values = torch.rand(8, generator=generator).tolist()
    kinds = ("disc", "square", "ring", "star")
    # Centres sit in turn in the four quadrants so that shapes do not pile up.
    quadrant = (0.22 * (1 if index % 2 else -1), 0.22 * (1 if index // 2 % 2 else -1))
    return _Shape(
        kind=kinds[index % len(kinds)],
        radius=0.13 + 0.06 * values[0],
        centre=(quadrant[0] + 0.08 * (values[1] - 0.5), quadrant[1] + 0.08 * (values[2] - 0.5)),
        orbit=(0.06 + 0.1 * values[3], 0.06 + 0.1 * values[4]),
        phase=2 * math.pi * values[5],
        cycles=1 if values[6] < 0.5 else -1,
        spin=math.pi * (values[7] - 0.5) * 2,
        tilt=2 * math.pi * values[7],
    )


def _orbits(
    shapes: list[_Shape], seed: int, num_frames: int, aspect: tuple[float, float]
) -> list[tuple[Pose, list[Pose]]]:
    """Returns for every frame the drift of the background and the poses of the shapes."""
    scene = []
    for t in range(num_frames):
        turn = 2 * math.pi * t / _CYCLE_FRAMES
        poses = []
        for shape in shapes:
            angle = shape.phase + shape.cycles * turn
            poses.append(
                Pose(
                    shape.centre[0] * aspect[0] + shape.orbit[0] * math.cos(angle),
                    shape.centre[1] * aspect[1] + shape.orbit[1] * math.sin(angle),
                    shape.tilt + shape.spin * turn / math.pi,
                )
            )
        scene.append((Pose(0.06 * turn, -0.03 * turn), poses))
    return scene


def _erratic(
    shapes: list[_Shape], seed: int, num_frames: int, aspect: tuple[float, float]
) -> list[tuple[Pose, list[Pose]]]:
    """Returns for every frame the pose of the camera and those of the shapes."""
    camera = erratic_camera(f"{seed}/camera", num_frames)
    extent = (0.42 * aspect[0], 0.42 * aspect[1])
    paths = [erratic_shape(f"{seed}/{i}", num_frames, extent) for i in range(len(shapes))]
    return [(camera[t], [path[t] for path in paths]) for t in range(num_frames)]


def _looked_through(
    camera: Pose, x: torch.Tensor, y: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the places in the world that pixels at x, y [H, W] show."""
    cos, sin = math.cos(camera.angle) * camera.scale, math.sin(camera.angle) * camera.scale
    return cos * x - sin * y + camera.x, sin * x + cos * y + camera.y


def _shape_coordinates(
    pose: Pose, x: torch.Tensor, y: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the positions x, y [H, W] in a shape's own, moving and turning frame."""
    dx, dy = x - pose.x, y - pose.y
    cos, sin = math.cos(pose.angle), math.sin(pose.angle)
    return cos * dx + sin * dy, cos * dy - sin * dx


def _signed_distance(kind: str, u: torch.Tensor, v: torch.Tensor, radius: float) -> torch.Tensor:
    """Returns the distance to the outline, negative inside (approximate for the star)."""
    length = torch.sqrt(u * u + v * v)
    if kind == "disc":
        return length - radius
    if kind == "ring":
        return (length - 0.75 * radius).abs() - 0.3 * radius
    if kind == "square":
        return torch.maximum(u.abs(), v.abs()) - 0.8 * radius
    lobes = 0.85 + 0.25 * torch.cos(5 * torch.atan2(v, u))
    return length - radius * lobes
