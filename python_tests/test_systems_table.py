"""bench/systems.py: the table of systems, on models small enough for a test."""

import json
from pathlib import Path

import report
import systems
import torch
from tiny_vtok import tiny, tiny_fsq

import vtok_ext as vt
from vtok_ext.training.recipe_file import load_recipe


def test_same_clips_for_every_system(tmp_path, capsys, monkeypatch):
    vidtok = {"ch": 8, "ch_mult": (1, 1, 1, 1), "num_res_blocks": 1}
    models = {
        "vidtok": vt.create_model("vidtok_fsq_causal_488_262144", **vidtok),
        "vtok": tiny(stride=1),
        "vtok_fsq": tiny_fsq(stride=1),
    }
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    named = [f"{name}={tmp_path / name}" for name in models]
    named.append(f"windows={tmp_path / 'vidtok'}@16")
    out = tmp_path / "systems.json"
    sizes = ["--frames", "32", "--size", "16", "--clips", "1", "--out", str(out)]
    threads = torch.get_num_threads()
    rows = {row["system"]: row for row in systems.main([*named, *sizes])}
    assert torch.get_num_threads() == threads
    assert rows["vtok"]["tokens"] == rows["vtok_fsq"]["tokens"] == 16 + 31
    assert rows["vtok_fsq"]["bits"] == 47 * 6 and rows["vtok"]["bits"] == 47 * 12 * 32
    assert rows["vidtok"]["tokens"] == 9 * 4 and rows["windows"]["tokens"] == 2 * 5 * 4
    assert all(row["psnr"] > 0 for row in rows.values())
    # Beyond imports, which take some 300 MB, and without the metrics.
    assert all(0 < row.get("peak_mb", 1) < 150 for row in rows.values())
    saved = json.loads(out.read_text())
    assert [row["system"] for row in saved["rows"]] == [*models, "windows", "mean colour"]
    assert "tokens" not in rows["mean colour"]
    text = capsys.readouterr().out
    assert text.count("\n") == 2 + len(rows) and "boundary_jump" in text
    monkeypatch.setattr(report, "RESULTS", tmp_path.parent)
    page = report.systems_table("systems")
    assert text.strip() in page and "1 clips of 32 frames of 16x16" in page


def test_peak_is_that_of_coding(monkeypatch):
    """Metrics took more than some of the models, and their memory was counted as the models'."""
    order = []

    class Queue:
        put = order.append

    def told(name, value):
        def call(*arguments):
            order.append(name)
            return value

        return call

    video = torch.zeros(1, 3, 16, 8, 8)
    monkeypatch.setattr(systems, "forget_process_peak", told("forget", 100.0))
    monkeypatch.setattr(systems, "process_peak_mb", told("peak", 130.0))
    monkeypatch.setattr(systems.vt, "load_model", told("load", tiny(stride=1)))
    monkeypatch.setattr(systems, "code_clip", told("code", (video, {"tokens": 1.0})))
    monkeypatch.setattr(systems, "quality_of", told("quality", {"psnr": 1.0}))
    options = {"threads": torch.get_num_threads(), "frames": 16, "size": 8, "clips": 2}
    systems.measure_system("vtok", "folder", options, Queue)
    assert order[:-1] == ["forget", "load", "code", "code", "peak", "quality", "quality"]
    assert order[-1]["peak_mb"] == 30.0


def test_tokens_of_the_recipe_of_vtok():
    recipe = load_recipe(str(Path(systems.__file__).parent / "systems" / "vtok.yaml"), [])
    model = vt.create_model(recipe.model.name, **recipe.model.overrides)
    assert model.token_grid(recipe.data.num_frames, 64, 64) == (16 + 32,)


def test_recipes_of_the_systems():
    """All see the same clips, but for their lengths, and none needs what must be downloaded."""
    names = {}
    for path in sorted((Path(systems.__file__).parent / "systems").glob("*.yaml")):
        recipe = load_recipe(str(path), [])
        assert (recipe.data.height, recipe.data.width, recipe.data.folder) == (64, 64, None)
        assert recipe.data.motion == "orbit" and recipe.data.num_clips == 1024
        assert getattr(recipe, "clips", "clips") == "clips"
        assert getattr(getattr(recipe, "loss", None), "perceptual_weight", 0) == 0
        names[path.stem] = recipe.model.name
    assert set(names) == {
        *("vidtok", "windows", "coordtok", "promag", "grow", "vtok", "vtok_encoder"),
    }
    assert names["windows"].replace("_noncausal_", "_causal_") == names["vidtok"]
