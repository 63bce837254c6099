"""Progress: bars on a terminal, rare plain lines elsewhere, nothing with --json."""

import json

import pytest

from vtok_ext.cli import console as console_module
from vtok_ext.cli.console import Console


def test_plain_lines(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(console_module.time, "monotonic", lambda: now[0])
    with Console().progress("training", 100) as progress:
        for step in range(1, 101):
            now[0] += 0.5
            progress.update(step, f"{step} dB")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "training ...",
        "training  20%, 10 s, ETA 40 s, 20 dB",
        "training  40%, 20 s, ETA 30 s, 40 dB",
        "training  60%, 30 s, ETA 20 s, 60 dB",
        "training  80%, 40 s, ETA 10 s, 80 dB",
        "training 100%, 50 s, 100 dB",
    ]


def test_plain_lines_without_a_total(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(console_module.time, "monotonic", lambda: now[0])
    with Console().progress("reading", None) as progress:
        now[0] = 11
        progress.update(340)
    assert capsys.readouterr().err.splitlines() == ["reading ...", "reading 340, 11 s"]


def test_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(console_module.sys.stderr, "isatty", lambda: True, raising=False)
    with Console().progress("training", 1.0) as progress:
        progress.update(0.5, "26.0 dB")
        progress.update(1.0, "28.0 dB")
    out, err = capsys.readouterr()
    assert out == ""
    assert "100%" in err and "28.0 dB" in err and "ETA" in err


@pytest.mark.parametrize("as_json", [True, False])
def test_messages_and_results(capsys, as_json):
    console = Console(as_json)
    console.say("working")
    console.warn("careful")
    with console.progress("training", 1.0) as progress:
        progress.update(1.0)
    console.result({"psnr": 30.5}, ["PSNR 30.5 dB"])
    out, err = capsys.readouterr()
    assert "warning: careful" in err
    if as_json:
        assert json.loads(out) == {"psnr": 30.5}
        assert err == "warning: careful\n"
    else:
        assert out == "PSNR 30.5 dB\n"
        assert "working" in err and "training" in err
