import json
from pathlib import Path

import numpy as np
import pytest

from ijepa.data.opening import open_source
from ijepa.errors import Refused
from ijepa.recipe import Recipe
from ijepa.report.material import Images, Pair, affordable, load_encoders, varied
from ijepa.report.record import read_record


def test_varied_takes_each_class_before_any_again(scenes: Path) -> None:
    source = open_source(scenes, split="train")
    chosen = varied(source, 12, 0)
    assert source.labels is not None and len(set(chosen.tolist())) == 12
    counts = np.bincount(source.labels[chosen], minlength=8)
    assert counts.min() >= 1 and counts.max() - counts.min() <= 1
    assert chosen.tolist() == varied(source, 12, 0).tolist()


def test_varied_takes_all_there_are_of_a_small_set(scenes: Path) -> None:
    source = open_source(scenes, split="val")
    assert sorted(varied(source, 100, 0).tolist()) == list(range(20))


def test_sets_are_those_of_the_evaluations(whole_run: Path) -> None:
    images = Images(read_record(whole_run), None)
    pair = images.pair("segmentation", "knn")
    assert isinstance(pair, Pair) and not pair.same and (len(pair.train), len(pair.test)) == (60, 20)
    assert images.trained_here()


def test_without_evaluations_the_training_set_is_both(whole_run: Path) -> None:
    pair = Images(read_record(whole_run), None).pair("diagnosis")
    assert isinstance(pair, Pair) and pair.same and len(pair.test) == 60


def test_given_data_stand_for_all(whole_run: Path, scenes: Path) -> None:
    images = Images(read_record(whole_run), f"{scenes}/val-*.tar")
    pair = images.pair("knn")
    assert isinstance(pair, Pair) and pair.same and len(pair.train) == 20
    assert not images.trained_here()
    with pytest.raises(Refused, match="--data"):
        Images(read_record(whole_run), f"{scenes}/none-*.tar")


def test_set_that_is_gone_is_told(run: Path) -> None:
    file = run / "evaluations" / "knn-demo.json"
    result = json.loads(file.read_text())
    result["data"]["test"]["path"] = "/gone/val.tar"
    file.write_text(json.dumps(result))
    pair = Images(read_record(run), None).pair("knn")
    assert isinstance(pair, str) and "/gone/val.tar does not exist" in pair


def test_encoders_are_the_checkpoint_s_and_the_seed_s(whole_run: Path) -> None:
    encoders = load_encoders(read_record(whole_run))
    assert not isinstance(encoders, str) and encoders.step == "step-00000060" and encoders.image_size == (48, 48)
    trained, random = (encoder.vit.state_dict() for encoder in (encoders.trained, encoders.random))
    assert any(not trained[name].equal(random[name]) for name in trained)  # the checkpoint's seed is 7, the recipe's 0


def test_large_models_encode_few_images() -> None:
    tiny, huge = (Recipe.load(name).model for name in ("scenes", "vit-huge-16-in22k"))
    assert affordable(tiny) == 1000 and affordable(huge) == 64
