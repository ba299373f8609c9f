import json

from ijepa.bench.attention import bench_attention


def test_bench_attention_methods_compute_the_same():
    result = bench_attention(images=3, grid=(8, 8), heads=2, head_width=8, repeats=1)
    assert json.loads(json.dumps(result)) == result
    rows = {(each["sequences"], each["dtype"]): each for each in result["results"]}
    assert rows.keys() == {(s, d) for s in ("context", "predictor") for d in ("bfloat16", "float32")}
    for (sequences, dtype), each in rows.items():
        assert each["count"] == (3 if sequences == "context" else 12)
        assert set(each["ms"]) == set(each["ratio"]) == {"ours", "loop", "sdpa loop", "sdpa padded"}
        assert each["ratio"]["ours"] == 1
        assert all(gap < (1e-5 if dtype == "float32" else 0.1) for gap in each["gap"].values()), each
