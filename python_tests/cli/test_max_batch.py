"""`vtok bench max-batch`: table, JSON and refusals."""

import pytest
import torch

from vtok_ext.cli import max_batch

FRAMES_16 = ["bench", "max-batch", "coordtok_small_128", "--frames", "16", "--size", "32"]


def test_table_and_json(vtok):
    arguments = ["bench", "max-batch", "coordtok_small_128", "--frames", "16", "--frames", "32"]
    report = vtok(*arguments, "--memory", "8", "--json").json
    assert [row["frames"] for row in report["rows"]] == [16, 32]
    for row in report["rows"]:
        used = row["state_gib"] + row["constant_gib"] + row["largest_batch"] * row["per_clip_gib"]
        assert used <= 8 < used + row["per_clip_gib"]
    assert report["rows"][0]["per_clip_gib"] < report["rows"][1]["per_clip_gib"]
    out = vtok(*arguments, "--size", "32").out
    assert "coordtok_small_128" in out and "predicted from what autograd saves" in out


def test_a_recomputed_encoder_takes_less(vtok):
    arguments = ["bench", "max-batch", "coordtok_small_128", "--frames", "16", "--size", "32"]
    report = vtok(*arguments, "--recompute-encoder", "--json").json
    kept, recomputed = report["rows"]
    assert (kept["recompute_encoder"], recomputed["recompute_encoder"]) == (False, True)
    assert recomputed["per_clip_gib"] < kept["per_clip_gib"]
    assert "coordtok_small_128, encoder recomputed" in vtok(*arguments, "--recompute-encoder").out


def test_causal_models_take_a_frame_more(vtok):
    name = "vidtok_kl_causal_488_4chn"
    report = vtok("bench", "max-batch", name, "--frames", "16", "--size", "64", "--json").json
    assert report["rows"][0]["frames"] == 17


def test_default_has_every_architecture(vtok):
    rows = vtok("bench", "max-batch", "--frames", "8", "--size", "32", "--json").json["rows"]
    assert {row["model"].split("_")[0] for row in rows} == {"coordtok", "vidtok", "promag", "vtok"}
    assert all(row["per_clip_gib"] > 0 for row in rows)


def test_points_are_told_where_there_are_some(vtok):
    assert "CoordTok decodes 1024 points" in vtok(*FRAMES_16).out
    other = vtok("bench", "max-batch", "vtok_small", "--frames", "8", "--size", "32")
    assert other.code == 0 and "CoordTok" not in other.out


def test_both_half_precisions_take_as_much(vtok):
    rows = [
        vtok(*FRAMES_16, "--precision", precision, "--json").json["rows"]
        for precision in ("bfloat16", "float16")
    ]
    assert rows[0] == rows[1]


def test_check_compares_with_the_prediction(vtok, monkeypatch):
    """With a measurement in the place of a GPU's, which has no memory for the longer clips."""
    predicted = vtok(*FRAMES_16, "--json").json["rows"][0]["per_clip_gib"]

    def measured(build, step, precision):
        with torch.device("meta"):
            if build().config.video_shape[0] == 32:
                raise torch.cuda.OutOfMemoryError("no memory")
        return int(1.5 * predicted * max_batch.GIB)

    monkeypatch.setattr(max_batch, "measured_per_clip", measured)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    arguments = [*FRAMES_16, "--frames", "32", "--check"]
    rows = vtok(*arguments, "--json").json["rows"]
    assert rows[0]["measured_to_predicted"] == pytest.approx(1.5, abs=1e-3)
    assert rows[1]["measured_per_clip_gib"] is None and rows[1]["measured_to_predicted"] is None
    out = vtok(*arguments).out
    assert "1.50x predicted" in out and "out of memory" in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_check_needs_a_gpu(vtok):
    result = vtok(*FRAMES_16, "--check")
    assert result.code == 2 and "bench max-batch: --check must have a CUDA GPU" in result.err


def test_bad_input_is_one_line(vtok):
    for arguments, message in (
        (["--memory", "0"], "bench max-batch: memory must be positive, got 0.0"),
        (["--frames", "0"], "bench max-batch: frames must be positive, got 0"),
        (["--memory", "nan"], "bench max-batch: memory must be positive, got nan"),
        (
            ["vidtok_kl_noncausal_488_4chn", "--frames", "3"],
            "bench max-batch: frames must be >= 4 for vidtok_kl_noncausal_488_4chn, got 3",
        ),
        (
            ["vtok_small", "coordtok_small_128", "--frames", "20"],
            "bench max-batch: frames must be a multiple of 8 for coordtok_small_128, got 20",
        ),
        (
            ["coordtok_small_128", "--size", "100"],
            "bench max-batch: size must be a multiple of 16 for coordtok_small_128, got 100",
        ),
        (
            ["vtok_small", "--recompute-encoder"],
            "bench max-batch: --recompute-encoder must have a CoordTok among the models, "
            "got vtok_small",
        ),
        (["nothing"], "create_model: name must be one of"),
    ):
        result = vtok("bench", "max-batch", *arguments)
        assert result.code == 2 and message in result.err
