"""The resolved values of `auto`, and the set-up of the device."""

import os
import time
from dataclasses import asdict, replace

import pytest
import torch

from ijepa.config.recipe import Recipe
from ijepa.training.runtime import Resolved, bfloat16_pays, resolve, setup_device
from ijepa.utils.environment import gemm_rates


@pytest.mark.parametrize(("ratio", "pays"), [(4.0, True), (1.3, True), (1.2, False), (0.5, False)])
def test_bfloat16_pays_if_its_products_are_faster(ratio, pays):
    assert bfloat16_pays({"float32": 100.0, "bfloat16": 100.0 * ratio}) is pays


def test_resolve_keeps_the_measured_autocast(monkeypatch):
    recipe = Recipe.load("vit-tiny-64")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    first = resolve(recipe)
    assert resolve(recipe, asdict(first)) == first
    other = replace(first, autocast=not first.autocast)  # to measure again would give the first value
    assert resolve(recipe, asdict(other)) == other


def test_resolve_bounds_kernel_caches_before_the_first_product(monkeypatch):
    """The first product creates the caches, and the environment is not read again."""
    found, clock = [], time.process_time
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("LRU_CACHE_CAPACITY", raising=False)
    # The rates of products are measured with this clock.
    monkeypatch.setattr(time, "process_time", lambda: found.append(os.environ.get("LRU_CACHE_CAPACITY")) or clock())
    gemm_rates.cache_clear()
    resolve(Recipe.load("vit-tiny-64", {"precision.autocast": "auto", "batch.micro": 1}))
    assert found and None not in found


@pytest.mark.parametrize(("autocast", "precision"), [(True, "high"), (False, "highest")])
def test_setup_device_allows_tf32_only_with_autocast(autocast, precision, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", chosen.append)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # restores it
    setup_device(Resolved("cuda", autocast, micro=1, workers=0, threads=torch.get_num_threads()), deterministic=False)
    assert chosen == [precision]
