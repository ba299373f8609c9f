import io
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from ijepa.data.open import open_dataset
from ijepa.data.sources.base import Source
from ijepa.utils.errors import UserError
from tests.helpers.imagenet import WNIDS, write_train
from tests.helpers.images import write_tar, write_tree

IDS = {1: "n02085620", 2: "n01440764", 3: "n01443537"}
"""The kit's class numbers do not follow the order of the WordNet ids."""


def kit_files(truth: str = "3\n1\n1\n2\n") -> dict[str, bytes]:
    io_module = pytest.importorskip("scipy.io")
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    rows = [(number, wnid, "a word", 0) for number, wnid in IDS.items()] + [(4, "n00001740", "entity", 3)]
    stream = io.BytesIO()
    io_module.savemat(stream, {"synsets": np.array(rows, dtype=kinds).reshape(-1, 1)}, do_compression=True)
    return {
        "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": truth.encode(),
        "ILSVRC2012_devkit_t12/data/meta.mat": stream.getvalue(),
    }


def val_files() -> dict[str, bytes]:
    return {f"ILSVRC2012_val_{number:08d}.JPEG": b"image %d" % number for number in range(1, 5)}


def with_class(source: Source) -> list[tuple[str, str]]:
    return [(Path(source.name(i)).name, source.classes[source.label(i)]) for i in range(len(source))]


TRUTH = [IDS[3], IDS[1], IDS[1], IDS[2]]


def test_validation_classes_from_the_development_kit(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "data", {f"val/{name}": data for name, data in val_files().items()})
    write_tree(root, kit_files())
    source = open_dataset(str(root / "val"), where="--test", split="val", require_labels=True)
    assert source.classes == tuple(sorted(IDS.values()))
    assert with_class(source) == list(zip(val_files(), TRUTH, strict=True))
    assert with_class(open_dataset(root, split="val")) == with_class(source), "the folder above, next to the kit"
    assert [source.image(i) for i in range(4)] == list(val_files().values())
    assert source.require_labels("--test").tolist() == [WNIDS.index(name) for name in TRUTH]


@pytest.mark.parametrize("form", ["folder", "data", "archive", "table"])
def test_validation_classes_from_a_given_kit_or_table(tmp_path: Path, form: str) -> None:
    root = write_tree(tmp_path / "val", val_files())
    folder = write_tree(tmp_path / "elsewhere", kit_files())
    given = folder / "ILSVRC2012_devkit_t12"
    if form == "data":
        given = given / "data"
    elif form == "archive":
        with tarfile.open(given.with_suffix(".tar.gz"), "w:gz") as archive:
            archive.add(given, given.name)
        given = given.with_suffix(".tar.gz")
    elif form == "table":
        rows = [f"ILSVRC2012_val_{i + 1:08d},{wnid} 1 2 3 4 {wnid} 5 6 7 8" for i, wnid in enumerate(TRUTH)]
        given = folder / "LOC_val_solution.csv"
        given.write_text("\n".join(["ImageId,PredictionString", *rows[::-1]]) + "\n")
    source = open_dataset(str(root), where="--test", split="val", devkit=str(given), require_labels=True)
    assert [wnid for _, wnid in with_class(source)] == TRUTH


def test_find_imagenet_tars_in_one_folder(tmp_path: Path) -> None:
    write_tree(tmp_path, kit_files())
    write_train(tmp_path / "ILSVRC2012_img_train.tar")
    write_tar(tmp_path / "ILSVRC2012_img_val.tar", list(val_files().items()))
    train, test = (
        open_dataset(str(tmp_path), where="--x", split=split, require_labels=True) for split in ("train", "val")
    )
    assert len(train) == 9 and train.classes == test.classes
    assert [wnid for _, wnid in with_class(test)] == TRUTH
    assert open_dataset(tmp_path / "ILSVRC2012_img_val.tar").labels.tolist() == test.labels.tolist()
    with pytest.raises(UserError, match="ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar"):
        open_dataset(tmp_path)


def test_validation_images_without_a_kit(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "val", val_files())
    assert open_dataset(root).labels is None
    with pytest.raises(UserError, match="devkit") as err:
        open_dataset(str(root), where="--test", split="val", require_labels=True)
    assert err.value.where == "--test"
    with pytest.raises(UserError, match="nowhere") as err:
        open_dataset(str(root), where="--test", split="val", devkit="nowhere")
    assert err.value.where == "--devkit"
    (tmp_path / "kit").mkdir()
    with pytest.raises(UserError, match=r"kit .*ILSVRC2012_validation_ground_truth.txt"):
        open_dataset(str(root), where="--test", split="val", devkit=str(tmp_path / "kit"))
    (tmp_path / "table.csv").write_text("ImageId,PredictionString\nx,y\n")
    with pytest.raises(UserError, match=r"table.csv"):
        open_dataset(str(root), where="--test", split="val", devkit=str(tmp_path / "table.csv"))


def test_kit_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "val", val_files())
    write_tree(tmp_path, kit_files("1\n2\n3\n"))
    with pytest.raises(UserError, match=r"00000004\.JPEG") as err:
        open_dataset(root, where="--test")
    assert err.value.where == "--test"
    write_tree(tmp_path, kit_files("1\n2\n3\n4\n"))
    with pytest.raises(UserError, match=r"meta.mat .*: 4"):
        open_dataset(root, where="--test")
    write_tree(tmp_path, {"ILSVRC2012_devkit_t12/data/meta.mat": b"nonsense"})
    with pytest.raises(UserError, match=r"meta.mat") as caught:
        open_dataset(root, where="--test")
    assert "\n" not in str(caught.value)


def test_damaged_kit_or_table_is_refused(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "val", val_files())
    digits = np.random.default_rng(0).integers(10, size=200_000, dtype=np.uint8).tobytes()  # hard to compress
    folder = write_tree(tmp_path / "elsewhere/ILSVRC2012_devkit_t12", {"data/a.bin": digits}) / "data"
    given = tmp_path / "ILSVRC2012_devkit_t12.tar.gz"

    def refused(file: Path, message: str) -> None:
        with pytest.raises(UserError, match=message) as caught:
            open_dataset(str(root), where="--test", split="val", devkit=str(file), require_labels=True)
        assert caught.value.where == "--devkit"
        assert "\n" not in str(caught.value)

    for kind in ("gz", "xz"):
        with tarfile.open(given, f"w:{kind}") as archive:  # type: ignore[call-overload]
            archive.add(folder, "data")
        whole = given.read_bytes()
        given.write_bytes(whole[: len(whole) // 2])
        refused(given, r".*t12.tar.gz is (damaged|no folder and no archive): ")
        given.write_bytes(whole[:40_000] + b"\xff" * 20_000 + whole[60_000:])
        refused(given, r".*t12.tar.gz is (damaged|no folder and no archive): ")
    table = tmp_path / "LOC_val_solution.csv"
    table.write_text("ImageId,PredictionString\n" + "x" * 200_000 + ",y\n")
    refused(table, r".*solution.csv is not the table of the validation images: field larger")


def test_missing_scipy_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_tree(tmp_path / "val", val_files())
    write_tree(tmp_path, kit_files())
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(UserError, match="scipy"):
        open_dataset(str(root), where="--test", split="val", require_labels=True)
    assert open_dataset(root).labels is None, "scipy is only needed for classes"


def test_tiny_imagenet(tmp_path: Path) -> None:
    table = "val_0.JPEG\tn02\t0\t32\t44\t62\nval_1.JPEG\tn01\t1\t2\t3\t4\n"
    files = {
        "train/n01/images/n01_0.JPEG": b"a",
        "train/n01/n01_boxes.txt": b"",
        "train/n02/images/n02_0.JPEG": b"b",
        "val/images/val_0.JPEG": b"c",
        "val/images/val_1.JPEG": b"d",
        "val/val_annotations.txt": table.encode(),
        "test/images/test_0.JPEG": b"e",
    }
    root = write_tree(tmp_path / "tiny-imagenet-200", files)
    train, test = (open_dataset(root, split=split) for split in ("train", "val"))
    assert with_class(train) == [("n01_0.JPEG", "n01"), ("n02_0.JPEG", "n02")]
    assert with_class(test) == [("val_0.JPEG", "n02"), ("val_1.JPEG", "n01")]
    assert with_class(open_dataset(root / "val")) == with_class(test)
    (root / "val/val_annotations.txt").write_text(table.splitlines()[0])
    with pytest.raises(UserError, match=r"val_annotations.txt .*val_1.JPEG"):
        open_dataset(root, split="val")
