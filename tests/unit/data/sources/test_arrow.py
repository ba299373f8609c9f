"""Data sets in the format of Hugging Face's `save_to_disk`, with and without the library `datasets`."""

import json
import pickle

import numpy as np
import pytest

from ijepa.data.open import open_dataset
from ijepa.utils.errors import UserError
from tests.helpers.images import jpeg


def write_saved(folder, images, labels):
    """Write rows in two files, as `Dataset.save_to_disk` does."""
    pa = pytest.importorskip("pyarrow")
    folder.mkdir(parents=True)
    files = []
    for part, rows in enumerate((slice(3), slice(3, None))):
        table = pa.table({"label": pa.array(labels[rows], "int64"), "image": pa.array(images[rows])})
        files.append(f"data-{part:05d}-of-00002.arrow")
        with pa.OSFile(str(folder / files[-1]), "wb") as out, pa.ipc.new_stream(out, table.schema) as stream:
            stream.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in files]}))
    features = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))


@pytest.fixture
def saved(tmp_path):
    images = [{"bytes": jpeg(i), "path": None} for i in range(5)]
    write_saved(tmp_path / "set/train", images, [i % 2 for i in range(5)])
    (tmp_path / "set/dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    return tmp_path / "set"


def test_open_saved_keeps_the_order(saved):
    source = open_dataset(f"hf:{saved}", split="train")
    assert len(source) == 5 and source.classes == ("cat", "dog") and source.labels.tolist() == [0, 1, 0, 1, 0]
    again = pickle.loads(pickle.dumps(source))  # as in a worker
    assert [again.image(i) for i in range(5)] == [jpeg(i) for i in range(5)]
    assert again.fingerprint == source.fingerprint and source.name(3) == "train/row-000000003"


@pytest.mark.filterwarnings("error")
def test_open_saved_rows_without_a_label(tmp_path):
    images = [{"bytes": jpeg(i), "path": None} for i in range(5)]
    write_saved(tmp_path / "set", images, [1, None, 0, None, 1])
    source = open_dataset(f"hf:{tmp_path}/set")
    assert source.labels.tolist() == [1, -1, 0, -1, 1] and source.labels.dtype == np.int32
    assert [source.label(i) for i in (0, 1)] == [1, None]
    write_saved(tmp_path / "large", images, [1, 2**40, 0, 0, 1])
    with pytest.raises(UserError, match="1099511627776"):
        open_dataset(f"hf:{tmp_path}/large")


def test_open_saved_refuses_other_folders(saved, tmp_path):
    for path, message in (
        (f"hf:{saved}", "has the splits train, test"),
        (f"hf:{tmp_path}", "is not a saved data set"),
    ):
        with pytest.raises(UserError, match=message):
            open_dataset(path, split="val" if path.endswith("set") else None)
    (saved / "train/data-00001-of-00002.arrow").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match="train") as err:
        open_dataset(f"hf:{saved}/train")
    assert err.value.where == "data.path"


@pytest.fixture
def hugging_face():
    datasets = pytest.importorskip("datasets", reason="needs Hugging Face's datasets")

    def part(rows):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
        images = [{"bytes": jpeg(row), "path": None} for row in rows]
        return datasets.Dataset.from_dict({"image": images, "label": [row % 2 for row in rows]}, features=features)

    return datasets.DatasetDict({"train": part(range(9)), "validation": part(range(20, 24))})


def test_open_saved_written_by_datasets(hugging_face, tmp_path):
    hugging_face.save_to_disk(str(tmp_path / "set"), num_shards={"train": 2, "validation": 1})
    train, val = (open_dataset(f"hf:{tmp_path}/set", split=split) for split in ("train", "val"))
    assert train.classes == ("cat", "dog") and train.labels.tolist() == [row % 2 for row in range(9)]
    assert [train.image(i) for i in range(9)] == [jpeg(i) for i in range(9)]
    assert [val.image(i) for i in range(4)] == [jpeg(i) for i in range(20, 24)]


def test_open_parquet_written_by_datasets(hugging_face, tmp_path):
    (tmp_path / "data").mkdir()
    for split, rows in hugging_face.items():
        rows.to_parquet(str(tmp_path / f"data/{split}-00000-of-00001.parquet"))
    train, val = (open_dataset(tmp_path, split=split) for split in ("train", "val"))
    assert train.classes == ("cat", "dog") and train.labels.tolist() == [row % 2 for row in range(9)]
    assert [train.image(i) for i in range(9)] == [jpeg(i) for i in range(9)]
    assert [val.image(i) for i in range(4)] == [jpeg(i) for i in range(20, 24)]
