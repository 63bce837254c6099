"""Studies: specification, runs that survive a kill, verdicts, report."""

import itertools
import json
import os
import signal
import struct
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch

from vtok_ext.cli.app import run as vtok
from vtok_ext.training.studies import kinds, row_training, runner, vidtok_row
from vtok_ext.training.studies.report import write_report
from vtok_ext.training.studies.row_result import FinishedRun, RowResult, read_result, result_path
from vtok_ext.training.studies.runner import planned_runs, run_study
from vtok_ext.training.studies.specification import Comparison, Study, find_study, load_study
from vtok_ext.training.studies.verdict import (
    bootstrap_interval,
    interval,
    judge,
    student_interval,
)


def text_of(rows="a: {value: 2}\n  b: {value: 1}", extra=""):
    return (
        textwrap.dedent(
            """
        kind: numbers
        about: Whether two is more than one.
        settings: {clips: 20, inner: {x: 1, y: 2}}
        smoke: {clips: 3}
        seeds: [0, 1, 2]
        comparisons:
          - {better: a, worse: b, metric: score, claim: a is above b, margin: 0.5}
          - {better: b, worse: a, metric: score, claim: b is above a, margin: 0.5}
          - {better: a, worse: b, metric: size, claim: a is larger}
        """
        )
        + f"rows:\n  {rows}\n{extra}"
    )


def numbers(settings, seed, folder, progress):
    """A kind whose scores are the row's value, noise of clip and seed, and little of its own."""
    noise = np.random.default_rng(7).normal(size=settings["clips"])
    own = np.random.default_rng([seed, settings["value"]]).normal(size=settings["clips"])
    score = settings["value"] + noise + 0.1 * own + 0.05 * seed
    progress(0.5, "half")
    if settings.get("fail") == seed:
        raise RuntimeError("diverged")
    picture = folder / "p.png"
    picture.write_bytes(b"picture")
    return RowResult({"score": score.tolist()}, {"size": settings["value"] + seed}, [picture], "x")


@pytest.fixture
def make_study(tmp_path, monkeypatch):
    monkeypatch.setitem(kinds.KINDS, "numbers", numbers)

    def make(**options):
        path = tmp_path / "sums.yaml"
        path.write_text(text_of(**options))
        return load_study(path)

    return make


def test_all_runs_report_and_resume(make_study, tmp_path):
    study, out = make_study(), tmp_path / "out"
    seen = []
    runs = planned_runs(study)
    assert [str(run) for run in runs[:3]] == ["a, seed 0", "b, seed 0", "a, seed 1"]
    first = run_study(study, out, runs[:3], progress=lambda f, note: seen.append(f))
    assert first.done == [str(run) for run in runs[:3]] and seen == sorted(seen) and seen[-1] == 1
    report = tmp_path / "docs" / "sums.md"
    write_report(study, out, report)
    text = report.read_text()
    assert "3 of 6 runs" in text and "Missing: b (seed 1, 2); a (seed 2)." in text
    assert text.count("**undecided** (one seed") == 3
    second = run_study(study, out, runs)
    assert second.skipped == first.done and len(second.done) == 3
    verdicts = [v.verdict for _, v in write_report(study, out, report)]
    assert verdicts == ["holds", "reversed", "holds"]
    text = report.read_text()
    assert "6 of 6 runs" in text and "Missing" not in text and "3 of 3" in text
    assert "../out/pictures/a-seed-0-p.png" in text
    assert (out / "pictures" / "b-seed-2-p.png").read_bytes() == b"picture"
    assert not (out / "work" / "a" / "seed-0").exists()


def test_changed_settings_are_run_again_and_never_reported(make_study, tmp_path):
    out = tmp_path / "out"
    run_study(make_study(), out, planned_runs(make_study()))
    other = make_study(rows="a: {value: 3}\n  b: {value: 1}")
    write_report(other, out, tmp_path / "r.md")
    assert "3 of 6 runs" in (tmp_path / "r.md").read_text()
    warnings = []
    outcome = run_study(other, out, planned_runs(other), warn=warnings.append)
    assert outcome.done == ["a, seed 0", "a, seed 1", "a, seed 2"]
    assert len(warnings) == 3 and "made with other settings" in warnings[0]


def test_a_failure_leaves_the_others(make_study, tmp_path):
    study = make_study(rows="a: {value: 2, fail: 1}\n  b: {value: 1}")
    outcome = run_study(study, tmp_path, planned_runs(study), warn=lambda line: None)
    assert outcome.failed == {"a, seed 1": "RuntimeError: diverged"} and len(outcome.done) == 5
    assert not result_path(tmp_path, "a", 1).exists()


def test_a_report_names_rows_of_other_code(make_study, tmp_path):
    study = make_study()
    run_study(study, tmp_path, planned_runs(study))
    for seed in study.seeds:
        path = result_path(tmp_path, "b", seed)
        path.write_text(json.dumps(json.loads(path.read_text()) | {"code": "0ldc0de"}))
    write_report(study, tmp_path, tmp_path / "r.md")
    assert "0ldc0de (3: b)" in (tmp_path / "r.md").read_text()


def test_trained_weights_are_used_again_by_the_same_code_only(tmp_path, monkeypatch):
    trainings = []
    for code in ("a", "a", "b"):
        monkeypatch.setattr(row_training, "code_in_words", lambda code=code: code)
        row_training.trained_once(
            torch.nn.Linear(2, 2), tmp_path, "k", {}, lambda code=code: trainings.append(code)
        )
    assert trainings == ["a", "b"]


def test_a_smoke_run_replaces_no_results(make_study, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_study()
    place = ["study", "sums.yaml", "--out", "results"]
    assert vtok(place) == 0
    kept = {p: p.read_bytes() for p in (tmp_path / "results" / "runs").glob("*/*.json")}
    assert len(kept) == 6
    assert vtok([*place, "--smoke"]) == 2
    assert "out of a smoke run must be a folder without other results" in capsys.readouterr().err
    assert all(p.read_bytes() == content for p, content in kept.items())
    for _ in range(2):  # a smoke run may be repeated
        assert vtok(["study", "sums.yaml", "--smoke", "--out", "smoke"]) == 0


def test_values_must_be_finite():
    with pytest.raises(ValueError, match="metric score must be finite, got nan"):
        RowResult({"score": [1.0, float("nan")]}).check()


def test_claimed_run_is_left_to_its_process(make_study, tmp_path):
    study = make_study()
    run = planned_runs(study)[0]
    with runner._claimed(tmp_path, run) as folder:
        assert folder is not None
        outcome = run_study(study, tmp_path, [run])
    assert outcome.elsewhere == ["a, seed 0"] and not outcome.done


def test_settings_merge():
    study = Study("n", "k", {"a": {"inner": {"y": 3}}}, [0], settings={"inner": {"x": 1, "y": 2}})
    assert study.settings_of("a") == {"inner": {"x": 1, "y": 3}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"extra": "row: {}"}, "did you mean 'rows'?"),
        ({"rows": "a: {value: 2}"}, "row must be one of a, got 'b'"),
        ({"rows": "a/../b: {value: 2}"}, "a row's name must be letters"),
        ({"extra": "plot: {x: value, metrics: [score]}"}, "plot: lines must be given"),
        ({"extra": "a: ["}, "must be YAML"),
    ],
)
def test_wrong_files(make_study, options, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        make_study(**options)


def test_unknown_kind_is_never_imported(make_study, tmp_path):
    study = Study("n", "os", {"a": {}}, [0])
    with pytest.raises(ValueError, match="kind must be one of"):
        run_study(study, tmp_path, planned_runs(study))


def finished(row, seed, scores, held_out="x", **summary):
    return FinishedRun(
        "n", row, seed, {}, "", {"score": scores}, summary, [], held_out, 1, "m", "d"
    )


@pytest.mark.parametrize("of_clips", [0.3, 3.0], ids=["seeds differ", "clips differ"])
def test_intervals_cover_what_they_should(of_clips):
    """Of 200 experiments of three seeds without a difference, 5 % may claim one."""
    wrong = wrong_of_bootstrap = 0
    for i in range(200):
        generator = np.random.default_rng(i)
        seeds, clips = generator.normal(size=(3, 1)), of_clips * generator.normal(size=(1, 30))
        differences = seeds + clips + generator.normal(size=(3, 30))
        low, high = bootstrap_interval(differences, seed=i)
        wrong_of_bootstrap += low > 0 or high < 0
        low, high = interval(differences)
        wrong += low > 0 or high < 0
    # The bootstrap alone does not know how little three seeds say of their variance.
    assert 1 <= wrong <= 16 and wrong < wrong_of_bootstrap
    low, high = student_interval(np.array([1.0, 2.0, 3.0]))
    assert (low, high) == pytest.approx((2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5))


@pytest.mark.parametrize(("count", "quantile"), [(11, 2.228), (21, 2.086), (121, 1.980)])
def test_student_quantiles_beyond_the_table(count, quantile):
    numbers = np.arange(count, dtype=float)
    low, high = student_interval(numbers)
    half = quantile * numbers.std(ddof=1) / count**0.5
    assert (high - low) / 2 == pytest.approx(half, rel=2e-3)


def test_directions_and_margins():
    runs = {}
    for seed in range(3):
        runs["a", seed] = finished("a", seed, [1.0 + 0.01 * seed, 1.1, 1.2])
        runs["b", seed] = finished("b", seed, [1.4, 1.5, 1.6])

    def verdict(better, worse, **options):
        return judge(Comparison(better, worse, "score", "c", **options), runs).verdict

    assert verdict("b", "a") == "holds" and verdict("a", "b") == "reversed"
    assert verdict("a", "b", direction="lower") == "holds"
    assert verdict("b", "a", margin=1.0) == "undecided"
    assert verdict("a", "b", margin=-0.5) == "holds"  # not worse by more than 0.5
    assert verdict("a", "b", margin=-0.1) == "reversed"


def test_no_rows_are_no_study(make_study):
    for options in ({"rows": []}, {"seeds": []}):
        with pytest.raises(ValueError, match="rows and seeds must name some"):
            planned_runs(make_study(), **options)


def test_two_metrics_of_one_row(tmp_path):
    runs = {}
    for seed in range(3):
        run = finished("a", seed, [2.0, 2.1, 2.2], whole=1.0)
        run.per_clip["other"] = [1.0 + 0.01 * seed, 1.1, 1.2]
        runs["a", seed] = run
    claim = Comparison("a", "a", "score", "c", margin=0.9, worse_metric="other")
    found = judge(claim, runs)
    assert found.verdict == "holds" and found.difference == pytest.approx(1 - 0.01 / 3)
    with pytest.raises(ValueError, match="metric must be one of score, other, whole of a, got 'x'"):
        judge(Comparison("a", "a", "score", "c", worse_metric="x"), runs)
    with pytest.raises(ValueError, match="worse_metric must be text, got 3"):
        Comparison("a", "a", "score", "c", worse_metric=3)
    study = Study("n", "k", {"a": {}}, [0], comparisons=[claim])
    write_report(study, tmp_path, tmp_path / "r.md")
    assert "| c | score - other | a - a | - |" in (tmp_path / "r.md").read_text()


def test_what_cannot_be_compared():
    claim = Comparison("a", "b", "score", "c")
    runs = {("a", 0): finished("a", 0, [1.0, 2.0]), ("b", 0): finished("b", 0, [1.0, 2.0], "y")}
    with pytest.raises(ValueError, match="must be measured on the same clips"):
        judge(claim, runs)
    runs["b", 0] = finished("b", 0, [1.0])
    with pytest.raises(ValueError, match="as many values of score"):
        judge(claim, runs)
    with pytest.raises(ValueError, match="metric must be one of score"):
        judge(Comparison("a", "b", "scores", "c"), runs)
    assert judge(Comparison("a", "c", "score", "c"), runs).reason == "no seed has both rows"


TINY = """
kind: vidtok
about: Tiny.
settings:
  model: {regularizer: fsq, levels: [4, 4], ch: 4, ch_mult: [1, 1], num_res_blocks: 1}
  steps: 2
  batch_size: 2
  num_frames: 5
  size: 16
  train_clips: 4
  eval_clips: 3
  usage_clips: 4
  strata: 3
rows:
  fsq: {variant: fsq, codes: 16}
  lfq: {model: {regularizer: lfq, levels: [], z_channels: 4}, variant: lfq, codes: 16}
  long: {steps: 100000, variant: fsq, codes: 16}
seeds: [0, 1]
comparisons: [{better: fsq, worse: lfq, metric: psnr, claim: none}]
metrics: {psnr: "PSNR, dB", codebook_use: codes used}
plot: {x: codes, lines: variant, metrics: [psnr, codebook_use]}
sheet: [fsq, lfq]
"""


def start_study(folder, *arguments):
    command = [sys.executable, "-m", "vtok_ext.cli", "study", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True
    )


def test_killed_and_resumed(tmp_path, monkeypatch, capsys):
    """SIGKILL in the middle of a run; what was finished is kept, byte by byte."""
    folder = tmp_path / "bench" / "studies"
    folder.mkdir(parents=True)
    (folder / "tiny.yaml").write_text(TINY)
    out = tmp_path / "bench" / "results" / "studies" / "tiny"
    process = start_study(tmp_path, "tiny")
    started = out / "work" / "long" / "seed-0"
    deadline = time.monotonic() + 120
    while not started.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert started.exists(), process.communicate()
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {p: p.read_bytes() for p in (out / "runs").glob("*/*.json")}
    assert {p.parent.name for p in kept} == {"fsq", "lfq"}
    monkeypatch.chdir(tmp_path)
    assert vtok(["study", "tiny"]) == 2 and "--resume goes on" in capsys.readouterr().err
    chosen = ("--rows", "fsq,lfq", "--jobs", "2", "--json")
    resumed = start_study(tmp_path, "tiny", "--resume", *chosen)
    stdout, stderr = resumed.communicate()
    assert resumed.returncode == 0, stderr
    outcome = json.loads(stdout)
    assert sorted(outcome["skipped"]) == ["fsq, seed 0", "lfq, seed 0"]
    assert sorted(outcome["done"]) == ["fsq, seed 1", "lfq, seed 1"]
    assert all(p.read_bytes() == content for p, content in kept.items())
    found = read_result(result_path(out, "fsq", 1))
    assert len(found.per_clip["psnr"]) == 3 and found.summary["tokens"] == 4 * 3 * 8 * 8
    assert [len(found.per_clip[f"psnr_motion_{i}"]) for i in (1, 2, 3)] == [1, 1, 1]
    page = tmp_path / "docs" / "studies" / "tiny.md"
    assert "4 of 6 runs" in page.read_text() and "| fsq | 2 of 2 |" in page.read_text()
    assert (page.parent / "../../bench/results/studies/tiny/pictures").is_dir()
    # Three strips of 5 frames of 16x16, enlarged three times, below 12 pixels with a name.
    assert "![fsq, lfq](tiny_rows.png)" in page.read_text()
    header = page.with_name("tiny_rows.png").read_bytes()[16:24]
    assert struct.unpack(">II", header) == (5 * 16 * 3, 3 * (16 * 3 + 12))
    pytest.importorskip("matplotlib")
    assert page.with_suffix(".png").stat().st_size > 5000


def test_find_study_names_the_closest(tmp_path, monkeypatch):
    (tmp_path / "bench" / "studies").mkdir(parents=True)
    (tmp_path / "bench" / "studies" / "quantizers.yaml").write_text(TINY)
    monkeypatch.chdir(tmp_path / "bench")
    assert find_study("quantizers").name == "quantizers.yaml"
    with pytest.raises(FileNotFoundError, match="did you mean 'quantizers'?"):
        find_study("quantisers")


def test_a_frozen_encoder_stays_as_it_is(tmp_path, monkeypatch):
    seen = []
    measure = vidtok_row._measure

    def spy(model, *rest, **options):
        seen.append({name: p.clone() for name, p in model.named_parameters()})
        return measure(model, *rest, **options)

    monkeypatch.setattr(vidtok_row, "_measure", spy)
    model = {"regularizer": "fsq", "levels": [4, 4], "ch": 4, "ch_mult": [1, 1]}
    settings = {"model": model, "num_frames": 5, "size": 16, "train_clips": 2, "batch_size": 2}
    settings |= {"eval_clips": 1, "usage_clips": 1}
    folder = tmp_path / "work" / "row" / "seed-0"
    folder.mkdir(parents=True)
    for stages in ([{"steps": 1}], [{"steps": 1}, {"steps": 2, "freeze_encoder": True}]):
        vidtok_row.run_row({**settings, "stages": stages}, 0, folder, lambda *seen: None)
    changed = {name for name, p in seen[0].items() if not p.equal(seen[1][name])}
    assert changed and all(name.startswith("decoder.") for name in changed)
    work = settings | {"steps": 3}
    tera = [
        vidtok_row.run_row({**work, "stages": [stage]}, 0, folder, lambda *seen: None).summary[
            "training_tera_macs"
        ]
        for stage in ({}, {"freeze_encoder": True}, {"steps": 6})
    ]
    assert 0.6 < tera[1] / tera[0] < 1 and tera[2] == pytest.approx(2 * tera[0])
    with pytest.raises(ValueError, match="model must be discrete"):
        vidtok_row.run_row({"model": {"regularizer": "kl"}}, 0, folder, lambda *seen: None)


def test_an_encoder_is_frozen_for_its_stage_only(tmp_path, monkeypatch):
    """With moving averages, which no gradient moves."""
    seen = []
    train = vidtok_row.train_steps

    def spy(loss_of, optimizers, steps, **options):
        seen.append(None)
        train(loss_of, optimizers, steps, **options)

    measure = vidtok_row._measure

    def keep(model, *rest, **options):
        seen[-1] = {name: value.clone() for name, value in model.state_dict().items()}
        return measure(model, *rest, **options)

    monkeypatch.setattr(vidtok_row, "train_steps", spy)
    monkeypatch.setattr(vidtok_row, "_measure", keep)
    model = {"regularizer": "vq", "codebook": "ema", "codebook_size": 8, "z_channels": 4}
    settings = {"model": {**model, "ch": 4, "ch_mult": [1, 1], "num_res_blocks": 1}}
    settings |= {"num_frames": 5, "size": 16, "train_clips": 2, "batch_size": 2, "steps": 2}
    settings |= {"eval_clips": 1, "usage_clips": 1, "start_codebook": True}
    folder = tmp_path / "work" / "row" / "seed-0"
    folder.mkdir(parents=True)
    frozen = {"freeze_encoder": True}
    states = []
    for stages in ([{}], [{}, frozen], [{}, frozen, {}]):
        vidtok_row.run_row({**settings, "stages": stages}, 0, folder, lambda *seen: None)
        states.append(seen[-1])
    changed = [
        {name.split(".")[0] for name in now if not now[name].equal(before[name])}
        for before, now in itertools.pairwise(states)
    ]
    assert changed == [{"decoder"}, {"decoder", "encoder", "quantizer"}]
    with pytest.raises(ValueError, match="start_codebook must be of regularizer 'vq', got 'fsq'"):
        vidtok_row.VidTokRow.of({"model": {"regularizer": "fsq"}, "start_codebook": True})


FAILING = TINY.replace("seeds: [0, 1]", "seeds: [0]").replace(
    "variant: fsq, codes: 16}\n  lfq", "variant: fsq, codes: 17}\n  lfq"
)


def test_several_processes_try_a_failing_run_once(tmp_path):
    (tmp_path / "tiny.yaml").write_text(FAILING)
    options = ("--rows", "fsq,lfq", "--jobs", "2", "--json", "--out", "results")
    process = start_study(tmp_path, "tiny.yaml", *options)
    stdout, stderr = process.communicate()
    assert process.returncode == 2, stderr
    outcome = json.loads(stdout)
    assert list(outcome["failed"]) == ["fsq, seed 0"] and outcome["done"] == ["lfq, seed 0"]
    assert "codes must be the size of the codebook" in outcome["failed"]["fsq, seed 0"]
    assert stderr.count("fsq, seed 0 failed") == 1 and outcome["elsewhere"] == []
