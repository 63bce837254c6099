"""Clips for training from video files."""

import random

import numpy as np
import pytest
import torch
from helpers import write_video

from vtok_ext.data.buckets import check_buckets, choose_bucket
from vtok_ext.data.clips import Augmentation, ProceduralClips, VideoClips, fit
from vtok_ext.data.frame_sampling import FrameSampling
from vtok_ext.data.procedural import procedural_clip
from vtok_ext.data.video import read_clip
from vtok_ext.data.video_list import list_videos


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "inner").mkdir()
    write_video(tmp_path / "a.mp4", 21)
    write_video(tmp_path / "inner" / "b.mp4", 5)
    write_video(tmp_path / "short.mp4", 3)
    (tmp_path / "broken.mp4").write_bytes(b"no video at all")
    return tmp_path


def clips_of(folder, *shape, fps=None, shortest=None, **options):
    sampling = FrameSampling(shape[0], fps, shortest=shortest)
    return VideoClips(list_videos(folder), sampling, [shape], **options)


def test_windows_of_files(folder):
    clips = clips_of(folder, 5, 32, 48)
    assert [video.name for video in clips.videos] == ["a.mp4", "inner/b.mp4"]
    whole = read_clip(folder / "a.mp4")[0]
    windows = [whole[:, t : t + 5] for t in range(17)]
    starts = set()
    for epoch in range(12):
        clip = clips[epoch, 0]
        starts |= {t for t in range(17) if torch.equal(windows[t], clip)}
        assert torch.equal(clip, clips[epoch, 0])
    assert len(starts) > 3 and max(starts) > 8
    assert torch.equal(clips[0, 1], read_clip(folder / "inner" / "b.mp4")[0])


def test_short_videos_are_padded(folder):
    clips = clips_of(folder, 8, 32, 48, shortest=4)
    assert [video.name for video in clips.videos] == ["a.mp4", "inner/b.mp4"]
    assert "short.mp4 has 3 of 4 frames" in "\n".join(clips.unreadable)
    assert clips.with_length((0, 0))[1] == 8
    clip, length = clips.with_length((0, 1))
    whole = read_clip(folder / "inner" / "b.mp4")[0]
    assert length == 5 and torch.equal(clip, whole[:, [0, 1, 2, 3, 4, 4, 4, 4]])
    assert torch.equal(clips[0, 1], clip)


def test_fixed_rate(folder):
    clips = clips_of(folder, 3, 32, 48, fps=3.0)  # every tenth of 21 frames at 30 fps
    assert len(clips) == 1
    assert torch.equal(clips[0, 0], read_clip(folder / "a.mp4")[0][:, [0, 10, 20]])


def test_files_left_out_are_named(folder):
    lines = "\n".join(clips_of(folder, 5, 16, 16).unreadable)
    assert "broken.mp4" in lines and "short.mp4 has 3 of 5 frames" in lines


def test_a_file_damaged_later_is_replaced_and_named(folder, tmp_path):
    log = tmp_path / "damaged.txt"
    clips = clips_of(folder, 5, 32, 48, damage_log=log)
    (folder / "a.mp4").write_bytes(b"gone")
    for _ in range(2):
        assert torch.equal(clips[3, 0], read_clip(folder / "inner" / "b.mp4")[0])
    line = log.read_text()
    assert line.startswith("a.mp4: ") and line.count("\n") == 1
    (folder / "inner" / "b.mp4").write_bytes(b"gone")
    with pytest.raises(ValueError, match="some video must be readable"):
        clips[0, 0]


def test_scan_on_the_way(folder):
    clips = clips_of(folder, 5, 32, 48, scan=False)
    assert len(clips) == 4 and not clips.unreadable
    broken = [video.name for video in clips.videos].index("broken.mp4")
    assert torch.equal(clips[0, broken], read_clip(folder / "inner" / "b.mp4")[0])
    assert "broken.mp4" in clips.unreadable[0]


def test_buckets(tmp_path):
    write_video(tmp_path / "long.mp4", 9)
    write_video(tmp_path / "short.mp4", 4)
    write_video(tmp_path / "tall.mp4", 9, 48, 32)
    buckets = [(8, 32, 48), (8, 48, 32), (4, 16, 16)]
    clips = VideoClips(list_videos(tmp_path), FrameSampling(1), buckets)
    assert clips.bucket_of == [0, 2, 1]
    assert [tuple(clips[0, i].shape[1:]) for i in range(3)] == [buckets[0], buckets[2], buckets[1]]
    assert choose_bucket(buckets, 100, 100, lambda frames: frames < 4) is None
    with pytest.raises(ValueError, match=r"different \(T, H, W\)"):
        check_buckets([(1, 2, 3), (1, 2, 3)])


def test_buckets_by_the_reference_rule(tmp_path):
    """It takes videos of any length, but only those that fill a longer bucket go there."""
    for count in (2, 8, 9, 21):
        write_video(tmp_path / f"{count:02}.mp4", count)
    buckets = [(9, 16, 16), (5, 16, 16)]
    videos = list_videos(tmp_path)
    every = VideoClips(videos, FrameSampling(1, 30.0, "reference"), buckets)
    assert every.bucket_of == [1, 1, 0, 0]
    second = VideoClips(videos, FrameSampling(1, 15.0, "reference"), buckets)
    assert second.bucket_of == [1, 1, 1, 0]
    assert second[0, 0].shape == (3, 5, 16, 16) and not second.unreadable


def test_a_damage_log_that_cannot_be_written_ends_nothing(folder, tmp_path):
    clips = clips_of(folder, 5, 32, 48, damage_log=tmp_path / "nowhere" / "damaged.txt")
    (folder / "a.mp4").write_bytes(b"gone")
    with pytest.warns(UserWarning, match="damage_log must be writable.*not listed there: a.mp4: "):
        clip = clips[3, 0]
    assert torch.equal(clip, read_clip(folder / "inner" / "b.mp4")[0])
    assert clips.unreadable[-1].startswith("a.mp4: ")


def test_fit_covers_and_crops():
    video = procedural_clip(2, 20, 40)
    assert fit(video, 10, 10).shape == (3, 2, 10, 10)
    assert fit(video, 33, 7).shape == (3, 2, 33, 7)
    assert torch.equal(fit(video, 20, 30), video[:, :, :, 5:35])
    assert torch.equal(fit(video, 20, 30, place=(0, 1)), video[:, :, :, 10:])
    assert fit(video, 20, 40, zoom=1.5).shape == video.shape


def test_bicubic_is_that_of_pil():
    image = pytest.importorskip("PIL.Image")
    video = procedural_clip(1, 40, 60)
    picture = image.fromarray(video[:, 0].permute(1, 2, 0).numpy())
    expected = torch.from_numpy(np.array(picture.resize((48, 32), image.Resampling.BICUBIC)))
    ours = fit(video, 32, 48, resize="bicubic")[:, 0].permute(1, 2, 0)
    difference = (ours.int() - expected.int()).abs().float()
    assert difference.max() <= 2 and difference.mean() < 0.3  # PIL rounds between its two passes
    assert not torch.equal(fit(video, 32, 48), fit(video, 32, 48, resize="bicubic"))
    with pytest.raises(ValueError, match="resize must be one of .*, got 'area'"):
        Augmentation(resize="area")


def test_augmentation_is_the_same_for_all_frames():
    still = procedural_clip(1, 20, 40).expand(-1, 4, -1, -1)
    augmentation = Augmentation("random", zoom=2.0, flip=True)
    seen = {}
    for seed in range(8):
        clip = augmentation.apply(still, 16, 16, random.Random(seed))
        assert clip.shape == (3, 4, 16, 16)
        assert all(torch.equal(clip[:, t], clip[:, 0]) for t in range(4))
        assert torch.equal(clip, augmentation.apply(still, 16, 16, random.Random(seed)))
        seen[clip.numpy().tobytes()] = seed
    assert len(seen) == 8
    flipped = [Augmentation(flip=True).apply(still, 20, 40, random.Random(s)) for s in range(8)]
    assert {torch.equal(clip, still) for clip in flipped} == {True, False}
    with pytest.raises(ValueError, match="zoom must be in"):
        Augmentation(zoom=0.5)


def test_procedural_clips_differ_and_repeat():
    clips = ProceduralClips(3, 2, 8, 8, first_seed=5)
    assert len(clips) == 3
    assert torch.equal(clips[0, 1], procedural_clip(2, 8, 8, seed=6))
    assert torch.equal(clips[0, 1], clips[4, 1])


def test_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="source must exist, got"):
        list_videos(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="source must name videos, got none"):
        list_videos(tmp_path)
    write_video(tmp_path / "short.mp4", 2)
    with pytest.raises(ValueError, match="5 frames or more, got 1 files, none of them usable"):
        clips_of(tmp_path, 5, 8, 8)
    with pytest.raises(ValueError, match="num_clips must be at least 1, got 0"):
        ProceduralClips(0, 1, 8, 8)
