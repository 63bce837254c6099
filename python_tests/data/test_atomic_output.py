"""Outputs are complete or absent, and nothing is replaced that may not be."""

import pytest

from vtok_ext.data.atomic_output import output_file, output_folder, refuse_foreign_files


def always(folder):
    return True


def never(folder):
    return False


def test_file_appears_on_success(tmp_path):
    path = tmp_path / "out.bin"
    with output_file(path) as partial:
        partial.write_bytes(b"data")
        assert not path.exists()
    assert path.read_bytes() == b"data"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError("disk"), KeyboardInterrupt()])
def test_file_vanishes_on_failure(tmp_path, error):
    path = tmp_path / "out.bin"
    path.write_bytes(b"old")
    with pytest.raises(type(error)):
        with output_file(path) as partial:
            partial.write_bytes(b"half")
            raise error
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_folder_appears_on_success_and_replaces(tmp_path):
    folder = tmp_path / "out"
    for content in ("one", "two"):
        with output_folder(folder, replaceable=always) as partial:
            (partial / "file").write_text(content)
        assert (folder / "file").read_text() == content
        assert list(tmp_path.iterdir()) == [folder]


def test_folder_vanishes_on_failure(tmp_path):
    folder = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        with output_folder(folder, replaceable=always) as partial:
            (partial / "file").write_text("half")
            raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_folder_of_another_kind_is_not_replaced(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "precious").write_text("kept")
    with pytest.raises(ValueError, match="must be a new or empty folder"):
        with output_folder(folder, replaceable=never):
            pass
    assert (folder / "precious").read_text() == "kept"
    assert list(tmp_path.iterdir()) == [folder]


def test_files_that_come_while_the_new_ones_are_made_are_kept(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "file").write_text("old")

    def only_mine(path):
        refuse_foreign_files(path, {"file", "below/file"}, "op")
        return True

    with pytest.raises(ValueError, match=r"^op: output must be .* got .*out with below/other"):
        with output_folder(folder, replaceable=only_mine) as partial:
            (partial / "file").write_text("new")
            (folder / "below").mkdir()
            (folder / "below" / "other").write_text("kept")
    assert (folder / "below" / "other").read_text() == "kept"
    assert (folder / "file").read_text() == "old"
    assert list(tmp_path.iterdir()) == [folder]


def test_empty_folder_is_filled(tmp_path):
    folder = tmp_path / "new"
    folder.mkdir()
    with output_folder(folder, replaceable=never) as partial:
        (partial / "file").write_text("x")
    assert (folder / "file").read_text() == "x"


def test_file_in_the_way(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ValueError, match="must be a folder, got the file"):
        with output_folder(tmp_path / "out", replaceable=always):
            pass
    with pytest.raises(ValueError, match="must lie in an existing folder"):
        with output_folder(tmp_path / "out" / "below", replaceable=always):
            pass
