"""The measurements of evaluation, index and order, with tiny sizes. No test depends on time."""

import json

import pytest
from click.testing import CliRunner

from benchmarks import evaluation, index, order
from ijepa.config.recipe import Recipe
from ijepa.evaluation.features import loaders


def run(module, tmp_path, *arguments):
    output = tmp_path / "result.json"
    done = CliRunner().invoke(module.main, [*map(str, arguments), "--output", str(output)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(output.read_text()), done.output.splitlines()


def test_evaluation_measures_all_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "KNN", {"train": 3000, "test": 300, "width": 64, "classes": 10})
    monkeypatch.setattr(evaluation, "BANK", {"patches": 3000, "width": 32, "queries": 50, "k": 5})
    cached = evaluation.cached_heads
    monkeypatch.setattr(evaluation, "cached_heads", lambda *sizes: cached(8, 3, 1, 16, 1))
    small = {"model.encoder.width": 32, "model.encoder.heads": 2, "model.encoder.depth": 4, "model.image_size": 64}
    tiny = Recipe.load("vit-small-16", {**small, "model.patch_size": 8, "mask.min_context": 4})
    monkeypatch.setattr(evaluation.Recipe, "load", lambda name: tiny)
    decoded = []
    crop = loaders.random_resized_crop_box
    monkeypatch.setattr(loaders, "random_resized_crop_box", lambda *given: decoded.append(given) or crop(*given))
    result, lines = run(evaluation, tmp_path, "--images", 2, "--knn-share", 1, "--repeats", 1)
    assert {"versions", "devices", "threads", "forward", "cached", "knn", "bank"} <= result.keys() and len(lines) == 4
    assert result["forward"]["heads"] == 52 and result["forward"]["ratio"] > 0
    assert len(result["cached"]) == 3
    for each in result["cached"].values():
        assert each["cpu_seconds"].keys() == {"together", "one by one", "modules", "products"}
        assert each["times faster at most"].keys() == {"one by one", "modules"}
    assert len(decoded) == 2 * 2 * 2, "two images, one head and many, two rounds: each goes through the augmentation"
    assert result["knn"]["train"] == 3000 and result["knn"]["planned bytes at full size"]["sum"] > 0
    assert 0 < result["bank"]["recall"]["8"] <= result["bank"]["recall"]["64"] == 1


def test_knn_at_full_size_is_planned_below_eight_gigabytes():
    assert sum(evaluation.planned_memory(1_281_167, 50_000, 1280, k=200, classes=1000).values()) < 8e9


def test_index_extrapolates_two_sizes(tmp_path):
    (tmp_path / "shards").mkdir()
    result, lines = run(index, tmp_path, "--images", 300, "--images", 900, "--folder", tmp_path / "shards")
    assert [row["images"] for row in result["rows"]] == [300, 900]
    assert all(row["cpu_seconds"] >= 0 and row["index_bytes"] > 0 for row in result["rows"])
    # Twelve bytes per image, and a fixed part.
    assert result["imagenet_22k"]["index_bytes"] == pytest.approx(12 * 14_146_391, rel=0.05)
    assert len(lines) == 3 and not list((tmp_path / "shards").iterdir())


def test_order_measures_both_kinds(tmp_path, monkeypatch):
    monkeypatch.setattr(order, "IMAGES", 50_000)
    (tmp_path / "index").mkdir()
    result, _ = run(order, tmp_path, "--folder", tmp_path / "index")
    assert set(result["orders"]) == {"global", "blocks"} and result["images"] == 50_000
    assert all(row.keys() == {"resume_seconds", "epoch_seconds"} for row in result["orders"].values())
    assert not list((tmp_path / "index").iterdir())
