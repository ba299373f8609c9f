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
def test_compare_gives_the_same_result_with_and_without_cache(tmp_path, kind):
    train, test = color_sets(tmp_path)
    run, protocol = RUNNERS[kind]
    lines = []
    results = [
        run(encoders(), train, test, protocol, EvaluationContext(seed=5, cache=cache, progress=lines.append))
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
    assert result.rows[1]["top1"] > 0.9  # the class is the color of the image
    assert any("pixels, test: features of 24 of 24 images" in line for line in lines)


def test_matched_labels_matches_classes_by_name(tmp_path):
    """The test set lacks the first class and numbers its own from 0; by number, all images would be wrong."""
    train, _ = color_sets(tmp_path)
    test = open_dataset(write_colors(tmp_path / "two", 8, names=("green", "red"), first=100))
    result = evaluate_knn({"pixels": PixelEncoder((32, 32), 8)}, train, test, KNN)
    assert test.labels.max() == 1
    assert result.rows[0]["top1"] > 0.9


def test_compare_uses_a_part_of_the_sets(tmp_path):
    train, test = color_sets(tmp_path)
    some = KNN.model_copy(update={"train_images": 40, "test_images": 10})
    result = evaluate_knn(
        {"pixels": PixelEncoder((32, 32), 8)}, train, test, some, EvaluationContext(cache=tmp_path / "cache")
    )
    assert (result.data.train.n, result.data.test.n) == (40, 10)


def refusal(train, test, protocol=KNN) -> UserError:
    with pytest.raises(UserError) as err:
        evaluate_knn({"pixels": PixelEncoder((32, 32), 8)}, train, test, protocol)
    assert "\n" not in str(err.value)
    return err.value


def test_compare_refuses_sets_without_labels(tmp_path):
    train, test = color_sets(tmp_path)
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in (tmp_path / "train" / "red").iterdir():
        (flat / file.name).write_bytes(file.read_bytes())
    without_labels = open_dataset(flat)
    assert refusal(without_labels, test).where == "--train"
    assert refusal(train, without_labels).where == "--test"


def test_compare_refuses_sets_that_do_not_match(tmp_path):
    train, test = color_sets(tmp_path)
    other = open_dataset(write_colors(tmp_path / "other", 2, names=("red", "violet"), first=200))
    error = refusal(train, other)
    assert error.where == "--test" and "violet" in error.problem
    assert refusal(train, train).where == "--test"
    assert refusal(train, Empty(test)).where == "--test"
    one = open_dataset(write_colors(tmp_path / "one" / "train", 2, names=("red",), first=300).parent, split="train")
    error = refusal(one, open_dataset(write_colors(tmp_path / "more", 2, names=("red",), first=400)))
    assert error.where == "--train" and "one class" in error.problem


def test_compare_refuses_an_image_size_that_is_not_a_multiple_of_the_patch(tmp_path):
    train, test = color_sets(tmp_path)
    error = refusal(train, test, KNN.model_copy(update={"image_size": 36}))
    assert "36" in error.where and "8 pixels" in error.problem


def test_compare_refuses_a_label_that_is_too_large(tmp_path):
    members = [
        (f"{n}.{field}", b"%d" % (n % 2 if n < 9 else 999_999_999)) for n in range(10) for field in ("cls", "jpg")
    ]
    train = open_dataset(write_tar(tmp_path / "train.tar", members))
    test = open_dataset(write_tar(tmp_path / "test.tar", members[:6]))
    error = refusal(train, test)
    assert error.where == "--train" and "label 999999999 of train.tar/9.jpg" in error.problem
    error = refusal(test, train)
    assert error.where == "--test" and "999999999" in error.problem


class Empty:
    def __init__(self, source):
        self.source = source

    def __len__(self):
        return 0
