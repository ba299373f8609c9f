"""Time, energy and CO2 compared with a calculation by hand."""

from dataclasses import replace

import pytest

from ijepa.config.recipe import Recipe
from ijepa.model.flops import Flops
from ijepa.planning.cost import estimate_cost
from ijepa.planning.hardware import Gpu, Grid, grids
from ijepa.planning.size import measure_recipe


def test_estimate_cost_by_hand():
    recipe = Recipe.load("vit-tiny-64", {"images": 200 * 86_400, "batch.global": 64})
    size = replace(measure_recipe(recipe), executed=Flops(0, 0, 1e12), plain=Flops(0, 0, 2e12))
    gpu = Gpu(name="g", bf16_tflops=100, fp8_tflops=None, memory_gb=1, tdp_w=500, server_w=1000, source="s")
    cost = estimate_cost(recipe, size, gpu, 4, grid=Grid(grams=100, year=2023), share_of_peak=0.5)
    assert cost.images_per_second == pytest.approx(200)  # 4 x 100 TFLOP/s x .5 / 1 TFLOP
    assert (cost.tflops_executed, cost.tflops_plain, cost.step_seconds) == pytest.approx((50, 100, 0.32))
    assert (cost.days, cost.device_hours) == pytest.approx((1, 96), rel=1e-3)
    site = 0.096 * grids().pue
    assert (cost.gpus_mwh, cost.site_mwh, cost.tonnes) == pytest.approx((0.048, site, 0.1 * site), rel=1e-3)
