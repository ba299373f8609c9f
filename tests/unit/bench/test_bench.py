"""The structure of the measurements and what they compare. No test looks at how long anything took."""

import json

import numpy as np
import pytest
import torch

from ijepa.bench import bench_attention, bench_evaluation, bench_index, bench_masks, bench_order, bench_step
from ijepa.bench.step import PARTS
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
def test_step_says_what_it_measured(autocast):
    lines = []
    recipe = Recipe.load("vit-small-16", {**TINY, "precision.autocast": autocast})
    threads = torch.get_num_threads()
    result = bench_step(recipe, micro=3, steps=2, threads=1, echo=lines.append)
    assert torch.get_num_threads() == threads
    assert json.loads(json.dumps(result)) == result
    assert result["versions"]["torch"] == torch.__version__ and result["devices"]
    assert result["seconds"].keys() == {"total", *PARTS}
    assert all(seconds >= 0 for seconds in result["seconds"].values())
    assert result["gemm"].keys() == ({"float32", "bfloat16"} if autocast == "bf16" else {"float32"})
    assert result["dtype"] == ("bfloat16" if autocast == "bf16" else "float32")
    packer = Packer(recipe.mask, recipe.model.grid, recipe.seed, 3, 2)
    pixels = torch.zeros(3, 3, 64, 64, dtype=torch.uint8)
    batches = [packer(np.arange(3 * step, 3 * step + 3), pixels) for step in (2, 3)]  # two steps warm up
    wanted = np.mean([batch_flops(recipe.model, batch).total / 3e9 for batch in batches])
    assert result["gflop"] == pytest.approx(wanted)
    assert 1e8 < result["memory"] < 1e11
    assert any("GFLOP" in line for line in lines)


def test_masks_are_measured_for_the_images_asked_for():
    lines = []
    result = bench_masks(images=5, grid=(8, 8), repeats=2, echo=lines.append)
    assert json.loads(json.dumps(result)) == result
    assert result["images"] == 5 and result["grid"] == [8, 8] and result["masks_ms"] > 0
    assert lines[0].startswith("5 images, 8 x 8")


def test_all_ways_of_attending_compute_the_same():
    result = bench_attention(images=3, grid=(8, 8), heads=2, head_width=8, repeats=1, echo=lambda line: None)
    assert json.loads(json.dumps(result)) == result
    kinds = {(each["sequences"], each["dtype"]): each for each in result["results"]}
    assert kinds.keys() == {(s, d) for s in ("context", "predictor") for d in ("bfloat16", "float32")}
    for (sequences, dtype), each in kinds.items():
        assert each["count"] == (3 if sequences == "context" else 12)
        assert set(each["ms"]) == set(each["ratio"]) == {"ours", "loop", "sdpa loop", "sdpa padded"}
        assert each["ratio"]["ours"] == 1
        assert all(gap < (1e-5 if dtype == "float32" else 0.1) for gap in each["gap"].values()), each


def test_evaluation_is_measured_by_parts(monkeypatch):
    from ijepa.bench import evaluation
    from ijepa.evaluation.features import loaders

    monkeypatch.setattr(evaluation, "KNN", {"train": 3000, "test": 300, "width": 64, "classes": 10})
    monkeypatch.setattr(evaluation, "BANK", {"patches": 3000, "width": 32, "queries": 50, "k": 5})
    cached = evaluation.cached_heads
    monkeypatch.setattr(evaluation, "cached_heads", lambda *sizes: cached(8, 3, 1, 16, 1))
    tiny = Recipe.load("vit-small-16", {**TINY, "model.encoder.depth": 4})
    monkeypatch.setattr(evaluation.Recipe, "load", lambda name: tiny)
    decoded = []
    crop = loaders.random_resized_crop_box
    monkeypatch.setattr(loaders, "random_resized_crop_box", lambda *given: decoded.append(given) or crop(*given))
    lines = []
    result = bench_evaluation(recipe="tiny", images=2, knn_share=1.0, repeats=1, echo=lines.append)
    assert json.loads(json.dumps(result)) == result
    assert result.keys() == {"threads", "forward", "cached", "knn", "bank"} and len(lines) == 4
    assert result["forward"]["heads"] == 52 and result["forward"]["ratio"] > 0
    assert len(result["cached"]) == 3
    for each in result["cached"].values():
        assert each["cpu_seconds"].keys() == {"together", "one by one", "modules", "products"}
        assert each["times faster at most"].keys() == {"one by one", "modules"}
    assert len(decoded) == 2 * 2 * 2, "two images, one head and many, two rounds: each goes through the augmentation"
    assert result["knn"]["train"] == 3000 and result["knn"]["planned bytes at full size"]["sum"] > 0
    assert 0 < result["bank"]["recall"]["8"] <= result["bank"]["recall"]["64"] == 1


def test_ratio_is_the_median_of_the_ratios_of_each_round():
    from ijepa.bench.evaluation import ratio, told

    seconds = {"ours": [1.0, 2.0, 1.0], "theirs": [3.0, 4.0, 50.0]}
    assert ratio(seconds, "theirs", "ours") == 3
    assert told(seconds) == {"cpu_seconds": {"ours": 1, "theirs": 4}}


def test_knn_at_full_size_is_planned_below_eight_gigabytes():
    from ijepa.evaluation.classification.knn import planned_memory

    assert sum(planned_memory(1_281_167, 50_000, 1280, k=200, classes=1000).values()) < 8e9


def test_the_index_is_measured_at_two_sizes_and_extended(tmp_path):
    lines: list[str] = []
    found = bench_index(images=(300, 900), folder=tmp_path, echo=lines.append)
    assert [row["images"] for row in found["rows"]] == [300, 900]
    assert all(row["cpu_seconds"] >= 0 and row["index_bytes"] > 0 for row in found["rows"])
    # Twelve bytes an image and a fixed part.
    assert found["imagenet_22k"]["index_bytes"] == pytest.approx(12 * 14_146_391, rel=0.05)
    assert len(lines) == 3 and not list(tmp_path.iterdir())


def test_the_order_is_measured_for_both_kinds(tmp_path):
    found = bench_order(images=50_000, folder=tmp_path, echo=lambda line: None)
    assert set(found["orders"]) == {"global", "blocks"} and found["images"] == 50_000
    assert all(row.keys() == {"resume_seconds", "epoch_seconds"} for row in found["orders"].values())
    assert not list(tmp_path.iterdir())
