"""`vtok tokenize` in two processes of torchrun: the bytes of one, also after a kill."""

import json
from pathlib import Path

import pytest
import torch
from helpers import digests, torchrun

from vtok_ext.training.distributed import on_rank_0, process_group

OPTIONS = ("--size", 16, "--videos-per-shard", 3, "--device", "cpu")
KILLED = Path(__file__).with_name("killed_tokenize.py")


@pytest.fixture
def one_thread():
    """torchrun gives its processes one thread; rounding may depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_two_processes_write_the_bytes_of_one(vtok, make_video, saved_models, tmp_path, one_thread):
    """Shards of videos of other lengths, some unreadable; an odd number of shards."""
    videos = tmp_path / "videos"
    videos.mkdir()
    for i in range(13):
        make_video(f"videos/{i:02d}.mp4", num_frames=5 + i % 4)
    (videos / "05.mp4").write_bytes(b"damaged")
    options = (*OPTIONS, "--frames", 5, "--model", saved_models["fsq"])
    assert vtok("tokenize", videos, tmp_path / "one", *options).code == 0
    call = ("-m", "vtok_ext.cli", "tokenize", videos, tmp_path / "two", *options)
    done = torchrun(*call, "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert digests(tmp_path / "two") == digests(tmp_path / "one")
    assert len(json.loads((tmp_path / "two" / "manifest.json").read_text())["shards"]) == 5
    # One of them talks, about what it did itself.
    assert done.stdout.count("12 tokens in 5 shards, 1 videos left out") == 1
    assert done.stderr.count("left out: 05.mp4") == 1 and "7 videos of this process" in done.stderr

    refused = torchrun(*call)
    assert refused.returncode != 0 and "internal error" not in refused.stderr
    assert "DST must be a new or empty folder" in refused.stderr


def test_a_killed_process_and_a_restart_change_nothing(vtok, saved_models, tmp_path, one_thread):
    options = ("procedural:30", "--frames", 5, *OPTIONS, "--model", saved_models["kl"])
    assert vtok("tokenize", *options[:1], tmp_path / "one", *options[1:]).code == 0
    call = ("tokenize", *options[:1], tmp_path / "two", *options[1:], "--resume", "--json")
    # Else torch lets the new processes read the addresses of the old ones.
    done = torchrun("--max-restarts", 1, KILLED, *call, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    assert done.returncode == 0, done.stderr
    assert "failed (exitcode: -9) local_rank: 1" in done.stderr
    found = json.loads(done.stdout)
    assert found["shards"] == 10 and 1 <= found["shards_found"] <= 6
    assert digests(tmp_path / "two") == digests(tmp_path / "one")
    # Any number of processes goes on: what is missing is divided among those that are there.
    for number in (2, 7, 8):
        (tmp_path / "two" / "shards" / f"{number:05d}.json").unlink()
    again = vtok(*call)
    assert again.code == 0 and again.json["shards_found"] == 7
    assert digests(tmp_path / "two") == digests(tmp_path / "one")


def test_a_process_that_has_done_its_part_waits_for_days(monkeypatch):
    """gloo's own limit is half an hour, and parts differ by more than that."""
    address = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in address.items():
        monkeypatch.setenv(name, value)
    cpu = torch.device("cpu")
    limits = []
    for patient in (False, True):
        with process_group(cpu, patient=patient):
            backend = torch.distributed.group.WORLD._get_backend(cpu)
            limits.append(backend.options._timeout.total_seconds())
            assert on_rank_0(lambda: 7) == 7
            with pytest.raises(ValueError, match="op: x must be y, got z"):
                on_rank_0(lambda: (_ for _ in ()).throw(ValueError("op: x must be y, got z")))
    assert limits[0] <= 1800 < 24 * 3600 < limits[1]
