"""Suffixes of the names of videos, which nobody means a token or latent file by."""

# What `VideoWriter` writes.
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv")
OTHER_VIDEO_SUFFIXES = (
    *(".webm", ".avi", ".gif", ".mpg", ".mpeg", ".m2v", ".ts", ".mts", ".m2ts", ".wmv", ".flv"),
    *(".ogv", ".ogg", ".3gp", ".vob", ".mxf", ".y4m", ".apng"),
)
