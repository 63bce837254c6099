"""`vtok encode`, `decode`, `stream`: equal to calls of the library; resumed to the bit."""

import signal
import subprocess
import sys
import time

import pytest
import torch

import vtok_ext as vt
from vtok_ext.cli import encode as encode_module
from vtok_ext.cli import reconstruct as reconstruct_module
from vtok_ext.data.video import VideoReader, read_clip
from vtok_ext.models.latent_statistics import LatentStatistics
from vtok_ext.models.vidtok_published import decode_published, encode_published

pytestmark = pytest.mark.usefixtures("short_portions")
TINY = {"ch": 8, "ch_mult": (1, 1, 1, 1), "num_res_blocks": 1}
V1_1 = "vidtok_fsq_causal_488_32768_v1_1"


@pytest.fixture
def v1_1_folder(tmp_path):
    torch.manual_seed(0)
    vt.create_model(V1_1, **TINY).save_pretrained(tmp_path / "v1_1")
    return tmp_path / "v1_1"


def close(frames, expected) -> bool:
    """Whether all values agree but for the rounding of sums in another order."""
    found = torch.cat(frames, dim=2)
    return found.shape == expected.shape and (found.float() - expected.float()).abs().max() <= 1


def thin_coordtok() -> vt.models.CoordTok:
    """A CoordTok of clips of up to 16 frames of 32x48."""
    torch.manual_seed(0)
    width = {"enc_embed_dim": 16, "dec_embed_dim": 16, "enc_num_heads": 2, "dec_num_heads": 2}
    depth = {"enc_num_layers": 1, "dec_num_layers": 1, "enc_patch_num_layers": 1}
    shape = {"video_shape": (16, 32, 48), "latent_patch_size": (16, 16, 16)}
    return vt.create_model("coordtok_large_128", **width, **depth, **shape).eval()


def source_of(video) -> torch.Tensor:
    return read_clip(video)[0][None]


@pytest.fixture
def normalised(saved_models, make_video, tmp_path):
    """Returns (model, file of normalised latents), statistics far from 0 and 1, and saves both."""
    model = vt.load_model(saved_models["kl"])
    mean, std = torch.tensor([3.0, -2.0, 1.0, 5.0]), torch.tensor([0.1, 4.0, 2.0, 0.5])
    model.latent_statistics = LatentStatistics({"grid": mean}, {"grid": std})
    model.save_pretrained(tmp_path / "known")
    with torch.no_grad():
        encoding = model.encode(source_of(make_video(num_frames=13)), normalize=True)
    encoding.save(tmp_path / "normalised")
    return model, tmp_path / "normalised"


@torch.no_grad()
@pytest.mark.parametrize("command", ["decode", "stream"])
def test_normalised_latents_are_restored(vtok, normalised, tmp_path, written, command):
    model, file = normalised
    expected = model.decode(vt.Encoding.load(file), output="uint8")
    written.clear()
    done = vtok(command, file, tmp_path / "back.mp4", "--model", tmp_path / "known")
    assert done.code == 0, done.err
    assert len(written) > 1 and close(written, expected)


def test_normalised_latents_need_statistics(vtok, normalised, saved_models, tmp_path):
    done = vtok("decode", normalised[1], tmp_path / "back.mp4", "--model", saved_models["kl"])
    assert done.code == 2 and "must know its statistics of latents" in done.err
    assert not (tmp_path / "back.mp4").exists()


@pytest.mark.parametrize("suffix", [".webm", ".AVI", ".gif"])
def test_a_video_that_cannot_be_written_is_no_token_file(
    vtok, make_video, model_folder, tmp_path, suffix
):
    out = tmp_path / f"out{suffix}"
    done = vtok("stream", make_video(), out, "--model", model_folder)
    assert done.code == 2 and "output must end in .mp4" in done.err and not out.exists()


@torch.no_grad()
def test_planes_of_a_model_for_whole_clips(vtok, make_video, tmp_path, written):
    """CoordTok: what is not a grid of latents goes through files all the same."""
    model = thin_coordtok()
    model.save_pretrained(tmp_path / "model")
    video, out = make_video(num_frames=9), tmp_path / "planes"
    report = vtok("encode", video, out, "--model", tmp_path / "model", "--json").json
    assert report["kind"] == "encoding" and report["grid"] == [1280]
    encoding = vt.Encoding.load(out)
    expected = model.encode(source_of(video)).latent
    assert all(torch.equal(encoding.latent[name], expected[name]) for name in expected)
    written.clear()
    assert vtok("decode", out, tmp_path / "back.mp4", "--model", tmp_path / "model").code == 0
    assert close(written, model.decode(encoding, output="uint8"))
    written.clear()
    sliced = ("--model", tmp_path / "model", "--slices", 3)
    assert vtok("decode", out, tmp_path / "back.mp4", *sliced).code == 0
    expected = model.decode(encoding, output="uint8", num_slices=3)
    assert close(written, expected) and not close(written, model.decode(encoding, output="uint8"))
    written.clear()
    out = tmp_path / "again.mp4"
    assert vtok("reconstruct", video, "--model", tmp_path / "model", "-o", out).code == 0
    assert close(written, model.decode(encoding, output="uint8"))
    written.clear()
    assert vtok("reconstruct", video, *sliced, "-o", out).code == 0
    assert close(written, expected)


@torch.no_grad()
def test_a_film_too_long_for_the_model_is_not_read_to_its_end(
    vtok, make_video, tmp_path, monkeypatch
):
    thin_coordtok().save_pretrained(tmp_path / "model")
    film, wide = make_video("film.mp4", 200), make_video("wide.mp4", 9, 32, 64)
    read = []
    chunks = VideoReader.chunks

    def counted(self, count):
        for chunk in chunks(self, count):
            read.append(len(chunk.timestamps))
            yield chunk

    monkeypatch.setattr(VideoReader, "chunks", counted)
    model = ("--model", tmp_path / "model")
    for video, got in ((film, "got (64, 32, 40)"), (wide, "got (9, 32, 64)")):
        refused = vtok("encode", video, tmp_path / "out", *model)
        assert refused.code == 2 and got in refused.err and "(16, 32, 48)" in refused.err
    assert vtok("reconstruct", film, *model, "-o", tmp_path / "back.mp4").code == 2
    assert sum(read) < 200
    refused = vtok("tokenize", film, tmp_path / "set", *model, "--device", "cpu")
    assert refused.code == 2 and "tokenize: film.mp4 (see --frames and --size): " in refused.err
    assert not any(tmp_path.glob("out*")) and not any(tmp_path.glob("back*"))


@pytest.mark.parametrize("kind", ["fsq", "kl"])
@pytest.mark.parametrize("num_frames", [1, 14])
@torch.no_grad()
def test_files_hold_what_the_whole_clip_gives(
    vtok, make_video, saved_models, written, tmp_path, kind, num_frames
):
    video, out = make_video("in.mp4", num_frames, 37, 43), tmp_path / "out.safetensors"
    result = vtok("encode", video, out, "--model", saved_models[kind], "--json")
    assert result.code == 0, result.err
    model = vt.load_model(saved_models[kind])
    expected = model.encode(source_of(video))
    if kind == "fsq":
        found = vt.Tokens.load(out)
        assert torch.equal(found.ids, expected.indices)
    else:
        found = vt.Encoding.load(out)
        scale = float(expected.latent.abs().max())
        assert torch.allclose(found.latent, expected.latent, atol=1e-5 * scale)
    assert (found.num_frames, found.size, found.model_id) == (num_frames, (37, 43), model.model_id)
    assert found.fps == pytest.approx(30) or num_frames == 1
    assert result.json["grid"] == list(model.token_grid(num_frames, 37, 43))
    assert result.json["frames"] == num_frames and result.json["kind"] in ("tokens", "encoding")
    back = tmp_path / "back.mp4"
    sliced = vtok("decode", out, back, "--model", saved_models[kind], "--slices", 2)
    assert sliced.code == 2 and "--slices must be given planes of CoordTok" in sliced.err
    sliced = vtok("reconstruct", video, "--model", saved_models[kind], "-o", back, "--slices", 2)
    assert sliced.code == 2 and "--slices must be given for a CoordTok, got" in sliced.err
    written.clear()
    result = vtok("decode", out, back, "--model", saved_models[kind], "--json")
    assert result.code == 0, result.err
    facts = [result.json[name] for name in ("frames", "height", "width")]
    assert facts == [num_frames, 37, 43]
    assert close(written, model.decode(expected, output="uint8"))
    assert read_clip(back)[0].shape == (3, num_frames, 37, 43)


@torch.no_grad()
def test_latents_of_a_discrete_model(vtok, make_video, model_folder, tmp_path):
    video, out = make_video("in.mp4", 6), tmp_path / "out"
    arguments = ("--model", model_folder, "--output", "latent")
    assert vtok("encode", video, out, *arguments).code == 0
    model = vt.load_model(model_folder)
    assert torch.equal(vt.Encoding.load(out).latent, model.encode(source_of(video)).latent)


@pytest.mark.parametrize("num_frames", [6, 12, 20])
@torch.no_grad()
def test_published_chunks_file_to_file(
    vtok, make_video, v1_1_folder, written, tmp_path, num_frames
):
    video, out = make_video("in.mp4", num_frames, 17, 23), tmp_path / "out"
    options = ("--model", v1_1_folder, "--streaming", "reference")
    result = vtok("stream", video, out, *options, "--json")
    assert result.code == 0 and result.json["streaming"] == "reference", result.err
    model = vt.load_model(v1_1_folder)
    expected = encode_published(model, source_of(video))
    tokens = vt.Tokens.load(out)
    assert torch.equal(tokens.ids, expected.indices)
    assert (tokens.size, tokens.frame_rule) == ((16, 16), "reference")
    written.clear()
    result = vtok("stream", out, tmp_path / "back.mp4", "--model", v1_1_folder)
    assert result.code == 0, result.err
    assert close(written, decode_published(model, expected, output="uint8"))
    assert close(written, model.detokenize(tokens, output="uint8"))


@pytest.mark.parametrize("rule", ["reference", "preserve"])
@torch.no_grad()
def test_whole_clips(vtok, make_video, saved_models, tmp_path, rule):
    """The published frame rule needs the length; a model without causality needs the clip."""
    folder = saved_models["fsq"]
    if rule == "preserve":
        torch.manual_seed(0)
        folder = tmp_path / "centred"
        vt.create_model("vidtok_fsq_noncausal_488_262144", **TINY).save_pretrained(folder)
    video, out = make_video("in.mp4", 7), tmp_path / "out"
    assert vtok("encode", video, out, "--model", folder, "--frames", rule).code == 0
    model = vt.load_model(folder)
    expected = model.tokenize(source_of(video), frames=rule)
    assert torch.equal(vt.Tokens.load(out).ids, expected.ids)
    result = vtok("decode", out, tmp_path / "back.mp4", "--model", folder, "--json")
    assert result.code == 0, result.err
    assert result.json["frames"] == expected.num_frames == (5 if rule == "reference" else 7)


class Killed(BaseException):
    """An interruption at a place of our choice."""


@pytest.mark.parametrize("kind", ["fsq", "kl"])
@pytest.mark.parametrize("kill_after", [1, 3])
def test_killed_and_resumed_encoding_is_bit_identical(
    vtok, make_video, saved_models, tmp_path, monkeypatch, kind, kill_after
):
    video, out = make_video("in.mp4", 19), tmp_path / "out"
    options = ("--model", saved_models[kind], "--resume", "--save-every", 0)
    append, calls = encode_module._Job._append, []

    def append_or_die(job, portions):
        calls.append(1)
        append(job, portions)
        if len(calls) > kill_after:  # after data was written that no state knows of
            raise Killed

    monkeypatch.setattr(encode_module._Job, "_append", append_or_die)
    with pytest.raises(Killed):
        vtok("stream", video, out, *options)
    assert not out.exists()
    assert {p.name for p in tmp_path.glob("out*")} == {"out.partial", "out.state"}
    monkeypatch.undo()
    monkeypatch.setattr(reconstruct_module, "_FEATURE_MAP_BYTES", 2**30)  # the state's plan counts
    result = vtok("stream", video, out, *options, "--json")
    assert result.code == 0 and result.json["resumed_at_frame"] == 4 * kill_after, result.err
    assert {p.name for p in tmp_path.glob("out*")} == {"out"}
    monkeypatch.setattr(reconstruct_module, "_FEATURE_MAP_BYTES", 1)
    assert vtok("encode", video, tmp_path / "one go", "--model", saved_models[kind]).code == 0
    assert out.read_bytes() == (tmp_path / "one go").read_bytes()


def test_resuming_without_a_state_starts_anew(vtok, make_video, model_folder, tmp_path):
    video, out = make_video("in.mp4", 5), tmp_path / "out"
    (tmp_path / "out.partial").write_bytes(b"left over")
    result = vtok("stream", video, out, "--model", model_folder, "--resume", "--json")
    assert result.code == 0 and result.json["resumed_at_frame"] == 0
    assert vt.Tokens.load(out).num_frames == 5


def interrupted(vtok, monkeypatch, *arguments):
    append = encode_module._Job._append

    def append_and_die(job, portions):
        append(job, portions)
        if job.encoder.num_frames > 8:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(encode_module._Job, "_append", append_and_die)
        with pytest.raises(Killed):
            vtok(*arguments)


def test_states_of_something_else_are_refused(
    vtok, make_video, saved_models, tmp_path, monkeypatch
):
    video, out = make_video("in.mp4", 14), tmp_path / "out"
    options = ("--resume", "--save-every", 0, "--model")
    interrupted(vtok, monkeypatch, "stream", video, out, *options, saved_models["fsq"])
    other = make_video("other.mp4", 15)
    result = vtok("stream", other, out, *options, saved_models["fsq"])
    assert result.code == 2 and "the source must be that of" in result.err
    result = vtok("stream", video, out, *options, saved_models["kl"])
    assert result.code == 2 and "the kind must be that of" in result.err
    result = vtok("stream", video, out, *options, saved_models["fsq"], "--output", "latent")
    assert result.code == 2 and "the kind must be that of" in result.err
    torch.manual_seed(1)
    vt.create_model("vidtok_fsq_causal_488_262144", **TINY).save_pretrained(tmp_path / "retrained")
    result = vtok("stream", video, out, *options, tmp_path / "retrained")
    assert result.code == 2 and "state must be that of encoder to tokens of" in result.err
    (tmp_path / "out.partial").write_bytes(b"short")
    result = vtok("stream", video, out, *options, saved_models["fsq"])
    assert result.code == 2 and "bytes to go on, got 5" in result.err
    (tmp_path / "out.state").write_bytes(b"damaged")
    result = vtok("stream", video, out, *options, saved_models["fsq"])
    assert result.code == 2 and "must be the state of a stream" in result.err


def test_interruption_without_resume_leaves_nothing(
    vtok, make_video, model_folder, tmp_path, monkeypatch
):
    video = make_video("in.mp4", 14)
    before = sorted(tmp_path.rglob("*"))
    interrupted(vtok, monkeypatch, "encode", video, tmp_path / "out", "--model", model_folder)
    assert sorted(tmp_path.rglob("*")) == before


def test_killed_processes_continue(vtok, make_video, model_folder, tmp_path, monkeypatch):
    """Real processes: one killed outright, one told to stop, one that finishes the file."""
    video, out = make_video("in.mp4", 160, 32, 32), tmp_path / "out"
    state = tmp_path / "out.state"
    arguments = ["stream", video, out, "--model", model_folder, "--resume", "--save-every", 0]
    for number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 130)):
        before = state.read_bytes() if state.exists() else b""
        command = [sys.executable, "-c", SLOWLY, *map(str, arguments)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while not (state.exists() and state.read_bytes() != before):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
        assert process.wait(timeout=60) == code
        said = process.stderr.read()
    assert f"vtok: interrupted, --resume continues from {state}" in said
    assert (tmp_path / "out.partial").exists() and not out.exists()
    result = vtok(*arguments, "--json")
    assert result.code == 0 and result.json["resumed_at_frame"] >= 32, result.err
    monkeypatch.undo()  # portions as in the other processes
    assert vtok("encode", video, tmp_path / "one go", "--model", model_folder).code == 0
    assert out.read_bytes() == (tmp_path / "one go").read_bytes()


# Waits a little at each portion, so that there is time to stop it in the middle.
SLOWLY = """
import sys, time
from vtok_ext.cli import encode
from vtok_ext.cli.app import run
save = encode._Job._save
encode._Job._save = lambda job: (save(job), time.sleep(0.3))
sys.exit(run(sys.argv[1:]))
"""


def test_refusals(vtok, make_video, saved_models, tmp_path):
    video, tokens = make_video("in.mp4", 5), tmp_path / "tokens"
    plain = video.with_suffix("")
    plain.write_bytes(video.read_bytes())
    fsq, kl = saved_models["fsq"], saved_models["kl"]
    assert vtok("encode", video, tokens, "--model", fsq).code == 0
    torch.manual_seed(1)
    vt.create_model("vidtok_fsq_causal_488_262144", **TINY).save_pretrained(tmp_path / "other")
    before = sorted(tmp_path.rglob("*"))
    out, mp4 = tmp_path / "out", tmp_path / "out.mp4"
    for arguments, words in (
        (("encode", plain, plain, "--model", fsq), "must be another file than the input"),
        (("encode", video, video, "--model", fsq), "output must end in no suffix of videos"),
        (("encode", video, tmp_path, "--model", fsq), "output must be a file, got the folder"),
        (("encode", video, out, "--model", kl, "--output", "tokens"), "model must be discrete"),
        (("encode", video, out, "--model", fsq, "--output", "ids"), "--output must be one of tok"),
        (("encode", video, out, "--model", fsq, "--frames", "all"), "--frames must be one of"),
        (("encode", video, out, "--model", fsq, "--streaming", "reference"), "version 1.1, got"),
        (("encode", tokens, out, "--model", fsq), "must be a video, got"),
        (("decode", video, mp4, "--model", fsq), "must be a token or latent file"),
        (("decode", tokens, out, "--model", fsq), "output must end in .mp4"),
        (("decode", tokens, mp4, "--model", kl), "tokens must come from"),
        (("decode", tokens, mp4, "--model", tmp_path / "other"), "another training run"),
        (("stream", tokens, out, "--model", fsq), "where the input is a token or latent file"),
        (("stream", tokens, mp4, "--model", fsq, "--resume"), "--resume must come with a token"),
        (("stream", tmp_path / "absent", out, "--model", fsq), "must be a file, got none"),
        (("stream", video, out, "--model", fsq, "--save-every", -1), "must be at least 0"),
    ):
        result = vtok(*arguments)
        assert result.code == 2 and words in result.err, (arguments, result.err)
    assert sorted(tmp_path.rglob("*")) == before
    options = ("--model", tmp_path / "other", "--any-weights")
    assert vtok("decode", tokens, mp4, *options).code == 0


@pytest.mark.parametrize("name", ["vidtok_kl_causal_488_4chn", "vidtok_kl_noncausal_488_4chn"])
def test_latents_of_nan_make_no_black_video(vtok, tmp_path, name):
    """Streamed, or decoded as a whole where the model takes clips only."""
    model = vt.create_model(name, **TINY)
    model.save_pretrained(tmp_path / "model")
    latent = torch.full((1, model.latent_channels, 2, 2, 2), float("nan"))
    vt.Encoding(latent, 5, (16, 16)).save(tmp_path / "latent")
    out = tmp_path / "out.mp4"
    result = vtok("decode", tmp_path / "latent", out, "--model", tmp_path / "model")
    assert result.code == 2 and "must give finite frames, got NaN" in result.err
    assert not out.exists()


def test_video_to_video_is_reconstruct(vtok, make_video, model_folder, tmp_path):
    out = tmp_path / "out.mp4"
    result = vtok("stream", make_video("in.mp4", 6), out, "--model", model_folder, "--json")
    assert result.code == 0 and result.json["frames"] == 6 and "psnr" in result.json
    assert read_clip(out)[0].shape[1] == 6
