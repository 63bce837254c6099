"""The timestamps of a video without decoding it, and the decoded frames at some of them.

Frames are addressed by timestamp, the one thing that seeking, variable frame rates and edit lists
leave in place.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from .errors import TruncatedVideoError, VideoReadError
from .reader import _is_cover_picture, _reason, _upright

_OP = "read_video"
# How far behind the wanted frame a seek aims, in frames: pictures may be stored out of order.
_SEEK_MARGIN = 2
# Frames that are decoded at once where those of a file do not come in their order.
_FRAMES_AT_ONCE = 16


@dataclass(frozen=True)
class VideoTimes:
    """When the frames of a video are shown.

    Attributes:
        timestamps: strictly increasing integers in units of `time_base`.
        time_base: in seconds.
        fps: average rate that the file declares, else that of the timestamps; 0 for one frame.
        height, width: of the frames; as stored, or as shown if the first one was decoded.
    """

    timestamps: tuple[int, ...]
    time_base: Fraction
    fps: Fraction
    height: int
    width: int

    def seconds(self) -> list[float]:
        """Returns the timestamps in seconds."""
        return [float(t * self.time_base) for t in self.timestamps]


def read_times(
    path: Path, content: bytes | None = None, *, decode_first: bool = False
) -> VideoTimes:
    """Returns the times of the frames that `path` promises.

    Args:
        path: the file.
        content: its bytes, if they are not in a file of their own; `path` then only names it.
        decode_first: decode one frame, which finds more of what is wrong with a file, and whose
            size is that after a rotation; otherwise nothing is decoded.

    Raises:
        VideoReadError: not a video, or without frames or timestamps.
    """
    import av

    container, stream = _opened(path, content)
    with container:
        try:
            packets = [p for p in container.demux(stream) if p.size and not p.is_discard]
        except (av.error.FFmpegError, OSError) as error:
            raise VideoReadError(f"{_OP}: {path} must be readable, got {_reason(error)}") from error
        times = sorted({p.pts for p in packets if p.pts is not None})
        if not times:
            raise VideoReadError(
                f"{_OP}: the video must have frames with times, got none in {path}"
            )
        base = Fraction(stream.time_base or Fraction(1, 1000))
        fps = Fraction(stream.average_rate or stream.guessed_rate or 0)
        if not fps and len(times) > 1:
            fps = Fraction(len(times) - 1) / ((times[-1] - times[0]) * base)
        size = (stream.codec_context.height, stream.codec_context.width)
    if decode_first:
        first = read_frames_at(path, times[:1], content)
        size = (first.shape[2], first.shape[3])
    return VideoTimes(tuple(times), base, fps, *size)


def read_frames_at(
    path: Path, timestamps: Sequence[int], content: bytes | None = None
) -> torch.Tensor:
    """Returns [3, t, H, W] uint8: the frames shown at `timestamps`, which may repeat.

    Decoding begins at the key frame before the first of them.

    Args:
        path: the file.
        timestamps: of frames of the file, in the stream's time base, not decreasing, at least one.
        content: its bytes, if they are not in a file of their own.

    Raises:
        VideoReadError: a frame is not there, or frames differ in size.
        TruncatedVideoError: damaged data.
    """
    wanted = sorted(set(timestamps))
    found = _decode(path, content, wanted, seek=True)
    if len(found) < len(wanted):  # a wrong index, or a codec that cannot be entered there
        found = _decode(path, content, wanted, seek=False)
    missing = [t for t in wanted if t not in found]
    if missing:
        raise VideoReadError(
            f"{_OP}: {path} must have the frames that it lists, got none at {missing[0]}"
        )
    sizes = {tuple(frame.shape) for frame in found.values()}
    if len(sizes) > 1:
        raise VideoReadError(f"{_OP}: every frame must have one size, got {sizes} in {path}")
    return torch.stack([found[t] for t in timestamps]).permute(3, 0, 1, 2)


def frames_in_order(
    path: Path, timestamps: Sequence[int], content: bytes | None = None
) -> Iterator[torch.Tensor]:
    """Yields the frames [H, W, 3] uint8 that `read_frames_at` gives at once, one after the other.

    The file is decoded once, from its beginning to the last of them; one frame exists at a time.

    Args:
        path: the file.
        timestamps: as for `read_frames_at`.
        content: its bytes, if they are not in a file of their own.

    Raises:
        VideoReadError, TruncatedVideoError: as `read_frames_at`, where the frame is due.
    """
    size, num_given = None, 0
    for picture in _run_through(path, timestamps, content):
        if size not in (None, picture.shape):
            sizes = {tuple(size or ()), tuple(picture.shape)}
            raise VideoReadError(f"{_OP}: every frame must have one size, got {sizes} in {path}")
        size, num_given = picture.shape, num_given + 1
        yield picture
    # Not in their order, or not there, which this finds out.
    for start in range(num_given, len(timestamps), _FRAMES_AT_ONCE):
        stamps = timestamps[start : start + _FRAMES_AT_ONCE]
        yield from read_frames_at(path, stamps, content).permute(1, 2, 3, 0)


def _run_through(
    path: Path, timestamps: Sequence[int], content: bytes | None
) -> Iterator[torch.Tensor]:
    """Yields the frames at `timestamps`, up to one that does not come when it is due."""
    import av

    container, stream = _opened(path, content)
    due, count = 0, 0
    with container:
        try:
            for frame in container.decode(stream):
                count += 1
                if frame.pts is None or frame.pts < timestamps[due]:
                    continue
                if frame.pts > timestamps[due]:
                    return
                picture = torch.from_numpy(_upright(frame).copy())
                while due < len(timestamps) and timestamps[due] == frame.pts:
                    yield picture
                    due += 1
                if due == len(timestamps):
                    return
        except (av.error.FFmpegError, OSError) as error:
            raise _damaged(path, count, error) from error


def _decode(
    path: Path, content: bytes | None, wanted: list[int], seek: bool
) -> dict[int, torch.Tensor]:
    """Returns timestamp -> [H, W, 3] uint8 of those frames that come up."""
    import av

    container, stream = _opened(path, content)
    found: dict[int, torch.Tensor] = {}
    left, count = set(wanted), 0
    with container:
        try:
            if seek and stream.average_rate and stream.time_base:
                step = round(1 / (stream.average_rate * stream.time_base))
                container.seek(max(0, wanted[0] - _SEEK_MARGIN * step), stream=stream)
            for frame in container.decode(stream):
                count += 1
                if frame.pts in left:
                    picture = _upright(frame)
                    found[frame.pts] = torch.from_numpy(picture.copy())
                    left.discard(frame.pts)
                    if not left:
                        break
        except (av.error.FFmpegError, OSError) as error:
            if seek:
                return {}
            raise _damaged(path, count, error) from error
    return found


def _damaged(path: Path, count: int, error: Exception) -> TruncatedVideoError:
    return TruncatedVideoError(
        f"{_OP}: the video must be intact, got a decoding error after {count} readable frames in "
        f"{path} ({_reason(error)})",
        count,
    )


def _opened(path: Path, content: bytes | None) -> tuple[Any, Any]:
    """Returns the open container and its first video stream."""
    import av

    source: Any = str(path) if content is None else io.BytesIO(content)
    try:
        container = av.open(source, "r")
    except (av.error.FFmpegError, OSError) as error:
        raise VideoReadError(
            f"{_OP}: input must be a video, got {path} ({_reason(error)})"
        ) from error
    streams = [
        stream
        for stream in container.streams.video
        if not _is_cover_picture(stream) and stream.codec_context is not None
    ]
    if not streams:
        container.close()
        raise VideoReadError(f"{_OP}: input must have a video stream, got none in {path}")
    # Workers of a loader are many already; threads of the decoder would only compete.
    streams[0].thread_type = "NONE"
    return container, streams[0]
