import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from ijepa.config.recipe import Recipe
from ijepa.data.loading.loader import Loader
from ijepa.data.open import open_dataset
from ijepa.masking.batch import Batch
from ijepa.report.images import picture
from ijepa.report.run_data import MissingInput, read_run_data
from ijepa.report.run_images import (
    RunImages,
    affordable_images,
    choose_varied,
    first_batch,
    sample_name,
    to_arrays,
)
from ijepa.report.sections.maps import map_section
from ijepa.report.sections.masks import mask_section
from ijepa.training import loop
from ijepa.utils.errors import UserError
from tests.conftest import TINY
from tests.helpers.images import write_tar


def images_of(run: Path, given: str | None = None) -> RunImages:
    return RunImages(read_run_data(run), given)


def test_choose_varied_takes_each_class_before_any_again(scenes: Path) -> None:
    source = open_dataset(scenes, split="train")
    chosen = choose_varied(source, 12)
    assert source.labels is not None and len(set(chosen.tolist())) == 12
    counts = np.bincount(source.labels[chosen], minlength=8)
    assert counts.min() >= 1 and counts.max() - counts.min() <= 1
    assert chosen.tolist() == choose_varied(source, 12).tolist()


def test_choose_varied_takes_all_images_of_a_small_set(scenes: Path) -> None:
    source = open_dataset(scenes, split="val")
    assert sorted(choose_varied(source, 100).tolist()) == list(range(20))


def test_sets_are_those_of_the_evaluation(whole_run: Path) -> None:
    images = images_of(whole_run)
    sets = images.sets(images.run.result("segmentation", "knn"))
    assert not sets.same and (len(sets.train), len(sets.test)) == (60, 20)
    assert images.is_training_set()


def test_sets_without_an_evaluation_are_the_training_set(whole_run: Path) -> None:
    sets = images_of(whole_run).sets(None)
    assert sets.same and len(sets.test) == 60


def test_given_images_replace_all_sets(whole_run: Path, scenes: Path) -> None:
    images = images_of(whole_run, f"{scenes}/val-*.tar")
    sets = images.sets(images.run.result("knn"))
    assert sets.same and len(sets.train) == 20 and not images.is_training_set()
    with pytest.raises(UserError) as err:
        images_of(whole_run, f"{scenes}/none-*.tar")
    assert err.value.where.startswith("--data")


def test_sets_that_were_moved_are_missing(run: Path) -> None:
    file = run / "evaluations" / "knn-demo.json"
    result = json.loads(file.read_text())
    result["data"]["test"]["path"] = "/gone/val.tar"
    file.write_text(json.dumps(result))
    images = images_of(run)
    with pytest.raises(MissingInput) as err:
        images.sets(images.run.result("knn"))
    assert "/gone/val.tar" in err.value.reason and "--data" in err.value.command


def test_encoders_are_those_of_the_checkpoint_and_of_the_seed(whole_run: Path) -> None:
    images = images_of(whole_run)
    assert images.checkpoint is not None and images.checkpoint.name == "step-00000060"
    trained, random = (images.encoders[name].vit.state_dict() for name in ("trained", "random"))
    assert any(not trained[name].equal(random[name]) for name in trained)  # the checkpoint has seed 7, the recipe 0


def test_affordable_images_are_few_for_a_large_model() -> None:
    tiny, huge = (Recipe.load(name).model for name in ("scenes", "vit-huge-16-in22k"))
    assert affordable_images(tiny) == 1000 and affordable_images(huge) == 64


def test_sets_have_only_the_images_of_a_list(run: Path, tmp_path: Path, scenes: Path) -> None:
    source, file = open_dataset(scenes, split="val"), run / "evaluations" / "knn-demo.json"
    (tmp_path / "names.txt").write_text("".join(f"{source.name(index)}\n" for index in (3, 7)))
    result = json.loads(file.read_text())
    result["data"]["test"]["list"] = str(tmp_path / "names.txt")
    file.write_text(json.dumps(result))
    images = images_of(run)
    listed, complete = (images.sets(images.run.result(kind)) for kind in ("knn", "linear"))
    assert [listed.test.name(index) for index in range(len(listed.test))] == [source.name(3), source.name(7)]
    assert (len(listed.train), len(complete.test)) == (60, 20)


def test_sample_name_has_the_number_of_a_class_without_a_name(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("a.jpg", b"1"), ("a.cls", b"0"), ("b.jpg", b"2"), ("b.cls", b"999999999")])
    (tmp_path / "classes.txt").write_text("cat\n")
    source = open_dataset(tmp_path)
    assert [sample_name(source, index) for index in (0, 1)] == ["a.tar/a.jpg, cat", "a.tar/b.jpg, class 999999999"]


def test_first_batch_has_the_samples_of_the_training_loop(
    run: Path, tmp_path: Path, scenes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an order that is not the default, and with several crops of an image."""
    seen: list[Batch] = []

    class Recording(Loader):
        def iterate(self, start_step: int, end_step: int) -> Iterator[Batch]:
            for batch in super().iterate(start_step, end_step):
                seen.append(batch)
                yield batch

    monkeypatch.setattr(loop, "Loader", Recording)
    data = {"path": str(scenes), "workers": 0, "order": "blocks", "block": 4, "window": 3, "crops_per_decode": 2}
    recipe = Recipe.read({**TINY, "steps": 2, "data": data, "schedule": {"warmup": "1 steps"}}, "tiny")
    source = open_dataset(scenes, split="train")
    loop.pretrain(recipe, source, tmp_path / "loop", quiet=True)
    indices = [index for batch in seen[:2] for index in batch.indices]
    pixels = torch.cat([batch.pixels for batch in seen[:2]])
    assert len(indices) == 8 and indices[0] == indices[1] != indices[2]

    batch = first_batch(recipe, source, 6)
    assert list(batch.indices) == indices[:6] and batch.pixels.equal(pixels[:6])
    (run / "recipe.yaml").write_text(recipe.dump())
    images = images_of(run)
    masks, maps = mask_section(images.run, images).crops, map_section(images.run, images).prediction
    assert maps is not None and masks.rows[0][1][0].alt.startswith(f"Crop 1: {source.name(indices[0])}")
    for grid, side in ((masks, 320), (maps, 160)):
        shown = [each.uri for each in grid.rows[0][1]]
        assert shown[:6] == [picture(crop, "", max_side=side).uri for crop in to_arrays(pixels[:6])]
