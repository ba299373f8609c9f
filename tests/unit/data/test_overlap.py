import os
from pathlib import Path

import numpy as np
import pytest

from ijepa.data import overlap
from ijepa.data.open import open_dataset
from ijepa.data.overlap import refuse_overlap
from ijepa.data.sources.base import Source
from ijepa.utils.errors import UserError
from tests.helpers.images import write_shards, write_tar, write_tree

FILES = {f"n{c}/n{c}_{i}.JPEG": f"{c}{i}".encode() for c in (1, 2) for i in range(3)}


def listed(path: Path | str, folder: Path, *names: str) -> Source:
    file = folder / f"list-{len(list(folder.iterdir()))}"
    file.write_text("".join(f"{name}\n" for name in names))
    return open_dataset(str(path), where="--x", split="train", names=str(file))


def test_refuse_overlap_of_subsets_of_one_folder(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "set", FILES)
    a, b, c = (listed(root, tmp_path, *names) for names in (("n1_0", "n1_1"), ("n1_2", "n2_0"), ("n1_1", "n2_0")))
    refuse_overlap(a, b)
    with pytest.raises(UserError, match="1 of its 2 .*n1/n1_1.JPEG"):
        refuse_overlap(a, c)
    with pytest.raises(UserError, match="2 of its 6 .*"):
        refuse_overlap(a, open_dataset(root))
    refuse_overlap(a, open_dataset(write_tree(tmp_path / "other", FILES)))


def test_refuse_overlap_of_nested_and_linked_folders(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "set", FILES)
    (tmp_path / "link").symlink_to(root / "n2")
    for inner in (root / "n2", tmp_path / "link"):
        with pytest.raises(UserError, match="3 of its 3 .*n2_0.JPEG"):
            refuse_overlap(open_dataset(root), open_dataset(inner))
    with pytest.raises(UserError, match="3 of its 6 .*n2/n2_0.JPEG"):
        refuse_overlap(open_dataset(root / "n2"), open_dataset(root))
    refuse_overlap(open_dataset(root / "n1"), open_dataset(root / "n2"))


def test_refuse_overlap_of_shards(tmp_path: Path) -> None:
    """A pattern and one of its shards."""
    root = write_shards(tmp_path / "shards", [3, 4, 2])
    train, one = open_dataset(f"{root}/train-*.tar"), open_dataset(sorted(root.glob("*.tar"))[1])
    with pytest.raises(UserError, match=r"4 of its 4 .*train-0+1\.tar/"):
        refuse_overlap(train, one)
    with pytest.raises(UserError, match="4 of its 9 .*"):
        refuse_overlap(one, train)
    refuse_overlap(open_dataset(sorted(root.glob("*.tar"))[0]), one)
    (tmp_path / "links").mkdir()
    for shard in root.glob("*.tar"):
        (tmp_path / "links" / f"again-{shard.name}").symlink_to(shard)
    with pytest.raises(UserError, match="9 of its 9 .*"):
        refuse_overlap(train, open_dataset(f"{tmp_path / 'links'}/*.tar"))


def test_refuse_overlap_of_subsets_of_one_shard(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", [(f"{name}.jpg", b"1") for name in "uvwx"])
    refuse_overlap(listed(tar, tmp_path, "u", "v"), listed(tar, tmp_path, "w", "x"))
    with pytest.raises(UserError, match=r"1 of its 2 .*a\.tar/v\.jpg"):
        refuse_overlap(listed(tar, tmp_path, "u", "v"), listed(tar, tmp_path, "v", "w"))
    refuse_overlap(listed(tar, tmp_path, "u"), open_dataset(write_tree(tmp_path / "folder", {"u.jpg": b"1"})))


def test_refuse_overlap_compares_samples_only_in_shared_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Comparing millions of samples would take long."""
    sets = [open_dataset(write_shards(tmp_path / name, [2])) for name in ("a", "b")]
    os.utime(next((tmp_path / "b").glob("*.tar")), (1, 1))
    sets[1] = open_dataset(tmp_path / "b")
    monkeypatch.setattr(overlap, "_places", lambda *given: pytest.fail("samples were looked at"))
    refuse_overlap(*sets)
    assert np.array_equal(sets[0].index.arrays["block"], sets[1].index.arrays["block"])


def test_refuse_overlap_of_parquet_rows(tmp_path: Path) -> None:
    """A row has another number in a set of several files than in a set of one file."""
    pytest.importorskip("pyarrow")
    from tests.unit.data.sources.test_parquet import write

    for name, rows in (("train-0", range(10)), ("train-1", range(20, 25)), ("val-0", range(30, 39))):
        write(tmp_path / f"pq/{name}.parquet", rows)
    every, train, val = (open_dataset(f"{tmp_path}/pq/{name}.parquet") for name in ("*", "train-*", "val-0"))
    refuse_overlap(train, val)
    with pytest.raises(UserError, match=r"9 of its 9 .*val-0\.parquet/row-0000000"):
        refuse_overlap(every, val)
    with pytest.raises(UserError, match=r"9 of its 24 .*val-0\.parquet/row-0000000"):
        refuse_overlap(val, every)
    row = "val-0.parquet/row-000000{}"
    few = listed(f"{tmp_path}/pq/*.parquet", tmp_path, row.format(6), "train-1.parquet/row-0000004")
    with pytest.raises(UserError, match=r"1 of its 3 .*val-0\.parquet/row-0000006"):
        refuse_overlap(few, listed(tmp_path / "pq/val-0.parquet", tmp_path, *map(row.format, (2, 6, 7))))
    refuse_overlap(few, listed(tmp_path / "pq/val-0.parquet", tmp_path, row.format(4)))
