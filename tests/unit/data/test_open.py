import os
from pathlib import Path

import pytest

from ijepa.data.open import detect_known_dataset, open_dataset
from ijepa.utils.errors import UserError
from tests.helpers.images import write_shards, write_tree


def test_open_dataset_errors_name_the_flag(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        open_dataset(tmp_path / "missing", where="--test")
    assert error.value.where == "--test"
    with pytest.raises(UserError) as error:
        open_dataset(tmp_path, where="--test", names=str(tmp_path / "missing"), split="val")
    assert error.value.where == "--test"
    with pytest.raises(UserError) as error:
        open_dataset(tmp_path, devkit=str(tmp_path / "missing"))
    assert error.value.where == "--devkit"


def test_open_dataset_errors_of_a_list_name_its_flag(tmp_path: Path) -> None:
    root = write_shards(tmp_path / "shards", [2])
    with pytest.raises(UserError) as error:
        open_dataset(root, where="--test", names=str(tmp_path / "missing"))
    assert error.value.where == "--test-list"


@pytest.mark.parametrize("path", ["", "hf:folder", "s3://bucket/a.tar", "missing"])
def test_detect_known_dataset_ignores_other_paths(path: str) -> None:
    assert detect_known_dataset(path, "--x", "train") is None


def test_detect_known_dataset_in_the_folder_of_the_split(tmp_path: Path) -> None:
    write_tree(tmp_path, {"validation/val_annotations.txt": b"a.JPEG\tn01\n", "validation/a.JPEG": b"image"})
    source = detect_known_dataset(tmp_path, "--x", "val")
    assert source is not None
    assert source.classes == ("n01",)
    assert detect_known_dataset(tmp_path, "--x", "train") is None


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs")
def test_detect_known_dataset_refuses_irregular_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(UserError, match="FIFO"):
        detect_known_dataset(tmp_path / "a.tar", "--x", None)
