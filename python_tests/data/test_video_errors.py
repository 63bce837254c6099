"""Whatever is wrong with a video file: one clear line, one class of error, nothing left behind."""

import errno

import pytest
import torch

from vtok_ext.data.video import (
    TruncatedVideoError,
    VideoError,
    VideoReader,
    VideoReadError,
    VideoWriteError,
    VideoWriter,
    read_clip,
)
from vtok_ext.data.video import writer as writer_module

av = pytest.importorskip("av")


def encode(path, num_frames, *, movflags=None, size=(32, 48), codec="libx264", options=None):
    """Writes noise, which takes many bytes per frame, straight through PyAV."""
    container = av.open(str(path), "w", options={"movflags": movflags} if movflags else {})
    stream = container.add_stream(codec, rate=30, options=options or {"g": "1"})
    stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
    generator = torch.Generator().manual_seed(0)
    for _ in range(num_frames):
        picture = torch.randint(0, 256, (*size, 3), dtype=torch.uint8, generator=generator)
        frame = av.VideoFrame.from_ndarray(picture.numpy(), format="rgb24")
        container.mux(stream.encode(frame))
    container.mux(stream.encode())
    container.close()


def fails_with(path, words, kind=VideoReadError):
    with pytest.raises(kind) as caught:
        read_clip(path)
    message = str(caught.value)
    assert words in message and str(path) in message
    assert "\n" not in message
    assert isinstance(caught.value, VideoError) and isinstance(caught.value, ValueError)
    return caught.value


def test_missing_file(tmp_path):
    fails_with(tmp_path / "none.mp4", "must be an existing file")


def test_folder(tmp_path):
    fails_with(tmp_path, "must be a video file, got the folder")


@pytest.mark.parametrize("content", [b"", b"not a video at all\n" * 100, bytes(5000)])
def test_not_a_video(tmp_path, content):
    path = tmp_path / "text.mp4"
    path.write_bytes(content)
    fails_with(path, "must be a video")


def test_no_video_stream(tmp_path):
    path = tmp_path / "sound.wav"
    container = av.open(str(path), "w")
    stream = container.add_stream("pcm_s16le", rate=8000)
    silence = av.AudioFrame(format="s16", layout="mono", samples=800)
    silence.sample_rate, silence.pts = 8000, 0
    for plane in silence.planes:
        plane.update(bytes(plane.buffer_size))
    container.mux(stream.encode(silence))
    container.close()
    fails_with(path, "must have a video stream")


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("empty.mp4", "libx264", {"movflags": "empty_moov+frag_keyframe"}),
        ("empty.avi", "mpeg4", {}),
    ],
)
def test_zero_frames(tmp_path, name, codec, options):
    path = tmp_path / name
    container = av.open(str(path), "w", options=options)
    stream = container.add_stream(codec, rate=30)
    stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
    stream.codec_context.open()
    container.start_encoding()
    container.close()
    fails_with(path, "must have frames, got none")


@pytest.mark.parametrize("missing", [20, 300, 2000])
def test_truncated_within_or_before_the_index(tmp_path, missing):
    path = tmp_path / "clip.mp4"
    encode(path, 12)
    path.write_bytes(path.read_bytes()[:-missing])
    error = fails_with(path, "frames are readable", TruncatedVideoError)
    assert error.frames_readable <= 12


def test_bytes_that_follow_the_video_do_no_harm(tmp_path):
    path = tmp_path / "clip.mp4"
    encode(path, 5)
    for trailer in (b"x", b"\x7f\xff\xff\xffMETA and more", bytes(100)):
        path.write_bytes(path.read_bytes() + trailer)
        assert read_clip(path)[0].shape[1] == 5


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_truncated_within_the_frames(tmp_path, suffix):
    """What decodes up to the cut would otherwise pass for the whole video."""
    path = tmp_path / f"clip{suffix}"
    encode(path, 12, movflags="faststart" if suffix == ".mp4" else None)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 6 // 10])
    error = fails_with(path, "frames are readable", TruncatedVideoError)
    assert 3 <= error.frames_readable <= 9
    assert f"{error.frames_readable} frames" in str(error)
    path.write_bytes(content)
    assert read_clip(path)[0].shape[1] == 12


def test_damaged_data_says_how_many_frames_were_readable(tmp_path):
    path = tmp_path / "clip.mp4"
    encode(path, 12)
    content = bytearray(path.read_bytes())
    middle = content.index(b"mdat") + (content.index(b"moov") - content.index(b"mdat")) // 2
    content[middle : middle + 1500] = b"\xff" * 1500
    path.write_bytes(content)
    error = fails_with(path, "must be intact, got a decoding error after", TruncatedVideoError)
    assert 0 < error.frames_readable < 12


def test_frame_size_that_changes_on_the_way(tmp_path):
    """Two raw MPEG streams of different sizes, one after the other, are still one stream."""
    first, second = tmp_path / "a.m2v", tmp_path / "b.m2v"
    encode(first, 3, size=(32, 48), codec="mpeg2video", options={})
    encode(second, 3, size=(48, 64), codec="mpeg2video", options={})
    path = tmp_path / "both.m2v"
    path.write_bytes(first.read_bytes() + second.read_bytes())
    fails_with(path, "every frame must be 48x32 as the first one, got 64x48")


def test_a_reader_gives_one_pass(write_video, tmp_path):
    path = tmp_path / "clip.mp4"
    write_video(path)
    with VideoReader(path) as reader:
        assert sum(c.frames.shape[1] for c in reader.chunks(4)) == 9
        with pytest.raises(ValueError, match="one pass"):
            next(reader.chunks(4))


def test_chunk_length_below_one(write_video, tmp_path):
    path = tmp_path / "clip.mp4"
    write_video(path)
    with VideoReader(path) as reader, pytest.raises(ValueError, match="at least 1, got 0"):
        next(reader.chunks(0))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("out.txt", "must end in .mp4"),
        ("file/out.mp4", "must lie in an existing folder"),
        ("none/out.mp4", "must lie in an existing folder"),
        ("folder.mp4", "must be a file, got the folder"),
    ],
)
def test_unwritable_output(tmp_path, name, words):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder.mp4").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(VideoWriteError, match=words):
        VideoWriter(tmp_path / name, height=32, width=48)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("frames", "error", "words"),
    [
        (torch.zeros(3, 2, 32, 48), TypeError, "must be uint8, got torch.float32"),
        (torch.zeros(3, 32, 48, dtype=torch.uint8), ValueError, r"must be \[3, t, 32, 48\]"),
        (torch.zeros(3, 2, 32, 50, dtype=torch.uint8), ValueError, r"got \[3, 2, 32, 50\]"),
        (torch.zeros(1, 2, 32, 48, dtype=torch.uint8), ValueError, r"got \[1, 2, 32, 48\]"),
    ],
)
def test_wrong_frames(tmp_path, frames, error, words):
    with pytest.raises(error, match=words):
        with VideoWriter(tmp_path / "out.mp4", height=32, width=48) as writer:
            writer.write(frames)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("timestamps", [[0, 0], [5, 3]])
def test_timestamps_that_do_not_increase(make_clip, tmp_path, timestamps):
    with pytest.raises(ValueError, match="timestamps must increase strictly"):
        with VideoWriter(tmp_path / "out.mp4", height=32, width=48) as writer:
            writer.write(make_clip(2, 32, 48), timestamps)
    assert list(tmp_path.iterdir()) == []


def test_no_frames_written(tmp_path):
    with pytest.raises(VideoWriteError, match="must have frames, got none"):
        with VideoWriter(tmp_path / "out.mp4", height=32, width=48):
            pass
    assert list(tmp_path.iterdir()) == []


class FullDisk:
    """A file on a disk with room for `room` bytes."""

    def __init__(self, file, room: int):
        self._file, self._room = file, room

    def write(self, data):
        self._room -= len(data)
        if self._room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self._file.write(data)

    def __getattr__(self, name):
        return getattr(self._file, name)


@pytest.mark.parametrize("room", [0, 100, 20_000])
def test_full_disk(make_clip, tmp_path, monkeypatch, room):
    original = writer_module._RecordingFile.__init__

    def on_a_full_disk(self, path):
        original(self, path)
        self._file = FullDisk(self._file, room)

    monkeypatch.setattr(writer_module._RecordingFile, "__init__", on_a_full_disk)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (3, 40, 64, 64), dtype=torch.uint8, generator=generator)
    with pytest.raises(VideoWriteError, match="No space left on device") as caught:
        with VideoWriter(tmp_path / "out.mp4", height=64, width=64) as writer:
            writer.write(noise)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
