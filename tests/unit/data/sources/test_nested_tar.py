import pickle
import tarfile
from pathlib import Path

import pytest

from ijepa.data.open import open_dataset
from ijepa.data.sources.base import Sample
from ijepa.utils.errors import UserError
from tests.helpers.imagenet import WNIDS, class_tar, tar, write_train
from tests.helpers.images import write_tar


def test_nested_index_reads_class_tars_in_place(tmp_path: Path) -> None:
    source = open_dataset(write_train(tmp_path / "ILSVRC2012_img_train.tar"))
    assert source.classes == WNIDS
    expected = [
        Sample(f"ILSVRC2012_img_train.tar/{wnid}_{i}.JPEG", f"{wnid} {i}".encode() * (i + 1) * 90, number, None)
        for number, wnid in reversed([*enumerate(WNIDS)])
        for i in range(number + 2)
    ]
    assert [source[i] for i in range(len(source))] == expected
    copy = pickle.loads(pickle.dumps(source))
    assert copy[3] == source[3]
    assert open_dataset(tmp_path / "ILSVRC2012_img_train.tar").fingerprint == source.fingerprint


def test_nested_index_agrees_with_tarfile(tmp_path: Path) -> None:
    path = write_train(tmp_path / "train.tar")
    slow = {}
    with tarfile.open(path) as outer:
        for member in outer:
            with tarfile.open(fileobj=outer.extractfile(member)) as inner:
                slow |= {file.name: inner.extractfile(file).read() for file in inner}
    source = open_dataset(path)
    assert {Path(source.name(i)).name: source.image(i) for i in range(len(source))} == slow


def test_nested_index_names_a_damaged_inner_tar(tmp_path: Path) -> None:
    whole = class_tar(WNIDS[0], 3)
    write_tar(tmp_path / "a.tar", [("n1.tar", whole), ("n2.tar", whole[:1500]), ("n3.tar", whole)])
    with pytest.raises(UserError, match=r"a\.tar.*n2\.tar.*1500") as caught:
        open_dataset(tmp_path / "a.tar", where="--train")
    assert caught.value.where == "--train"
    assert "\n" not in str(caught.value)
    write_tar(tmp_path / "b.tar", [("n1.tar", tar([("readme.txt", b"")]))])
    with pytest.raises(UserError, match=r"b\.tar") as err:
        open_dataset(tmp_path / "b.tar")
    assert err.value.where == "data.path"
    write_tar(tmp_path / "c.tar", [("n1.tar", b"\x1f\x8b" + bytes(600))])
    with pytest.raises(UserError, match=r"c\.tar.*n1\.tar.*gzip") as err:
        open_dataset(tmp_path / "c.tar")
    assert err.value.where == "data.path"
