"""What can go wrong with a video file, as one hierarchy: catching VideoError catches all of it."""

from __future__ import annotations


class VideoError(ValueError):
    """A video file that cannot be read or written as asked; the message is one line."""


class VideoReadError(VideoError):
    """The input is missing, is not a video, or holds no frame."""


class TruncatedVideoError(VideoReadError):
    """The file stops early or is damaged.

    Attributes:
        frames_readable: number of frames that decode before the damage.
    """

    def __init__(self, message: str, frames_readable: int) -> None:
        super().__init__(message)
        self.frames_readable = frames_readable


class VideoWriteError(VideoError):
    """The output cannot be created, or writing it failed; nothing is left behind."""
