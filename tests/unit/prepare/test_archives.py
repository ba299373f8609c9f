"""Sources of images to pack: lists, parquet files, folders of splits; and progress while archives are opened."""

import gzip
import json

import pytest

from ijepa.data.open import open_dataset
from ijepa.data.sources.base import FolderSource
from ijepa.prepare.archives import open_archives
from ijepa.prepare.file_lists import list_index
from ijepa.utils import progress
from ijepa.utils.errors import UserError
from tests.helpers.images import jpeg, write_tree
from tests.unit.prepare.test_pack import content, held, nested, run, tree


def test_pack_parquet_files_keeps_bytes(tmp_path):
    pytest.importorskip("pyarrow")
    from tests.unit.data.sources.test_parquet import write

    write(tmp_path / "set/data/train-00000-of-00001.parquet", range(10))
    write(tmp_path / "set/data/validation-00000-of-00001.parquet", range(20, 23))
    run("folder", tmp_path / "set", tmp_path / "out", "--shard-size", 4)
    wanted = {f"{row:09d}": (jpeg(row), ("cat", "dog")[row % 2]) for row in range(10)}
    assert held(tmp_path / "out") == wanted
    assert sorted(data for data, _ in held(tmp_path / "out", "val").values()) == sorted(map(jpeg, range(20, 23)))
    assert not (tmp_path / "out/.packing").exists()


def test_pack_folder_with_both_splits_or_one(tmp_path):
    root = tmp_path / "imagenet"
    tree(root / "train")
    write_tree(root / "val", {"b/v0.jpg": jpeg(70), "c/v1.jpg": jpeg(71)})
    assert "30 train in 1, 2 val in 1 shards" in run("folder", root, tmp_path / "out")
    assert held(tmp_path / "out", "val") == {"v0": (jpeg(70), "b"), "v1": (jpeg(71), "c")}
    assert list(json.loads((tmp_path / "out/manifest.json").read_text())["splits"]) == ["train", "val"]
    assert "2 val in 1 shards" in run("folder", root, tmp_path / "one", "--split", "val")
    assert "30 test in 1 shards" in run("folder", root / "train", tmp_path / "two", "--split", "test")
    # Packing shards again keeps their splits.
    run("folder", tmp_path / "out", tmp_path / "again", "--shard-size", 10)
    assert len(held(tmp_path / "again")) == 30 and len(held(tmp_path / "again", "val")) == 2
    with pytest.raises(UserError, match="--hold-out"):
        run("folder", root, tmp_path / "x", "--hold-out", 1)


def test_expand_reports_progress(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS", 0.0)
    archive = tmp_path / "whole.tar.gz"
    archive.write_bytes(gzip.compress(nested(tmp_path / "plain.tar", each=20).read_bytes()))
    said: list[str] = []
    open_archives("imagenet22k", [archive], tmp_path / "spool", None, said.append)
    assert any(line.startswith("expanding whole.tar.gz: ") and "minutes left" in line for line in said)
    assert any(line.startswith("indexing whole-") and "minutes left" in line for line in said)


def test_pack_list_without_labels(tmp_path):
    tree(tmp_path / "tree")
    (tmp_path / "list.csv").write_text("path\ntree/a/i0.jpg\n")
    run("list", tmp_path / "list.csv", tmp_path / "out")
    assert open_dataset(tmp_path / "out").labels is None and "classes.txt" not in content(tmp_path / "out")


def test_pack_list_with_absolute_paths(tmp_path):
    root = write_tree(tmp_path / "elsewhere", {"a.jpg": jpeg(1), "b.jpg": jpeg(2)})
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/list.csv").write_text(f"path,label\n{root}/b.jpg,1\n../elsewhere/a.jpg,0\n")
    source = FolderSource(list_index(tmp_path / "lists/list.csv"))
    assert [source.image(i) for i in range(2)] == [jpeg(2), jpeg(1)]
    run("list", tmp_path / "lists/list.csv", tmp_path / "out")
    assert held(tmp_path / "out") == {"a": (jpeg(1), "0"), "b": (jpeg(2), "1")}
