"""Data sets that Hugging Face's own `datasets` wrote; without it test_remote and test_parquet stand in."""

import pytest

from ijepa.data.open import open_dataset
from tests.helpers.images import jpeg

datasets = pytest.importorskip("datasets", reason="needs Hugging Face's datasets")


@pytest.fixture
def made():
    def part(rows):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
        images = [{"bytes": jpeg(row), "path": None} for row in rows]
        return datasets.Dataset.from_dict({"image": images, "label": [row % 2 for row in rows]}, features=features)

    return datasets.DatasetDict({"train": part(range(9)), "validation": part(range(20, 24))})


def test_saved_to_disk(made, tmp_path):
    made.save_to_disk(str(tmp_path / "set"), num_shards={"train": 2, "validation": 1})
    train, val = (open_dataset(f"hf:{tmp_path}/set", split=split) for split in ("train", "val"))
    assert train.classes == ("cat", "dog") and train.labels.tolist() == [row % 2 for row in range(9)]
    assert [train.image(i) for i in range(9)] == [jpeg(i) for i in range(9)]
    assert [val.image(i) for i in range(4)] == [jpeg(i) for i in range(20, 24)]


def test_written_as_parquet(made, tmp_path):
    (tmp_path / "data").mkdir()
    for split, rows in made.items():
        rows.to_parquet(str(tmp_path / f"data/{split}-00000-of-00001.parquet"))
    train, val = (open_dataset(tmp_path, split=split) for split in ("train", "val"))
    assert train.classes == ("cat", "dog") and train.labels.tolist() == [row % 2 for row in range(9)]
    assert [train.image(i) for i in range(9)] == [jpeg(i) for i in range(9)]
    assert [val.image(i) for i in range(4)] == [jpeg(i) for i in range(20, 24)]
