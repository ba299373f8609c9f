"""Parquet files that contain images, as Hugging Face publishes data sets."""

import json
import pickle
import sys
from pathlib import Path

import pytest

from ijepa.data.open import open_dataset
from ijepa.data.sources import parquet as module
from ijepa.utils.errors import RunError, UserError
from tests.helpers.images import jpeg, write_shards

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def write(path: Path, rows: range, *, form: str = "hugging face", group: int = 4) -> Path:
    """Write rows with image `jpeg(row)` and label row % 2 (cat, dog) in small row groups."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images: list[object] = [jpeg(row) for row in rows]
    labels: list[object] = [row % 2 for row in rows]
    metadata = {}
    if form == "hugging face":
        images = [{"bytes": data, "path": f"{row}.jpg"} for row, data in zip(rows, images, strict=True)]
        features = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
        metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    else:
        labels = [("cat", "dog")[row % 2] for row in rows]
    table = pa.table({"label": labels, "image": images, "about": ["x"] * len(rows)}).replace_schema_metadata(metadata)
    pq.write_table(table, path, row_group_size=group)
    return path


@pytest.fixture
def published(tmp_path):
    for number, rows in enumerate((range(10), range(10, 13))):
        write(tmp_path / f"set/data/train-{number:05d}-of-00002.parquet", rows)
    write(tmp_path / "set/data/validation-00000-of-00001.parquet", range(20, 25))
    (tmp_path / "set/README.md").write_text("a card")
    return tmp_path / "set"


def test_open_parquet_published_data_set(published, tmp_path):
    for path in (published, published / "data", f"{published}/data/train-*.parquet"):
        source = pickle.loads(pickle.dumps(open_dataset(path, split="train")))  # as in a worker
        assert len(source) == 13 and source.classes == ("cat", "dog")
        assert source.labels.tolist() == [row % 2 for row in range(13)]
        assert [source.image(i) for i in (12, 0, 9, 10, 3, 4)] == [jpeg(i) for i in (12, 0, 9, 10, 3, 4)]
        assert source.name(9) == "train-00000-of-00002.parquet/row-0000009"
        assert source.name(11) == "train-00001-of-00002.parquet/row-0000001"
    held = open_dataset(published, split="val")
    assert [held.image(i) for i in range(5)] == [jpeg(i) for i in range(20, 25)]
    with pytest.raises(UserError, match="train, val") as err:
        open_dataset(published)
    assert err.value.where == "data.path"


def test_open_parquet_bytes_and_words(tmp_path):
    source = open_dataset(write(tmp_path / "x.parquet", range(5), form="plain"))
    assert source.image(3) == jpeg(3) and source.classes == ("cat", "dog") and source.labels.tolist() == [0, 1, 0, 1, 0]


def test_row_group_cache_is_bounded(tmp_path, monkeypatch):
    source = open_dataset(write(tmp_path / "x.parquet", range(12)))
    read = []
    monkeypatch.setattr(source, "_read", lambda group: (read.append(group), type(source)._read(source, group))[1])
    for index in (0, 3, 5, 1, 9):
        assert source.image(index) == jpeg(index)
    assert read == [0, 1, 2] and len(source._groups) == 3
    monkeypatch.setattr(module, "_CACHE_BYTES", 1)
    assert source.image(4) == jpeg(4) and len(source._groups) == 1
    monkeypatch.setattr(module, "_MAX_GROUP_BYTES", 100)
    with pytest.raises(UserError, match="row_group_size"):
        open_dataset(write(tmp_path / "y.parquet", range(12)))


def test_empty_cell_is_an_unreadable_image(tmp_path):
    table = pa.table({"image": pa.array([jpeg(1), None], type=pa.binary())})
    pq.write_table(table, tmp_path / "x.parquet")
    source = open_dataset(tmp_path / "x.parquet")
    assert source.image(0) == jpeg(1) and source.image(1) == b"" and source.labels is None


def test_changed_file_is_an_error(published):
    source = open_dataset(published, split="train")
    write(published / "data/train-00000-of-00002.parquet", range(10), group=3)
    with pytest.raises(RunError, match="changed"):
        source.image(0)
    assert open_dataset(published, split="train").image(0) == jpeg(0)
    source = open_dataset(published, split="train")
    (published / "data/train-00001-of-00002.parquet").unlink()
    with pytest.raises(RunError, match="train-00001-of-00002.parquet: row group 0"):
        source.image(11)


def test_open_parquet_refuses_files_without_images(tmp_path, monkeypatch):
    pq.write_table(pa.table({"a": [1], "b": ["x"]}), tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("text")
    for name, message in (
        ("none.parquet", "has no column of images; its columns are a, b"),
        ("text.parquet", "cannot be read"),
        ("nothing.parquet", "does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            open_dataset(tmp_path / name)
    file = write(tmp_path / "x.parquet", range(3))
    open_dataset(file)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="pyarrow"):
        open_dataset(file)


def test_open_parquet_refuses_damaged_labels(tmp_path):
    file = write(tmp_path / "x.parquet", range(6), group=6)
    column = pq.ParquetFile(file).metadata.row_group(0).column(0)
    assert column.path_in_schema == "label"
    start = min(filter(None, (column.dictionary_page_offset, column.data_page_offset)))
    with file.open("rb+") as opened:
        opened.seek(start)
        opened.write(b"\xff" * column.total_compressed_size)
    with pytest.raises(UserError, match="column label") as error:
        open_dataset(file)
    assert "\n" not in str(error.value)


def test_find_parquet_descending_range(tmp_path):
    for number in range(2):
        write(tmp_path / f"x-{number}.parquet", range(3))
    assert len(open_dataset(f"{tmp_path}/x-{{1..0}}.parquet")) == 6
    with pytest.raises(UserError, match=r"\{9\.\.0\}") as err:
        open_dataset(f"{tmp_path}/x-{{9..0}}.parquet")
    assert err.value.where == "data.path"


def test_find_parquet_ignores_a_table_next_to_shards(tmp_path):
    folder = write_shards(tmp_path / "shards", [3])
    write(folder / "x.parquet", range(2))
    assert len(open_dataset(folder)) == 3
