from pathlib import Path

import pytest

from ijepa.utils.errors import RunError
from ijepa.utils.files import atomic_dir, atomic_file, write_errors


def _names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_atomic_file_replaces_the_file_when_the_block_ends(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with atomic_file(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" and _names(tmp_path) == ["a.bin"]


def test_atomic_file_writes_by_name_too(tmp_path):
    with atomic_file(tmp_path / "a.txt") as file, Path(file.name).open("w") as other:
        other.write("by name")
    assert (tmp_path / "a.txt").read_text() == "by name"


def test_atomic_file_leaves_the_old_file_after_an_error(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), atomic_file(path) as file:
        file.write(b"new")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old" and _names(tmp_path) == ["a.bin"]


def test_atomic_file_raises_oserror_for_a_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "missing" / "a.bin"):
        pass


def test_atomic_file_of_nested_writers_of_one_path(tmp_path):
    with atomic_file(tmp_path / "a") as first, atomic_file(tmp_path / "a") as second:
        first.write(b"first")
        second.write(b"second")
    assert (tmp_path / "a").read_bytes() == b"first" and _names(tmp_path) == ["a"]


def test_atomic_dir_appears_whole(tmp_path):
    with atomic_dir(tmp_path / "out") as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "a").write_text("a")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "sub" / "a").read_text() == "a" and _names(tmp_path) == ["out"]


def test_atomic_dir_leaves_nothing_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), atomic_dir(tmp_path / "out") as partial:
        (partial / "a").write_text("a")
        raise ZeroDivisionError
    assert _names(tmp_path) == []


def test_atomic_dir_does_not_replace_a_folder_with_content(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(OSError, match="out"), atomic_dir(tmp_path / "out") as partial:
        (partial / "a").write_text("a")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


def test_write_errors_names_the_place(tmp_path):
    with pytest.raises(RunError, match="curves.json"), write_errors("curves.json"), atomic_file(tmp_path / "a" / "b"):
        pass
