"""float8, activation checkpointing and compilation on two ranks compute what they compute on one."""

from pathlib import Path

import pytest

from ijepa.checkpoint.format import list_checkpoints
from ijepa.config.files import set_by_path
from ijepa.config.recipe import Recipe
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
    """Return the folder of runs on 1 and 2 ranks by name; all of them for a slow test, else two."""
    slow = request.node.get_closest_marker("slow")
    return request.getfixturevalue("all_runs" if slow else "few_runs")


@pytest.fixture(scope="module")
def job(scenes, tmp_path_factory):
    """Return a function that makes a job from its name, strategy and switches; all have equal micro-batches."""
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
                {"compile": True},  # `auto` is true on a GPU
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
    """Return the largest relative difference of two runs' losses."""
    pairs = list(zip(rows(ours), rows(theirs), strict=True))
    assert len(pairs) == STEPS
    return max(abs(a["loss"] / b["loss"] - 1) for a, b in pairs)


@pytest.mark.distributed
def test_float8_is_identical_with_ddp_and_zero2(runs):
    assert gap(runs / "ddp", runs / "zero2") == 0
    ddp, zero2 = parameters(runs / "ddp"), parameters(runs / "zero2")
    assert all((ddp[name] == zero2[name]).all() for name in ddp)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("two", "one", "tolerance"),
    # A different order of summation may round a value to the next float8 number, which differs by an eighth.
    [
        ("zero2", "one", 1e-4),
        pytest.param("zero3-rowwise", "one-rowwise", 1e-4, marks=needs_rowwise),
        ("narrow", "one-narrow", 1e-3),  # gathered weights are rounded to bfloat16 and then to float8
        ("resumed", "one", 1e-4),
        ("all", "all-ddp", 1e-3),
        ("all", "mission", 1e-3),
        ("mission", "narrow", 5e-3),  # different padding, so different tokens determine the scales
    ],
)
def test_float8_losses_of_one_and_two_processes_agree(runs, two, one, tolerance):
    assert gap(runs / two, runs / one) < tolerance


@pytest.mark.slow
@pytest.mark.distributed
@needs_rowwise
def test_tensorwise_and_rowwise_float8_differ(runs):
    assert gap(runs / "one", runs / "one-rowwise") > 1e-6


@pytest.mark.slow
@pytest.mark.distributed
def test_resume_casts_the_loaded_float8_weights(runs):
    assert len(rows(runs / "stopped")) < STEPS
    assert list_checkpoints(runs / "resumed/checkpoints")[-1].name == f"step-{STEPS:08d}"


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", ["selective", "full"])
def test_activation_checkpointing_changes_no_bit(runs, name):
    for ours, theirs in zip(rows(runs / "plain"), rows(runs / name), strict=True):
        assert ours == theirs
    plain, other = parameters(runs / "plain"), parameters(runs / name)
    assert all((plain[key] == other[key]).all() for key in plain)


@pytest.mark.slow
@pytest.mark.distributed
def test_compilation_changes_rounding_only(runs):
    """The job's `warm` has checked on every rank that blocks are compiled in the first steps only."""
    assert gap(runs / "compiled", runs / "plain") < 1e-6


@pytest.mark.slow
@pytest.mark.distributed
def test_mission_preset_starts_with_its_own_switches(runs):
    """The preset's switches in torchrun's environment, with a model that a CPU trains in a second."""
    written = Recipe.load(runs / "mission/recipe.yaml")
    assert (written.precision.autocast, written.precision.fp8) == ("bf16", "tensorwise")
    assert (written.parallel.strategy, written.compile) == ("zero2", True)
    assert Recipe.load("vit-huge-16-in22k").compile == "auto"
    assert len(rows(runs / "mission")) == STEPS
