import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from ijepa.config.recipe import Recipe
from ijepa.data.loading.loader import Loader
from ijepa.data.open import open_source
from ijepa.masking.batch import Batch
from ijepa.report.image_sections import mask_section
from ijepa.report.maps import map_section
from ijepa.report.markup import Section
from ijepa.report.material import Images, Pair, affordable, first_batch, load_encoders, shown, varied
from ijepa.report.pictures import picture
from ijepa.report.run_data import read_record
from ijepa.training import loop
from ijepa.utils.errors import UserError
from tests.conftest import TINY


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
    with pytest.raises(UserError, match="--data"):
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


def test_part_that_a_list_chose_is_opened_again(run: Path, tmp_path: Path, scenes: Path) -> None:
    source, file = open_source(scenes, split="val"), run / "evaluations" / "knn-demo.json"
    (tmp_path / "names.txt").write_text("".join(f"{source.name(index)}\n" for index in (3, 7)))
    result = json.loads(file.read_text())
    result["data"]["test"]["list"] = str(tmp_path / "names.txt")
    file.write_text(json.dumps(result))
    images = Images(read_record(run), None)
    pair, whole = images.pair("knn"), images.pair("linear")
    assert isinstance(pair, Pair) and isinstance(whole, Pair)
    assert [pair.test.name(index) for index in range(len(pair.test))] == [source.name(3), source.name(7)]
    assert (len(pair.train), len(whole.test)) == (60, 20)


def test_first_samples_are_those_of_the_loop(
    run: Path, tmp_path: Path, scenes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another order than the usual one, and with several crops of an image."""
    seen: list[Batch] = []

    class Recording(Loader):
        def iterate(self, start_step: int, end_step: int) -> Iterator[Batch]:
            for batch in super().iterate(start_step, end_step):
                seen.append(batch)
                yield batch

    monkeypatch.setattr(loop, "Loader", Recording)
    data = {"path": str(scenes), "workers": 0, "order": "blocks", "block": 4, "window": 3, "crops_per_decode": 2}
    recipe = Recipe.read({**TINY, "steps": 2, "data": data, "schedule": {"warmup": "1 steps"}}, "tiny")
    source = open_source(scenes, split="train")
    loop.pretrain(recipe, source, tmp_path / "loop", quiet=True)
    indices = [index for batch in seen[:2] for index in batch.indices]
    pixels = torch.cat([batch.pixels for batch in seen[:2]])
    assert len(indices) == 8 and indices[0] == indices[1] != indices[2]

    batch = first_batch(recipe, source, 6)
    assert list(batch.indices) == indices[:6] and batch.pixels.equal(pixels[:6])
    (run / "recipe.yaml").write_text(recipe.dump())
    record = read_record(run)
    images = Images(record, None)
    parts = mask_section(record, images), map_section(record, images, load_encoders(record))
    for part, word in zip(parts, (f"Crop 1: {source.name(indices[0])}", "Crop 1, whose targets"), strict=True):
        assert isinstance(part, Section) and word in part.body
        for crop in shown(pixels[:6]):
            assert picture(crop, "", most=160).partition('src="')[2].partition('"')[0] in part.body
