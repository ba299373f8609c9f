"""Plans of the main recipe on given hardware: figures, refusals, JSON."""

import json

import pytest

from ijepa.config.recipe import Recipe
from ijepa.planning.plan import make_plan
from ijepa.utils.errors import UserError


@pytest.fixture(scope="module")
def mission() -> Recipe:
    return Recipe.load("vit-huge-16-in22k")


def test_make_plan_gives_the_days_and_energy_of_the_mission(mission):
    plan = make_plan(mission, gpu="h100", devices=8, images_per_second=4200, country="France")
    cost = plan.asked.cost
    assert cost.tflops_plain == pytest.approx(349, rel=0.005)
    assert cost.days == pytest.approx(18, rel=0.01)
    assert cost.device_hours == pytest.approx(8 * 24 * cost.days)
    assert plan.asked.chosen.strategy == "zero2" and plan.asked.chosen.best.micro == 256
    assert cost.tonnes == pytest.approx(cost.site_mwh * 56 / 1000)
    same = next(each for each in plan.comparison if each.key == "h200").cost
    assert same.images_per_second == pytest.approx(4200)


@pytest.mark.parametrize(
    ("flags", "where", "words"),
    [
        ({"gpu": "h101"}, "--gpu h101", "h100"),
        ({"devices": 7}, "--gpus 7", "4 does"),
        ({"devices": 0}, "--gpus 0", ""),
        ({"country": "Swedn"}, "--country Swedn", "Sweden"),
        ({"images_per_second": -1.0}, "--images-per-second -1", ""),
        ({"images_per_second": float("nan")}, "--images-per-second nan", ""),
        ({"images_per_second": float("inf")}, "--images-per-second inf", ""),
        ({"images_per_second": 1e6}, "--images-per-second 1e+06", "peak"),
        ({"share_of_peak": 0.0}, "--share-of-peak 0", ""),
        ({"share_of_peak": 35.0}, "--share-of-peak 35", ""),
        ({"share_of_peak": float("nan")}, "--share-of-peak nan", ""),
    ],
    ids=str,
)
def test_make_plan_refuses_impossible_flags(mission, flags, where, words):
    with pytest.raises(UserError) as err:
        make_plan(mission, **flags)
    assert err.value.where == where and words in str(err.value)


def test_hsdp_shares_within_a_node_or_as_the_recipe_says(mission):
    shards = {memory.strategy: memory.shards for memory in make_plan(mission, devices=16).asked.memory}
    assert shards == {"none": 1, "ddp": 1, "zero2": 16, "zero3": 16, "hsdp": 8}
    four = Recipe.load("vit-huge-16-in22k", {"parallel.shard": 4})
    assert {memory.strategy: memory.shards for memory in make_plan(four, devices=16).asked.memory}["hsdp"] == 4
    with pytest.raises(UserError) as err:
        make_plan(Recipe.load("vit-huge-16-in22k", {"parallel.shard": 3}), devices=16)
    assert err.value.where == "parallel.shard = 3"


def test_one_gpu_has_one_strategy(mission):
    assert [memory.strategy for memory in make_plan(mission, devices=1).asked.memory] == ["none"]


def test_as_json_states_every_figure(mission):
    plan = make_plan(mission, images_per_second=4200)
    values = json.loads(json.dumps(plan.as_json(), allow_nan=False))
    assert values["plan"]["cost"]["images_per_second"] == 4200
    assert values["flops_per_image"]["executed"]["target"] == pytest.approx(plan.size.executed.target)
    assert {each["gpu"]["key"] for each in values["comparison"]} == {"a100", "h100", "h200", "b200"}
    fits = values["plan"]["memory"][0]["fits"]
    assert [fit["activation_checkpointing"] for fit in fits] == ["none", "selective", "full"]


def test_micro_batches_come_before_activation_checkpointing():
    chosen = make_plan(Recipe.load("vit-huge-16-448-in1k")).asked.chosen
    by_kind = {fit.activation_checkpointing: fit for fit in chosen.fits}
    assert by_kind["none"].micro < by_kind["full"].micro and chosen.best is by_kind["none"]
