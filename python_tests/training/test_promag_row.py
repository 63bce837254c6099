"""Rows of the study of growing: each method runs, shares its trained stages, and is measured."""

import pytest

from vtok_ext.training.studies.promag_row import run_row

TINY = {
    "model": {"ch": 4, "ch_mult": [1, 1, 2], "num_res_blocks": 1, "z_channels": 2},
    "base_steps": 1,
    "growth_steps": 1,
    "batch_size": 2,
    "size": 12,
    "train_clips": 4,
    "eval_clips": 3,
    "long_frames": 30,
    "long_clips": 1,
}
CLIP_METRICS = {"psnr", "ssim", "psnr_kept", "sharpness", "corner_error"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("study")

    def call(row, **settings):
        folder = out / "work" / row
        folder.mkdir(parents=True, exist_ok=True)
        result = run_row({**TINY, "factor": 16, **settings}, 0, folder, lambda fraction, note: None)
        result.check()
        return result, {path.name for path in (out / "shared").glob("promag-*")}

    return call


def test_grown_and_interpolated_share_their_base(run):
    grown, stages = run("grown", method="grown")
    assert set(grown.per_clip) == CLIP_METRICS and len(grown.per_clip["psnr"]) == 3
    assert len(stages) == 3  # base, 8x, 16x
    interpolated, again = run("interpolated", method="interpolated")
    assert again == stages
    assert interpolated.held_out == grown.held_out
    assert interpolated.per_clip["psnr"] != grown.per_clip["psnr"]
    assert interpolated.summary["training_tera_macs"] < grown.summary["training_tera_macs"]
    assert grown.pictures[0].read_bytes().startswith(b"\x89PNG")
    chunks, again = run("chunks", method="grown", overlap=4)
    assert again == stages and set(chunks.per_clip) == {"psnr", "boundary_jump"}


def test_direct_gets_the_work_of_base_and_growth(run):
    grown, _ = run("grown", method="grown", base_steps=2, growth_steps=4)
    direct, _ = run("direct", method="direct", base_steps=2, growth_steps=4)
    short, _ = run("short", method="direct", base_steps=2, growth_steps=4, budget="growth")
    work = [r.summary["training_tera_macs"] for r in (grown, direct, short)]
    assert work[1] == pytest.approx(work[0], rel=0.2)  # whole steps
    assert work[2] < 0.9 * work[1]


def test_a_generator_on_latents(run):
    results = [
        run(f"dit{factor}", method="grown", factor=factor, generator_work=2e-3)[0].summary
        for factor in (4, 16)
    ]
    assert [r["tokens"] for r in results] == [45, 18]
    assert results[1]["generator_steps"] > results[0]["generator_steps"] >= 1


def test_wrong_settings(run):
    with pytest.raises(ValueError, match="did you mean 'growth_steps'"):
        run("wrong", method="grown", grow_steps=1)
    with pytest.raises(ValueError, match="method must be one of"):
        run("wrong", method="grow")
