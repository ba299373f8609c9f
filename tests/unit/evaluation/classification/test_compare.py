import json

import pytest

from ijepa.config.recipe import ModelSection
from ijepa.data.open import open_dataset
from ijepa.evaluation.classification.knn import evaluate_knn
from ijepa.evaluation.classification.linear_probe import evaluate_linear
from ijepa.evaluation.context import EvaluationContext
from ijepa.evaluation.features.extract import PixelEncoder
from ijepa.evaluation.protocols import KnnProtocol, LinearProtocol
from ijepa.evaluation.results.schema import DataSet
from ijepa.model.encoder import FrozenEncoder
from ijepa.utils.errors import UserError
from tests.helpers.feature_clouds import color_sets, write_colors
from tests.helpers.images import write_tar

SHAPE = ModelSection(image_size=32, patch_size=8, encoder={"width": 32, "depth": 2, "heads": 2})
LINEAR = LinearProtocol(name="toy", crop_fraction=1.0, lrs=(1e-3, 1e-2), weight_decays=(1e-2,), batch=32, epochs=10)
KNN = KnnProtocol(name="toy", crop_fraction=1.0, neighbors=(5,), k=5)
RUNNERS = {"linear": (evaluate_linear, LINEAR), "knn": (evaluate_knn, KNN)}


def encoders():
    return {"random": FrozenEncoder.initial(SHAPE, 0), "pixels": PixelEncoder((32, 32), 8)}


@pytest.mark.parametrize("kind", RUNNERS)
def test_same_json_twice_with_and_without_cache(tmp_path, kind):
    train, test = color_sets(tmp_path)
    run, protocol = RUNNERS[kind]
    told = []
    results = [
        run(encoders(), train, test, protocol, EvaluationContext(seed=5, cache=cache, progress=told.append))
        for cache in (None, tmp_path / "cache", tmp_path / "cache")
    ]
    texts = [json.dumps(result.to_json() | {"seconds": 0}, allow_nan=False) for result in results]
    assert texts[0] == texts[1] == texts[2]
    result = results[0]
    assert (result.kind, result.level, result.chance) == (kind, None, pytest.approx(1 / 3))
    assert result.protocol == protocol.model_dump(mode="json")
    assert result.data.train == DataSet(n=60, classes=3, fingerprint=train.fingerprint)
    assert result.data.test == DataSet(n=24, classes=3, fingerprint=test.fingerprint)
    assert [row.encoder for row in result.rows] == ["random", "pixels"]
    for row in result.rows:
        assert row["ci"][0] <= row["top1"] <= row["ci"][1] <= 1
    assert result.rows[1]["top1"] > 0.9, "the class is the picture's color"
    assert any("pixels, test: features of 24 of 24 images" in line for line in told)


def test_classes_are_matched_by_name(tmp_path):
    """A test set without the first class numbers its own from 0: by number, every image would be wrong."""
    train, _ = color_sets(tmp_path)
    test = open_dataset(write_colors(tmp_path / "two", 8, names=("green", "red"), first=100))
    result = evaluate_knn({"pixels": PixelEncoder((32, 32), 8)}, train, test, KNN)
    assert test.labels.max() == 1
    assert result.rows[0]["top1"] > 0.9


def test_a_part_of_the_sets(tmp_path):
    train, test = color_sets(tmp_path)
    some = KNN.model_copy(update={"train_images": 40, "test_images": 10})
    result = evaluate_knn(
        {"pixels": PixelEncoder((32, 32), 8)}, train, test, some, EvaluationContext(cache=tmp_path / "cache")
    )
    assert (result.data.train.n, result.data.test.n) == (40, 10)


def refusal(train, test, protocol=KNN, encoders=None):
    with pytest.raises(UserError) as refused:
        evaluate_knn(encoders or {"pixels": PixelEncoder((32, 32), 8)}, train, test, protocol)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_refusals(tmp_path):
    train, test = color_sets(tmp_path)
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in (tmp_path / "train" / "red").iterdir():
        (flat / file.name).write_bytes(file.read_bytes())
    unlabeled = open_dataset(flat)
    assert refusal(unlabeled, test).startswith("--train: the images have no labels")
    assert refusal(train, unlabeled).startswith("--test: the images have no labels")
    strange = open_dataset(write_colors(tmp_path / "strange", 2, names=("red", "violet"), first=200))
    assert refusal(train, strange).startswith("--test: 1 of its classes are not in the train set: violet")
    assert refusal(train, train).startswith("--test: is the train set")
    one = open_dataset(write_colors(tmp_path / "one" / "train", 2, names=("red",), first=300).parent, split="train")
    assert "one class" in refusal(one, open_dataset(write_colors(tmp_path / "more", 2, names=("red",), first=400)))
    odd = KNN.model_copy(update={"image_size": 36})
    assert "patches of pixels, 8 pixels" in refusal(train, test, odd)
    assert refusal(train, Empty(test)).startswith("--test: holds no images")


def test_a_label_that_is_too_large_for_a_table_is_refused(tmp_path):
    members = [
        (f"{n}.{field}", b"%d" % (n % 2 if n < 9 else 999_999_999)) for n in range(10) for field in ("cls", "jpg")
    ]
    train = open_dataset(write_tar(tmp_path / "train.tar", members))
    test = open_dataset(write_tar(tmp_path / "test.tar", members[:6]))
    line = refusal(train, test)
    assert line.startswith("--train: label 999999999 of train.tar/9.jpg is too large")
    assert refusal(test, train).startswith("--test: 1 of its classes are not in the train set: 999999999")


class Empty:
    def __init__(self, source):
        self.source = source

    def __len__(self):
        return 0
