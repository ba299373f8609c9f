"""FIFOs, sockets and devices are not read as images: opening a FIFO would wait for a writer."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ijepa.data.open import open_dataset
from ijepa.data.sources.base import read_file
from ijepa.prepare.file_lists import list_index
from ijepa.utils.errors import RunError, UserError
from tests.helpers.images import jpeg, write_tree
from tests.unit.data.sources.test_arrow import write_saved

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no FIFOs")
PATIENCE = 60
"""Seconds after which a process is considered to hang."""


def in_time(*words: object) -> subprocess.CompletedProcess[str]:
    words = (sys.executable, *map(str, words))
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=PATIENCE)


def make(path: Path, kind: str) -> Path:
    if kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a socket":
        here = Path.cwd()
        os.chdir(path.parent)  # the path of a socket is limited to about 100 bytes
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(path.name)
        os.chdir(here)
    elif kind == "a device":
        path.symlink_to("/dev/null")  # not /dev/zero, which would fill the memory if it was read
    else:
        path.mkdir()
    return path


KINDS = ("a FIFO", "a socket", "a device")


@pytest.fixture
def tree(tmp_path) -> Path:
    return write_tree(tmp_path / "tree", {f"a/{n}.jpg": jpeg(n) for n in range(3)})


@pytest.mark.parametrize("name", ["x.jpg", "0.mask.png"])
@pytest.mark.parametrize("kind", KINDS)
def test_folder_with_an_irregular_file_is_refused(tree, kind, name):
    make(tree / "a" / name, kind)
    with pytest.raises(UserError, match=f"tree/a/{name} is {kind}"):
        open_dataset(tree)


def test_links_and_fifos_without_an_image_name_are_accepted(tree):
    os.mkfifo(tree / "queue")
    (tree / "a/link.jpg").symlink_to(tree / "a/0.jpg")
    source = open_dataset(tree)
    assert [source.image(i) for i in (0, 3)] == [jpeg(0)] * 2


@pytest.mark.parametrize(
    "command",
    [
        ("data", "check", "DATA"),
        ("data", "pack", "folder", "DATA", "OUT"),
        ("pretrain", "vit-tiny-64", "--data.path", "DATA", "--data.workers", "0", "--output", "OUT", "--steps", "2"),
    ],
)
def test_commands_do_not_wait_for_a_fifo_named_as_an_image(tree, tmp_path, command):
    os.mkfifo(tree / "a/x.jpg")
    places = {"DATA": tree, "OUT": tmp_path / "out"}
    done = in_time("-m", "ijepa", *(places.get(word, word) for word in command))
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and "x.jpg is a FIFO, not a regular file" in done.stderr
    assert not (tmp_path / "out").exists()


_OPEN = """
import sys
from ijepa.data.open import open_dataset
from ijepa.utils.errors import UserError
for path in sys.argv[1:]:
    try:
        open_dataset(path)
    except UserError as error:
        print(error)
"""


def test_path_of_an_irregular_file_is_refused(tmp_path):
    for name in ("x.tar", "x.parquet", "x", "ILSVRC2012_img_train.tar"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "parts").mkdir()
    os.mkfifo(tmp_path / "parts/x.parquet")
    names = ("x.tar", "*.tar", "x.parquet", "parts", "x", "ILSVRC2012_img_train.tar")
    done = in_time("-c", _OPEN, *(tmp_path / name for name in names))
    lines = done.stdout.splitlines()
    assert len(lines) == len(names) and all("is a FIFO, not a regular file" in line for line in lines), done


_READ = """
import sys
from pathlib import Path
from ijepa.data.open import open_dataset
from ijepa.data.sources.base import FolderSource
from ijepa.prepare.file_lists import list_index
for path in sys.argv[1:]:
    source = FolderSource(list_index(Path(path))) if path.endswith(".csv") else open_dataset(path)
    print([len(source.image(index)) for index in range(len(source))])
"""


def test_rows_with_irregular_files_are_unreadable_images(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    good = tmp_path / "good.jpg"
    good.write_bytes(jpeg(1))
    paths = [good, *(make(tmp_path / f"{number}.jpg", kind) for number, kind in enumerate((*KINDS, "a folder")))]
    rows = [{"bytes": None, "path": str(path)} for path in paths]
    write_saved(tmp_path / "saved", rows, [0] * len(rows))
    pq.write_table(pa.table({"image": rows}), tmp_path / "x.parquet")
    (tmp_path / "list.csv").write_text("".join(f"{path},0\n" for path in paths))
    done = in_time("-c", _READ, f"hf:{tmp_path}/saved", tmp_path / "x.parquet", tmp_path / "list.csv")
    assert json.loads(f"[{','.join(done.stdout.splitlines())}]") == [[len(jpeg(1)), 0, 0, 0, 0]] * 3, done.stderr


def test_list_with_an_irregular_file_is_packed_without_it(tmp_path):
    write_tree(tmp_path, {f"{n}.jpg": jpeg(n) for n in range(3)})
    os.mkfifo(tmp_path / "x.jpg")
    (tmp_path / "list.csv").write_text("0.jpg\nx.jpg\n".replace("\n", ",0\n"))
    assert len(list_index(tmp_path / "list.csv").arrays["ends"]) == 2
    done = in_time("-m", "ijepa", "data", "pack", "list", tmp_path / "list.csv", tmp_path / "out")
    assert done.returncode == 0 and "1 bad" in done.stdout, done
    assert json.loads((tmp_path / "out/bad.jsonl").read_text())["name"] == "x.jpg"


_FRAME = """
import sys
from pathlib import Path
from ijepa.utils.errors import RunError
from ijepa.evaluation.video.dataset import Video
try:
    Video("x", (Path(sys.argv[1]),), (None,)).frame(0)
except RunError as error:
    print(error)
"""


def test_irregular_video_frame_cannot_be_decoded(tmp_path):
    done = in_time("-c", _FRAME, make(tmp_path / "0.jpg", "a FIFO"))
    assert done.stdout.endswith("0.jpg: the file is empty\n"), done


def test_missing_file_is_an_error(tmp_path):
    with pytest.raises(RunError, match="gone.jpg"):
        read_file(tmp_path / "gone.jpg")
