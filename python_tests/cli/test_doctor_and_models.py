"""`vtok doctor` and `vtok models`: what they report is so; starting up stays light."""

import subprocess
import sys

import torch

import vtok_ext as vt
from vtok_ext.cli.conv3d_advice import known_problems, paths
from vtok_ext.cli.doctor import _warnings, examine, loaded_openmp_runtimes


def test_models_lists_every_name_with_its_facts(vtok):
    result = vtok("models", "--json")
    assert [row["name"] for row in result.json] == vt.list_models()
    rows = {row["name"]: row for row in result.json}
    # Parameter counts of the published table, in millions.
    expected = {
        "vidtok_kl_causal_488_8chn": 157.6,
        "vidtok_kl_causal_288_8chn": 148.8,
        "vidtok_fsq_causal_488_262144": 157.5,
        "vidtok_fsq_causal_41616_262144": 199.0,
    }
    for name, millions in expected.items():
        assert round(rows[name]["parameters"] / 1e6, 1) == millions
    row = rows["vidtok_fsq_causal_488_262144"]
    assert row["levels"] == [8] * 6 and row["codebook_size"] == 262144
    assert row["compression"] == [4, 8, 8] and row["causal"] and row["discrete"]
    assert rows["vidtok_kl_causal_288_8chn"]["codebook_size"] is None
    # Multiply-adds of the published table, where they are called FLOPs.
    row = rows["vidtok_kl_causal_488_4chn"]
    assert row["clip"] == [17, 256, 256] and round(row["multiply_adds"] / 1e12, 2) == 10.35
    assert row["flops"] == 2 * row["multiply_adds"]
    row = rows["coordtok_large_128"]
    assert row["clip"] == [128, 128, 128] and row["compression"] is None
    # Attention among 32,768 points of 1,024 numbers in 24 layers is most of the work.
    attention = 24 * 2 * 1024 * 32768**2
    assert 0.8 < attention / row["multiply_adds"] < 0.9


def test_models_table_never_cuts_a_name(vtok, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    out = vtok("models").out
    for name in vt.list_models():
        assert name in out
    assert "262,144 = 8x8x8x8x8x8" in out
    assert "10.35 T" in out and "20.69 T" in out and "multiply-adds to encode and decode" in out


def test_doctor_reports_this_installation(vtok):
    report = vtok("doctor", "--json").json
    assert report["torch"]["version"] == torch.__version__
    assert report["torch"]["threads"] == torch.get_num_threads()
    assert report["cuda"]["usable"] == torch.cuda.is_available()
    if not report["cuda"]["usable"]:
        assert report["cuda"]["reason"]
    assert report["vtok_ext"]["build"]["cpu_isa"] == vt.build_info()["cpu_isa"]
    assert report["video"]["codecs"]["mpeg4"] is True


def test_doctor_for_people(vtok, monkeypatch):
    monkeypatch.setenv("VTOK_NATIVE", "1")
    out = vtok("doctor").out
    assert "torch.version" in out and torch.__version__ in out
    assert "environment.VTOK_NATIVE" in out


MAPS = """\
7f00-7f01 r-xp 00000000 fd:00 11 /venv/torch/lib/libgomp.so.1
7f01-7f02 r--p 00001000 fd:00 11 /venv/torch/lib/libgomp.so.1
7f02-7f03 r-xp 00000000 fd:00 11 /alias/libgomp.so.1
7f03-7f04 r-xp 00000000 fd:00 12 /usr/lib/libgomp.so.1.0.0
7f04-7f05 r-xp 00000000 fd:00 13 /opt/intel/libiomp5.so
7f05-7f06 r-xp 00000000 fd:00 14 /usr/lib/libompi_other.txt
7f06-7f07 rw-p 00000000 00:00 0
7f07-7f08 r-xp 00000000 fd:00 15 /usr/lib/llvm 15/libomp.so.5
"""


def test_openmp_runtimes_are_counted_once_each():
    assert loaded_openmp_runtimes(MAPS) == [
        "/alias/libgomp.so.1",
        "/opt/intel/libiomp5.so",
        "/usr/lib/libgomp.so.1.0.0",
        "/usr/lib/llvm 15/libomp.so.5",
    ]
    assert loaded_openmp_runtimes("") == []


def test_doctor_warns():
    report = examine()
    report["openmp_runtimes"] = ["/a/libgomp.so.1", "/b/libiomp5.so"]
    report["torch"]["threads"], report["torch"]["cpus_usable"] = 8, 2
    report["video"] = {**report["video"], "codecs": {"libx264": False}}
    text = "\n".join(_warnings(report))
    assert "2 OpenMP runtimes are loaded" in text
    assert "8 threads on 2 usable CPUs" in text
    assert "no libx264" in text
    report["video"] = {"usable": False, "reason": "No module named 'av'"}
    assert "cannot be read: No module named 'av'" in "\n".join(_warnings(report))


def test_doctor_names_torch_and_cudnn_pairs_with_bad_convolutions(vtok):
    assert known_problems("2.13.0+cpu", None) == []
    assert known_problems("2.10.0+cu130", 91501) == []
    assert known_problems("2.9.1+cu128", 91501) == []
    assert "memory" in known_problems("2.9.1+cu128", 91002)[0]
    assert "wrong results" in known_problems("2.8.0+cu128", 91002)[0]
    assert known_problems("2.8.0+cu128", 90701) == []
    report = vtok("doctor", "--json").json
    assert report["conv3d"]["path_on_cpu"] == "oneDNN through torch"
    assert report["conv3d"]["path_on_cuda"] == paths(vt.build_info(), True)[0]
    report["conv3d"]["known_of_torch_conv3d"] = ["slow"]
    assert "torch.nn.Conv3d: slow" in _warnings(report)


def test_doctor_says_what_runs_convolutions():
    with_cuda, without = (
        {"native": True, "cuda_version": "13.0"},
        {"native": True, "cuda_version": None},
    )
    assert paths(with_cuda, True) == ("kernels of vtok_ext, no cuDNN", "oneDNN through torch")
    assert paths(without, False) == ("none: built without CUDA", "torch without oneDNN: slow")
    for path in paths({**with_cuda, "native": False}, True):
        assert "VTOK_NATIVE=0" in path


def test_importing_the_package_is_light():
    """The library must work without what only the command line needs."""
    code = (
        "import sys; import vtok_ext; "
        "print([m for m in ('av', 'typer', 'rich', 'omegaconf', 'vtok_ext.cli') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_command_line_starts_without_the_video_library():
    code = (
        "import sys; from vtok_ext.cli.app import run; code = run(['--help']); "
        "print(code, 'av' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "0 False"
    commands = ("demo", "reconstruct", "encode", "decode", "stream", "eval", "convert", "models")
    for command in (*commands, "doctor"):
        assert command in done.stdout
