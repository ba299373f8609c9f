"""The text of plans and sizes."""

import io

import pytest
from rich.console import Console

from ijepa.config.recipe import Recipe
from ijepa.planning.plan import make_plan
from ijepa.planning.text import render_plan, render_size


def rendered(changes: dict | None = None, **flags) -> str:
    return render_plan(make_plan(Recipe.load("vit-huge-16-in22k", changes or {}), **flags), Console(file=io.StringIO()))


def test_render_plan_shows_the_figures_of_the_plan():
    page = rendered(images_per_second=4200, country="Norway")
    for words in (
        *("1.26 B in both", "17.9 days", "4,200 images/s", "zero2 *", "hsdp (8 GPUs)", "NVIDIA B200", "Norway, 2023"),
    ):
        assert words in page
    assert max(map(len, page.splitlines())) <= 120


def test_render_plan_is_styled_on_a_terminal_only():
    plan = make_plan(Recipe.load("vit-small-16", {"data.images": 1000}), devices=1)
    assert "\x1b[" in render_plan(
        plan, Console(file=io.StringIO(), force_terminal=True, width=100, color_system="standard")
    )
    assert "\x1b[" not in render_plan(plan, Console(file=io.StringIO()))


def test_render_plan_without_a_known_length_gives_a_speed_and_no_cost():
    plan = make_plan(Recipe.load("vit-huge-16-in22k", {"data.images": None}))
    assert plan.asked.cost.days is None and "--data.images" in render_plan(plan, Console(file=io.StringIO()))


@pytest.mark.parametrize(("length", "shown"), [({}, True), ({"images": 1_000_000}, False), ({"steps": 500}, False)])
def test_render_plan_shows_epochs_if_they_set_the_length(length, shown):
    assert ("460 epochs" in rendered({"schedule.warmup": "5 %", **length})) is shown


def test_render_plan_reports_a_model_that_does_not_fit():
    plan = make_plan(Recipe.load("vit-huge-16-in22k", {"model.encoder.width": 8192}), gpu="a100", devices=1)
    assert plan.asked.chosen.best.micro == 0 and plan.asked.chosen.best.activation_checkpointing == "full"
    assert "does not fit" in render_plan(plan, Console(file=io.StringIO()))


def test_render_size_states_recipe_parameters_and_length():
    text = render_size(Recipe.load("vit-huge-16-in22k"))
    assert "name: vit-huge-16-in22k" in text and "630.7 M context" in text and "3177412 steps" in text
    assert "--data.images" in render_size(Recipe.load("vit-huge-16-in22k", {"data.images": None}))
