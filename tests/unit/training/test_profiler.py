"""The profiler writes its files for the given steps, and changes no bit."""

import gzip
import json

import pytest

from ijepa.config.recipe import Recipe
from ijepa.data.open import open_dataset
from ijepa.training.loop import pretrain
from ijepa.training.profiler import Window
from ijepa.utils.errors import UserError
from tests.conftest import TINY


@pytest.mark.parametrize(("text", "window"), [("3", Window(3, 3)), ("3-5", Window(3, 5))])
def test_window_parses_a_range_of_steps(text, window):
    assert Window.parse(text) == window


@pytest.mark.parametrize("text", ["", "0", "5-3", "a-b", "3-", "-3", "1-2-3"])
def test_window_refuses_anything_else(text):
    with pytest.raises(UserError) as caught:
        Window.parse(text)
    assert caught.value.where.startswith("--profile")


def test_profile_names_parts_of_steps_and_changes_no_bit(scenes, tmp_path):
    recipe = Recipe.read({**TINY, "steps": 3, "data": {**TINY["data"], "path": str(scenes)}}, "test")
    source = open_dataset(scenes, split="train")
    pretrain(recipe, source, tmp_path / "plain", quiet=True)
    pretrain(recipe, source, tmp_path / "traced", quiet=True, profile=Window(2, 3))
    assert (tmp_path / "plain/metrics.jsonl").read_bytes() == (tmp_path / "traced/metrics.jsonl").read_bytes()
    assert not (tmp_path / "plain/profile").exists()
    folder = tmp_path / "traced/profile/step-00000002"
    with gzip.open(folder / "rank-0.trace.json.gz") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert names.count("ijepa: optimizer and EMA") == 2
    assert names.count("ijepa: forward and backward") == names.count("ijepa: wait for data") >= 2
    assert "aten::" in (folder / "rank-0.table.txt").read_text()
