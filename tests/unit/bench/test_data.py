import json

import pytest

from ijepa.bench.data import bench_data
from ijepa.config.recipe import Recipe
from ijepa.utils.errors import RunError
from tests.helpers.images import jpeg, write_tree


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return Recipe.load("vit-huge-16-in22k", {"model.image_size": 96})


def test_bench_data_compares_the_methods(tmp_path, recipe):
    files = {f"{i:02d}.jpg": jpeg(i, 150 + i, 200 - i) for i in range(40)} | {"broken.jpg": jpeg(0)[:200]}
    result = bench_data(write_tree(tmp_path, files), recipe, micro=32, repeats=1)
    assert json.loads(json.dumps(result)) == result
    assert result["images"] == 32 and result["image_size"] == [96, 96]
    assert set(result["images_per_cpu_second"]) == {"usual", "ours", "ours: decode", "ours: loader"}
    rates = result["images_per_cpu_second"]
    assert result["ratio"] == pytest.approx(rates["ours"] / rates["usual"])
    overhead = (1 / rates["ours: loader"] - 1 / rates["ours"]) * rates["ours: decode"]
    assert result["loader_overhead"] == pytest.approx(overhead)
    assert result["psnr_mean"] > result["psnr_percentile_1"] > 50


def test_bench_data_without_cpu_affinity(tmp_path, recipe, monkeypatch):
    monkeypatch.delattr("os.sched_getaffinity", raising=False)
    monkeypatch.delattr("os.sched_setaffinity", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    files = {f"{i:02d}.jpg": jpeg(i, 120, 100) for i in range(8)}
    result = bench_data(write_tree(tmp_path, files), recipe, micro=8, repeats=1)
    assert set(result["images_per_second_by_workers"]) == {"1"}


def test_bench_data_without_a_readable_image(tmp_path, recipe):
    with pytest.raises(RunError, match="decoded"):
        bench_data(write_tree(tmp_path, {f"{i}.jpg": b"x" for i in range(3)}), recipe)
