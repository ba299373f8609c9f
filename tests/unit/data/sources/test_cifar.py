import os
import pickle
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest

from ijepa.data.loading.decode import decode
from ijepa.data.open import open_source
from ijepa.utils.errors import UserError


def python2(value: object) -> bytes:
    """What Python 2 pickles plain values and arrays of bytes as: its texts are bytes with a length."""
    if isinstance(value, bytes):
        return b"T" + struct.pack("<i", len(value)) + value
    if value is None:
        return b"N"
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, np.ndarray):
        empty = b"cnumpy\nndarray\n" + python2((0,)) + python2(b"b")
        kind = (
            b"cnumpy\ndtype\n" + python2((b"u1", 0, 1)) + b"R" + python2((3, b"|", None, None, None, -1, -1, 0)) + b"b"
        )
        state = python2(1) + python2(value.shape) + kind + python2(0) + python2(value.tobytes())
        return b"cnumpy.core.multiarray\n_reconstruct\n(" + empty + b"tR(" + state + b"tb"
    if isinstance(value, dict):
        return b"(" + b"".join(python2(key) + python2(item) for key, item in value.items()) + b"d"
    assert isinstance(value, list | tuple)
    return b"(" + b"".join(map(python2, value)) + (b"l" if isinstance(value, list) else b"t")


def dump(path: Path, value: object) -> None:
    path.write_bytes(b"\x80\x02" + python2(value) + b".")


def pixels(number: int, count: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (count, 3072), dtype=np.uint8)


@pytest.fixture
def ten(tmp_path: Path) -> Path:
    root = tmp_path / "cifar-10-batches-py"
    root.mkdir()
    for number, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        names = [b"%s_%d.png" % (name.encode(), row) for row in range(3)]
        batch = {b"labels": [number, 1, 0], b"data": pixels(number, 3), b"filenames": names, b"batch_label": b"x"}
        dump(root / name, batch)
    dump(root / "batches.meta", {b"label_names": [b"class%d" % i for i in range(10)], b"num_vis": 3072})
    return root


def test_ten(ten: Path) -> None:
    train, test = (open_source(ten, split=split) for split in ("train", "val"))
    assert (len(train), len(test)) == (15, 3)
    assert train.classes == tuple(f"class{i}" for i in range(10))
    assert train.labels.tolist() == [n for i in range(5) for n in (i, 1, 0)]
    assert train.fingerprint != test.fingerprint
    assert train.name(4) == "data_batch_2_1.png"
    for source, number, index in ((train, 1, 4), (test, 5, 1)):
        image = decode(source.image(index))
        assert (image == pixels(number, 3)[1].reshape(3, 32, 32).transpose(1, 2, 0)).all()
    assert len(open_source(ten.parent, split="train")) == 15, "the folder above"
    assert len(open_source(ten / "data_batch_3")) == 3, "one batch"


def test_pixels_are_those_that_pickle_itself_reads(ten: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        whole = pickle.loads((ten / "data_batch_4").read_bytes(), encoding="bytes")
    source = open_source(ten / "data_batch_4")
    for row, planes in enumerate(whole[b"data"]):
        assert (decode(source.image(row)) == planes.reshape(3, 32, 32).transpose(1, 2, 0)).all()


def test_hundred(tmp_path: Path) -> None:
    for number, name in enumerate(["train", "test"]):
        dump(tmp_path / name, {b"fine_labels": [7, 99], b"coarse_labels": [1, 2], b"data": pixels(number, 2)})
    dump(tmp_path / "meta", {b"fine_label_names": [b"c%02d" % i for i in range(100)], b"coarse_label_names": []})
    source = open_source(tmp_path, split="val")
    assert source.labels.tolist() == [7, 99]
    assert source.classes[99] == "c99"
    assert source.name(1) == "test/1"
    assert pickle.loads(pickle.dumps(source)).image(1) == source.image(1)


def test_a_split_has_to_be_chosen(ten: Path) -> None:
    with pytest.raises(UserError, match=r"holds several splits: train, test; choose one, or give .*test_batch"):
        open_source(ten)


def test_a_packed_archive_is_to_be_unpacked(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(UserError, match=r"cifar-10-python.tar.gz is packed; give the folder"):
        open_source(tmp_path / "cifar-10-python.tar.gz")


class Tells:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"cos\nsystem\n(S'touch RUN'\ntR.", r"it names (posix|os)\.system"),
        (b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x0dopen('RUN','w'\x85R.", "no pickle of CIFAR"),
        (b"cnumpy\nsave\n(S'RUN'\ntR.", r"it names numpy\.save"),
        (b"cnumpy.core.multiarray\nfromfile\n(S'RUN'\ntR.", r"it names numpy\.core\.multiarray\.fromfile"),
        (b"nothing of the kind", "no pickle of CIFAR"),
        (b"", "no pickle of CIFAR"),
        (b"(l.", "it holds no dictionary"),
        (b"(d.", r"its images are not rows of 3072 bytes"),
    ],
)
def test_code_in_a_pickle_is_not_run(ten: Path, data: bytes, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ten)
    (ten / "test_batch").write_bytes(data)
    with pytest.raises(UserError, match=words) as caught:
        open_source(ten, where="--test", split="val")
    assert str(caught.value).startswith("--test: ")
    assert "\n" not in str(caught.value)
    assert not (ten / "RUN").exists()


@pytest.mark.parametrize("protocol", range(5))
def test_a_pickle_that_would_make_a_folder_does_not(ten: Path, protocol: int) -> None:
    (ten / "test_batch").write_bytes(pickle.dumps({"data": Tells(ten / "RUN")}, protocol))
    with pytest.raises(UserError, match=r"it names (posix|nt)\.mkdir"):
        open_source(ten, split="val")
    assert not (ten / "RUN").exists()
    pickle.loads((ten / "test_batch").read_bytes())
    assert (ten / "RUN").exists(), "the pickle would have"


def test_labels_that_do_not_fit_are_refused(ten: Path) -> None:
    dump(ten / "test_batch", {b"labels": [0, 10], b"data": pixels(0, 2)})
    with pytest.raises(UserError, match="test_batch: its labels are not numbers below 10"):
        open_source(ten, split="test")
    dump(ten / "test_batch", {b"labels": [0, 1], b"data": pixels(0, 3)})
    with pytest.raises(UserError, match="test_batch holds 3 images and 2 labels"):
        open_source(ten, split="test")
