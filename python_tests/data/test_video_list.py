"""Lists of videos: folder, CSV, JSON lines, tars."""

import io
import json
import tarfile

import pytest
import torch

from vtok_ext.data.clips import VideoClips
from vtok_ext.data.frame_sampling import FrameSampling
from vtok_ext.data.video import read_clip
from vtok_ext.data.video_list import list_videos


@pytest.fixture
def folder(tmp_path, write_video):
    (tmp_path / "v").mkdir()
    write_video(tmp_path / "v" / "b.mp4")
    write_video(tmp_path / "v" / "a.mp4", num_frames=7)
    return tmp_path


def test_folder_is_sorted(folder):
    assert [item.name for item in list_videos(folder)] == ["v/a.mp4", "v/b.mp4"]
    assert [item.name for item in list_videos(folder, fraction=0.5)] == ["v/a.mp4"]


def test_published_csv(folder):
    text = "videos,caption\nv/b.mp4,caf\xe9\n,nothing\nv/a.mp4,one,too,many\nv/a.mp4,x\n"
    (folder / "train.csv").write_bytes(text.encode("iso-8859-1"))
    lines = []
    items = list_videos(folder / "train.csv", warn=lines.append)
    assert [(i.name, i.fields) for i in items] == [
        ("v/b.mp4", {"caption": "caf\xe9"}),
        ("v/a.mp4", {"caption": "x"}),
    ]
    assert len(lines) == 2 and "line 3" in lines[0]
    assert list_videos(folder / "train.csv", root="/data")[0].path.as_posix() == "/data/v/b.mp4"
    (folder / "bad.csv").write_text("files\nv/a.mp4\n")
    with pytest.raises(ValueError, match="must have a column videos, got"):
        list_videos(folder / "bad.csv")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_csv_in_utf_8(folder, encoding):
    text = "videos,caption\nv/caf\xe9.mp4,na\xefve\n"
    (folder / "t.csv").write_bytes(text.encode(encoding))
    items = list_videos(folder / "t.csv")
    assert [(i.name, i.fields) for i in items] == [("v/caf\xe9.mp4", {"caption": "na\xefve"})]


def test_json_lines(folder):
    rows = ['{"video": "v/a.mp4", "label": 3}', "[1]", "", '{"path": "v/b.mp4"}', "{"]
    (folder / "t.jsonl").write_text("\n".join(rows))
    lines = []
    items = list_videos(folder / "t.jsonl", warn=lines.append)
    assert [(i.name, i.fields) for i in items] == [("v/a.mp4", {"label": 3}), ("v/b.mp4", {})]
    assert len(lines) == 2


def make_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def test_tars_are_read_in_place(folder):
    a, b = ((folder / "v" / name).read_bytes() for name in ("a.mp4", "b.mp4"))
    fields = json.dumps({"label": 5}).encode()
    one = [("002.mp4", b), ("002.json", fields), ("001.mp4", a), ("001.txt", b"a cat\n")]
    shards = folder / "shards"
    shards.mkdir()
    make_tar(shards / "00.tar", [*one, ("003.txt", b"alone")])
    make_tar(shards / "01.tar", [("004.cls", b"7"), ("004.mp4", b"damaged"), ("../x.mp4", a)])
    lines = []
    items = list_videos(shards, warn=lines.append)
    assert [item.name for item in items] == [
        "00.tar/001.mp4",
        "00.tar/002.mp4",
        "01.tar/../x.mp4",
        "01.tar/004.mp4",
    ]
    assert [i.fields for i in items] == [{"caption": "a cat"}, {"label": 5}, {}, {"label": "7"}]
    assert lines == [f"{shards / '00.tar'}: sample 003 has no video"]
    assert list_videos(shards / "*.tar") == items
    clips = VideoClips(items, FrameSampling(7), [(7, 32, 48)])
    assert len(clips) == 3 and "01.tar/004.mp4" in clips.unreadable[0]
    assert torch.equal(clips[0, 0], read_clip(folder / "v" / "a.mp4")[0])


def test_members_that_are_left_out_are_named(tmp_path):
    large = b'"' + b"x" * (1 << 20) + b'"'
    members = [("1.mp4", b"a"), ("1.webm", b"b"), ("2.MP4", b"c"), ("2.json", large)]
    members += [("3.mp4", b"d"), ("3.JSON", b'{"label": 3}'), ("3.Txt", b"x"), ("3.txt", b"cat")]
    members += [("4.right.mp4", b"e" * (1 << 21)), ("4.mp4", b"f"), ("4.jpg", b"\xff"), ("5", b"")]
    path = tmp_path / "x.tar"
    make_tar(path, members)
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("6.mp4")
        link.type, link.linkname = tarfile.SYMTYPE, "1.mp4"
        tar.addfile(link)
    lines = []
    items = list_videos(path, warn=lines.append)
    names = ["x.tar/1.webm", "x.tar/2.MP4", "x.tar/3.mp4", "x.tar/4.mp4"]
    assert [item.name for item in items] == names
    assert [item.content() for item in items] == [b"b", b"c", b"d", b"f"]
    assert [item.fields for item in items] == [{}, {}, {"label": 3, "caption": "cat"}, {}]
    assert lines == [
        f"{path}: sample 1 must have one video, 1.mp4 is left out",
        f"{path}: 2.json must be <= 1 MiB, got {len(large)} bytes; it is left out",
        f"{path}: sample 3 must have one .txt, 3.Txt is left out",
        f"{path}: 4.right.mp4 must have one dot, that of its kind; it is left out",
        f"{path}: 3 members are no video or field, the first 4.jpg",
    ]


def test_names_in_tars_of_one_name_differ(tmp_path):
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        make_tar(tmp_path / place / "0.tar", [("1.mp4", place.encode())])
    items = list_videos(tmp_path)
    assert [item.name for item in items] == ["a/0.tar/1.mp4", "b/0.tar/1.mp4"]
    assert [item.content() for item in items] == [b"a", b"b"]


def test_what_is_no_tar_is_named(folder):
    (folder / "x.tar").write_bytes(b"x" * 2000)
    lines = []
    with pytest.raises(ValueError, match="source must name videos"):
        list_videos(folder / "x.tar", warn=lines.append)
    assert "must be an uncompressed tar" in lines[0]


def test_damaged_lines_are_named_and_the_rest_is_read(folder):
    """A quote that is not closed, a value beyond csv's limit, a line in another encoding."""
    long = "x" * 200_000
    rows = ["videos,caption", 'v/a.mp4,"a cat', "v/b.mp4,a dog", 'v/a.mp4,"', f"v/b.mp4,{long}"]
    (folder / "t.csv").write_text("\n".join([*rows, "v/b.mp4,a cow", ""]))
    lines = []
    items = list_videos(folder / "t.csv", warn=lines.append)
    assert [item.fields["caption"] for item in items][-1] == "a cow"
    assert "line 4: a value goes over several lines" in lines[0]
    assert "line 5: no row, got field larger than field limit" in lines[1] and len(lines) == 2
    # As Windows writes it, with a mark in front.
    (folder / "t.jsonl").write_bytes(b'\xef\xbb\xbf{"video": "v/a.mp4"}\n{"video": "v/\xff.mp4"}\n')
    lines.clear()
    assert [item.name for item in list_videos(folder / "t.jsonl", warn=lines.append)] == ["v/a.mp4"]
    assert "t.jsonl, line 2: no object with a video" in lines[0]
