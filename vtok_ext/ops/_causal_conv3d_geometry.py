"""Sizes of a causal convolution: padding, outputs, and which frames a stream still needs.

reach = (kernel - 1) * dilation + 1                       values that one output sees
padded = front + repeat * T + back                        frames (rows, columns) with padding
outputs = floor((padded - reach) / stride) + 1            at least 0
state = padded - outputs * stride                         frames that later outputs still see
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

TEMPORAL = ("zeros", "replicate", "same", "valid")
UPSAMPLE = (None, "space", "time")
SpatialPadding = str | Sequence[Sequence[int]]


class Geometry(NamedTuple):
    """Everything about a convolution that is not a tensor, as the integers of a raw op."""

    stride_t: int
    stride_h: int
    stride_w: int
    dilation_t: int
    dilation_h: int
    dilation_w: int
    groups: int
    front: int  # frames before the first one, where there is no state
    back: int
    top: int
    bottom: int
    left: int
    right: int
    repeat_time: int  # nearest upsampling before the convolution
    repeat_space: int
    replicate: int  # 1: front frames are copies of the first frame, 0: zeros

    @property
    def stride(self) -> tuple[int, int, int]:
        """Steps in (t, h, w)."""
        return self[0:3]

    @property
    def dilation(self) -> tuple[int, int, int]:
        """Distance of neighbouring taps in (t, h, w)."""
        return self[3:6]

    def reach(self, kernel: Sequence[int]) -> list[int]:
        """Returns how many frames, rows and columns one output sees."""
        return [(k - 1) * d + 1 for k, d in zip(kernel, self.dilation, strict=True)]

    def padded_frames(self, num_frames: int, state_frames: int | None) -> int:
        """Returns the number of frames that windows run over."""
        front = self.front if state_frames is None else state_frames
        return front + self.repeat_time * num_frames + self.back

    def num_frames(self, kernel: Sequence[int], num_frames: int, state_frames: int | None) -> int:
        """Returns how many frames come out of `num_frames` frames behind state or front frames."""
        padded = self.padded_frames(num_frames, state_frames)
        return _num_outputs(padded, self.reach(kernel)[0], self.stride_t)

    def state_frames(self, kernel: Sequence[int], num_frames: int, before: int | None) -> int:
        """Returns the length of the state after `num_frames` frames behind a state of `before`."""
        outputs = self.num_frames(kernel, num_frames, before)
        return self.padded_frames(num_frames, before) - outputs * self.stride_t

    def state_range(self, kernel: Sequence[int]) -> tuple[int, int]:
        """Returns the shortest and the longest state of a stream that has started."""
        reach = self.reach(kernel)[0]
        return reach - self.stride_t, reach - 1

    def output_shape(
        self, x_shape: Sequence[int], weight_shape: Sequence[int], state_frames: int | None
    ) -> list[int]:
        """Returns [B, O, T', H', W']."""
        kernel = weight_shape[2:]
        reach = self.reach(kernel)
        rows = self.top + self.repeat_space * x_shape[3] + self.bottom
        columns = self.left + self.repeat_space * x_shape[4] + self.right
        return [
            x_shape[0],
            weight_shape[0],
            self.num_frames(kernel, x_shape[2], state_frames),
            _num_outputs(rows, reach[1], self.stride_h),
            _num_outputs(columns, reach[2], self.stride_w),
        ]


def _num_outputs(padded: int, reach: int, stride: int) -> int:
    return max(0, (padded - reach + stride) // stride)


def make_geometry(
    kernel: Sequence[int],
    stride: int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
    temporal: str,
    front: int | None,
    spatial_padding: SpatialPadding,
    upsample: str | None,
) -> Geometry:
    """Returns the geometry of the arguments of `causal_conv3d`; ValueError where they are wrong."""
    steps, distances = _triple("stride", stride), _triple("dilation", dilation)
    if not _is_integer(groups) or groups < 1:
        raise ValueError(f"causal_conv3d: groups must be an integer >= 1, got {groups!r}")
    if temporal not in TEMPORAL:
        raise ValueError(f"causal_conv3d: temporal must be one of {TEMPORAL}, got {temporal!r}")
    if upsample not in UPSAMPLE:
        raise ValueError(f"causal_conv3d: upsample must be one of {UPSAMPLE}, got {upsample!r}")
    spare = [(k - 1) * d for k, d in zip(kernel, distances, strict=True)]
    before, behind = _temporal_padding(temporal, front, kernel[0], spare[0], steps[0])
    return Geometry(
        *steps,
        *distances,
        groups,
        before,
        behind,
        *_spatial_padding(spatial_padding, kernel, spare),
        2 if upsample == "time" else 1,
        2 if upsample == "space" else 1,
        int(temporal == "replicate"),
    )


def _triple(name: str, value: int | Sequence[int]) -> tuple[int, int, int]:
    sizes = (value, 1, 1) if isinstance(value, int) else _as_tuple(value)
    if len(sizes) != 3 or not all(_is_integer(s) and s >= 1 for s in sizes):
        raise ValueError(
            f"causal_conv3d: {name} must be an integer >= 1 (in time) or three (t, h, w), "
            f"got {value!r}"
        )
    return sizes


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _as_tuple(value: Any) -> tuple[Any, ...]:
    """Returns a sequence as a tuple, and nothing of what is none."""
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else ()


def _temporal_padding(
    temporal: str, front: int | None, kernel: int, spare: int, stride: int
) -> tuple[int, int]:
    """Returns the numbers of frames before and behind the clip."""
    if temporal == "same":
        if kernel % 2 == 0:
            raise ValueError(
                f'causal_conv3d: weight must have an odd number of frames with temporal="same", '
                f"got {kernel}"
            )
        if front is not None:
            raise ValueError(f'causal_conv3d: front must be None with temporal="same", got {front}')
        return spare // 2, spare // 2
    if temporal == "valid":
        if front not in (None, 0) or isinstance(front, bool):
            raise ValueError(
                f'causal_conv3d: front must be None or 0 with temporal="valid", got {front}'
            )
        return 0, 0
    if front is None:
        return max(0, spare + 1 - stride), 0
    if not _is_integer(front) or not 0 <= front <= spare:
        raise ValueError(
            f"causal_conv3d: front must be in 0..{spare}, the frames that a first window can see "
            f"before the clip, got {front!r}"
        )
    return front, 0


def _spatial_padding(
    padding: SpatialPadding, kernel: Sequence[int], spare: Sequence[int]
) -> tuple[int, int, int, int]:
    """Returns (top, bottom, left, right)."""
    if isinstance(padding, str):
        if padding != "same":
            raise ValueError(
                'causal_conv3d: spatial_padding must be "same" or ((top, bottom), (left, right)), '
                f"got {padding!r}"
            )
        if kernel[1] % 2 == 0 or kernel[2] % 2 == 0:
            raise ValueError(
                'causal_conv3d: weight must have odd height and width with spatial_padding="same", '
                f"got {list(kernel)}"
            )
        return spare[1] // 2, spare[1] // 2, spare[2] // 2, spare[2] // 2
    sides = [_as_tuple(side) for side in _as_tuple(padding)]
    values = [value for side in sides for value in side]
    if [len(side) for side in sides] != [2, 2] or not all(
        _is_integer(value) and value >= 0 for value in values
    ):
        raise ValueError(
            'causal_conv3d: spatial_padding must be "same" or ((top, bottom), (left, right)) with '
            f"integers >= 0, got {padding!r}"
        )
    return tuple(values)
