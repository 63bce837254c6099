"""Bad input to `vtok`: one clear line on stderr, exit code 2, nothing left behind."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import vtok_ext as vt
from vtok_ext.cli import study
from vtok_ext.cli.failures import describe_failure
from vtok_ext.models.failed_computation import FailedComputationError


def fails(result, words, code=2):
    lines = result.err.strip().splitlines()
    assert result.code == code, result.err
    assert result.out == ""
    failures = [line for line in lines if line.startswith("vtok: ")]
    assert len(failures) == 1 and failures[0] == lines[-1], result.err
    assert words in failures[0], failures[0]
    assert "Traceback" not in result.err


def listing(folder):
    return sorted(folder.rglob("*"))


def make_text(path):
    path.write_text("not a video\n" * 50)


def make_truncated(path, source):
    path.write_bytes(source.read_bytes()[:-700])


@pytest.mark.parametrize("command", ["reconstruct", "demo"])
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "must be an existing file"),
        ("folder", "must be a video file, got the folder"),
        ("text", "must be a video, got"),
        ("truncated", "frames are readable"),
        ("zero frames", "must have frames, got none"),
    ],
)
def test_bad_video(vtok, make_video, model_folder, tmp_path, command, kind, words):
    source = make_video("good.mp4")
    path = tmp_path / "bad.mp4"
    if kind == "folder":
        path.mkdir()
    elif kind == "text":
        make_text(path)
    elif kind == "truncated":
        make_truncated(path, source)
    elif kind == "zero frames":
        make_zero_frames(path)
    before = listing(tmp_path)
    if command == "reconstruct":
        out = tmp_path / "out.mp4"
        result = vtok("reconstruct", path, "--model", model_folder, "-o", out)
    else:
        result = vtok("demo", "--video", path, "--out", tmp_path / "out", "--steps", 1)
    fails(result, words)
    assert listing(tmp_path) == before


def make_zero_frames(path):
    import av

    options = {"movflags": "empty_moov+frag_keyframe"}
    container = av.open(str(path), "w", options=options)
    stream = container.add_stream("libx264", rate=30)
    stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
    stream.codec_context.open()
    container.start_encoding()
    container.close()


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("file/out.mp4", "must lie in an existing folder"),
        ("folder.mp4", "must be a file, got the folder"),
        ("out.gif", "must end in .mp4"),
        ("good.mp4", "must be another file than the input"),
    ],
)
def test_unwritable_video(vtok, make_video, model_folder, tmp_path, out, words):
    source = make_video("good.mp4")
    content = source.read_bytes()
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder.mp4").mkdir()
    before = listing(tmp_path)
    fails(vtok("reconstruct", source, "--model", model_folder, "-o", tmp_path / out), words)
    assert listing(tmp_path) == before
    assert source.read_bytes() == content


def broken_model(folder, target, how):
    """Copies a saved model to `target` and damages it."""
    shutil.copytree(folder, target)
    config_path, weights_path = target / "config.json", target / "model.safetensors"
    if how in ("level of 1", "typo"):
        text = config_path.read_text()
        config = json.loads(text)
        fields = config["config"]
        if how == "typo":
            fields["num_res_block"] = fields.pop("num_res_blocks")
        else:
            fields["levels"][2] = 1
        config_path.write_text(json.dumps(config))
    elif how == "no config":
        config_path.unlink()
    elif how == "truncated weights":
        weights_path.write_bytes(weights_path.read_bytes()[:-100])
    elif how == "NaN weights":
        weights = load_file(weights_path)
        weights["decoder.conv_out.conv.bias"].fill_(float("nan"))
        save_file(weights, weights_path)
    else:
        weights = load_file(weights_path)
        name = "encoder.conv_in.conv.weight"
        weights[name] = weights[name][0] if how == "rank" else weights[name][:, :, :, :, :1]
        save_file({k: v.contiguous() for k, v in weights.items()}, weights_path)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("level of 1", "levels must be"),
        ("typo", "num_res_blocks"),
        ("no config", "config.json"),
        ("truncated weights", "model.safetensors"),
        ("NaN weights", "must give finite frames"),
        ("rank", "encoder.conv_in.conv.weight"),
        ("shape", "encoder.conv_in.conv.weight"),
    ],
)
def test_damaged_model(vtok, make_video, model_folder, tmp_path, how, words):
    source = make_video("good.mp4")
    broken_model(model_folder, tmp_path / "model", how)
    before = listing(tmp_path)
    options = ("--model", tmp_path / "model", "-o", tmp_path / "out.mp4")
    fails(vtok("reconstruct", source, *options), words)
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--model", "no/such/folder/anywhere"), "no/such/folder/anywhere"),
        (("--model", "MODEL", "--device", "tpu"), "must be auto, cpu, cuda or cuda:N"),
        (("--model", "MODEL", "--name", "vidtok"), "must be absent for a saved model"),
    ],
)
def test_bad_options_of_reconstruct(vtok, make_video, model_folder, tmp_path, options, words):
    source = make_video("good.mp4")
    options = [model_folder if option == "MODEL" else option for option in options]
    fails(vtok("reconstruct", source, "-o", tmp_path / "out.mp4", *options), words)
    assert listing(tmp_path) == [source]


def test_a_model_that_is_neither_folder_nor_on_a_hub(vtok, make_video, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    source = make_video("good.mp4")
    result = vtok("reconstruct", source, "-o", tmp_path / "out.mp4", "--model", "run/modle")
    fails(result, "must be an existing folder, got 'run/modle'; as a hub id it needs huggingface")
    assert listing(tmp_path) == [source]


def test_an_absent_package_of_an_extra(vtok, make_video, tmp_path, monkeypatch):
    """The folder is known by its config.json, the library that reads it is not there."""
    monkeypatch.setitem(sys.modules, "diffusers", None)
    (tmp_path / "wan").mkdir()
    (tmp_path / "wan" / "config.json").write_text('{"_class_name": "AutoencoderKLWan"}')
    result = vtok("encode", make_video(), tmp_path / "out", "--model", tmp_path / "wan")
    fails(result, "diffusers must be installed (pip install 'vtok_ext[diffusers]'), got no module")


def test_an_absent_logger_is_found_before_anything_is_written(vtok, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    options = ("run.loggers=[tensorboard,wandb]", "--out", tmp_path / "run", "--device", "cpu")
    fails(vtok("train", "smoke_fsq", *options), "must name installed packages, got 'wandb'")
    assert listing(tmp_path) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA works here")
def test_cuda_that_cannot_be_used(vtok, make_video, model_folder, tmp_path):
    options = ("--model", model_folder, "-o", tmp_path / "out.mp4", "--device", "cuda")
    fails(vtok("reconstruct", make_video(), *options), "which torch cannot use here")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--seconds", 5, "--steps", 5), "one of --seconds and --steps"),
        (("--seconds", 0), "--seconds must be positive"),
        (("--steps", 0), "--steps must be at least 1"),
        (("--out", "photos"), "must be a new or empty folder"),
        (("--out", "file"), "must be a folder, got the file"),
        (("--out", "file/below"), "must lie in an existing folder"),
    ],
)
def test_bad_options_of_demo(vtok, tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "precious.txt").write_text("kept")
    (tmp_path / "file").write_text("in the way")
    before = listing(tmp_path)
    fails(vtok("demo", *options), words)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("arguments", [("nonsense",), ("reconstruct",), ("demo", "--steps", "x")])
def test_usage_errors_exit_with_2(vtok, arguments):
    result = vtok(*arguments)
    assert result.code == 2
    assert "Traceback" not in result.err


VIDEO = torch.zeros(1, 3, 5, 16, 16)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda model: model.encode(VIDEO[0]), "encode: video must be"),
        (lambda model: model.encode(VIDEO.long()), "encode: video must be"),
        (lambda model: model.encode(VIDEO / 0), "encode: video must"),
        (lambda model: model.encode(VIDEO[:, :, :0]), "encode: video must"),
        (lambda model: vt.create_model("vidtok_fsq_causal_488_4096", levels=(8, 1)), "levels must"),
        (lambda model: vt.fsq(torch.zeros(1, 2, 3), [8, 1]), "levels must"),
    ],
    ids=["rank", "dtype", "NaN", "zero frames", "levels of 1", "levels of 1 in the op"],
)
def test_bad_tensors_are_bad_input(model_folder, call, words):
    """What the library raises for bad tensors is what the command line takes for bad input."""
    with pytest.raises((ValueError, TypeError)) as caught:
        call(vt.load_model(model_folder))
    code, line = describe_failure(caught.value)
    assert code == 2
    assert words in line and "\n" not in line


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("op: x must be 1,\n got 2"), 2, "op: x must be 1, got 2"),
        (OSError(28, "No space left on device"), 2, "No space left on device"),
        (PermissionError(13, "Permission denied", "/a"), 2, "Permission denied: /a"),
        (FileNotFoundError("load_model: there is no model"), 2, "load_model: there is no model"),
        (TypeError("op: x must be float, got int"), 2, "op: x must be float, got int"),
        (ImportError("op: x must be installed, got none"), 2, "op: x must be installed, got none"),
        (FailedComputationError("study: 2 runs failed"), 2, "study: 2 runs failed"),
        (
            ImportError("cannot import name 'x'"),
            1,
            "internal error: ImportError: cannot import name 'x' (set VTOK_DEBUG=1 for the "
            "traceback)",
        ),
        (
            TypeError("unsupported operand"),
            1,
            "internal error: TypeError: unsupported operand (set VTOK_DEBUG=1 for the traceback)",
        ),
        (SafetensorError("I/O error"), 2, "model or token file: I/O error"),
        (
            RuntimeError("oh"),
            1,
            "internal error: RuntimeError: oh (set VTOK_DEBUG=1 for the traceback)",
        ),
    ],
)
def test_exit_codes(error, code, line):
    assert describe_failure(error) == (code, line)


def test_a_study_with_failed_runs(vtok, monkeypatch):
    monkeypatch.setattr(study, "run_study_command", lambda **options: ["a, seed 1: diverged"])
    words = "study: every run must end, got 1 that failed, the first: a, seed 1: diverged"
    fails(vtok("study", "quantizers"), words)


def test_internal_error_and_debugging(vtok, monkeypatch):
    from vtok_ext.cli import doctor

    def broken():
        raise RuntimeError("a defect")

    monkeypatch.setattr(doctor, "examine", broken)
    fails(vtok("doctor"), "internal error: RuntimeError: a defect", code=1)
    monkeypatch.setenv("VTOK_DEBUG", "1")
    result = vtok("doctor")
    assert result.code == 1
    assert "Traceback" in result.err and "in broken" in result.err


def vtok_process(arguments, folder, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "vtok_ext.cli", *map(str, arguments)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        **options,
    )


@pytest.mark.parametrize("command", ["demo", "reconstruct"])
def test_disk_without_room(make_video, model_folder, tmp_path, command):
    """Every file is limited to 20 kB: writing fails as on a full disk, in real system calls."""
    video = make_video("in.mp4", 60, 96, 96)
    arguments = ["demo", "--steps", 1]
    if command == "reconstruct":
        arguments = ["reconstruct", video, "--model", model_folder, "-o", "out.mp4"]
    before = listing(tmp_path)
    process = vtok_process(
        arguments,
        tmp_path,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    assert err.strip().splitlines()[-1].startswith("vtok: "), err
    assert "Traceback" not in err
    assert listing(tmp_path) == before


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_demo_leaves_nothing(tmp_path, sent):
    process = vtok_process(["demo", "--seconds", 300], tmp_path)
    deadline = time.monotonic() + 60
    while not listing(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert listing(tmp_path), "the demo did not begin"
    process.send_signal(sent)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert listing(tmp_path) == []
