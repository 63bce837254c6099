"""VTok on the command line: `ask`, `generate`, `reconstruct`, `encode` and `decode`."""

import pytest
import torch
from helpers import import_or_skip, write_video
from tiny_vtok import tiny, tiny_fsq, tiny_lm

import vtok_ext as vt
from vtok_ext.data.captioned import draw_scene, render
from vtok_ext.data.video import VideoWriter, read_clip
from vtok_ext.models import Encoding, Tokens, VTok


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    import_or_skip("transformers")
    models = {"continuous": tiny(stride=2), "fsq": tiny_fsq(stride=2), "lm": tiny_lm()}
    root = tmp_path_factory.mktemp("vtok")
    for name, model in models.items():
        model.save_pretrained(str(root / name))
    return {name: root / name for name in models}


@pytest.fixture
def video(tmp_path):
    path = tmp_path / "shapes.mp4"
    with VideoWriter(path, height=32, width=32, fps=8) as writer:
        writer.write(render(draw_scene(0, 24), 32, 32))
    return path


def test_ask(vtok, folders, video):
    result = vtok("ask", folders["lm"], video, "what colour is the circle", "--json")
    assert result.code == 0, result.err
    assert result.json["frames"] == 24 and result.json["fps"] == 8
    assert result.json["tokens"] == 16 + 11
    plain = vtok("ask", folders["lm"], video, "what colour is the circle", "--max-frames", 5)
    assert plain.code == 0 and plain.err == ""


def test_generate(vtok, folders, written, tmp_path):
    out = tmp_path / "out.mp4"
    options = ("--frames", 6, "--height", 20, "--width", 24, "-o", out, "--json")
    result = vtok("generate", folders["lm"], "a red circle moves left", *options)
    assert result.code == 0, result.err
    frames, _, info = read_clip(out)
    assert frames.shape == (3, 6, 20, 24) and info.fps == 8
    again = tmp_path / "again.mp4"
    vtok("generate", folders["lm"], "a red circle moves left", *options[:6], "-o", again)
    # What reaches the writer: x264 does not give the same file every time on a busy machine.
    assert torch.equal(written[1], written[0]) and read_clip(again)[0].shape == frames.shape


@pytest.mark.parametrize("kind", ["continuous", "fsq"])
def test_reconstruct_encode_and_decode(vtok, folders, video, written, tmp_path, kind):
    model, out = folders[kind], tmp_path / "out.mp4"
    result = vtok("reconstruct", video, "--model", model, "-o", out, "--json")
    assert result.code == 0, result.err
    assert result.json["frames"] == 24
    if kind == "fsq":
        assert result.json["tokens"] == 16 + 11
    reconstructed = torch.cat(written, dim=2)
    written.clear()
    file, back = tmp_path / "clip.vtok", tmp_path / "back.mp4"
    result = vtok("encode", video, file, "--model", model, "--json")
    assert result.code == 0 and result.json["frames"] == 24
    result = vtok("decode", file, back, "--model", model)
    assert result.code == 0, result.err
    # What reaches the writer: H.264 would blow up a single grey level.
    assert (torch.cat(written, dim=2).float() - reconstructed.float()).abs().max() <= 1


@pytest.mark.parametrize("kind", ["continuous", "fsq"])
def test_encode_takes_portions_and_writes_what_the_whole_clip_gives(
    vtok, folders, tmp_path, monkeypatch, kind
):
    source, file = tmp_path / "long.mp4", tmp_path / "clip.vtok"
    write_video(source, 75, 32, 48)
    frames = read_clip(source)[0]
    model = vt.load_model(folders[kind])
    with torch.no_grad():
        whole = model.encode(frames[None], fps=30.0)
    monkeypatch.setattr(VTok, "encode", lambda *given, **options: pytest.fail("the whole clip"))
    result = vtok("encode", source, file, "--model", folders[kind], "--json", "--device", "cpu")
    assert result.code == 0, result.err
    assert result.json["grid"] == list(whole.latent.shape[1:])[: 1 if kind == "fsq" else 2]
    if kind == "fsq":
        tokens = Tokens.load(file)
        assert torch.equal(tokens.ids, whole.indices) and tokens.fps == 30
        assert (tokens.num_frames, tokens.size) == (75, (32, 48))
        assert tokens.model_id == model.model_id
    else:
        encoding = Encoding.load(file)
        assert torch.equal(encoding.latent, whole.latent) and encoding.model_id == model.model_id
        assert torch.equal(encoding.positions, whole.positions) and encoding.num_frames == 75


def test_tokens_that_would_lose_their_frames_are_refused(vtok, video, tmp_path):
    """A file of ids says nothing of a chosen key frame: it was decoded as if it were the first."""
    model = tmp_path / "auto"
    tiny_fsq(stride=2, key_frame="auto").save_pretrained(model)
    file, folder = tmp_path / "clip.vtok", tmp_path / "set"
    for arguments in (
        ("encode", video, file, "--model", model),
        ("tokenize", video, folder, "--model", model),
        ("tokenize", video, folder, "--model", model, "--output", "latent"),
    ):
        result = vtok(*arguments)
        assert result.code == 2 and "Tokens record no positions" in result.err
    assert not file.exists() and not folder.exists()
    assert vtok("encode", video, file, "--model", model, "--output", "latent").code == 0
    assert vtok("decode", file, tmp_path / "back.mp4", "--model", model).code == 0


def test_bad_input_is_one_line(vtok, folders, video, tmp_path):
    for arguments, words in (
        (("ask", folders["continuous"], video, "why"), "model must be VTokLM"),
        (("ask", tmp_path / "nothing", video, "why"), "must be a folder"),
        (("generate", folders["lm"], "a", "--frames", 0), "--frames and --fps must be positive"),
        (("generate", folders["lm"], "a", "-o", tmp_path / "a.gif"), "output must end in"),
        # Options of other models had no effect, and one video was made.
        (("generate", folders["lm"], "a", "-n", 3, "--label", 1), "-n, --label must be absent"),
        (("generate", folders["lm"], "a", "--last-step", "none"), "--last-step must be absent"),
        (("generate", folders["lm"], "a", "--guidance", 2), "guidance must be 1 for a model"),
        (("generate", folders["lm"], "--frames", 8), "--frames must be absent with a generator"),
        (("generate", folders["lm"], "a", "--fps", "inf"), "fps must be finite, got inf"),
        (("generate", folders["lm"], "a", "--temperature", "nan"), "--temperature must be >= 0"),
    ):
        result = vtok(*arguments)
        assert result.code == 2 and words in result.err and result.err.count("\n") == 1
    assert not list(tmp_path.glob("*.gif"))
