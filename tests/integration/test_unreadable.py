"""Unreadable images and void steps are counted and named, and too many of them stop the run."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

from ijepa.checkpoint.format import list_checkpoints
from ijepa.checkpoint.state import seal
from ijepa.data.open import open_dataset
from ijepa.data.sources.base import TarSource
from ijepa.distributed.process_group import World
from ijepa.evaluation.diagnostics.online import online_diagnosis
from ijepa.model.ijepa import IJEPA
from ijepa.training.limits import Counts
from ijepa.training.loop import Callback, pretrain
from ijepa.training.optimizer import make_optimizer
from ijepa.training.resume import find_start
from ijepa.utils.errors import RunError
from tests.helpers.images import write_tar, write_tree
from tests.helpers.ranks import run_jobs, spawn
from tests.helpers.runs import Kill, bytes_of, recipe, source


def folder_of_images(scenes: Path, out: Path, broken: int) -> Path:
    data = source(scenes)
    out.mkdir()
    for index in range(40):
        image = data[index].image
        (out / f"{index:03d}.jpg").write_bytes(image[: len(image) // 2] if index < broken else image)
    return out


def test_unreadable_image_is_replaced_counted_and_named(scenes, tmp_path, capsys):
    images = folder_of_images(scenes, tmp_path / "images", broken=1)
    chosen = recipe(images, data__replaced_limit=0.2)
    pretrain(chosen, open_dataset(images), tmp_path / "run")
    assert capsys.readouterr().out.count("unreadable image, replaced by the next image of its epoch: 000.jpg") == 1
    state = json.loads((list_checkpoints(tmp_path / "run/checkpoints")[-1] / "state.json").read_text())
    assert state["counts"]["replaced_names"] == ["000.jpg"] and 1 <= state["counts"]["replaced"] <= 3
    pretrain(chosen, open_dataset(images), tmp_path / "again", quiet=True)
    assert bytes_of(tmp_path / "again") == bytes_of(tmp_path / "run")


def test_invalid_label_does_not_stop_pretraining(scenes, tmp_path):
    """Only measurements read labels."""
    data = source(scenes)
    members = [
        (f"{n:02d}.{kind}", content)
        for n in range(12)
        for kind, content in (("jpg", data[n].image), ("cls", b"%d" % (n % 2)))
    ]
    write_tar(tmp_path / "a.tar", [*members, ("99.cls", b"999999999"), ("99.jpg", data[12].image)])
    images = open_dataset(tmp_path / "a.tar")
    callbacks = [Callback(8, online_diagnosis(images, (48, 48)))]
    pretrain(recipe(tmp_path / "a.tar"), images, tmp_path / "run", callbacks=callbacks, quiet=True)
    rows = [json.loads(line) for line in (tmp_path / "run/diagnostics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 8] and all(0 <= row["knn"] <= 1 for row in rows)


def test_each_unreadable_image_is_named_once(scenes, tmp_path, capsys):
    small = source(scenes)[0].image
    (tmp_path / "images").mkdir()
    for index in range(250):
        (tmp_path / "images" / f"{index:03d}.jpg").write_bytes(small[:99] if index < 110 else small)
    images = open_dataset(tmp_path / "images")
    chosen = recipe(tmp_path / "images", data__replaced_limit=1.0, batch={"global": 25}, steps=20)
    pretrain(chosen, images, tmp_path / "run")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("unreadable")]
    assert len(lines) == len(set(lines)) == 110
    state = json.loads((list_checkpoints(tmp_path / "run/checkpoints")[-1] / "state.json").read_text())
    assert len(state["counts"]["replaced_names"]) == 100


def test_too_many_unreadable_images_stop_the_run(scenes, tmp_path):
    images = folder_of_images(scenes, tmp_path / "images", broken=12)
    with pytest.raises(RunError, match=r"data.replaced_limit.*0\d\d.jpg"):
        pretrain(recipe(images), open_dataset(images), tmp_path / "run", quiet=True)


class Killer:
    """Measures nothing, and kills the run at the second measurement."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, model):
        self.calls += 1
        if self.calls == 2:
            raise Kill
        return {}


def counted(run: Path) -> tuple[int, int, list[int]]:
    """Return replaced and seen crops by the last checkpoint, and replaced crops of each step by the log."""
    counts = json.loads((list_checkpoints(run / "checkpoints")[-1] / "state.json").read_text())["counts"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return counts["replaced"], counts["seen"], [row.get("replaced", 0) for row in rows]


def test_replaced_counts_do_not_depend_on_micro_batches_and_resume(scenes, tmp_path):
    """Micro-batches of 1 separate two crops of one image."""
    images = folder_of_images(scenes, tmp_path / "images", broken=12)
    found = []
    for micro in (4, 2, 1):
        chosen = recipe(
            images, data__replaced_limit=1.0, data__crops_per_decode=2, batch={"global": 8, "micro": micro}, log_every=3
        )
        out = tmp_path / f"run-{micro}"
        if micro == 2:  # killed after step 4, with a checkpoint of step 3
            with pytest.raises(Kill):
                pretrain(chosen, open_dataset(images), out, callbacks=[Callback(4, Killer())], quiet=True)
        pretrain(chosen, open_dataset(images), out, quiet=True)
        found.append(counted(out))
    assert found[0] == found[1] == found[2] and found[0][0] == sum(found[0][2]) and found[0][1] == 64
    assert 10 <= found[0][0] <= 30 and found[0][0] % 2 == 0


@pytest.mark.slow
@pytest.mark.distributed
def test_replaced_counts_are_those_of_all_ranks(scenes, tmp_path):
    images = folder_of_images(scenes, tmp_path / "images", broken=12)
    values = {"batch": {"global": 8, "micro": 2}, "data__replaced_limit": 1.0}
    pretrain(recipe(images, **values), open_dataset(images), tmp_path / "one", quiet=True)
    stops = recipe(images, **values | {"data__replaced_limit": 0.1}, log_every=8)
    jobs = [{"recipe": yaml.safe_load(recipe(images, **values).dump()), "output": str(tmp_path / "two")}]
    run_jobs(2, jobs)
    assert counted(tmp_path / "two") == counted(tmp_path / "one")
    (tmp_path / "stops.yaml").write_text(stops.dump())
    line = [
        sys.executable,
        "-m",
        "ijepa",
        "pretrain",
        str(tmp_path / "stops.yaml"),
        "--output",
        str(tmp_path / "stops"),
    ]
    ranks = spawn(2, line)
    (said,) = [text for text in "".join(text for _, text in ranks).splitlines() if text.startswith("ijepa: ")]
    assert [code for code, _ in ranks] == [1, 1]
    assert re.match(r"ijepa: \d+ of \d+ images are unreadable, more than data.replaced_limit = 0.1; the first: ", said)


def test_void_steps_in_a_row_stop_the_run(scenes, tmp_path):
    def poison(model):
        with torch.no_grad():
            model.predictor.mask_token.fill_(float("nan"))
        return {}

    chosen = recipe(scenes, optimizer={"nonfinite_limit": 1}, checkpoint__every=100)
    with pytest.raises(RunError, match=r"^2 steps .*step 2 .*train-\d+"):
        pretrain(chosen, source(scenes), tmp_path, callbacks=[Callback(100, poison)], quiet=True)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(row["void"] and row["loss"] is None for row in rows)


class Recording(TarSource):
    """Keeps the indices of the images that are read."""

    def __init__(self, index) -> None:
        super().__init__(index)
        self.read: list[int] = []

    def _image(self, index: int) -> bytes:
        self.read.append(index)
        return super()._image(index)


def test_void_step_names_the_images_that_were_loaded(scenes, tmp_path):
    """Half as many as a batch has slots, because each image has two crops; and none twice."""

    def poison(model):
        with torch.no_grad():
            model.predictor.mask_token.fill_(float("nan"))
        return {}

    images = Recording(source(scenes).index)
    two_crops = {"data__crops_per_decode": 2, "data__workers": 0, "log_every": 1}
    chosen = recipe(scenes, optimizer={"nonfinite_limit": 1}, **two_crops)
    with pytest.raises(RunError) as caught:
        pretrain(chosen, images, tmp_path, callbacks=[Callback(100, poison)], quiet=True)
    names = dict.fromkeys(source(scenes).name(index) for index in images.read[4:8])
    assert len(names) == 4 and f"step 2 with {', '.join(names)}; lower the" in str(caught.value)
    assert str(caught.value).endswith("set --precision.autocast none, which needs a new --output")


@pytest.mark.parametrize("rank", [0, 1])
def test_start_loads_the_counts_on_every_rank(scenes, tmp_path, rank):
    """Otherwise ranks would stop after different steps."""
    pretrain(recipe(scenes, steps=3), source(scenes), tmp_path, quiet=True)
    (saved,) = list_checkpoints(tmp_path / "checkpoints")
    state = json.loads((saved / "state.json").read_text())
    state["counts"]["void_in_a_row"] = 5
    del state["sha256"]
    (saved / "state.json").write_text(seal(state))
    chosen, world = recipe(scenes, steps=3), World(rank=rank)
    start = find_start(world, chosen, source(scenes), tmp_path, "auto")
    model = IJEPA(chosen.model)
    start.load(world, model, make_optimizer(model, chosen.optimizer), None)
    counts = Counts(**start.state["counts"])
    assert (counts.void_in_a_row, counts.seen) == (5, 24)


@pytest.mark.parametrize(
    ("every", "log_every", "diagnosed"), [(100, 10, False), (1, 10, False), (3, 7, False), (100, 10, True)]
)
def test_void_steps_in_a_row_do_not_depend_on_log_interval(scenes, tmp_path, every, log_every, diagnosed):
    """Values are read from the device by a reading of the log, a checkpoint or a measurement."""
    void: set[int] = set()

    def poisoned(grad):
        poisoned.step += 1  # a step has one micro-batch
        return torch.full_like(grad, float("nan")) if poisoned.step in void else grad

    def poison(model):
        if poisoned.step == 0:  # not after the last step
            model.predictor.mask_token.register_hook(poisoned)
        return {}

    def go(run: str) -> None:
        poisoned.step = 0
        callbacks = [Callback(1000, poison), *([Callback(2, lambda model: {})] if diagnosed else [])]
        pretrain(chosen, source(scenes), tmp_path / run, callbacks=callbacks, quiet=True)

    small = {"steps": 21, "batch": {"global": 2}, "optimizer": {"nonfinite_limit": 2}}
    chosen = recipe(scenes, **small, checkpoint__every=every, log_every=log_every)
    void |= {1, 2, 4, 5, 7, 10, 14, 20, 21}  # never three in a row
    go("some")
    state = json.loads((list_checkpoints(tmp_path / "some/checkpoints")[-1] / "state.json").read_text())
    assert state["counts"]["void_in_a_row"] == 2
    void |= {6}
    with pytest.raises(RunError, match=r"^3 steps .*step 6 "):
        go("many")
    assert poisoned.step <= 6 + log_every


@pytest.mark.parametrize("packed", [False, True])
def test_unreadable_image_may_have_a_name_that_is_not_utf8(scenes, tmp_path, capsys, packed):
    name, data = os.fsdecode(b"caf\xe9.jpg"), source(scenes)
    files = {f"{index:03d}.jpg": data[index].image for index in range(31)} | {name: b""}
    shown = "caf\\xe9.jpg"
    if packed:
        (tmp_path / "images").mkdir()
        write_tar(tmp_path / "images/a.tar", files.items())
        shown = f"a.tar/{shown}"
    else:
        write_tree(tmp_path / "images", files)
    chosen = recipe(tmp_path / "images", data__replaced_limit=0.2)
    images = open_dataset(tmp_path / "images")
    for _ in range(2):  # the second time, the run is resumed
        pretrain(chosen, images, tmp_path / "run", callbacks=[Callback(1, lambda model: {})])
    assert f"unreadable image, replaced by the next image of its epoch: {shown}\n" in capsys.readouterr().out
    state = json.loads((list_checkpoints(tmp_path / "run/checkpoints")[-1] / "state.json").read_text())
    assert state["counts"]["replaced_names"] == [shown]
