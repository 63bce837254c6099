"""What is known of videos before training, and what of it is remembered."""

import json
import os

import pytest
from helpers import write_video

from vtok_ext.data import video_scan
from vtok_ext.data.clips import VideoClips
from vtok_ext.data.frame_sampling import FrameSampling
from vtok_ext.data.video import read_times
from vtok_ext.data.video_list import list_videos
from vtok_ext.data.video_scan import VideoFacts, VideoIndex


@pytest.fixture
def opened(monkeypatch):
    """The names of the files that a scan opens."""
    names = []

    def read(path, *arguments, **options):
        names.append(path.name)
        return read_times(path, *arguments, **options)

    monkeypatch.setattr(video_scan, "read_times", read)
    return names


@pytest.fixture
def videos(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    write_video(folder / "a.mp4", 9)
    write_video(folder / "b.mp4", 5, 48, 32)
    (folder / "c.mp4").write_bytes(b"none")
    return folder


def test_only_what_has_changed_is_opened_again(videos, opened, tmp_path):
    path = tmp_path / "run" / "index.json"
    first = VideoIndex(path)
    found = first.scan(list_videos(videos))
    b = VideoFacts(5, 4 / 30, 48, 32, 30.0)
    assert found[:2] == [VideoFacts(9, found[0].duration, 32, 48, 30.0), b]
    assert found[0].duration == pytest.approx(8 / 30) and "must be a video" in found[2]
    first.save()
    assert sorted(opened) == ["a.mp4", "b.mp4", "c.mp4"] and os.listdir(path.parent) == [path.name]
    opened.clear()
    second = VideoIndex(path)
    assert second.scan(list_videos(videos)) == found and not opened
    write_video(videos / "b.mp4", 7)
    (videos / "c.mp4").touch()
    third = VideoIndex(path)
    again = third.scan(list_videos(videos))
    assert (
        again[0] == found[0] and again[1].num_frames == 7 and sorted(opened) == ["b.mp4", "c.mp4"]
    )
    third.save()
    opened.clear()
    assert VideoIndex(path).scan(list_videos(videos)) == again and not opened


@pytest.mark.parametrize("content", ["", "[]", '{"format": "vtok_ext.videos", "version": 9}'])
def test_what_is_no_index_counts_as_nothing(content, videos, opened, tmp_path):
    path = tmp_path / "index.json"
    path.write_text(content)
    index = VideoIndex(path)
    index.scan(list_videos(videos))
    index.save()
    assert len(opened) == 3 and len(json.loads(path.read_text())["videos"]) == 3


def test_entries_of_other_facts_are_opened_again(videos, opened, tmp_path):
    """Such as those of an index from before `fps` was one."""
    index = VideoIndex(tmp_path / "index.json")
    found = index.scan(list_videos(videos))
    index.save()
    values = json.loads(index.path.read_text())
    del values["videos"][str(videos / "a.mp4")]["facts"]["fps"]
    index.path.write_text(json.dumps(values))
    opened.clear()
    assert VideoIndex(index.path).scan(list_videos(videos)) == found and opened == ["a.mp4"]


def test_a_file_that_is_gone_is_not_remembered(videos, opened, tmp_path):
    path = tmp_path / "index.json"
    items = list_videos(videos)
    (videos / "a.mp4").rename(videos / "away")
    index = VideoIndex(path)
    assert "No such file" in index.scan(items)[0]
    index.save()
    (videos / "away").rename(videos / "a.mp4")
    assert VideoIndex(path).scan(items)[0].num_frames == 9


def test_clips_of_known_facts_open_nothing(videos, opened):
    items = list_videos(videos)
    facts = [VideoFacts(9, 8 / 30, 32, 48, 30), "damaged", VideoFacts(3, 2 / 30, 32, 48, 30)]
    clips = VideoClips(items, FrameSampling(5), [(5, 16, 16)], facts=facts)
    assert [video.name for video in clips.videos] == ["a.mp4"] and not opened
    assert clips.unreadable == ["b.mp4: damaged", "c.mp4 has 3 of 5 frames, too few"]
