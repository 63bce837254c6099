"""Recipes of video files: the data section as a whole, and files that break while training."""

import pytest
import torch
from helpers import write_video
from tiny_recipe import tiny

from vtok_ext.data.clips import Augmentation, VideoClips
from vtok_ext.data.frame_sampling import FrameSampling
from vtok_ext.data.video_list import list_videos
from vtok_ext.training.clip_order import buckets_of
from vtok_ext.training.dry_run import dry_run
from vtok_ext.training.latent_clips import CachedLatents, LabelledClips
from vtok_ext.training.loop import train
from vtok_ext.training.overfit_check import four_clips
from vtok_ext.training.run_log import read_log
from vtok_ext.training.setup import build_clips
from vtok_ext.training.tokenizer_task import TokenizerTask

PLAIN = ["loss.discriminator=none", "loss.perceptual_weight=0", "run.validate_every=99"]


@pytest.fixture
def source(tmp_path):
    """A published list of 5 wide and 3 tall videos and one that is none; held-out ones apart."""
    (tmp_path / "train").mkdir()
    (tmp_path / "held_out").mkdir()
    for i in range(8):
        write_video(tmp_path / "train" / f"{i}.mp4", 14 + i, *((32, 48) if i < 5 else (48, 32)))
    (tmp_path / "train" / "x.mp4").write_bytes(b"none")
    write_video(tmp_path / "held_out" / "0.mp4", 9, 32, 32)
    names = [f"{i}.mp4" for i in range(8)] + ["x.mp4"]
    (tmp_path / "train.csv").write_text("\n".join(["videos", *names]))
    (tmp_path / "held_out.csv").write_text("videos\n0.mp4\n")
    return tmp_path


def recipe(source, *overrides):
    return tiny(
        *PLAIN,
        f"data.folder={source / 'train.csv'}",
        f"data.root={source / 'train'}",
        f"data.validation_folder={source / 'held_out.csv'}",
        f"data.validation_root={source / 'held_out'}",
        "data.buckets=[[5,16,24],[5,24,16]]",
        "data.fps=[10,30]",
        "data.crop=random",
        "data.zoom=1.3",
        "data.flip=true",
        "data.resize=bicubic",
        "run.batch_size=1",
        *overrides,
    )


def losses(out):
    return [line["loss"] for line in read_log(out / "log.jsonl") if line["kind"] == "train"]


def test_every_option_of_the_data_reaches_the_clips(source):
    warnings = []
    clips, held_out = build_clips(recipe(source).data, 0, warnings.append)
    assert clips.bucket_of == [0] * 5 + [1] * 3
    assert [tuple(clips[0, i].shape) for i in (0, 7)] == [(3, 5, 16, 24), (3, 5, 24, 16)]
    assert clips.samplings[0].fps == (10.0, 30.0)
    assert clips.augmentation == Augmentation("random", 1.3, True, "bicubic")
    assert not torch.equal(clips[0, 0], clips[1, 0])
    assert [tuple(clip.shape) for clip in held_out] == [(3, 5, 16, 16)]
    assert "x.mp4" in warnings[0] and warnings[1] == "left out: 1 of 9 videos"


def test_a_dry_run_and_the_four_clips_of_overfitting_are_of_one_bucket(source):
    """Clips of other buckets have another shape: no batch, and no four clips, can hold both."""
    several = recipe(source, "run.batch_size=3")
    assert dry_run(several, torch.device("cpu")).samples_per_step == 3 * several.run.accumulate
    clips, _ = build_clips(several.data, 0, lambda line: None)
    assert four_clips(clips).shape == (4, 3, 5, 16, 24)
    clips.bucket_of[0] = 1  # its bucket has 4 clips, 0 and 5 to 7
    expected = [clips[0, i] for i in (0, 5, 6, 7)]
    assert torch.equal(four_clips(clips), torch.stack(expected))


def test_buckets_that_fill_no_micro_batch_are_named(source):
    """They are not trained on, hence no part of an epoch."""
    line = "bucket [5, 24, 16] holds 3 clips, fewer than the 4 of a micro-batch of all processes: "
    line += "they are never trained on"
    found = dry_run(recipe(source, "run.batch_size=4"), torch.device("cpu"))
    assert line in found.notes and found.samples_per_epoch == 4
    warnings = []
    train(recipe(source, "run.batch_size=4", "run.steps=1"), source / "run", warn=warnings.append)
    assert warnings.count(line) == 1
    found = dry_run(recipe(source, "run.batch_size=3"), torch.device("cpu"))
    assert not any("bucket [" in note for note in found.notes) and found.samples_per_epoch == 6


def test_a_run_goes_on_in_the_middle_of_an_epoch(source):
    """With other numbers of workers too."""
    train(recipe(source, "run.steps=6"), source / "whole", warn=lambda line: None)
    train(recipe(source, "run.steps=3"), source / "parts", warn=lambda line: None)
    rest = recipe(source, "run.steps=6", "data.num_workers=2")
    train(rest, source / "parts", resume="auto", warn=lambda line: None)
    assert len(set(losses(source / "whole"))) == 6
    assert losses(source / "parts") == losses(source / "whole")
    warnings = []
    changed = recipe(source, "run.steps=7", "run.batch_size=2", "run.accumulate=1")
    train(changed, source / "parts", resume="auto", warn=warnings.append)
    assert any("had 1 clips of a bucket and has 2 now" in line for line in warnings)


def test_files_that_break_while_training_are_counted_and_listed(source):
    def damage(progress):
        if progress.step == 1:
            for i in (0, 1):
                (source / "train" / f"{i}.mp4").write_bytes(b"gone")

    warnings = []
    result = train(
        recipe(source, "run.steps=16", "data.num_workers=1"),
        source / "run",
        warn=warnings.append,
        on_step=damage,
    )
    assert result.step == 16  # two epochs
    lines = (source / "run" / "damaged.txt").read_text().splitlines()
    assert {line.partition(":")[0] for line in lines} == {"0.mp4", "1.mp4"}
    assert warnings[-1].startswith("2 videos could not be read while training")
    assert str(source / "run" / "damaged.txt") in warnings[-1]


def test_a_damage_log_that_cannot_be_written_is_refused(source, monkeypatch):
    """At the start, before any video is opened, and without leaving an empty file."""
    log = source / "log.txt"
    for path, message in (
        (source / "nowhere" / "log.txt", "data.damage_log must lie in an existing folder, got"),
        (source / "train", "data.damage_log must be a file, got the folder"),
    ):
        with pytest.raises(ValueError, match=message):
            build_clips(recipe(source, f"data.damage_log={path}").data, 0, print)
    build_clips(recipe(source, f"data.damage_log={log}").data, 0, lambda line: None)
    assert not log.exists()
    log.touch()
    monkeypatch.setattr("os.access", lambda path, mode: path != log)  # root may write anything
    with pytest.raises(ValueError, match="data.damage_log must be a writable file, got"):
        build_clips(recipe(source, f"data.damage_log={log}").data, 0, print)


class Wrapped:
    """As tasks wrap clips: to add a label, a length, or to keep latents."""

    def __init__(self, clips):
        self.clips = clips

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, place):
        return self.clips[place]


def test_files_that_break_are_named_whatever_wraps_them(source, monkeypatch):
    clips, held_out = build_clips(recipe(source).data, 0, lambda line: None)
    (source / "train" / "1.mp4").write_bytes(b"gone")
    wrapped = Wrapped(Wrapped(clips))
    assert buckets_of(wrapped) == clips.bucket_of
    monkeypatch.setattr(TokenizerTask, "data", lambda task, warn: (wrapped, held_out))
    warnings = []
    train(recipe(source, "run.steps=7"), source / "run", warn=warnings.append)
    assert (source / "run" / "damaged.txt").read_text().startswith("1.mp4: ")
    assert warnings[-1].startswith("1 videos could not be read while training")


def test_labels_are_those_of_the_video_that_stands_in(tmp_path):
    for name, length in (("a/0.mp4", 4), ("b/0.mp4", 5)):
        (tmp_path / name).parent.mkdir()
        write_video(tmp_path / name, length, 16, 16)
    files = VideoClips(list_videos(tmp_path), FrameSampling(3), [(3, 16, 16)])
    clips = LabelledClips(files, tmp_path)
    assert clips.names == ["a", "b"] and [clips[0, i][1] for i in (0, 1)] == [0, 1]
    (tmp_path / "a" / "0.mp4").write_bytes(b"gone")
    clip, label = clips[0, 0]
    assert label == 1 and torch.equal(clip, files[0, 1])
    latent, label = CachedLatents(clips, lambda batch: batch[:, :, 0])[0, 0]
    assert label == 1 and torch.equal(latent, clip[:, 0])


def test_a_damaged_held_out_video_is_not_replaced_by_one_that_counts_twice(source):
    held_out = source / "held_out"
    for i in (1, 2, 3):
        write_video(held_out / f"{i}.mp4", 9 + i, 32, 32)
    content = bytearray((held_out / "1.mp4").read_bytes())
    begin = content.index(b"mdat") + 8
    size = int.from_bytes(content[begin - 8 : begin - 4], "big") - 8
    content[begin : begin + size] = bytes(size)  # its index is whole, its frames are not
    (held_out / "1.mp4").write_bytes(content)
    folder = [f"data.validation_folder={held_out}", "data.validation_root=null"]
    settings = recipe(source, *folder, "data.validation_clips=3").data
    warnings = []
    _, clips = build_clips(settings, 0, warnings.append)
    assert len(clips) == 3
    assert not any(torch.equal(a, b) for i, a in enumerate(clips) for b in clips[:i])
    assert any(line.startswith("left out: 1.mp4") for line in warnings)
    more = recipe(source, *folder, "data.validation_clips=4").data
    with pytest.raises(ValueError, match="must hold 4 usable files, got 3"):
        build_clips(more, 0, warnings.append)


def test_other_videos_are_announced_when_a_run_goes_on(source):
    short = ["run.steps=2", "data.buckets=[]", "data.num_frames=5", "data.height=16"]
    short += ["data.width=16", f"data.folder={source / 'train'}", "data.root=null"]
    train(recipe(source, *short), source / "run", warn=lambda line: None)
    said = []
    again = recipe(source, *short, "run.steps=3")
    train(again, source / "run", resume="auto", warn=said.append)
    assert not any("videos of before" in line for line in said)
    write_video(source / "train" / "00.mp4", 14, 32, 48)
    train(recipe(source, *short, "run.steps=4"), source / "run", resume="auto", warn=said.append)
    assert any("the 8 videos of before are 9 now" in line for line in said)
