"""Shards are plain tars with repeatable bytes; they are complete or absent."""

import hashlib
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ijepa.prepare.shard_writer import Record, ShardPlan, plan_shards, write_folder, write_shard
from ijepa.utils.errors import RunError, UserError

RECORDS = [
    Record("a", image=b"first", label=3, mask=b"mask"),
    Record("b/c", image=b"x" * 1500, label=0, extension="png"),
    Record("d", image=b""),
]


def some(plan: ShardPlan) -> Iterator[Record]:
    for index in range(plan.start, plan.stop):
        yield Record(f"{plan.split}-{index}", image=bytes([index]) * index, label=index % 2)


def broken(plan: ShardPlan) -> Iterator[Record]:
    yield from some(plan)
    if plan.number == 1:
        raise RunError("the source ended")


def test_write_shard_members_in_order_without_metadata(tmp_path: Path) -> None:
    path = tmp_path / "train-0000.tar"
    entry = write_shard(path, RECORDS)
    with tarfile.open(path) as tar:
        members = tar.getmembers()
        contents = {m.name: tar.extractfile(m).read() for m in members}  # type: ignore[union-attr]
    assert [m.name for m in members] == ["a.jpg", "a.cls", "a.mask.png", "b/c.png", "b/c.cls", "d.jpg"]
    assert contents == {
        "a.jpg": b"first",
        "a.cls": b"3",
        "a.mask.png": b"mask",
        "b/c.png": b"x" * 1500,
        "b/c.cls": b"0",
        "d.jpg": b"",
    }
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}
    data = path.read_bytes()
    assert entry == {
        "name": "train-0000.tar",
        "images": 3,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "labels": {"0": 1, "3": 1},
    }
    assert len(data) % tarfile.RECORDSIZE == 0


def test_write_shard_writes_the_same_bytes_as_tarfile(tmp_path: Path) -> None:
    import io

    write_shard(tmp_path / "ours.tar", RECORDS)
    with tarfile.open(tmp_path / "theirs.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for record in RECORDS:
            for name, data in record.members():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    assert (tmp_path / "ours.tar").read_bytes() == (tmp_path / "theirs.tar").read_bytes()


def test_write_shard_leaves_nothing_after_an_error(tmp_path: Path) -> None:
    def records() -> Iterator[Record]:
        yield RECORDS[0]
        assert not (tmp_path / "train-0000.tar").exists()
        raise ValueError("midway")

    with pytest.raises(ValueError, match="midway"):
        write_shard(tmp_path / "train-0000.tar", records())
    assert list(tmp_path.iterdir()) == []


def test_write_shard_with_equal_keys_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="key a"):
        write_shard(tmp_path / "train-0000.tar", [RECORDS[0], RECORDS[0]])
    assert list(tmp_path.iterdir()) == []


def test_write_shard_to_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="train-0000.tar"):
        write_shard(tmp_path / "absent" / "train-0000.tar", RECORDS)


@given(count=st.integers(0, 500), size=st.integers(1, 120))
def test_plan_shards_covers_every_sample_once(count: int, size: int) -> None:
    plans = plan_shards({"train": count, "val": 0}, size)
    assert [i for plan in plans for i in range(plan.start, plan.stop)] == list(range(count))
    assert all(0 < plan.stop - plan.start <= size for plan in plans)
    assert [plan.name for plan in plans] == [f"train-{n:04d}.tar" for n in range(len(plans))]


def write(out: Path, **changes: object) -> dict:
    arguments: dict = {
        "splits": {"train": 7, "val": 3},
        "records": some,
        "classes": ("even", "odd"),
        "about": {"drawn_by": "a test"},
        "shard_size": 4,
    }
    return write_folder(out, **arguments | changes)


def test_write_folder_manifest_counts_samples(tmp_path: Path) -> None:
    manifest = write(tmp_path / "set")
    assert manifest == json.loads((tmp_path / "set" / "manifest.json").read_text())
    assert manifest["drawn_by"] == "a test" and manifest["classes"] == ["even", "odd"]
    assert (tmp_path / "set" / "classes.txt").read_text() == "even\nodd\n"
    train = manifest["splits"]["train"]
    assert (train["images"], train["images_per_class"]) == (7, {"even": 4, "odd": 3})
    assert [(s["name"], s["images"]) for s in train["shards"]] == [("train-0000.tar", 4), ("train-0001.tar", 3)]
    for shard in train["shards"]:
        data = (tmp_path / "set" / shard["name"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == shard["sha256"] and len(data) == shard["bytes"]


@pytest.mark.parametrize("processes", [1, 2])
def test_write_folder_after_an_error_has_no_manifest_and_no_partial_shard(tmp_path: Path, processes: int) -> None:
    with pytest.raises(RunError, match="source"):
        write(tmp_path / "set", records=broken, splits={"train": 7}, processes=processes)
    assert [p.name for p in (tmp_path / "set").iterdir()] == ["train-0000.tar"]


def test_write_folder_needs_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "empty").iterdir()}
    with pytest.raises(UserError, match="empty"):
        write(tmp_path / "empty")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "empty").iterdir()} == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file"):
        write(tmp_path / "file")
    with pytest.raises(UserError):
        write(tmp_path / "file" / "below")
