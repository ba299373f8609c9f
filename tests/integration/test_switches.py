"""float8, recomputation and compilation over two processes: what one process computes, whatever the strategy."""

from pathlib import Path

import pytest
import torch

from ijepa.checkpoint.format import list_checkpoints
from ijepa.config.files import set_by_path
from ijepa.config.recipe import Recipe
from ijepa.distributed import float8_gather
from ijepa.model.float8 import cpu_scales_rows
from tests.helpers.ranks import run, run_jobs
from tests.integration.test_distributed import parameters, recipe, rows
from tests.unit.model.test_float8 import needs_rowwise

pytest.importorskip("torchao")

FLOAT8 = {"autocast": "none", "fp8": "tensorwise"}
ROWWISE = {"autocast": "none", "fp8": "rowwise"}
STEPS = 4
NARROW = {"autocast": "bf16", "fp8": "tensorwise"}
STATIC = {"batch.pad_to_budget": True}
MATH = {"autocast": "none", "attention": "math"}
ALL = {"compile": True, "activation_checkpointing": "selective"}


@pytest.fixture
def runs(request) -> Path:
    """The folder of runs on 1 and 2 processes, each under its name; all of them for a slow test, else two."""
    slow = request.node.get_closest_marker("slow")
    return request.getfixturevalue("all_runs" if slow else "few_runs")


@pytest.fixture(scope="module")
def job(scenes, tmp_path_factory):
    """Make a job of the module's folder, from its name, strategy and switches; all have equal micro-batches."""
    out = tmp_path_factory.mktemp("switches")

    def make(name: str, strategy: str, precision: dict, switches: dict | None = None, **how) -> dict:
        values = recipe(scenes, strategy, steps=STEPS, precision=precision)
        for key, value in (switches or {}).items():
            set_by_path(values, key.split("."), value)
        return {"recipe": values, "output": str(out / name), "unfused": True, **how}

    return make


@pytest.fixture(scope="module")
def few_runs(job) -> Path:
    jobs = [job("ddp", "ddp", FLOAT8), job("zero2", "zero2", FLOAT8)]
    run_jobs(2, jobs)
    return Path(jobs[0]["output"]).parent


@pytest.fixture(scope="module")
def all_runs(few_runs, job) -> Path:
    out, mission = few_runs, Recipe.load("vit-huge-16-in22k")
    run_jobs(
        2,
        [
            *([job("zero3-rowwise", "zero3", ROWWISE)] if cpu_scales_rows() else []),
            job(
                "mission",
                mission.parallel.strategy,
                mission.precision.model_dump(mode="json"),
                {"compile": True},  # what auto is on a GPU
                warm=2,
            ),
            job("narrow", "zero2", NARROW),
            job("stopped", "zero2", FLOAT8, stop_after=1),
            job("plain", "zero2", MATH, STATIC),
            job("selective", "zero2", MATH, {**STATIC, "activation_checkpointing": "selective"}),
            job("full", "zero3", MATH, {**STATIC, "activation_checkpointing": "full"}),
            job("compiled", "zero2", MATH, {"compile": True}, warm=2),
            job("all", "zero2", NARROW, ALL, warm=2),
            job("all-ddp", "ddp", NARROW, ALL, warm=2),
        ],
    )
    run(job("one", "none", FLOAT8))
    if cpu_scales_rows():
        run(job("one-rowwise", "none", ROWWISE))
    run(job("one-narrow", "none", NARROW))
    run(job("resumed", "none", FLOAT8, copy=str(out / "stopped")))
    return out


def gap(ours: Path, theirs: Path) -> float:
    """The largest relative difference of two runs' losses."""
    pairs = list(zip(rows(ours), rows(theirs), strict=True))
    assert len(pairs) == STEPS
    return max(abs(a["loss"] / b["loss"] - 1) for a, b in pairs)


@pytest.mark.distributed
def test_float8_has_the_same_bits_replicated_and_sharded(runs):
    assert gap(runs / "ddp", runs / "zero2") == 0
    ddp, zero2 = parameters(runs / "ddp"), parameters(runs / "zero2")
    assert all((ddp[name] == zero2[name]).all() for name in ddp)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("two", "one", "tolerance"),
    # A sum in another order may move a value over the edge between two float8 numbers, a step of an eighth.
    [
        ("zero2", "one", 1e-4),
        pytest.param("zero3-rowwise", "one-rowwise", 1e-4, marks=needs_rowwise),
        ("narrow", "one-narrow", 1e-3),  # weights that travel are rounded to bfloat16 and then to float8
        ("resumed", "one", 1e-4),
        ("all", "all-ddp", 1e-3),
        ("all", "mission", 1e-3),
        ("mission", "narrow", 5e-3),  # padded otherwise, so that other tokens set the scales
    ],
)
def test_float8_on_two_processes_gives_the_losses_of_one(runs, two, one, tolerance):
    assert gap(runs / two, runs / one) < tolerance


@pytest.mark.slow
@pytest.mark.distributed
@needs_rowwise
def test_the_scale_of_a_tensor_is_not_that_of_a_row(runs):
    assert gap(runs / "one", runs / "one-rowwise") > 1e-6


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_that_goes_on_casts_the_weights_it_has_read(runs):
    assert len(rows(runs / "stopped")) < STEPS
    assert list_checkpoints(runs / "resumed/checkpoints")[-1].name == f"step-{STEPS:08d}"


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", ["selective", "full"])
def test_recomputing_changes_no_bit(runs, name):
    for ours, theirs in zip(rows(runs / "plain"), rows(runs / name), strict=True):
        assert ours == theirs
    plain, other = parameters(runs / "plain"), parameters(runs / name)
    assert all((plain[key] == other[key]).all() for key in plain)


@pytest.mark.slow
@pytest.mark.distributed
def test_compiled_blocks_compute_the_same(runs):
    """And are compiled in the first steps alone: `warm` in the job has counted that on every rank."""
    assert gap(runs / "compiled", runs / "plain") < 1e-6


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_rows_that_ranks_do_not_share_evenly_are_gathered_whole(ranks, monkeypatch):
    whole, parts = torch.arange(1, 33, dtype=torch.uint8).view(8, 4), []

    def gather(rows, part, group, async_op):
        parts.append(part)
        if len(parts) == ranks:
            rows.copy_(torch.cat(parts))

    monkeypatch.setattr(float8_gather, "_all_gather", gather)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: ranks)
    each = -(-8 // ranks)
    for rank in range(ranks):
        out = torch.zeros_like(whole)
        _, held, rows = float8_gather.gather_rows(out, whole[rank * each : (rank + 1) * each], None)
        assert held is out
    assert torch.equal(rows[:8], whole) and (rows is out) == (8 % ranks == 0)


@pytest.mark.slow
@pytest.mark.distributed
def test_the_mission_starts_as_it_is_written(runs):
    """The preset's own switches under torchrun's environment, on a model that a CPU trains in a second."""
    written = Recipe.load(runs / "mission/recipe.yaml")
    assert (written.precision.autocast, written.precision.fp8) == ("bf16", "tensorwise")
    assert (written.parallel.strategy, written.compile) == ("zero2", True)
    assert Recipe.load("vit-huge-16-in22k").compile == "auto"
    assert len(rows(runs / "mission")) == STEPS
