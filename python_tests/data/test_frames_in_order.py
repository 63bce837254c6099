"""Frames one after the other: those that `read_frames_at` gives at once, in one pass."""

import pytest
import torch
from helpers import write_video

from vtok_ext.data.video import (
    TruncatedVideoError,
    VideoReadError,
    frames_at,
    frames_in_order,
    read_frames_at,
    read_times,
)


@pytest.fixture
def decoded(monkeypatch):
    """How often `read_frames_at` decoded something."""
    calls, decode = [], frames_at._decode

    def count(*arguments, **options):
        calls.append(options["seek"])
        return decode(*arguments, **options)

    monkeypatch.setattr(frames_at, "_decode", count)
    return calls


def in_order(path, stamps):
    return torch.stack(list(frames_in_order(path, stamps))).permute(3, 0, 1, 2)


def test_some_of_the_frames_and_some_twice(decoded, tmp_path):
    write_video(tmp_path / "a.mp4", 40)
    times = read_times(tmp_path / "a.mp4").timestamps
    stamps = [times[i] for i in (0, 1, 1, 1, 5, 6, 30, 30, 39)]
    found = in_order(tmp_path / "a.mp4", stamps)
    assert not decoded and torch.equal(found, read_frames_at(tmp_path / "a.mp4", stamps))


def test_a_frame_that_does_not_come_in_its_order(decoded, tmp_path, monkeypatch):
    write_video(tmp_path / "a.mp4", 40)
    times = read_times(tmp_path / "a.mp4").timestamps
    expected = read_frames_at(tmp_path / "a.mp4", times)
    run_through = frames_at._run_through
    monkeypatch.setattr(frames_at, "_run_through", lambda *a: list(run_through(*a))[:7])
    decoded.clear()
    assert torch.equal(in_order(tmp_path / "a.mp4", times), expected)
    assert decoded == [True] * 3  # 33 frames, 16 at a time


def test_a_frame_that_is_not_there_and_a_file_that_ends(tmp_path):
    write_video(tmp_path / "a.mkv", 40)
    times = read_times(tmp_path / "a.mkv").timestamps
    found = frames_in_order(tmp_path / "a.mkv", [times[0], times[1] + 1])
    assert next(found).shape == (32, 48, 3)
    with pytest.raises(VideoReadError, match=f"got none at {times[1] + 1}"):
        next(found)
    content = (tmp_path / "a.mkv").read_bytes()
    (tmp_path / "a.mkv").write_bytes(content[: len(content) // 2])
    given = []
    with pytest.raises((VideoReadError, TruncatedVideoError)) as one:
        for frame in frames_in_order(tmp_path / "a.mkv", times):
            given.append(frame)
    with pytest.raises(type(one.value)):
        read_frames_at(tmp_path / "a.mkv", times)
    assert 0 < len(given) < 40
