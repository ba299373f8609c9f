"""Benchmarks give whole results on tiny shapes; what they measure is not for tests to judge."""

import pytest

from ijepa.bench import bench_attention, bench_masks, bench_step
from ijepa.recipe import Recipe
from tests.conftest import TINY


def test_step():
    said = []
    result = bench_step(Recipe.read(TINY, "test"), micro=4, steps=2, echo=said.append)
    parts = result["cpu_seconds_an_image"]
    assert set(parts) == {"packing", "target encoder", "whole step", "forward", "backward", "optimiser and EMA"}
    assert all(value >= 0 for value in parts.values()) and parts["whole step"] > 0
    assert result["gflop_an_image"] > 0 and len(said) == len(parts) + 1


def test_masks():
    result = bench_masks(images=8, repeats=2, echo=lambda line: None)
    assert result["cpu_milliseconds"] > 0


def test_attention():
    result = bench_attention(images=2, repeats=1, echo=lambda line: None)
    assert [(row["sequences"], row["dtype"]) for row in result["rows"]] == [
        ("context", "bfloat16"), ("context", "float32"), ("predictor", "bfloat16"), ("predictor", "float32"),
    ]  # fmt: skip
    assert all(row["times_packed"]["packed"] == pytest.approx(1) for row in result["rows"])
