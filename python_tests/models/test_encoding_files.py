"""Token and latent files: round trips, and refusal of anything else before it is read."""

import json
import os
import struct

import pytest
import torch
from safetensors.torch import save_file

import vtok_ext as vt


@pytest.fixture
def tokens():
    ids = torch.randint(0, 8**6, (2, 3, 2, 4), dtype=torch.int32)
    facts = {"fps": 23.976, "model_id": "m@1", "frame_rule": "reference"}
    return vt.Tokens(ids, (3, 2, 4), num_frames=7, size=(15, 30), **facts)


def test_tokens_round_trip(tokens, tmp_path):
    path = tmp_path / "clip.tokens"
    tokens.save(path)
    loaded = vt.Tokens.load(path)
    assert torch.equal(loaded.ids, tokens.ids) and loaded.ids.dtype == torch.int32
    for name in ("grid", "num_frames", "size", "fps", "model_id", "frame_rule"):
        assert getattr(loaded, name) == getattr(tokens, name)
    assert os.listdir(tmp_path) == ["clip.tokens"]
    assert os.stat(path).st_mode & 0o777 == 0o666 & ~current_umask()


def current_umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def test_encoding_round_trips(model, clip, tmp_path):
    with torch.no_grad():
        encoding = model.encode(clip(1, 6, 12, 20), fps=30)
        encoding.save(tmp_path / "clip.latent")
        loaded = vt.Encoding.load(tmp_path / "clip.latent")
        assert torch.equal(model.decode(loaded), model.decode(encoding))
    assert (loaded.num_frames, loaded.size, loaded.fps) == (6, (12, 20), 30.0)
    assert loaded.frame_rule == "preserve"
    for name in ("indices", "moments"):
        a, b = getattr(loaded, name), getattr(encoding, name)
        assert (a is None and b is None) or torch.equal(a, b)


def test_a_latent_that_is_a_view_of_its_moments_round_trips(tmp_path):
    """As the mean of a posterior is for one clip, where the view is contiguous."""
    moments = torch.randn(1, 8, 2, 3, 3)
    vt.Encoding(moments[:, :4], 5, (24, 24), moments=moments).save(tmp_path / "clip.latent")
    loaded = vt.Encoding.load(tmp_path / "clip.latent")
    assert torch.equal(loaded.moments, moments) and torch.equal(loaded.latent, moments[:, :4])


def test_encoding_of_planes_round_trips(tmp_path):
    planes = {"xy": torch.randn(1, 4, 2, 2), "xt": torch.randn(1, 4, 2, 3)}
    vt.Encoding(planes, 3, (2, 2)).save(tmp_path / "planes")
    loaded = vt.Encoding.load(tmp_path / "planes").latent
    assert loaded.keys() == planes.keys()
    assert all(torch.equal(loaded[name], planes[name]) for name in planes)


def write(path, tensors, header):
    save_file(tensors, path, metadata={"vtok_ext": json.dumps(header)})


HEADER = {
    "format": "vtok_ext.tokens",
    "version": 1,
    "grid": [1, 2, 2],
    "num_frames": 1,
    "size": [16, 16],
    "fps": None,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "header must be that of a vtok_ext tokens file"),
        ({"version": 2}, "version must be 1, got 2"),
        ({"grid": [1, 2, 3]}, r"ids must have the grid \[1, 2, 3\], got \[1, 1, 2, 2\]"),
        ({"grid": "x"}, "grid must be 3 integers >= 1, got 'x'"),
        ({"num_frames": 0}, "num_frames must be an integer >= 1, got 0"),
        ({"num_frames": None}, "num_frames must be an integer >= 1, got None"),
        ({"size": [16]}, r"size must be 2 integers >= 1, got \[16\]"),
        ({"frame_rule": "x"}, r"frame_rule must be one of \('preserve', 'reference'\), got 'x'"),
        ({"chunk_frames": 0}, "chunk_frames must be an integer >= 1, got 0"),
        ({"fps": -1}, "fps must be a number > 0 or null, got -1"),
    ],
)
def test_bad_headers(tmp_path, changes, message):
    path = tmp_path / "bad"
    write(path, {"ids": torch.zeros(1, 1, 2, 2, dtype=torch.int32)}, {**HEADER, **changes})
    with pytest.raises(ValueError, match=message):
        vt.Tokens.load(path)


def test_bad_files(tmp_path, tokens):
    path = tmp_path / "bad"
    with pytest.raises(FileNotFoundError, match="tokens: .*bad' must be a file, got none"):
        vt.Tokens.load(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="must be a tokens file"):
        vt.Tokens.load(path)
    write(path, {"x": torch.zeros(1, 1, 2, 2, dtype=torch.int32)}, HEADER)
    with pytest.raises(ValueError, match="the only tensor must be ids"):
        vt.Tokens.load(path)
    write(path, {"ids": torch.zeros(1, 1, 2, 2)}, HEADER)
    with pytest.raises(TypeError, match="ids must be int32 or int64, got torch.float32"):
        vt.Tokens.load(path)
    tokens.save(path)
    with pytest.raises(ValueError, match="header must be that of a vtok_ext encoding file"):
        vt.Encoding.load(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="must be a tokens file"):
        vt.Tokens.load(path)


def test_claimed_size_beyond_the_file_is_refused_before_allocation(tmp_path):
    """A header that promises a terabyte must not make the reader allocate it."""
    count = 1 << 38
    header = {
        "__metadata__": {"vtok_ext": json.dumps({**HEADER, "grid": [1, 1, count]})},
        "ids": {"dtype": "I32", "shape": [1, 1, 1, count], "data_offsets": [0, 4 * count]},
    }
    text = json.dumps(header).encode()
    path = tmp_path / "huge"
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 16)
    with pytest.raises(ValueError, match="must be a tokens file"):
        vt.Tokens.load(path)


def test_inconsistent_tokens_are_refused():
    with pytest.raises(ValueError, match=r"ids must be \[B, 1, 2, 3\], got \[1, 1, 2, 2\]"):
        vt.Tokens(torch.zeros(1, 1, 2, 2, dtype=torch.int32), (1, 2, 3), 1, (16, 16))


def test_failed_save_leaves_nothing(tokens, tmp_path, monkeypatch):
    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        tokens.save(tmp_path / "clip")
    assert os.listdir(tmp_path) == []
    monkeypatch.undo()
    with pytest.raises(IsADirectoryError, match="must be a file name, got a directory"):
        tokens.save(tmp_path)
    with pytest.raises(FileNotFoundError, match="save: the folder of .*clip' must exist, got none"):
        tokens.save(tmp_path / "absent" / "clip")
