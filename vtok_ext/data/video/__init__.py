"""Video files in and out, through PyAV: chunks of frames with timestamps, in bounded memory."""

from .errors import TruncatedVideoError, VideoError, VideoReadError, VideoWriteError
from .reader import FrameChunk, VideoInfo, VideoReader, read_clip
from .writer import VideoWriter

__all__ = [
    "FrameChunk",
    "TruncatedVideoError",
    "VideoError",
    "VideoInfo",
    "VideoReadError",
    "VideoReader",
    "VideoWriteError",
    "VideoWriter",
    "read_clip",
]
