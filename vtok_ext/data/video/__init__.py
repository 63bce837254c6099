"""Video files in and out, through PyAV: chunks of frames with timestamps, in bounded memory."""

from .errors import TruncatedVideoError, VideoError, VideoReadError, VideoWriteError
from .frames_at import VideoTimes, frames_in_order, read_frames_at, read_times
from .reader import FrameChunk, VideoInfo, VideoReader, read_clip
from .writer import VideoWriter

__all__ = [
    "FrameChunk",
    "TruncatedVideoError",
    "VideoError",
    "VideoInfo",
    "VideoReadError",
    "VideoReader",
    "VideoTimes",
    "VideoWriteError",
    "VideoWriter",
    "frames_in_order",
    "read_clip",
    "read_frames_at",
    "read_times",
]
