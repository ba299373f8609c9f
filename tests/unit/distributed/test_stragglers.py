"""A slow rank is found and named."""

import json
import sys
from dataclasses import dataclass

import pytest
import torch

from ijepa.distributed.process_group import World
from ijepa.distributed.stragglers import StragglerDetector
from ijepa.model.ijepa import IJEPA
from tests.helpers.ranks import spawn
from tests.integration.test_distributed import command
from tests.unit.training.test_optimizer import SHAPE

SLOW = """
import os, sys, time
import torch
from ijepa.__main__ import main
from ijepa.model.vision_transformer import Attention

plain = Attention.forward

def forward(self, *arguments):
    if not torch.is_grad_enabled():  # in the target encoder
        time.sleep(0.1 * int(os.environ["RANK"]))
    return plain(self, *arguments)

Attention.forward = forward
sys.stdout = sys.stderr
main()
"""


@dataclass(frozen=True)
class FakeWorld(World):
    """A world whose other ranks give fixed answers."""

    others: tuple[tuple[float, float], ...] = ()

    def all_gather_object(self, value):
        return [value, *self.others]


def detector(others, rank: int = 0) -> StragglerDetector:
    return StragglerDetector(
        FakeWorld(rank=rank, size=len(others) + 1, others=others), IJEPA(SHAPE), torch.device("cpu")
    )


@pytest.mark.slow
@pytest.mark.distributed
def test_slow_rank_is_in_timings_and_reported_after_three_readings(scenes, tmp_path):
    whole = command(scenes, tmp_path / "run", "--steps", "10", "--parallel.timeout", "60")
    ranks = spawn(2, [sys.executable, "-c", SLOW, *whole[3:]])
    assert [code for code, _ in ranks] == [0, 0], ranks
    rows = [json.loads(line) for line in (tmp_path / "run/timings.jsonl").read_text().splitlines()]
    assert len(rows) >= 5 and all(row["slowest_rank"] == 1 and row["slowest_times"] > 1.5 for row in rows[1:]), rows
    lines = [line for _, text in ranks for line in text.splitlines() if " computes " in line]
    assert len(lines) == 1 and lines[0].startswith("rank 1 computes ") and lines[0].endswith("which wait for it")


@pytest.mark.parametrize("behind", [(4.0, 0.0), (2.0, 0.5)], ids=["slow", "hungry"])
def test_compare_reports_a_lasting_straggler_once(behind):
    times = detector(((2.0, 0.0), behind))

    def read(*others) -> list[str]:
        object.__setattr__(times._world, "others", others)
        times._times.append((0.0, 2.0))
        return times.compare(10.0, 0.0)[1]

    steady = (2.0, 0.1)
    said = [read((2.0, 0.0), behind) for _ in range(5)]
    assert [len(lines) for lines in said] == [0, 0, 1, 0, 0] and said[2][0].startswith("rank 2 ")
    assert not read((2.0, 0.0), steady) and not any(read((2.0, 0.0), behind) for _ in range(2))
    assert len(read((2.0, 0.0), behind)) == 1


def test_compare_returns_lines_on_rank_0_only():
    times = detector(((9.0, 0.0),), rank=1)
    for _ in range(4):
        times._times.append((0.0, 1.0))
        figures, lines = times.compare(10.0, 1.0)
        assert figures == {"slowest_rank": 1, "slowest_times": 9.0, "data_bound_rank": 0, "data_bound_wait": 0.1}
        assert not lines
    assert detector(()).compare(10.0, 1.0) == ({}, [])


def test_straggler_detector_times_one_block():
    times, model = detector(((1.0, 0.0),)), IJEPA(SHAPE)
    times = StragglerDetector(times._world, model, torch.device("cpu"))
    pixels = torch.zeros(2 * 36, 3 * 64, dtype=torch.uint8)
    model.encode_targets(pixels, 2)
    assert len(times._times) == 1 and times._times[0][1] > times._times[0][0]
