"""Encodes RGB frames to an H.264 file that appears complete or not at all.

Even sizes are written as yuv420p, which every player shows. Odd sizes are written as yuv444p at
their exact size, because yuv420p halves the colour planes and cannot hold them; players with a full
H.264 decoder (FFmpeg, VLC, mpv) show them. Where libx264 is absent, MPEG-4 part 2 takes its place.
Colours are BT.709, limited range, and marked as such.
"""

from __future__ import annotations

import math
import os
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from ..atomic_output import check_output_file, temporary_sibling
from .colour import frame_from_rgb, mark_colours
from .errors import VideoWriteError

_OP = "write_video"
_CONTAINERS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}
# MPEG-4 part 2 stores the time base denominator in 16 bits.
_MPEG4_LARGEST_DENOMINATOR = 65535


class VideoWriter:
    """Writes frames to `path`; the file takes its name when `close()` succeeds.

    As a context manager it closes on success and discards on any exception, Ctrl-C included.

    Args:
        path: output, .mp4, .m4v, .mov or .mkv (which rounds timestamps to milliseconds).
        height, width: frame size in pixels, any, odd included.
        fps: frame rate used when `write` gets no timestamps; also recorded in the stream.
        time_base: unit of the timestamps in seconds; default 1 / fps.
        pixel_aspect: width / height of a pixel.
        crf: x264 quality, 0 (lossless) to 51; 16 is visually transparent.

    Raises:
        VideoWriteError: unknown file ending, unwritable place, full disk, size out of range.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        height: int,
        width: int,
        fps: Fraction | float = 30,
        time_base: Fraction | None = None,
        pixel_aspect: Fraction | float = 1,
        crf: int = 16,
    ) -> None:
        self.path = Path(path)
        if self.path.suffix.lower() not in _CONTAINERS:
            raise VideoWriteError(
                f"{_OP}: output must end in {', '.join(_CONTAINERS)}, got {self.path}"
            )
        try:
            check_output_file(self.path, _OP)
        except ValueError as error:
            raise VideoWriteError(str(error)) from None
        if height < 1 or width < 1:
            raise VideoWriteError(f"{_OP}: size must be at least 1x1, got {width}x{height}")
        self.height, self.width = height, width
        if not math.isfinite(fps):
            raise VideoWriteError(f"{_OP}: fps must be finite, got {fps}")
        rate = Fraction(fps).limit_denominator(1001)
        if rate <= 0:
            raise VideoWriteError(f"{_OP}: fps must be positive, got {fps}")
        self._time_base = time_base or 1 / rate
        self._stored_time_base = self._time_base
        self._first_timestamp: int | None = None
        self._last_written = -1
        self.num_frames = 0
        self._partial = temporary_sibling(self.path)
        self._container: Any = None
        try:
            self._file = _RecordingFile(self._partial)
        except OSError as error:
            raise VideoWriteError(_write_failure(self.path, error)) from error
        try:
            self._open_stream(rate, Fraction(pixel_aspect).limit_denominator(1000), crf)
        except BaseException:
            self.discard()
            raise

    def write(
        self,
        frames: torch.Tensor,  # [3, t, H, W] uint8
        timestamps: list[int] | None = None,
    ) -> None:
        """Returns None after encoding the frames.

        Args:
            frames: [3, t, H, W] uint8 RGB, on any device.
            timestamps: t strictly increasing integers in units of `time_base`, relative to
                anything (the first frame of the file is shown at time 0). None continues at fps.

        Raises:
            ValueError, TypeError: wrong shape, dtype or timestamps.
            VideoWriteError: encoding failed, for instance for want of space.
        """
        self._check(frames, timestamps)
        pictures = frames.detach().permute(1, 2, 3, 0).contiguous().cpu().numpy()
        for i, picture in enumerate(pictures):
            self._write_picture(picture, None if timestamps is None else timestamps[i])

    def close(self) -> None:
        """Returns None when the file is complete and has its name; safe to call twice.

        Raises:
            VideoWriteError: no frame was written, or finishing the file failed.
        """
        if self._container is None:
            return
        try:
            if self.num_frames == 0:
                raise VideoWriteError(f"{_OP}: a video must have frames, got none: {self.path}")
            self._encode(None)
            container, self._container = self._container, None
            self._guarded(container.close)
            self._file.finish()
            os.replace(self._partial, self.path)
        except OSError as error:
            raise VideoWriteError(_write_failure(self.path, error)) from error
        finally:
            self.discard()

    def discard(self) -> None:
        """Returns None after removing what was written so far, unless `close()` has succeeded."""
        container, self._container = self._container, None
        if container is not None:
            try:
                container.close()
            except Exception:  # the trailer of a file that is thrown away: the first error counts
                pass
        self._file.release()
        self._partial.unlink(missing_ok=True)

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def _open_stream(self, rate: Fraction, pixel_aspect: Fraction, crf: int) -> None:
        import av

        has_x264 = "libx264" in av.codecs_available
        if not has_x264:
            self._stored_time_base = _with_small_denominator(self._time_base)
        odd = self.height % 2 == 1 or self.width % 2 == 1
        self._pixel_format = "yuv444p" if has_x264 and odd else "yuv420p"
        container_format = _CONTAINERS[self.path.suffix.lower()]
        try:
            self._container = av.open(self._file, "w", format=container_format)
            options = {"crf": str(crf)} if has_x264 else {"qscale": "2"}
            codec = "libx264" if has_x264 else "mpeg4"
            stream = self._container.add_stream(codec, rate=rate, options=options)
            stream.height, stream.width = self.height, self.width
            stream.pix_fmt = self._pixel_format
            stream.time_base = self._stored_time_base
            context = stream.codec_context
            context.time_base = self._stored_time_base
            context.sample_aspect_ratio = pixel_aspect
            mark_colours(context)
            context.open()
        except (av.error.FFmpegError, OSError) as error:
            raise VideoWriteError(_write_failure(self.path, error)) from error
        self._stream = stream

    def _check(self, frames: torch.Tensor, timestamps: list[int] | None) -> None:
        if self._container is None:
            raise ValueError(f"{_OP}: the writer must be open, got a closed one: {self.path}")
        if frames.dtype != torch.uint8:
            raise TypeError(f"{_OP}: frames must be uint8, got {frames.dtype}")
        expected = (3, self.height, self.width)
        if frames.dim() != 4 or (frames.shape[0], *frames.shape[2:]) != expected:
            raise ValueError(
                f"{_OP}: frames must be [3, t, {self.height}, {self.width}], "
                f"got {list(frames.shape)}"
            )
        if timestamps is not None and len(timestamps) != frames.shape[1]:
            raise ValueError(
                f"{_OP}: timestamps must be one per frame ({frames.shape[1]}), "
                f"got {len(timestamps)}"
            )

    def _write_picture(self, picture: np.ndarray, timestamp: int | None) -> None:
        if timestamp is None:
            shown_at = self._last_written + 1
        else:
            if self._first_timestamp is None:
                self._first_timestamp = timestamp
            seconds = (timestamp - self._first_timestamp) * self._time_base
            shown_at = round(seconds / self._stored_time_base)
            if shown_at <= self._last_written:
                raise ValueError(
                    f"{_OP}: timestamps must increase strictly, got {timestamp} for frame "
                    f"{self.num_frames}"
                )
        frame = frame_from_rgb(picture, self._pixel_format)
        frame.pts, frame.time_base = shown_at, self._stored_time_base
        self._encode(frame)
        self._last_written = shown_at
        self.num_frames += 1

    def _encode(self, frame: Any) -> None:
        """Encodes one frame, or drains the encoder when frame is None."""
        self._guarded(lambda: [self._container.mux(p) for p in self._stream.encode(frame)])

    def _guarded(self, action: Any) -> None:
        import av

        try:
            action()
        except (av.error.FFmpegError, OSError) as error:
            raise VideoWriteError(
                _write_failure(self.path, self._file.first_error or error)
            ) from error
        if self._file.first_error is not None:  # FFmpeg may swallow what its writer reports
            raise VideoWriteError(_write_failure(self.path, self._file.first_error))


class _RecordingFile:
    """A file for FFmpeg to write to that remembers the first failure.

    FFmpeg buffers and may drop a write error until the end or for good; a full disk must not pass
    as a finished file.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self.name = str(path)
        self.first_error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.first_error = self.first_error or error
            raise

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def finish(self) -> None:
        """Returns None when every byte is on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def release(self) -> None:
        try:
            self._file.close()
        except OSError:  # closing flushes; on a full disk that fails once more
            pass


def _with_small_denominator(time_base: Fraction) -> Fraction:
    """Returns the same unit if MPEG-4 can store it, else the finest one that it can."""
    if time_base.denominator <= _MPEG4_LARGEST_DENOMINATOR:
        return time_base
    return Fraction(1, _MPEG4_LARGEST_DENOMINATOR)


def _write_failure(path: Path, error: BaseException) -> str:
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return f"{_OP}: cannot write {path} ({' '.join(reason.split())}), nothing was left behind"
