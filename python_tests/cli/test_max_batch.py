"""`vtok bench max-batch`: table, JSON and refusals."""


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


def test_bad_input_is_one_line(vtok):
    for arguments, message in (
        (["--memory", "0"], "bench max-batch: memory must be positive, got 0.0"),
        (["--frames", "0"], "bench max-batch: frames must be positive, got 0"),
        (["--memory", "nan"], "bench max-batch: memory must be positive, got nan"),
        (
            ["vidtok_kl_noncausal_488_4chn", "--frames", "3"],
            "bench max-batch: frames must be >= 4 for vidtok_kl_noncausal_488_4chn, got 3",
        ),
        (["nothing"], "create_model: name must be one of"),
    ):
        result = vtok("bench", "max-batch", *arguments)
        assert result.code == 2 and message in result.err
