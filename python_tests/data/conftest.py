"""Small clips and video files for the tests of vtok_ext.data."""

from fractions import Fraction

import pytest
import torch

from vtok_ext.data.procedural import procedural_clip
from vtok_ext.data.video import VideoWriter


@pytest.fixture
def make_clip():
    """Returns a function (num_frames, height, width) -> [3, T, H, W] uint8, smooth in space."""

    def make(num_frames: int, height: int, width: int) -> torch.Tensor:
        return procedural_clip(num_frames, height, width, seed=3, num_shapes=2)

    return make


@pytest.fixture
def write_video(make_clip):
    """Returns a function that writes a procedural video and returns its frames."""

    def write(path, num_frames=9, height=32, width=48, timestamps=None, time_base=Fraction(1, 30)):
        frames = make_clip(num_frames, height, width)
        with VideoWriter(path, height=height, width=width, time_base=time_base) as writer:
            writer.write(frames, timestamps)
        return frames

    return write
