"""Decodes a video file into chunks of RGB frames with their timestamps, in bounded memory.

Every frame is presented at its own timestamp: nothing is dropped, doubled or resampled, so a
variable frame rate survives when the timestamps are handed to VideoWriter. Audio is ignored;
rotation metadata (phones) is applied; deeper formats are converted to 8 bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from .colour import rgb_from_frame
from .container_size import missing_bytes
from .errors import TruncatedVideoError, VideoReadError

_OP = "read_video"


@dataclass(frozen=True)
class VideoInfo:
    """What a file says of its first video stream, after rotation.

    Attributes:
        path: the file.
        height, width: size of the frames that the reader gives, in pixels.
        fps: average frame rate in frames per second; 0 if the file does not say.
        time_base: the unit of the timestamps, in seconds.
        num_frames: frame count as declared by the container, None if it does not say. A hint for
            a progress bar, not a promise: edit lists may hide frames.
        pixel_aspect: width / height of one pixel, 1 for square pixels.
        codec: name of the codec.
    """

    path: Path
    height: int
    width: int
    fps: Fraction
    time_base: Fraction
    num_frames: int | None
    pixel_aspect: Fraction
    codec: str


@dataclass(frozen=True)
class FrameChunk:
    """Consecutive frames.

    Attributes:
        frames: [3, t, H, W] uint8 RGB, stored frame by frame with interleaved colours
            (the memory order of channels_last_3d).
        timestamps: t strictly increasing integers, in units of VideoInfo.time_base.
    """

    frames: torch.Tensor  # [3, t, H, W]
    timestamps: list[int]


class VideoReader:
    """Reads the first video stream of a file from its beginning to its end.

    Use as a context manager. One reader gives one pass.

    Args:
        path: the file.

    Raises:
        VideoReadError: missing file, a folder, not a video, no video stream, zero frames.
        TruncatedVideoError: the file is cut off; raised at once, says how many frames decode.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._container, self._stream = _open(self.path)
        try:
            lacking = missing_bytes(self.path)
            if lacking:
                self._raise_truncated(lacking)
            self._decoded = self._decode()
            self._first = next(self._decoded, None)
            if self._first is None:
                raise VideoReadError(f"{_OP}: the video must have frames, got none in {self.path}")
            self.info = self._describe(self._first)
        except BaseException:
            self.close()
            raise

    def chunks(self, num_frames: int = 16) -> Iterator[FrameChunk]:
        """Yields all frames in chunks of `num_frames`, the last one shorter.

        Memory is that of one chunk plus the decoder's own.

        Args:
            num_frames: frames per chunk, >= 1.

        Raises:
            ValueError: num_frames < 1.
            VideoReadError: the frame size changes on the way.
            TruncatedVideoError: damaged data; says how many frames were readable.
        """
        if num_frames < 1:
            raise ValueError(f"{_OP}: num_frames must be at least 1, got {num_frames}")
        height, width = self.info.height, self.info.width
        buffer: np.ndarray | None = None
        timestamps: list[int] = []
        for picture, timestamp in self._pictures():
            if picture.shape != (height, width, 3):
                raise VideoReadError(
                    f"{_OP}: every frame must be {width}x{height} as the first one, got "
                    f"{picture.shape[1]}x{picture.shape[0]} at {timestamp} in {self.path}"
                )
            if buffer is None:
                buffer = np.empty((num_frames, height, width, 3), dtype=np.uint8)
            buffer[len(timestamps)] = picture
            timestamps.append(timestamp)
            if len(timestamps) == num_frames:
                yield _chunk(buffer, timestamps)
                buffer, timestamps = None, []
        if buffer is not None:
            yield _chunk(buffer[: len(timestamps)], timestamps)

    def close(self) -> None:
        """Returns None after closing the file; safe to call twice."""
        self._container.close()

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _decode(self) -> Iterator[Any]:
        """Yields decoded frames; damage becomes TruncatedVideoError with the count so far."""
        import av

        count = 0
        try:
            for frame in self._container.decode(self._stream):
                yield frame
                count += 1
        except (av.error.FFmpegError, OSError) as error:
            raise TruncatedVideoError(
                f"{_OP}: the video must be intact, got a decoding error after {count} readable "
                f"frames in {self.path} ({_reason(error)})",
                count,
            ) from error

    def _raise_truncated(self, lacking: int) -> None:
        try:
            readable = sum(1 for _ in self._decode())
        except TruncatedVideoError as error:
            readable = error.frames_readable
        raise _truncated(self.path, lacking, readable)

    def _pictures(self) -> Iterator[tuple[np.ndarray, int]]:
        """Yields ([H, W, 3] uint8, timestamp), timestamps made strictly increasing."""
        if self._first is None:
            raise ValueError(f"{_OP}: a reader gives one pass, open {self.path} again")
        first, self._first = self._first, None
        step = self._typical_step()
        last: int | None = None
        for frame in _with_first(first, self._decoded):
            timestamp = frame.pts
            if timestamp is None:  # raw streams: the declared rate is all there is
                timestamp = 0 if last is None else last + step
            if last is not None and timestamp <= last:
                timestamp = last + 1
            last = timestamp
            yield _upright(frame), timestamp

    def _typical_step(self) -> int:
        """Returns the frame interval in time-base units, at least 1."""
        fps, time_base = self.info.fps, self.info.time_base
        return max(1, round(1 / (fps * time_base))) if fps else 1

    def _describe(self, first: Any) -> VideoInfo:
        stream = self._stream
        turned = _quarter_turns(first) % 2 == 1
        height, width = (first.width, first.height) if turned else (first.height, first.width)
        aspect = Fraction(stream.sample_aspect_ratio or 1)
        return VideoInfo(
            path=self.path,
            height=height,
            width=width,
            fps=Fraction(stream.average_rate or stream.guessed_rate or 0),
            time_base=Fraction(stream.time_base or Fraction(1, 1000)),
            num_frames=stream.frames or None,
            pixel_aspect=1 / aspect if turned else aspect,
            codec=stream.codec_context.name,
        )


def read_clip(
    path: str | Path, *, max_frames: int | None = None
) -> tuple[torch.Tensor, list[int], VideoInfo]:
    """Returns (frames [3, T, H, W] uint8, timestamps, VideoInfo) of a whole, short video.

    Args:
        path: the file.
        max_frames: stop after this many frames; None reads all of them into memory.

    Raises:
        VideoReadError, TruncatedVideoError: see VideoReader.
    """
    if max_frames is not None and max_frames < 1:
        raise ValueError(f"read_clip: max_frames must be at least 1, got {max_frames}")
    frames: list[torch.Tensor] = []
    timestamps: list[int] = []
    with VideoReader(path) as reader:
        for chunk in reader.chunks(16):
            frames.append(chunk.frames.permute(1, 2, 3, 0))
            timestamps += chunk.timestamps
            if max_frames is not None and len(timestamps) >= max_frames:
                break
        info = reader.info
    kept = torch.cat(frames)[:max_frames]
    return kept.permute(3, 0, 1, 2), timestamps[:max_frames], info


def _open(path: Path) -> tuple[Any, Any]:
    """Returns the open PyAV container and its first video stream."""
    import av

    if path.is_dir():
        raise VideoReadError(f"{_OP}: input must be a video file, got the folder {path}")
    if not path.exists():
        raise VideoReadError(f"{_OP}: input must be an existing file, got {path}")
    try:
        container = av.open(str(path), "r")
    except (av.error.FFmpegError, OSError) as error:
        _raise_if_cut_off(path, error)
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
        _raise_if_cut_off(path, None)
        raise VideoReadError(f"{_OP}: input must have a video stream, got none in {path}")
    streams[0].thread_type = "AUTO"
    return container, streams[0]


def _raise_if_cut_off(path: Path, cause: Exception | None) -> None:
    """Returns None unless the end of the file is missing, where the index often stands."""
    try:
        lacking = missing_bytes(path)
    except OSError:
        return
    if lacking:
        raise _truncated(path, lacking, 0) from cause


def _truncated(path: Path, lacking: int, readable: int) -> TruncatedVideoError:
    return TruncatedVideoError(
        f"{_OP}: the video must be complete, got a file that lacks its last {lacking} bytes or "
        f"more, of which {readable} frames are readable: {path}",
        readable,
    )


def _is_cover_picture(stream: Any) -> bool:
    """Returns True for the still image that music files carry as a video stream."""
    from av.stream import Disposition

    return bool(stream.disposition & Disposition.attached_pic)


def _with_first(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


def _quarter_turns(frame: Any) -> int:
    """Returns the number of counterclockwise quarter turns that display asks for."""
    return round(frame.rotation / 90) % 4


def _upright(frame: Any) -> np.ndarray:
    """Returns [H, W, 3] uint8 RGB of one frame, turned as display asks."""
    return np.rot90(rgb_from_frame(frame), _quarter_turns(frame))


def _chunk(buffer: np.ndarray, timestamps: list[int]) -> FrameChunk:
    return FrameChunk(torch.from_numpy(buffer).permute(3, 0, 1, 2), timestamps)


def _reason(error: Exception) -> str:
    """Returns FFmpeg's own words without the error number."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())
