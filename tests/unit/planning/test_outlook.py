"""The mission's figures, what is refused, and the page that shows it all."""

import io
import json

import pytest
from rich.console import Console

from ijepa.config.recipe import Recipe
from ijepa.planning.cost import course
from ijepa.planning.hardware import Gpu, Grid
from ijepa.planning.outlook import outlook, plan
from ijepa.planning.text import show
from ijepa.utils.errors import UserError


@pytest.fixture(scope="module")
def mission() -> Recipe:
    return Recipe.load("vit-huge-16-in22k")


def test_size_of_the_mission(mission):
    found = plan(mission)
    assert 2 * found.encoder == pytest.approx(1.26e9, rel=0.005)
    assert found.plain.total == pytest.approx(664e9, rel=0.005)
    assert found.full.total == pytest.approx(659e9, rel=0.002)
    assert found.executed.total == pytest.approx(593.5e9, rel=0.005)
    assert found.lengths is not None and found.lengths.total * 2048 == pytest.approx(460 * 14_146_391, rel=1e-6)


def test_course_of_the_mission(mission):
    found = outlook(mission, gpu="h100", devices=8, images_per_second=4200, country="France")
    run = found.row.course
    assert run.tflops_plain == pytest.approx(349, rel=0.005)
    assert run.days == pytest.approx(18, rel=0.01)
    assert run.device_hours == pytest.approx(8 * 24 * run.days)
    assert found.row.chosen.strategy == "zero2" and found.row.chosen.best.micro == 256
    assert run.tonnes == pytest.approx(run.site_mwh * 56 / 1000)
    same = next(row for row in found.rows if row.key == "h200").course
    assert same.images_per_second == pytest.approx(4200)


def test_course_by_hand():
    gpu = Gpu(
        name="g", bf16_tflops=100, fp8_tflops=None, memory_gb=1, bandwidth_gbs=1, tdp_w=500, server_w=1000, source="s"
    )
    run = course(
        gpu, 4, executed=1e12, plain=2e12, batch=50, images=200 * 86_400, grid=Grid(grams=100, year=2023), pue=1.5,
        share_of_peak=0.5,
    )  # fmt: skip
    assert run.images_per_second == pytest.approx(200)  # 4 x 100 TFLOP/s x .5 over 1 TFLOP
    assert (run.tflops_executed, run.tflops_plain, run.step_seconds) == pytest.approx((50, 100, 0.25))
    assert (run.days, run.device_hours) == pytest.approx((1, 96))
    assert (run.gpus_mwh, run.site_mwh, run.tonnes) == pytest.approx((0.048, 0.144, 0.0144))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"gpu": "h101"}, ["--gpu h101", "did you mean h100?"]),
        ({"devices": 7}, ["--gpus 7", "batch.global = 2048", "4 does"]),
        ({"devices": 0}, ["--gpus 0"]),
        ({"country": "Swedn"}, ["did you mean Sweden?"]),
        ({"images_per_second": -1.0}, ["--images-per-second -1"]),
        ({"images_per_second": float("nan")}, ["--images-per-second nan"]),
        ({"images_per_second": float("inf")}, ["--images-per-second inf"]),
        ({"images_per_second": 1e6}, ["times the bfloat16 peak"]),
        ({"share_of_peak": 0.0}, ["--share-of-peak 0"]),
        ({"share_of_peak": 35.0}, ["--share-of-peak 35"]),
        ({"share_of_peak": float("nan")}, ["--share-of-peak nan"]),
    ],
    ids=str,
)
def test_refusals(mission, flags, words):
    with pytest.raises(UserError) as refused:
        outlook(mission, **flags)
    for word in words:
        assert word in str(refused.value)


def test_hsdp_shares_within_a_node_or_as_the_recipe_says(mission):
    shards = {row.strategy: row.shards for row in outlook(mission, devices=16).row.memory}
    assert shards == {"none": 1, "ddp": 1, "zero2": 16, "zero3": 16, "hsdp": 8}
    four = Recipe.load("vit-huge-16-in22k", {"parallel.shard": 4})
    assert {row.strategy: row.shards for row in outlook(four, devices=16).row.memory}["hsdp"] == 4
    with pytest.raises(UserError, match=r"parallel\.shard = 3"):
        outlook(Recipe.load("vit-huge-16-in22k", {"parallel.shard": 3}), devices=16)


def test_one_gpu_has_one_strategy(mission):
    assert [row.strategy for row in outlook(mission, devices=1).row.memory] == ["none"]


def test_page_and_json_say_the_same(mission):
    found = outlook(mission, images_per_second=4200, country="Norway")
    text = io.StringIO()
    show(found, Console(file=text))
    page = text.getvalue()
    for words in (
        "1.26 B in both",
        "17.9 days",
        "4,200 images/s",
        "zero2 *",
        "hsdp (8 a copy)",
        "NVIDIA B200",
        "Norway, 2023",
    ):
        assert words in page
    values = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert values["plan"]["course"]["images_per_second"] == 4200
    assert values["flops_an_image"]["executed"]["target"] == pytest.approx(found.found.executed.target)
    assert {row["gpu"]["key"] for row in values["comparison"]} == {"a100", "h100", "h200", "b200"}
    assert [fit["checkpointing"] for fit in values["plan"]["memory"][0]["fits"]] == ["none", "selective", "full"]


def test_a_run_of_unknown_length_has_a_speed_and_no_cost():
    found = outlook(Recipe.load("vit-huge-16-in22k", {"data.images": None}))
    text = io.StringIO()
    show(found, Console(file=text))
    assert found.row.course.days is None and "--data.images" in text.getvalue()


@pytest.mark.parametrize(("length", "shown"), [({}, True), ({"images": 1_000_000}, False), ({"steps": 500}, False)])
def test_epochs_are_shown_where_they_count(length, shown):
    text = io.StringIO()
    show(outlook(Recipe.load("vit-huge-16-in22k", {"schedule.warmup": "5 %", **length})), Console(file=text))
    assert ("460 epochs" in text.getvalue()) is shown


def test_a_model_that_fits_nowhere_is_said_to():
    found = outlook(Recipe.load("vit-huge-16-in22k", {"model.encoder.width": 8192}), gpu="a100", devices=1)
    text = io.StringIO()
    show(found, Console(file=text))
    assert found.row.chosen.best.micro == 0 and "does not fit" in text.getvalue()
    assert found.row.chosen.best.checkpointing == "full"


def test_micro_batches_come_before_checkpointing():
    found = outlook(Recipe.load("vit-huge-16-448-in1k"))
    by_kind = {fit.checkpointing: fit for fit in found.row.chosen.fits}
    assert by_kind["none"].micro < by_kind["full"].micro and found.row.chosen.best is by_kind["none"]
