import json

import numpy as np
import pytest
import torch

from ijepa.bench.step import PARTS, bench_step
from ijepa.config.recipe import Recipe
from ijepa.masking.packing import Packer
from ijepa.model.flops import batch_flops

TINY = {
    "model.image_size": 64,
    "model.patch_size": 8,
    "model.encoder.width": 32,
    "model.encoder.depth": 2,
    "model.encoder.heads": 2,
    "model.predictor.width": 16,
    "model.predictor.depth": 2,
    "model.predictor.heads": 1,
    "mask.min_context": 4,
}


@pytest.mark.parametrize("autocast", ["none", "bf16"])
def test_bench_step_reports_parts_and_operations(autocast):
    recipe = Recipe.load("vit-small-16", {**TINY, "precision.autocast": autocast})
    threads = torch.get_num_threads()
    result = bench_step(recipe, micro=3, steps=2, threads=1)
    assert torch.get_num_threads() == threads
    assert json.loads(json.dumps(result)) == result
    assert result["seconds"].keys() == {"total", *PARTS}
    assert all(seconds >= 0 for seconds in result["seconds"].values())
    assert result["gemm"].keys() == ({"float32", "bfloat16"} if autocast == "bf16" else {"float32"})
    assert result["dtype"] == ("bfloat16" if autocast == "bf16" else "float32")
    packer = Packer(recipe.mask, recipe.model.grid, recipe.seed, 3, 2)
    pixels = torch.zeros(3, 3, 64, 64, dtype=torch.uint8)
    batches = [packer(np.arange(3 * step, 3 * step + 3), pixels) for step in (2, 3)]  # two steps warm up
    expected = np.mean([batch_flops(recipe.model, batch).total / 3e9 for batch in batches])
    assert result["gflop"] == pytest.approx(expected)
    assert 1e8 < result["memory"] < 1e11
