from ijepa.bench.masks import bench_masks


def test_bench_masks_reports_its_settings():
    result = bench_masks(images=5, grid=(8, 8), repeats=2)
    assert result["images"] == 5 and result["grid"] == [8, 8] and result["masks_ms"] > 0 and result["packing_ms"] >= 0
