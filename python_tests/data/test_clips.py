"""Clips for training from video files."""

from fractions import Fraction

import pytest
import torch

from vtok_ext.data.clips import FolderClips, ProceduralClips, fit
from vtok_ext.data.procedural import procedural_clip
from vtok_ext.data.video import VideoWriter, read_clip


def write(path, num_frames, height=32, width=48):
    frames = procedural_clip(num_frames, height, width, seed=num_frames)
    with VideoWriter(path, height=height, width=width, time_base=Fraction(1, 30)) as writer:
        writer.write(frames, list(range(num_frames)))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "inner").mkdir()
    write(tmp_path / "a.mp4", 21)
    write(tmp_path / "inner" / "b.mp4", 5)
    write(tmp_path / "short.mp4", 3)
    (tmp_path / "broken.mp4").write_bytes(b"no video at all")
    return tmp_path


def test_windows_of_files(folder):
    clips = FolderClips(folder, 5, 32, 48)
    assert [path.name for path in clips.paths] == ["a.mp4", "b.mp4"]
    whole = read_clip(folder / "a.mp4")[0]
    windows = [whole[:, t : t + 5] for t in range(17)]
    starts = set()
    for epoch in range(12):
        clip = clips[epoch, 0]
        starts |= {t for t in range(17) if torch.equal(windows[t], clip)}
        assert torch.equal(clip, clips[epoch, 0])
    assert len(starts) > 3 and max(starts) > 8
    assert torch.equal(clips[0, 1], read_clip(folder / "inner" / "b.mp4")[0])


def test_files_left_out_are_named(folder):
    lines = "\n".join(FolderClips(folder, 5, 16, 16).unreadable)
    assert "broken.mp4" in lines and "short.mp4 has 3 of 5 frames" in lines


def test_fit_covers_and_crops():
    video = procedural_clip(2, 20, 40)
    assert fit(video, 10, 10).shape == (3, 2, 10, 10)
    assert fit(video, 33, 7).shape == (3, 2, 33, 7)
    assert torch.equal(fit(video, 20, 30), video[:, :, :, 5:35])


def test_procedural_clips_differ_and_repeat():
    clips = ProceduralClips(3, 2, 8, 8, first_seed=5)
    assert len(clips) == 3
    assert torch.equal(clips[0, 1], procedural_clip(2, 8, 8, seed=6))
    assert torch.equal(clips[0, 1], clips[4, 1])


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="folder must exist, got"):
        FolderClips(tmp_path / "nowhere", 5, 8, 8)
    with pytest.raises(ValueError, match="5 frames or more, got 0 files, none of them usable"):
        FolderClips(tmp_path, 5, 8, 8)
    with pytest.raises(ValueError, match="num_clips must be at least 1, got 0"):
        ProceduralClips(0, 1, 8, 8)
