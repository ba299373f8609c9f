import pickle
from pathlib import Path

import numpy as np
import pytest

from ijepa.data.loading.decode import decode
from ijepa.data.open import open_dataset
from ijepa.utils.errors import UserError

PIXELS = 3072


def pixels(number: int, count: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (count, PIXELS), dtype=np.uint8)


def write_rows(path: Path, labels: list[list[int]], images: np.ndarray) -> None:
    path.write_bytes(np.hstack([np.array(labels, dtype=np.uint8), images]).tobytes())


@pytest.fixture
def cifar10(tmp_path: Path) -> Path:
    root = tmp_path / "cifar-10-batches-bin"
    root.mkdir()
    for number, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        write_rows(root / f"{name}.bin", [[number], [1], [0]], pixels(number, 3))
    (root / "batches.meta.txt").write_text("".join(f"class{i}\n" for i in range(10)) + "\n")
    return root


def test_cifar10(cifar10: Path) -> None:
    train, test = (open_dataset(cifar10, split=split) for split in ("train", "val"))
    assert (len(train), len(test)) == (15, 3)
    assert train.classes == tuple(f"class{i}" for i in range(10))
    assert train.labels.tolist() == [n for i in range(5) for n in (i, 1, 0)]
    assert train.fingerprint != test.fingerprint
    assert train.name(4) == "data_batch_2.bin/00001"
    for source, number, index in ((train, 1, 4), (test, 5, 1)):
        image = decode(source.image(index))
        assert (image == pixels(number, 3)[1].reshape(3, 32, 32).transpose(1, 2, 0)).all()
    assert len(open_dataset(cifar10.parent, split="train")) == 15, "the folder above"
    assert len(open_dataset(cifar10 / "data_batch_3.bin")) == 3, "one file"
    assert len(open_dataset(cifar10, split="test")) == 3


def test_cifar100_has_fine_labels(tmp_path: Path) -> None:
    for number, name in enumerate(["train.bin", "test.bin"]):
        write_rows(tmp_path / name, [[1, 7], [2, 99]], pixels(number, 2))
    (tmp_path / "fine_label_names.txt").write_text("\n".join(f"c{i:02d}" for i in range(100)))
    (tmp_path / "coarse_label_names.txt").write_text("a\nb\n")
    source = open_dataset(tmp_path, split="val")
    assert source.labels.tolist() == [7, 99]
    assert source.classes[99] == "c99"
    assert source.name(1) == "test.bin/00001"
    assert (decode(source.image(1)) == pixels(1, 2)[1].reshape(3, 32, 32).transpose(1, 2, 0)).all()
    assert pickle.loads(pickle.dumps(source)).image(1) == source.image(1)


def test_name_of_a_late_row(cifar10: Path) -> None:
    """The number of a row is not its offset divided by the number of pixels."""
    write_rows(cifar10 / "test_batch.bin", [[0]] * 6000, np.zeros((6000, PIXELS), dtype=np.uint8))
    assert open_dataset(cifar10, split="test").name(5999) == "test_batch.bin/05999"


@pytest.mark.parametrize(
    ("folder", "files", "given"),
    [
        ("cifar-10-batches-py", ["batches.meta", "test_batch"], ""),
        ("cifar-10-batches-py", ["batches.meta", "test_batch"], "cifar-10-batches-py"),
        ("cifar-10-batches-py", ["batches.meta", "test_batch"], "cifar-10-batches-py/test_batch"),
        ("cifar-100-python", ["meta", "train"], ""),
        ("cifar-100-python", ["meta", "train"], "cifar-100-python"),
    ],
)
def test_python_edition_is_refused(tmp_path: Path, folder: str, files: list[str], given: str) -> None:
    (tmp_path / folder).mkdir()
    for name in files:
        (tmp_path / folder / name).write_bytes(pickle.dumps({b"labels": []}))
    with pytest.raises(UserError, match="binary") as caught:
        open_dataset(tmp_path / given, where="--test", split="val")
    assert caught.value.where == "--test"


def test_packed_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(UserError, match="packed"):
        open_dataset(tmp_path / "cifar-10-binary.tar.gz")


def test_split_has_to_be_chosen(cifar10: Path) -> None:
    with pytest.raises(UserError, match="train, test") as err:
        open_dataset(cifar10)
    assert err.value.where == "data.path"


@pytest.mark.parametrize("data", [b"", bytes(3073)[:-1], b"\x0a" + bytes(3072)])
def test_damaged_file_is_refused(cifar10: Path, data: bytes) -> None:
    """Empty, truncated, or with a label that has no class."""
    (cifar10 / "test_batch.bin").write_bytes(data)
    with pytest.raises(UserError, match=r"test_batch\.bin") as caught:
        open_dataset(cifar10, where="--test", split="test")
    assert caught.value.where == "--test"
