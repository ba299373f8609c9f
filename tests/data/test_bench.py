import json

import pytest

from ijepa.data.bench import bench_data
from ijepa.errors import Refused
from tests.data.making import jpeg, write_tree


def test_bench(tmp_path):
    files = {f"{i:02d}.jpg": jpeg(i, 150 + i, 200 - i) for i in range(40)} | {"broken.jpg": jpeg(0)[:200]}
    lines: list[str] = []
    result = bench_data(write_tree(tmp_path, files), repeats=1, image_size=(64, 64), echo=lines.append)
    assert json.loads(json.dumps(result)) == result
    assert result["images"] == 40
    assert set(result["images_per_cpu_second"]) == {"usual", "ours", "ours: decode", "ours: loader"}
    rates = result["images_per_cpu_second"]
    assert result["ratio"] == pytest.approx(rates["ours"] / rates["usual"])
    assert result["psnr_mean"] > result["psnr_percentile_1"] > 50
    assert any(f"{result['ratio']:.2f} x" in line for line in lines)


def test_nothing_to_measure(tmp_path):
    with pytest.raises(Refused, match="none of 3 images"):
        bench_data(write_tree(tmp_path, {f"{i}.jpg": b"x" for i in range(3)}), echo=lambda _: None)
