"""Videos survive a trip through a file: pixels, sizes, timestamps, rotation, chunking."""

from fractions import Fraction

import pytest
import torch

from vtok_ext.data.video import VideoReader, VideoWriter, read_clip

av = pytest.importorskip("av")

# Mean absolute difference, of 255, after H.264 at crf 16: measured up to 4.4 on these small, busy
# pictures. A frame in the wrong place, turned, or of the wrong colours differs by 15 and more.
CODEC_ERROR = 6.0


def mean_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.float() - b.float()).abs().mean().item()


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
@pytest.mark.parametrize("size", [(32, 48), (37, 43), (36, 43), (37, 44), (1, 1), (66, 130)])
def test_frames_come_back_at_their_exact_size(write_video, tmp_path, size, suffix):
    path = tmp_path / f"clip{suffix}"
    frames = write_video(path, 6, *size)
    decoded, timestamps, info = read_clip(path)
    assert decoded.shape == frames.shape == (3, 6, *size)
    assert (info.height, info.width) == size
    assert decoded.dtype == torch.uint8
    assert len(timestamps) == 6
    assert mean_difference(decoded, frames) < CODEC_ERROR
    assert list(tmp_path.iterdir()) == [path]


def test_colours_are_not_shifted(tmp_path):
    """A wrong colour matrix (BT.601 for BT.709) shifts them by 10, coarse rounding by 2."""
    colours = torch.tensor(
        [[255, 0, 0], [0, 255, 0], [0, 0, 255], [200, 150, 40]], dtype=torch.uint8
    )
    frames = colours.T[:, :, None, None].expand(3, 4, 64, 64)
    path = tmp_path / "colours.mp4"
    with VideoWriter(path, height=64, width=64) as writer:
        writer.write(frames)
    decoded, _, _ = read_clip(path)
    assert (decoded.float() - frames.float()).abs().max() <= 3
    assert (decoded.float() - frames.float()).mean().abs() <= 0.5


@pytest.mark.parametrize("time_base", [Fraction(1, 30), Fraction(1, 90000), Fraction(1001, 30000)])
def test_variable_frame_rate_survives(write_video, tmp_path, time_base):
    timestamps = [7, 8, 10, 11, 20, 50, 51, 53]
    first, second = tmp_path / "first.mp4", tmp_path / "second.mp4"
    write_video(first, 8, timestamps=timestamps, time_base=time_base)
    expected = [(t - 7) * time_base for t in timestamps]
    with VideoReader(first) as reader:
        info = reader.info
        chunks = list(reader.chunks(3))
    with VideoWriter(
        second, height=info.height, width=info.width, time_base=info.time_base
    ) as writer:
        for chunk in chunks:
            writer.write(chunk.frames, chunk.timestamps)
    for path in (first, second):
        _, read, info = read_clip(path)
        assert [t * info.time_base for t in read] == expected


def test_variable_frame_rate_without_x264(write_video, tmp_path, monkeypatch):
    """MPEG-4 part 2 cannot store 1/90000 s; frames keep their times to within one of its ticks."""
    monkeypatch.setattr(av, "codecs_available", av.codecs_available - {"libx264"})
    path = tmp_path / "clip.mp4"
    timestamps = [0, 3003, 6006, 30000, 90000]
    frames = write_video(path, 5, 37, 43, timestamps=timestamps, time_base=Fraction(1, 90000))
    decoded, read, info = read_clip(path)
    assert info.codec == "mpeg4"
    assert decoded.shape == frames.shape
    assert mean_difference(decoded, frames) < 2 * CODEC_ERROR
    for actual, expected in zip(read, timestamps, strict=True):
        assert abs(float(actual * info.time_base) - expected / 90000) <= 1 / 65535


@pytest.mark.parametrize("num_frames", [1, 2, 5, 13, 100])
def test_chunks_join_to_the_whole_clip(write_video, tmp_path, num_frames):
    path = tmp_path / "clip.mp4"
    write_video(path, 13)
    whole, timestamps, _ = read_clip(path)
    with VideoReader(path) as reader:
        chunks = list(reader.chunks(num_frames))
    assert [c.frames.shape[1] for c in chunks[:-1]] == [num_frames] * (len(chunks) - 1)
    assert torch.equal(torch.cat([c.frames for c in chunks], dim=1), whole)
    assert [t for c in chunks for t in c.timestamps] == timestamps


def test_chunks_are_stored_with_interleaved_colours(write_video, tmp_path):
    path = tmp_path / "clip.mp4"
    write_video(path, 4)
    with VideoReader(path) as reader:
        chunk = next(reader.chunks(4))
    assert chunk.frames[None].is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("degrees", [90, -90, 180])
def test_rotation_metadata_is_applied(make_clip, tmp_path, degrees):
    path = tmp_path / "turned.mp4"
    frames = make_clip(3, 32, 48)
    container = av.open(str(path), "w")
    stream = container.add_stream("libx264", rate=30, options={"crf": "10"})
    stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
    if not hasattr(stream, "set_display_rotation"):
        pytest.skip("this PyAV cannot write rotation metadata")
    stream.set_display_rotation(degrees)
    for picture in frames.permute(1, 2, 3, 0).contiguous().numpy():
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
    container.mux(stream.encode())
    container.close()
    decoded, _, info = read_clip(path)
    # Positive angles turn counterclockwise, as torch.rot90 does from rows to columns.
    expected = torch.rot90(frames, degrees // 90, dims=(2, 3))
    assert (info.height, info.width) == tuple(expected.shape[2:])
    assert mean_difference(decoded, expected) < 2 * CODEC_ERROR


def test_pixel_aspect_is_kept(make_clip, tmp_path):
    path = tmp_path / "anamorphic.mp4"
    with VideoWriter(path, height=32, width=48, pixel_aspect=Fraction(4, 3)) as writer:
        writer.write(make_clip(2, 32, 48))
    with VideoReader(path) as reader:
        assert reader.info.pixel_aspect == Fraction(4, 3)


def test_max_frames_reads_the_beginning(write_video, tmp_path):
    path = tmp_path / "clip.mp4"
    write_video(path, 20)
    whole, _, _ = read_clip(path)
    beginning, timestamps, _ = read_clip(path, max_frames=5)
    assert len(timestamps) == 5
    assert torch.equal(beginning, whole[:, :5])


def test_audio_is_ignored(write_video, make_clip, tmp_path):
    """A file whose first stream is sound reads as the same frames."""
    path = tmp_path / "sound.mkv"
    frames = make_clip(4, 32, 48)
    container = av.open(str(path), "w")
    sound = container.add_stream("pcm_s16le", rate=8000)
    stream = container.add_stream("libx264", rate=30, options={"crf": "10"})
    stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
    silence = av.AudioFrame(format="s16", layout="mono", samples=800)
    silence.sample_rate, silence.pts = 8000, 0
    for plane in silence.planes:
        plane.update(bytes(plane.buffer_size))
    container.mux(sound.encode(silence))
    for picture in frames.permute(1, 2, 3, 0).contiguous().numpy():
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
    container.mux(stream.encode())
    container.close()
    decoded, _, _ = read_clip(path)
    assert decoded.shape == frames.shape
    assert mean_difference(decoded, frames) < 2 * CODEC_ERROR


def test_an_existing_output_is_replaced_only_on_success(write_video, make_clip, tmp_path):
    path = tmp_path / "clip.mp4"
    write_video(path, 3)
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        with VideoWriter(path, height=32, width=48) as writer:
            writer.write(make_clip(5, 32, 48))
            raise KeyboardInterrupt
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    write_video(path, 4)
    assert path.read_bytes() != before
