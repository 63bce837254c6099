"""The scan of video files at the start of a run: one process looks, and what it saw is kept."""

import json
from pathlib import Path

import pytest
from helpers import torchrun, write_video
from tiny_recipe import OVERRIDES

from vtok_ext.cli.app import run
from vtok_ext.data import video_scan
from vtok_ext.data.video import read_times

FAULTY = Path(__file__).with_name("faulty_scan.py")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "clips").mkdir()
    for i in range(5):
        write_video(tmp_path / "clips" / f"{i}.mp4", 5 + i, 16, 16)
    (tmp_path / "clips" / "x.mp4").write_bytes(b"none")
    return tmp_path / "clips"


def test_a_process_that_cannot_read_goes_by_what_the_first_one_saw(folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    done = torchrun(FAULTY, folder, out)
    assert done.returncode == 0, done.stderr
    found = [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]
    names = [f"{i}.mp4" for i in range(5)]
    assert found[0][0] == [[names, [0] * 5, 6]] * 2  # opened by the first scan alone
    assert found[1][0] == [[names, [0] * 5, 0]] * 2
    assert "left out: 1 of 6 videos" in found[0][1]


def test_a_resumed_run_opens_no_video_for_a_scan(folder, tmp_path, monkeypatch, capsys):
    opened = []

    def read(path, *arguments, **options):
        opened.append(path.name)
        return read_times(path, *arguments, **options)

    monkeypatch.setattr(video_scan, "read_times", read)
    plain = ["loss.discriminator=none", "loss.perceptual_weight=0", f"data.folder={folder}"]
    plain += [f"data.validation_folder={folder}", "run.validate_every=9"]
    call = ["train", "smoke_kl", *OVERRIDES, *plain, "-o", str(tmp_path / "run")]
    call += ["--device", "cpu", "--resume", "auto"]
    assert run([*call, "run.steps=1"]) == 0
    # The folder of held-out clips is the same one.
    assert sorted(opened) == [f"{i}.mp4" for i in range(5)] + ["x.mp4"]
    assert (tmp_path / "run" / "index.json").is_file()
    opened.clear()
    write_video(folder / "3.mp4", 12, 16, 16)
    assert run([*call, "run.steps=2"]) == 0
    assert opened == ["3.mp4"]
    assert "left out: x.mp4" in capsys.readouterr().err
