"""wrap_diffusers: the encodings and videos of diffusers, exact streams, refusals, the commands."""

import json

import pytest
from helpers import import_or_skip

diffusers = import_or_skip("diffusers")

import tiny  # noqa: E402
import torch  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

import vtok_ext as vt  # noqa: E402
from vtok_ext.cli.app import app  # noqa: E402
from vtok_ext.data.tokenizing import _padded_frames  # noqa: E402
from vtok_ext.data.video import VideoReader, VideoWriter  # noqa: E402
from vtok_ext.diffusers_vae import load_diffusers_vae  # noqa: E402
from vtok_ext.models.latent_statistics import LatentStatistics  # noqa: E402

STREAMS = ["wan", "wan_residual", "cogvideox", "vidtok"]
WRAPPED = ["wan", "wan_residual", "cogvideox", "hunyuan_video"]


def streamed(model, clip, portions):
    """(latents, frames) of a stream in portions of that many frames, saved and resumed midway."""
    encoder, decoder = model.stream_encoder(), model.stream_decoder(size=tuple(clip.shape[3:]))
    latents, frames = [], []
    for i, chunk in enumerate(clip.split(portions, dim=2)):
        if i == 1:
            saved = encoder.state_dict(), decoder.state_dict()
            encoder, decoder = model.stream_encoder(), model.stream_decoder()
            decoder.height, decoder.width = clip.shape[3:]
            encoder.load_state_dict(saved[0])
            decoder.load_state_dict(saved[1])
        new = encoder.push(chunk)
        latents += new
        for latent in new:
            frames += decoder.push(latent)
    for latent in encoder.flush():
        latents.append(latent)
        frames += decoder.push(latent)
    frames += decoder.flush(num_frames=encoder.num_frames)
    return torch.cat(latents, dim=2), torch.cat(frames, dim=2)


@torch.no_grad()
@pytest.mark.parametrize("name", WRAPPED)
def test_encodings_and_videos_are_those_of_diffusers(name):
    vae, clip = tiny.make(name), tiny.video(17 if name == "cogvideox" else 9)
    if name == "hunyuan_video":
        vae.use_framewise_encoding = vae.use_framewise_decoding = False
    posterior = vae.encode(clip).latent_dist
    frames = vae.decode(posterior.mode()).sample
    model = vt.wrap_diffusers(vae)
    for rule in ("preserve", "reference"):
        encoding = model.encode(clip, frames=rule)
        assert torch.allclose(encoding.moments, posterior.parameters, atol=1e-5)
        assert torch.allclose(encoding.latent, posterior.mode(), atol=1e-5)
        video = model.decode(encoding)
        assert torch.allclose(video, frames, atol=1e-4)
    assert tuple(encoding.latent.shape[2:]) == model.token_grid(*clip.shape[2:])
    draw = torch.Generator().manual_seed(3)
    assert not torch.equal(model.encode(clip, sample=True, generator=draw).latent, encoding.latent)
    assert model.name == type(vae).__name__ and not model.is_discrete
    assert next(model.vae.parameters()) is next(vae.parameters())
    with pytest.raises(ValueError, match="tokenize: model must be discrete"):
        model.tokenize(clip)


@torch.no_grad()
@pytest.mark.parametrize("name", WRAPPED)
def test_the_manifest_knows_how_many_frames_latents_stand_for(name):
    """Units of several latents, and a first frame alone without causality, are counted."""
    model = vt.wrap_diffusers(tiny.make(name))
    for num_frames in (1, 2, 6):
        latent = model.encode(tiny.video(num_frames)).latent
        frames = model.decode(latent).shape[2]
        assert _padded_frames(model, num_frames) == frames, num_frames


def test_statistics_are_saved_beside_the_folder_of_diffusers(tmp_path):
    model = vt.wrap_diffusers(tiny.make("wan"))
    values = {"grid": torch.tensor([0.5, -2.0])}, {"grid": torch.tensor([3.0, 0.25])}
    model.latent_statistics = LatentStatistics(*values)
    model.save_pretrained(tmp_path)
    found = load_diffusers_vae(tmp_path).latent_statistics
    assert found.to_dict() == model.latent_statistics.to_dict()
    path = tmp_path / "latent_statistics.json"
    path.write_text("{")
    with pytest.raises(ValueError, match="load_diffusers_vae: .* must be JSON"):
        load_diffusers_vae(tmp_path)
    model.latent_statistics = None
    model.save_pretrained(tmp_path)
    assert not path.exists() and load_diffusers_vae(tmp_path).latent_statistics is None


@pytest.mark.parametrize("name", ["vidtok", "wan"])
def test_stats_refuses_a_folder_of_diffusers_before_it_measures(name, tmp_path):
    tiny.make(name).save_pretrained(tmp_path / "model")
    done = CliRunner().invoke(app, ["stats", str(tmp_path / "model"), str(tmp_path / "no-data")])
    assert isinstance(done.exception, ValueError)
    assert "must be a folder of this package, got one of diffusers" in str(done.exception)


@torch.no_grad()
@pytest.mark.parametrize("is_patched", [False, True], ids=["original", "patched"])
@pytest.mark.parametrize("name", STREAMS)
def test_streams_equal_the_whole_clip(name, is_patched):
    vae = tiny.make(name)
    model = vt.wrap_diffusers(vt.patch_diffusers(vae) if is_patched else vae)
    for num_frames, portions in ((1, 1), (6, 4), (19, 3)):
        clip = tiny.video(num_frames, size=14)
        encoding = model.encode(clip)
        assert tuple(encoding.latent.shape[2:]) == model.token_grid(num_frames, 14, 14)
        video = model.decode(encoding)
        latents, frames = streamed(model, clip, portions)
        assert torch.allclose(latents, encoding.latent, atol=1e-5)
        assert frames.shape == video.shape == clip.shape
        assert torch.allclose(frames, video, atol=1e-4 * float(video.abs().max()))


@torch.no_grad()
def test_units_of_cogvideox():
    """Its group norm makes a unit of two latents what it is: no other number can be decoded."""
    model = vt.wrap_diffusers(tiny.make("cogvideox"))
    latent = torch.randn(1, 2, 4, 4, 4)
    with pytest.raises(ValueError, match=r"latent must have 1 or 1 \+ 2 n frames in all, got 1"):
        model.decode(latent)
    decoder = model.stream_decoder()
    assert decoder.push(latent[:, :, :2]) == []
    with pytest.raises(ValueError, match="AutoencoderKLCogVideoX decodes 2 at a time"):
        decoder.flush()
    vae = tiny.make("cogvideox")
    vae.num_latent_frames_batch_size = 4
    with pytest.raises(ValueError, match=r"num_sample_frames_batch_size must be 4 \* num_latent"):
        vt.wrap_diffusers(vae)


@torch.no_grad()
def test_hunyuan_video_refuses_streams_and_says_why():
    vae = tiny.make("hunyuan_video")
    model = vt.wrap_diffusers(vae)
    for stream in (model.stream_encoder, model.stream_decoder):
        with pytest.raises(ValueError, match="whose group norm takes its statistics over all"):
            stream()
    clip = tiny.video(6, size=14)
    assert model.decode(model.encode(clip)).shape == clip.shape
    # What the refusal is about: the first latent depends on the last frame.
    other = torch.cat([clip[:, :, :5], -clip[:, :, 5:]], dim=2)
    first, changed = (model.encode(x).latent[:, :, 0] for x in (clip, other))
    assert (first - changed).abs().max() > 1e-4


def test_wan_of_another_frame_rate_is_refused():
    with pytest.raises(ValueError, match="diffusers encodes 4 frames at a time whatever it says"):
        vt.wrap_diffusers(tiny.make("wan", temperal_downsample=[False, True]))


def test_vidtok_shares_parameters():
    vae = tiny.make("vidtok_fsq")
    model = vt.wrap_diffusers(vae, "mine")
    assert model.name == "mine" and model.is_discrete
    theirs = dict(vae.named_parameters())
    assert all(p is theirs[k] for k, p in model.named_parameters())
    clip = tiny.video(9)
    with torch.no_grad():
        assert torch.equal(model.tokenize(clip).ids, vae(clip, encoder_mode=True)[1].int())


@torch.no_grad()
@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_folders(name, tmp_path):
    vae, clip = tiny.make(name), tiny.video(9)
    model = vt.wrap_diffusers(vt.patch_diffusers(vae))
    model.save_pretrained(tmp_path)
    loaded = load_diffusers_vae(tmp_path)
    assert loaded.model_id == model.model_id
    assert torch.equal(loaded.encode(clip).latent, model.encode(clip).latent)
    with pytest.raises(ValueError, match=f"one of diffusers' {type(vae).__name__}; vt.wrap_diff"):
        vt.load_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="folder must hold one of AutoencoderKLWan"):
        load_diffusers_vae(tmp_path)


@pytest.fixture
def clip_file(tmp_path):
    frames = ((tiny.video(11, size=16)[0] + 1) * 127.5).to(torch.uint8)
    with VideoWriter(tmp_path / "clip.mp4", height=16, width=16, fps=10) as writer:
        writer.write(frames)
    return tmp_path / "clip.mp4"


@pytest.mark.parametrize("name", ["wan", "hunyuan_video"])
def test_commands(name, tmp_path, clip_file):
    vt.wrap_diffusers(tiny.make(name)).save_pretrained(tmp_path / "vae")
    runner, model = CliRunner(), ["--model", str(tmp_path / "vae"), "--json"]

    def run(*arguments, code=0):
        result = runner.invoke(app, [*map(str, arguments), *model])
        assert result.exit_code == code, result.output
        return result

    report = json.loads(run("eval", clip_file).stdout)
    assert report["frames"] == 11 and report["version"] == "diffusers"
    assert report["passes"] == ("exact stream" if name == "wan" else "whole clip")
    reference = json.loads(run("eval", clip_file, "--protocol", "reference").stdout)
    assert reference["passes"] == "clips of 17 frames"
    run("encode", clip_file, tmp_path / "clip.latents")
    run("decode", tmp_path / "clip.latents", tmp_path / "back.mp4")
    with VideoReader(tmp_path / "back.mp4") as reader:
        assert reader.info.num_frames == 11
    out = tmp_path / "out.mp4"
    if name == "wan":
        run("stream", clip_file, tmp_path / "s.latents", "--resume")
    run("reconstruct", clip_file, "-o", out)
    with VideoReader(out) as reader:
        assert reader.info.num_frames == 11
