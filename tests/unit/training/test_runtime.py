"""What `auto` becomes."""

import pytest
import torch

from ijepa.config.recipe import Recipe
from ijepa.training import runtime
from ijepa.training.runtime import Resolved, bfloat16_pays, resolve, setup_device


@pytest.mark.parametrize(("ratio", "pays"), [(4.0, True), (1.3, True), (1.2, False), (0.5, False)])
def test_bfloat16_is_taken_where_its_products_are_faster(ratio, pays):
    assert bfloat16_pays({"float32": 100.0, "bfloat16": 100.0 * ratio}) is pays


def test_auto_is_measured_once_and_kept(monkeypatch):
    recipe = Recipe.load("vit-tiny-64")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(runtime, "bfloat16_pays", lambda rates: True)
    first = resolve(recipe)
    assert first.autocast
    monkeypatch.setattr(runtime, "bfloat16_pays", lambda rates: pytest.fail("measured again"))
    assert resolve(recipe, first.as_json()) == first


def test_the_caches_are_bounded_before_the_first_product(monkeypatch):
    """They are made by it: what the environment says later goes unread."""
    order = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(runtime, "bound_kernel_caches", lambda: order.append("bounded"))
    rates = {"float32": 1.0, "bfloat16": 2.0}
    monkeypatch.setattr(runtime, "gemm_rates", lambda: order.append("product") or rates)
    resolve(Recipe.load("vit-tiny-64", {"precision.autocast": "auto", "batch.micro": 1}))
    assert order[0] == "bounded" and "product" in order


@pytest.mark.parametrize(("autocast", "precision"), [(True, "high"), (False, "highest")])
def test_without_autocast_a_gpu_multiplies_in_float32_and_not_in_tf32(autocast, precision, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", chosen.append)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # restores it
    setup_device(Resolved("cuda", autocast, micro=1, workers=0, threads=torch.get_num_threads()), deterministic=False)
    assert chosen == [precision]
