"""Rows of the CoordTok study: each kind runs, is measured alike and shares its training."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import vtok_ext as vt
from vtok_ext.training.studies import coordtok_row, row_training
from vtok_ext.training.studies.coordtok_row import CoordTokRow, run_row
from vtok_ext.training.studies.report import write_report
from vtok_ext.training.studies.runner import planned_runs, run_study
from vtok_ext.training.studies.specification import load_study

STUDIES = Path(__file__).parents[2] / "bench" / "studies"
TINY = {
    "model": {
        "video_shape": [8, 16, 16],
        "enc_embed_dim": 8,
        "enc_num_layers": 1,
        "enc_num_heads": 2,
        "enc_patch_num_layers": 1,
        "enc_patch_size": [4, 8, 8],
        "latent_resolution": [4, 4, 4],
        "latent_channels": 2,
        "latent_patch_size": [2, 2, 2],
        "dec_embed_dim": 8,
        "dec_num_layers": 1,
        "dec_num_heads": 2,
        "dec_patch_size": [1, 8, 8],
    },
    "ratio": 0.25,
    "window": 4,
    "steps": 2,
    "batch_size": 2,
    "train_clips": 4,
    "eval_clips": 6,
}
VIDTOK = {
    "regularizer": "kl",
    "z_channels": 2,
    "ch": 4,
    "ch_mult": [1, 1, 1],
    "num_res_blocks": 1,
    "causal": False,
}
THIRDS = {f"psnr_{name}_{i}" for name in ("dynamic", "frequency") for i in (1, 2, 3)}
CLIP_METRICS = {"psnr", "ssim", "boundary_jump", "psnr_mean_colour", "psnr_mean_frame"} | THIRDS
CLIP_METRICS |= {"fall_dynamic", "fall_frequency"}


def mean(result, metric):
    return sum(result.per_clip[metric]) / len(result.per_clip[metric])


@pytest.fixture
def run(tmp_path):
    def call(row, seed=0, **settings):
        folder = tmp_path / "work" / row / f"seed-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        result = run_row({**TINY, **settings}, seed, folder, lambda fraction, note: None)
        result.check()
        return result

    call.shared = tmp_path / "work" / "shared"
    return call


def test_a_coordtok_and_a_vidtok_are_measured_alike(run):
    row = run("coordtok")
    assert set(row.per_clip) == CLIP_METRICS | {"psnr_sliced"}
    assert row.pictures[0].read_bytes().startswith(b"\x89PNG")
    vidtok = run("vidtok", vidtok=VIDTOK, muon_lr=0.01)
    assert set(vidtok.per_clip) == CLIP_METRICS
    assert vidtok.held_out == row.held_out
    assert vidtok.per_clip["psnr_mean_colour"] == row.per_clip["psnr_mean_colour"]
    assert vidtok.per_clip["psnr"] != row.per_clip["psnr"]
    # Three planes of 4 x 4 cells; two windows of 4 frames, a quarter of those and of the pixels.
    assert (row.summary["tokens"], row.summary["latent_numbers"]) == (48, 96)
    assert (vidtok.summary["tokens"], vidtok.summary["latent_numbers"]) == (32, 64)
    assert row.summary["points_per_step"] == 2 * 8


def test_a_vidtok_trains_for_the_work_of_the_coordtok(run):
    settings = {"steps": 600, "warmup": 5, "vidtok": VIDTOK, "muon_lr": 0.01}
    trained, fresh = run("trained", **settings), run("fresh", **{**settings, "steps": 2})
    row = CoordTokRow.of({**TINY, "steps": 600})
    costs = coordtok_row._Training(row, 0, Path(), print).costs(row.new_model())
    assert 10 < trained.summary["training_steps"] < 100
    assert trained.summary["training_tera_macs"] == pytest.approx(
        costs["training_tera_macs"], rel=0.5 / trained.summary["training_steps"]
    )
    assert mean(trained, "psnr") > mean(fresh, "psnr") + 1


@pytest.mark.parametrize("muon_lr", [None, 0.02])
def test_a_coordtok_learns(run, muon_lr):
    trained = run("trained", steps=100, lr=0.01, muon_lr=muon_lr, warmup=5)
    fresh = run("fresh")
    assert mean(trained, "psnr") > mean(fresh, "psnr") + 3
    assert trained.summary["training_tera_macs"] > 40 * fresh.summary["training_tera_macs"]


def test_thirds_are_of_the_clips_in_order_of_what_moves(run):
    from vtok_ext.metrics import video_dynamics

    found = run("coordtok").per_clip
    (clips,) = (
        clips
        for clips in (load_file(p)["clips"] for p in run.shared.glob("clips-*"))
        if len(clips) == TINY["eval_clips"]
    )
    order = video_dynamics(clips).argsort().tolist()
    assert sorted(found["psnr_dynamic_1"]) == sorted(found["psnr"][i] for i in order[:2])
    assert sorted(found["psnr_dynamic_3"]) == sorted(found["psnr"][i] for i in order[4:])
    above = [a - b for a, b in zip(found["psnr"], found["psnr_mean_colour"], strict=True)]
    fall = sum(above[i] for i in order[:2]) - sum(above[i] for i in order[4:])
    assert sum(found["fall_dynamic"]) == pytest.approx(fall)
    video = clips.float() / 127.5 - 1
    still = vt.metrics.psnr(video[:1].mean(2, keepdim=True).expand_as(video[:1]), video[:1])
    assert found["psnr_mean_frame"][0] == pytest.approx(still.item(), abs=1e-4)


@pytest.fixture
def seen(monkeypatch):
    """Clips that training steps got, in order."""
    kept = []
    to_video = coordtok_row.to_video
    monkeypatch.setattr(
        coordtok_row, "to_video", lambda clips: kept.append(clips.clone()) or to_video(clips)
    )
    return kept


def test_rows_see_equal_clips_and_seeds_the_same_held_out_ones(run, seen):
    results, rows = [], []
    wider = {**VIDTOK, "ch_mult": [1, 1, 2]}
    for name, seed, changes in (
        ("patches", 0, {}),
        ("frames", 0, {"sampling": "frames"}),
        ("vidtok", 0, {"vidtok": wider, "muon_lr": 0.01, "steps": 400, "ratio": 1.0}),
        ("patches", 1, {}),
    ):
        del seen[:]
        results.append(run(name, seed, **changes))
        rows.append(torch.cat(seen[:2]))
    assert rows[0].equal(rows[1]) and rows[0].equal(rows[2]) and not rows[0].equal(rows[3])
    assert len({result.held_out for result in results}) == 1
    assert results[0].per_clip["psnr"] != results[3].per_clip["psnr"]


def test_frames_are_drawn_whole(run, monkeypatch):
    drawn = []
    draw = coordtok_row.draw_points
    monkeypatch.setattr(coordtok_row, "draw_points", lambda *a: drawn.append(draw(*a)) or drawn[-1])
    for sampling in ("frames", "patches"):
        del drawn[:]
        run(sampling, sampling=sampling)
        points = torch.cat(drawn[1:])  # the first count multiply-adds
        frames = [len(clip[:, 0].unique()) for clip in points]
        # 8 of the 32 points: two frames of 4, or as many as it happens.
        assert (set(frames) == {2}) == (sampling == "frames")


def test_a_generator_uses_the_kept_training(run, monkeypatch):
    trainings = []
    train = row_training.train_steps

    def spy(*arguments, **options):
        trainings.append(arguments[2])
        return train(*arguments, **options)

    monkeypatch.setattr(coordtok_row, "train_steps", spy)
    row = run("coordtok")
    kept = {path.name: path.read_bytes() for path in run.shared.glob("coordtok-*")}
    assert trainings == [2] and len(kept) == 1
    generates = {"generates": True, "generator_work": 1e-3, "generator_clips": 5}
    small = run("generator", **generates)
    assert trainings == [2]
    assert {path.name: path.read_bytes() for path in run.shared.glob("coordtok-*")} == kept
    assert small.summary["tokens"] == 48
    again = run("again")
    assert again.per_clip == row.per_clip and trainings == [2]
    assert again.summary == row.summary  # the CPU seconds of the training too
    wide = {**TINY["model"], "latent_resolution": [4, 8, 8]}
    large = run("large", **generates, model=wide)
    names = {"kvd", "kvd_decoded", "kvd_decoded_gaussian", "kvd_reconstructed"}
    assert names < set(small.summary) and len({small.summary[name] for name in names}) == 4
    assert small.held_out == large.held_out != row.held_out
    assert large.summary["tokens"] == 128
    assert small.summary["generator_steps"] > large.summary["generator_steps"] >= 1
    assert trainings == [2, 2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ration": 0.5}, "did you mean 'ratio'"),
        ({"ratio": 0.0}, r"ratio must be in \(0, 1\], got 0.0"),
        ({"sampling": "pixels"}, "sampling must be one of"),
        ({"sampling": "frames", "ratio": 0.1}, "num_points must be a multiple of 4"),
        ({"model": {"dec_embed_dims": 8}}, "did you mean 'dec_embed_dim'"),
        ({"model": {**TINY["model"], "video_shape": [8, 16, 32]}}, "clips must be square"),
        ({"eval_clips": 4}, "eval_clips must be a multiple of 3, got 4"),
        ({"window": 3}, "window must divide the 8 frames of a clip, got 3"),
        ({"vidtok": {**VIDTOK, "regularizer": "fsq"}}, "vidtok must have regularizer 'kl'"),
        ({"vidtok": VIDTOK}, "muon_lr must be given for a VidTok"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        CoordTokRow.of({**TINY, **settings})


def test_smoke_study_of_every_row(tmp_path):
    torch.set_num_threads(1)
    study = load_study(STUDIES / "coordtok.yaml")
    for row in study.rows:
        CoordTokRow.of(study.settings_of(row))
    runs = planned_runs(study, seeds=study.seeds[:1])
    outcome = run_study(study, tmp_path, runs, smoke=True)
    assert outcome.failed == {} and len(outcome.done) == len(study.rows)
    found = write_report(study, tmp_path, tmp_path / "report.md", smoke=True)
    assert len(found) == len(study.comparisons)
    assert all(verdict.difference is not None for _, verdict in found)
