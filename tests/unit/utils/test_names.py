"""Names that are not UTF-8 can be printed and stored."""

import os
import subprocess
import sys

import pytest

from ijepa.data.open import open_dataset
from ijepa.utils.errors import RunError, UserError
from ijepa.utils.files import write_text
from ijepa.utils.names import printable
from tests.helpers.images import jpeg, write_shards, write_tree

ODD = os.fsdecode(b"caf\xe9")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("café/日本.jpg", "café/日本.jpg"),
        (ODD, "caf\\xe9"),
        (os.fsdecode(b"\xff\xc3\xa9\x80"), "\\xffé\\x80"),
        ("\ud800", "\\ud800"),
        ("a\\xe9", "a\\xe9"),
        ("", ""),
    ],
)
def test_printable_escapes_bytes_that_are_not_utf8(name, shown):
    assert printable(name) == shown == printable(shown)


def test_errors_are_printable():
    refused = UserError(f"/data/{ODD}", f"{ODD} is missing", f"rename {ODD}")
    lines = [str(RunError(f"{ODD}: gone")), str(refused), refused.where, refused.problem, refused.hint]
    assert lines[0] == "caf\\xe9: gone" and all(line.encode() for line in lines)


def test_sources_have_printable_names_and_classes(tmp_path):
    tree = open_dataset(write_tree(tmp_path / "tree", {f"{ODD}/{ODD}.jpg": jpeg(1), "b/1.jpg": jpeg(2)}))
    assert [tree.name(i) for i in range(2)] == ["b/1.jpg", "caf\\xe9/caf\\xe9.jpg"]
    assert tree.file(1) == tree[1].name == tree.name(1) and tree.classes == ("b", "caf\\xe9")
    assert tree.image(1) == jpeg(1)
    shards = write_shards(tmp_path / "shards", [1])
    (shards / "train-0000.tar").rename(shards / f"{ODD}.tar")
    (shards / "classes.txt").write_bytes(b"caf\xe9\n")
    source = open_dataset(shards)
    assert (source.name(0), source.file(0)) == ("caf\\xe9.tar/s0000.jpg", "caf\\xe9.tar")
    assert source.classes == ("caf\\xe9",) and source.image(0)


def test_write_text_writes_surrogates_as_escapes(tmp_path):
    write_text(tmp_path / "page.html", f"<p>{ODD}</p>")
    assert (tmp_path / "page.html").read_text() == "<p>caf\\udce9</p>"


def test_command_with_a_character_that_the_terminal_cannot_show(tmp_path):
    folder = tmp_path / "日本"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(jpeg(1))
    done = subprocess.run(
        [sys.executable, "-m", "ijepa", "data", "index", str(folder)],
        env={**os.environ, "PYTHONIOENCODING": "latin-1"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0 and b"\\u65e5\\u672c: 1 images" in done.stdout, done
