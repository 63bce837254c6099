"""Token and latent files in portions, and the saved state of a stream."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

import vtok_ext as vt
from vtok_ext.models.encoding_stream import (
    EncodingReader,
    EncodingWriter,
    encoding_kind,
    load_stream_state,
    save_stream_state,
)

FACTS = {"num_frames": 14, "size": [15, 30], "fps": 25.0, "model_id": "m@1+2"}


def ids(num: int) -> torch.Tensor:
    return torch.arange(num * 6, dtype=torch.int32).view(1, num, 2, 3)


def latents(num: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(1, 4, num, 2, 3, generator=torch.Generator().manual_seed(0)).to(dtype)


def write(path, kind, portions, facts=FACTS):
    writer = EncodingWriter(path, kind)
    for portion in portions:
        writer.append(portion)
    grid = writer.finish(facts)
    assert grid == [sum(p.shape[-3] for p in portions), 2, 3]


def test_tokens_written_in_portions_are_tokens(tmp_path):
    path, whole = tmp_path / "tokens", ids(5)
    write(path, "tokens", whole.split([1, 3, 1], dim=1), {**FACTS, "frame_rule": "reference"})
    loaded = vt.Tokens.load(path)
    assert torch.equal(loaded.ids, whole) and loaded.grid == (5, 2, 3)
    assert (loaded.num_frames, loaded.size, loaded.fps) == (14, (15, 30), 25.0)
    assert (loaded.model_id, loaded.frame_rule) == ("m@1+2", "reference")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_latents_written_in_portions_are_an_encoding(tmp_path, dtype):
    path, whole = tmp_path / "latent", latents(5, dtype)
    write(path, "encoding", whole.split([2, 3], dim=2))
    loaded = vt.Encoding.load(path)
    assert torch.equal(loaded.latent, whole) and loaded.indices is None
    assert (loaded.num_frames, loaded.model_id, loaded.frame_rule) == (14, "m@1+2", "preserve")


@pytest.mark.parametrize("kind", ["tokens", "encoding"])
@pytest.mark.parametrize("portions", [True, False])
def test_reading_in_portions(tmp_path, kind, portions):
    path, whole = tmp_path / "file", ids(5) if kind == "tokens" else latents(5)
    if portions:
        write(path, kind, whole.split(2, dim=-3), {**FACTS, "chunk_frames": 16})
    elif kind == "tokens":
        vt.Tokens(whole, (5, 2, 3), 14, (15, 30), 25.0, "m@1+2").save(path)
    else:
        vt.Encoding(whole, 14, (15, 30), fps=25.0, model_id="m@1+2").save(path)
    assert encoding_kind(path) == kind
    with EncodingReader(path) as reader:
        assert (reader.kind, reader.num_latents, reader.num_frames) == (kind, 5, 14)
        assert (reader.size, reader.fps, reader.model_id) == ((15, 30), 25.0, "m@1+2")
        assert reader.chunk_frames == (16 if portions else None)
        chunks = list(reader.chunks(2))
    assert [c.shape[-3] for c in chunks] == [2, 2, 1]
    assert torch.equal(torch.cat(chunks, dim=-3), whole)


def test_continued_file_is_the_same(tmp_path):
    whole = latents(6)
    write(tmp_path / "one", "encoding", whole.split(2, dim=2))
    writer = EncodingWriter(tmp_path / "two", "encoding")
    writer.append(whole[:, :, :2])
    writer.flush()
    kept = writer.num_bytes
    writer.append(torch.full_like(whole[:, :, :3], 7))  # after the state was saved: thrown away
    writer.close()
    writer = EncodingWriter(tmp_path / "two", "encoding", kept)
    for portion in whole[:, :, 2:].split(2, dim=2):
        writer.append(portion)
    writer.finish(FACTS)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_bad_portions(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(ValueError, match=r"must have latents, got none"):
        EncodingWriter(path, "tokens").finish(FACTS)
    with pytest.raises(ValueError, match=r"must have 5000 bytes to go on, got 4096"):
        EncodingWriter(path, "tokens", 5000)
    writer = EncodingWriter(path, "tokens")
    with pytest.raises(ValueError, match=r"one clip of rank 4, got \[2, 5, 2, 3\]"):
        writer.append(ids(5).expand(2, -1, -1, -1))
    writer.append(ids(1))
    with pytest.raises(ValueError, match=r"must be \(2, 3\) torch.int32 as before, got \(2, 2\)"):
        writer.append(ids(1)[..., :2])
    with pytest.raises(ValueError, match="facts must fit into 4 kB"):
        writer.finish({**FACTS, "model_id": "x" * 5000})


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(FileNotFoundError, match="must be a file, got none"):
        encoding_kind(path)
    path.write_text("text")
    with pytest.raises(ValueError, match="must be a token or latent file, got another"):
        encoding_kind(path)
    write(path, "tokens", [ids(1)])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="must be a token or latent file"):
        EncodingReader(path)
    vt.Tokens(ids(2).expand(2, -1, -1, -1), (2, 2, 3), 5, (16, 16)).save(path)
    with pytest.raises(ValueError, match=r"ids must be those of one clip, got \[2, 2, 2, 3\]"):
        EncodingReader(path).__enter__()
    vt.Encoding({"xy": torch.zeros(2, 4, 2, 2)}, 3, (2, 2)).save(path)
    with pytest.raises(ValueError, match=r"must be those of one clip, got \[2\] clips of planes"):
        EncodingReader(path).__enter__()


def test_state_round_trip_and_refusals(kl_model, clip, tmp_path):
    stream = kl_model.stream_encoder()
    stream.push(clip(1, 6, 8, 8))
    path = tmp_path / "state"
    save_stream_state(path, stream.state_dict(), {"num_frames": 6})
    state, facts = load_stream_state(path)
    assert facts == {"num_frames": 6} and state.keys() == stream.state_dict().keys()
    other = kl_model.stream_encoder()
    other.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(other.flush(), stream.flush(), strict=True))
    with pytest.raises(FileNotFoundError, match="must be a file, got none"):
        load_stream_state(tmp_path / "absent")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="must be the state of a stream, got"):
        load_stream_state(path)
    for header in ("null", "{", json.dumps({"format": "vtok_ext.stream_state", "version": 2})):
        save_file({"x": torch.zeros(1)}, path, metadata={"vtok_ext": header})
        with pytest.raises(ValueError, match="must be the state of a stream, got"):
            load_stream_state(path)
    assert os.listdir(tmp_path) == ["state"]
