"""`vtok train` from the command line."""

import shutil

import pytest

import vtok_ext as vt

SMALL = [
    "model.overrides.ch=4",
    "model.overrides.ch_mult=[1,1,1,1]",
    "data.num_frames=5",
    "data.height=16",
    "data.width=16",
    "loss.perceptual_weight=0",
    "loss.discriminator=none",
    "run.steps=2",
]


def test_built_in_recipe(vtok, tmp_path):
    out = tmp_path / "run"
    done = vtok("train", "smoke_fsq", *SMALL, "--out", out, "--json", "--device", "cpu")
    assert done.code == 0, done.err
    assert done.json["step"] == 2 and done.json["stopped_by"] is None
    assert done.json["model"] == str(out / "model")
    assert vt.load_model(out / "model").is_discrete
    again = vtok("train", "smoke_fsq", *SMALL, "-o", out, "--resume", "auto", "--device", "cpu")
    assert again.code == 0 and "2 steps, model in" in again.out and "psnr" not in again.out
    assert vtok("train", "smoke_fsq", *SMALL, "--out", out).code == 2


def test_folder_of_videos(vtok, tmp_path, make_video):
    (tmp_path / "clips").mkdir()
    make_video("clips/a.mp4")
    make_video("clips/b.mp4", num_frames=3)
    folder = [f"data.folder={tmp_path / 'clips'}", "run.batch_size=1"]
    refused = vtok("train", "smoke_kl", *SMALL, *folder, "-o", tmp_path / "run")
    assert refused.code == 2 and "data.validation_folder must be given" in refused.err
    both = [*folder, f"data.validation_folder={tmp_path / 'clips'}", "data.validation_clips=1"]
    done = vtok("train", "smoke_kl", *SMALL, *both, "-o", tmp_path / "run", "--device", "cpu")
    assert done.code == 0, done.err
    assert "left out" in done.err and "b.mp4 has 3 of 5 frames" in done.err
    assert "psnr" in done.out and " clips/s" in done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "must be a YAML file or one of"),
        (["smoke_fsq", "run.step=1"], "did you mean 'steps'?"),
        (["smoke_fsq", "--resume", "maybe"], "resume must be one of"),
        (["smoke_fsq", "model.overrides.chs=1"], "did you mean 'ch'?"),
    ],
)
def test_bad_input_is_one_line(vtok, tmp_path, arguments, message):
    failed = vtok("train", *arguments, "-o", tmp_path / "run", "--device", "cpu")
    assert failed.code == 2 and message in failed.err and failed.err.count("\n") <= 2
    assert not (tmp_path / "run").exists()


def test_absent_weights_of_lpips_are_never_left_out_in_silence(vtok, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    published = ["loss.perceptual_network=published", "loss.perceptual_weight=1"]
    failed = vtok("train", "smoke_fsq", *SMALL, *published, "-o", tmp_path / "run")
    assert failed.code == 2 and "backbone must be a file, got none at" in failed.err
    assert str(tmp_path / "cache") in failed.err and not (tmp_path / "run").exists()


def test_dry_run_shows_and_leaves_a_picture_only(vtok, tmp_path):
    out = tmp_path / "run"
    done = vtok("train", "smoke_fsq", *SMALL, "--dry-run", "--out", out, "--device", "cpu")
    assert done.code == 0, done.err
    assert "model.encoder" in done.err and "activations" in done.err and "epochs of" in done.err
    assert [path.name for path in out.iterdir()] == ["dry-run.png"]
    small = [*SMALL, "--dry-run", "-o", out, "--device", "cpu", "--json"]
    done = vtok("train", "smoke_two_stage", *small)
    assert [facts["samples_per_step"] for facts in done.json] == [2, 2]
    assert (out / "dry-run-2.png").is_file()


def test_a_stage_that_is_done_is_not_run_again(vtok, tmp_path):
    """Not even if its checkpoints are gone: it would begin anew and replace its model."""
    call = ["train", "smoke_two_stage", *SMALL, "run.sample_every=0", "-o", tmp_path]
    call += ["--resume", "auto", "--device", "cpu"]
    assert vtok(*call).code == 0
    shutil.rmtree(tmp_path / "stage-1" / "checkpoints")
    model = tmp_path / "stage-1" / "model" / "model.safetensors"
    before = model.stat().st_mtime_ns
    again = vtok(*call, "run.steps=3")
    assert again.code == 0 and "stage 1 of 2 is done" in again.err, again.err
    assert "3 steps, model in" in again.out and model.stat().st_mtime_ns == before
    assert not (tmp_path / "stage-1" / "checkpoints").exists()


def test_overfit_says_whether_the_model_learned(vtok, tmp_path):
    """In two steps it did not, which is exit code 1."""
    arguments = ["smoke_fsq", *SMALL, "--overfit", "2", "-o", tmp_path, "--device", "cpu"]
    failed = vtok("train", *arguments)
    assert failed.code == 1 and "FAILED: every output is" in failed.out
    assert len(list((tmp_path / "overfit").glob("clip-*.png"))) == 4
    for recipe in ("smoke_coordtok", "smoke_fsq"):
        refused = vtok("train", recipe, "--overfit", "0", "-o", tmp_path)
        assert refused.code == 2 and "greater than or equal to 1" in refused.err
    both = vtok("train", "smoke_fsq", "--overfit", "2", "--dry-run", "-o", tmp_path)
    assert both.code == 2 and "one of --dry-run and --overfit" in both.err
    other = vtok("train", "smoke_fsq", "model={name: vtok_small}", "--dry-run", "-o", tmp_path)
    assert other.code == 2 and "model must be a VidTok or ProMAG for task tokenizer" in other.err
    refused = vtok("train", "smoke_vtok_encoder", "--overfit", "2", "-o", tmp_path)
    assert refused.code == 2 and "must have a recipe that trains a tokenizer" in refused.err


def test_stages_in_one_command(vtok, tmp_path):
    arguments = [*SMALL, "run.steps=1", "-o", tmp_path, "--device", "cpu", "--json"]
    done = vtok("train", "smoke_two_stage", *arguments)
    assert done.code == 0, done.err
    assert done.json["model"] == str(tmp_path / "stage-2" / "model")
    again = vtok("train", "smoke_two_stage", *arguments, "--resume", "auto")
    assert again.code == 0 and again.json["resumed_from"] == 1
