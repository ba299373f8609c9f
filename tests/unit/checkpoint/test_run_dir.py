"""Folders that do not hold the run, starts that were killed, and full disks."""

import os

import pytest

from ijepa.checkpoint.format import list_checkpoints
from ijepa.checkpoint.run_dir import Run, open_run
from ijepa.training.loop import pretrain
from ijepa.utils.errors import UserError
from tests.helpers.runs import Kill, recipe, source


def test_refused_start_writes_nothing(scenes, tmp_path, whole):
    with pytest.raises(UserError, match="optimizer.lr_encoder") as err:
        pretrain(recipe(scenes, optimizer={"lr_encoder": 0.1}), source(scenes), whole, quiet=True)
    assert err.value.where == str(whole / "recipe.yaml")
    with pytest.raises(UserError) as err:
        pretrain(recipe(scenes), source(scenes), whole, resume="never", quiet=True)
    assert err.value.where == str(whole)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError) as caught:
        pretrain(recipe(scenes), source(scenes), tmp_path, quiet=True)
    assert caught.value.where == str(tmp_path)
    with pytest.raises(UserError) as err:
        pretrain(recipe(scenes, schedule={"warmup": "9 epochs"}), source(scenes), tmp_path / "new", quiet=True)
    assert err.value.where == "schedule.warmup = 9 epochs"
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_open_run_allows_changes_that_do_not_affect_results(scenes, whole):
    limits = {"optimizer": {"nonfinite_limit": 3}, "data__replaced_limit": 0.5, "data__images": 60}
    _, exists = open_run(whole, recipe(scenes, name="new", description="as before", **limits), resume="auto")
    assert exists


def test_start_that_was_killed_is_repeated(scenes, tmp_path, monkeypatch):
    """It was killed between run.json and the recipe, so any recipe may start."""

    run, calls, fsync = tmp_path / "run", iter(range(2)), os.fsync

    def killed(descriptor: int) -> None:
        fsync(descriptor)
        if next(calls) == 1:  # run.json was the first file
            (run / ".recipe.yaml.123").write_text("base: vit-ti")
            raise Kill

    with monkeypatch.context() as patched, pytest.raises(Kill):
        patched.setattr(os, "fsync", killed)
        pretrain(recipe(scenes, seed=1), source(scenes), run, quiet=True)
    assert {file.name for file in run.iterdir()} == {"run.json", ".recipe.yaml.123"}
    pretrain(recipe(scenes, steps=3), source(scenes), run, resume="never", quiet=True)
    assert Run(run).recipe() == recipe(scenes, steps=3) and list_checkpoints(run / "checkpoints")
    assert not list(run.glob(".*"))


def test_foreign_recipe_is_not_overwritten(scenes, tmp_path):
    (tmp_path / "recipe.yaml").write_text("base: vit-tiny-64")
    with pytest.raises(UserError) as caught:
        pretrain(recipe(scenes), source(scenes), tmp_path, quiet=True)
    assert caught.value.where == str(tmp_path)


def test_damaged_run_json_is_refused(scenes, tmp_path):
    run = tmp_path / "run"
    pretrain(recipe(scenes, steps=3), source(scenes), run, quiet=True)
    (run / "run.json").write_text("{}")
    with pytest.raises(UserError) as caught:
        pretrain(recipe(scenes, steps=3), source(scenes), run, quiet=True)
    assert caught.value.where == str(run / "run.json")
