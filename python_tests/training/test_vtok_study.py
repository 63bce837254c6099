"""The VTok study at its smallest: every row runs, and rows differ in nothing but what they show."""

import dataclasses
from pathlib import Path

import pytest
import torch
from helpers import import_or_skip

from vtok_ext.data.captioned import CaptionedClips
from vtok_ext.models.vision_encoder import SmallViT
from vtok_ext.training.studies.report import write_report
from vtok_ext.training.studies.runner import planned_runs, run_study
from vtok_ext.training.studies.specification import load_study
from vtok_ext.training.studies.vtok_clips import EncoderSettings, StudyClips
from vtok_ext.training.studies.vtok_row import VTokRow, run_row

import_or_skip("transformers")
STUDIES = Path(__file__).parents[2] / "bench" / "studies"


def nothing(fraction, line):
    """Shows no progress."""


def test_smoke_study_of_every_row(tmp_path):
    torch.set_num_threads(1)
    study = load_study(STUDIES / "vtok.yaml")
    runs = planned_runs(study, seeds=study.seeds[:1])
    outcome = run_study(study, tmp_path, runs, smoke=True)
    assert outcome.failed == {} and len(outcome.done) == len(study.rows)
    found = write_report(study, tmp_path, tmp_path / "report.md", smoke=True)
    assert len(found) == len(study.comparisons)
    text = (tmp_path / "report.md").read_text()
    # 24 frames of 32 pixels: S + (T - 1) against S * K and S * T.
    for row, tokens in (("blind", 0), ("vtok-attention", 39), ("frames-4", 64), ("s4", 27)):
        assert f"| {row} | 1 of 3 | {tokens} |" in text
    assert "| all-frames | 1 of 3 | 384 |" in text and "| stride-4 | 1 of 3 | 21 |" in text
    assert "| vtok-fsq | 1 of 3 | 39 |" in text
    shared = list((tmp_path / "work" / "shared").glob("*.safetensors"))
    assert len(shared) == 3  # one encoder, the maps of training and of held-out clips


def test_smoke_study_of_generation(tmp_path):
    study = load_study(STUDIES / "vtok_generation.yaml")
    runs = planned_runs(study, seeds=study.seeds[:1])
    outcome = run_study(study, tmp_path, runs, smoke=True)
    assert outcome.failed == {} and len(outcome.done) == len(study.rows)
    write_report(study, tmp_path, tmp_path / "report.md", smoke=True)
    assert "| vtok-flow | 1 of 3 | 27 |" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "pictures" / "vtok-flow-seed-0-generated.png").stat().st_size > 0


def test_maps_are_those_of_their_encoder(tmp_path):
    """With more training clips the held-out ones are the same, but not what the encoder sees."""
    settings = EncoderSettings(16, 8, 16, 1, 2, steps=2)
    test = CaptionedClips(2, 24, 16, 16, split="test")
    few, more = CaptionedClips(2, 24, 16, 16), CaptionedClips(4, 24, 16, 16)
    first = StudyClips(tmp_path, test, settings, few, nothing).maps
    second = StudyClips(tmp_path, test, settings, more, nothing)
    expected = second.encoder(test.clip(0).video.transpose(0, 1).float() / 127.5 - 1)
    assert torch.allclose(second.maps[0].float(), expected, atol=1e-2)
    assert not torch.equal(first, second.maps)


@pytest.mark.slow
def test_one_picture_tells_colours(tmp_path):
    """Of 8, among other questions, within 1,000 steps. With features as they come from the encoder
    and the usual initial weights not even 5,000 steps got above chance."""
    torch.set_num_threads(1)
    settings = {"steps": 1000, "train_clips": 512, "eval_clips": 64, "encoder_steps": 300}
    result = run_row(
        {"shown": "frames", "num_shown": 1, **settings}, 0, tmp_path / "work" / "run", nothing
    )
    colours = result.per_clip["accuracy_colour"]
    assert sum(colours) / len(colours) > 0.3


def test_wrong_settings_name_the_closest():
    with pytest.raises(ValueError, match="got 'stepz'; did you mean 'steps'"):
        VTokRow.of({"stepz": 3})


@pytest.mark.parametrize("key_frame", ["first", "auto"])
@pytest.mark.parametrize("pool", ["mean", "grid", "attention"])
def test_rows_show_what_the_tokenizer_encodes(key_frame, pool):
    """Of maps that were computed before, as VTok of the frames themselves."""
    settings = {"shown": "vtok", "key_frame": key_frame, "residual_pool": pool, "num_frames": 24}
    sizes = {"size": 32, "image_size": 32, "patch": 4, "encoder_dim": 16, "encoder_heads": 2}
    row = VTokRow.of({**settings, **sizes, "stride": 2})
    clips = CaptionedClips(4, 24, 32, 32)
    torch.manual_seed(0)
    model = row.build(SmallViT(32, 4, 16, 3, 2), clips).eval()
    video = torch.stack([clips.clip(i).video for i in range(4)])
    tokenizer = model.tokenizer
    tokenizer.config = dataclasses.replace(tokenizer.config, key_frame=key_frame)
    expected = tokenizer.encode(video)
    maps = torch.stack([tokenizer._maps_of(c.transpose(0, 1).float() / 127.5 - 1) for c in video])
    tokens, positions, _, _ = model._encode(maps, None)
    assert torch.equal(positions, expected.positions)
    assert torch.allclose(tokens, expected.latent, atol=1e-5)
    keys = set(positions[:, 0, 0].tolist())
    assert keys == {0} if key_frame == "first" else keys != {0}
