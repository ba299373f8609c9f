import json
import os
import pickle
import resource
import shutil
import tarfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

from ijepa.data.open import open_dataset
from ijepa.data.sources.base import Sample, Source
from ijepa.utils.errors import RunError, UserError
from tests.helpers.images import encoded, jpeg, write_shards, write_tar, write_tree

MASK = encoded(np.arange(16, dtype=np.uint8).reshape(4, 4), "PNG")


def everything(source: Source) -> list[Sample]:
    return [source[i] for i in range(len(source))]


def refusal(call, *arguments) -> str:
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_folder_source_with_classes(tmp_path):
    files = {
        "dog/2.jpg": b"d2",
        "dog/deep/1.png": b"d1",
        "cat/9.jpeg": b"c9",
        "owl/readme.txt": b"",
        "cat/1.webp": b"c1",
    }
    source = open_dataset(write_tree(tmp_path, files))
    assert source.classes == ("cat", "dog", "owl")
    assert everything(source) == [
        Sample("cat/1.webp", b"c1", 0, None),
        Sample("cat/9.jpeg", b"c9", 0, None),
        Sample("dog/2.jpg", b"d2", 1, None),
        Sample("dog/deep/1.png", b"d1", 1, None),
    ]
    assert source.require_labels("--train").tolist() == [0, 0, 1, 1]
    assert source.labels.dtype == np.int32 and not source.has_masks


def test_folder_source_without_classes(tmp_path):
    source = open_dataset(write_tree(tmp_path, {"b.jpg": b"1", "a.JPG": b"2"}))
    assert everything(source) == [Sample("a.JPG", b"2", None, None), Sample("b.jpg", b"1", None, None)]
    assert source.labels is None and source.classes is None
    assert refusal(source.require_labels, "--train").startswith("--train: the images have no labels;")
    assert refusal(source.require_masks, "--test").startswith(
        "--test: the images have no masks; give images/ and masks/"
    )


def test_folder_source_with_masks(tmp_path):
    files = {"images/1.jpg": b"1", "images/s/2.jpg": b"2", "masks/1.png": MASK, "masks/s/2.png": MASK + b" "}
    source = open_dataset(write_tree(tmp_path, files))
    assert everything(source) == [Sample("1.jpg", b"1", None, MASK), Sample("s/2.jpg", b"2", None, MASK + b" ")]
    assert source.has_masks
    source.require_masks("--train")
    (tmp_path / "masks/1.png").unlink()
    source = open_dataset(tmp_path)
    assert source[0].mask is None
    assert "1 of 2 images have no mask, the first is 1.jpg" in refusal(source.require_masks, "--train")


def test_tar_source(tmp_path):
    members = [
        ("a.jpg", b"A"),
        ("a.cls", b"1"),
        ("a.mask.png", MASK),
        ("d/b.png", b"BB"),
        ("d/b.json", b'{"label": 0}'),
    ]
    write_tar(tmp_path / "train-0.tar", members)
    write_tar(tmp_path / "train-1.tar", [("x" * 120 + ".webp", b"X")], format=tarfile.GNU_FORMAT)
    write_tar(tmp_path / "train-2.tar", [("notes.txt", b"")])
    write_tar(tmp_path / "train-3.tar", [("c.jpeg", b"C"), ("c.cls", b"2")])
    (tmp_path / "classes.txt").write_text("cat\ndog\n\nowl\n")
    source = open_dataset(tmp_path, split="train")
    assert everything(source) == [
        Sample("train-0.tar/a.jpg", b"A", 1, MASK),
        Sample("train-0.tar/d/b.png", b"BB", 0, None),
        Sample("train-1.tar/" + "x" * 120 + ".webp", b"X", None, None),
        Sample("train-3.tar/c.jpeg", b"C", 2, None),
    ]
    assert source.classes == ("cat", "dog", "owl") and source.has_masks
    line = refusal(source.require_labels, "--train")
    assert "1 of 4 images have no label, the first is train-1.tar/xxx" in line and line.startswith("--train")
    assert "3 of 4 images have no mask, the first is train-0.tar/d/b.png" in refusal(source.require_masks, "x")


def test_require_labels_refuses_labels_without_a_name(tmp_path):
    write_tar(tmp_path / "a.tar", [("a.jpg", b"A"), ("a.cls", b"2")])
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    assert "label 2 has no name: classes.txt has 2 lines" in refusal(open_dataset(tmp_path).require_labels, "--test")


def test_tar_source_of_a_folder_and_of_its_tar(tmp_path):
    write_shards(tmp_path, [4])
    assert everything(open_dataset(tmp_path)) == everything(open_dataset(tmp_path / "train-0000.tar"))


def test_open_files_limit(tmp_path, monkeypatch):
    write_shards(tmp_path, [2] * 12)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (16, 16))
    source = open_dataset(tmp_path)

    def open_files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = open_files()
    for i in [*range(24), *range(23, -1, -1)]:
        assert source[i].image == jpeg(i, 24 + i % 5 * 4, 24 + i % 7 * 3)
        assert open_files() <= before + 4


@pytest.mark.parametrize("index", [-1, 3, 10**9])
def test_index_out_of_range(tmp_path, index):
    source = open_dataset(write_shards(tmp_path, [3]))
    for call in (source.__getitem__, source.name, source.image, source.label):
        with pytest.raises(IndexError):
            call(index)


def test_source_pickle_is_small_and_equal(tmp_path):
    source = open_dataset(write_shards(tmp_path, [50, 50]))
    source[0]
    data = pickle.dumps(source)
    assert len(data) < 500
    copy = pickle.loads(data)
    assert everything(copy) == everything(source)
    assert copy.fingerprint == source.fingerprint and copy.labels.tolist() == source.labels.tolist()


def test_files_that_shrink_or_disappear_are_run_errors(tmp_path):
    source = open_dataset(write_shards(tmp_path / "shards", [3]))
    path = tmp_path / "shards/train-0000.tar"
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(RunError, match=r"train-0000.tar .*2560"):
        source[1]
    path.unlink()
    with pytest.raises(RunError, match=r"train-0000.tar"):
        pickle.loads(pickle.dumps(source)).image(0)
    source = open_dataset(write_tree(tmp_path / "folder", {"a.jpg": b"1"}))
    (tmp_path / "folder/a.jpg").unlink()
    with pytest.raises(RunError, match=r"a.jpg"):
        source[0]


def test_fingerprint_of_shards(tmp_path):
    one = open_dataset(write_shards(tmp_path, [2, 2])).fingerprint
    assert one == open_dataset(tmp_path).fingerprint
    assert one != open_dataset(tmp_path / "train-0000.tar").fingerprint


def arrow(folder: Path, rows: list[tuple[bytes, int]]) -> str:
    """A data set as `save_to_disk` writes it."""
    pyarrow, _ = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder.mkdir()
    table = pyarrow.table({"image": [image for image, _ in rows], "label": [label for _, label in rows]})
    with pyarrow.ipc.new_stream(str(folder / "data-0.arrow"), table.schema) as out:
        out.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-0.arrow"}]}))
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    return f"hf:{folder}"


def parquet(folder: Path, rows: list[tuple[bytes, int]]) -> str:
    pyarrow, _ = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder.mkdir()
    table = pyarrow.table({"image": [image for image, _ in rows], "label": [label for _, label in rows]})
    pyarrow.parquet.write_table(table, folder / "train-0.parquet", compression="none")
    return str(folder)


def shards(folder: Path, rows: list[tuple[bytes, int]]) -> str:
    folder.mkdir()
    for number, (image, label) in enumerate(rows):
        write_tar(folder / f"train-{number}.tar", [("a.jpg", image), ("a.cls", b"%d" % label)])
    return str(folder)


def folders(folder: Path, rows: list[tuple[bytes, int]]) -> str:
    return str(write_tree(folder, {f"{label}/{number}.jpg": image for number, (image, label) in enumerate(rows)}))


def pairs(folder: Path, rows: list[tuple[bytes, int]]) -> str:
    """Images and masks with a label map; the index is made from those of two folders."""
    images = {f"images/{number}{label}.jpg": image for number, (image, label) in enumerate(rows)}
    masks = {f"masks/{number}{label}.png": b"mask" for number, (_, label) in enumerate(rows)}
    return str(write_tree(folder, {**images, **masks, "labels.yaml": b"x"}))


def class_tars(folder: Path, rows: list[tuple[bytes, int]]) -> str:
    """One tar of class tars."""
    folder.mkdir()
    inner = []
    for number, (image, label) in enumerate(rows):
        write_tar(folder / "inner", [(f"{number}.jpg", image)])
        inner.append((f"n{label}{number}.tar", (folder / "inner").read_bytes()))
    (folder / "inner").unlink()
    write_tar(folder / "ILSVRC2012_img_train.tar", inner)
    return str(folder / "ILSVRC2012_img_train.tar")


@pytest.mark.parametrize("write", [shards, folders, pairs, arrow, parquet, class_tars])
def test_fingerprint_of_a_copy_and_of_other_data(tmp_path, write):
    """A copy has other times. Other data have the same number of images and the same file names."""
    rows = [(b"x" * 100, 0), (b"y" * 600, 1), (b"z" * 1100, 0)]
    path = write(tmp_path / "one", rows)
    first = open_dataset(path, split="train")
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    for file in (tmp_path / "copy").rglob("*"):
        os.utime(file, ns=(1, 12345))
    copy = open_dataset(path.replace("/one", "/copy"), split="train")
    assert copy.fingerprint == first.fingerprint and copy.stamp != first.stamp
    assert pickle.loads(pickle.dumps(copy)).fingerprint == first.fingerprint
    others = {"sizes": [(b"x" * 200, 0), *rows[1:]], "labels": [(b"x" * 100, 1), *rows[1:]]}
    if write is shards:
        others["order"] = [rows[1], rows[0], rows[2]]
    for name, other in others.items():
        source = open_dataset(write(tmp_path / name, other), split="train")
        assert len(source) == 3 and source.fingerprint != first.fingerprint, name


def test_file_closed_by_another_thread_stays_open_until_the_read_ends(tmp_path, monkeypatch):
    write_shards(tmp_path, [2] * 3)
    source = open_dataset(tmp_path)
    files, pread, advised = source._files, os.pread, []

    def closed_meanwhile(descriptor: int, size: int, offset: int) -> bytes:
        files.open.clear()
        return pread(descriptor, size, offset)

    def advice(descriptor: int, *more: int) -> None:
        files.open.clear()
        advised.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(os, "pread", closed_meanwhile)
    monkeypatch.setattr(os, "posix_fadvise", advice, raising=False)
    assert [source.image(i) for i in range(6)] == [jpeg(i, 24 + i % 5 * 4, 24 + i % 7 * 3) for i in range(6)]
    source.readahead(np.arange(6), lambda index: None)
    assert len(advised) == 6


def test_threads_close_each_others_files(tmp_path, monkeypatch):
    write_shards(tmp_path, [2] * 6)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (4, 4))  # one file open
    source = open_dataset(tmp_path)
    wanted = everything(source)

    class ClosedByOthers(OrderedDict):
        """As if another thread closed a file just after it was found."""

        def get(self, key, default=None):
            return self.pop(key, default)

    monkeypatch.setattr(source._files, "open", ClosedByOthers(source._files.open))
    assert everything(source) == wanted
