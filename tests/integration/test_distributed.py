"""Ranks, micro-batches, strategies and resumes change rounding at most."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ijepa.checkpoint.format import list_checkpoints, load_checkpoint
from ijepa.config.recipe import OptimizerSection, Recipe
from ijepa.data.open import open_dataset
from ijepa.interop.weights import load_encoder
from ijepa.model.ijepa import IJEPA
from ijepa.training.optimizer import make_optimizer
from ijepa.utils.errors import UserError
from tests.conftest import TINY
from tests.helpers.checkpoints import flip
from tests.helpers.ranks import environment, run, run_jobs, spawn
from tests.helpers.waiting import LIMIT, count_lines, wait_until

DOUBLE = {"double": True}
CLIP = 1e-3


def recipe(scenes: Path, strategy: str = "auto", micro: int = 2, **changes) -> dict:
    values = {**TINY, "data": {**TINY["data"], "path": str(scenes)}, "batch": {"global": 8, "micro": micro}}
    values["checkpoint"] = {"every": 100, "keep": 2}  # and at the end
    return {**values, "parallel": {"strategy": strategy, **changes.pop("parallel", {})}, **changes}


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def last(run: Path) -> Path:
    return list_checkpoints(run / "checkpoints")[-1]


def job(output: Path, values: dict, **how) -> dict:
    return {"recipe": values, "output": str(output), **how}


@pytest.fixture
def runs(request) -> Path:
    """Return the folder of runs on 1, 2 and 4 ranks by name; all of them for a slow test, else a few."""
    slow = request.node.get_closest_marker("slow")
    return request.getfixturevalue("all_runs" if slow else "few_runs")


@pytest.fixture(scope="module")
def few_runs(scenes, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("worlds")
    copy = shutil.copytree(scenes, out / "copy-of-scenes", copy_function=shutil.copyfile)  # with other times of change
    run(job(out / "one-double", recipe(scenes, micro=4), **DOUBLE))
    run_jobs(
        2,
        [
            job(out / "ddp", recipe(scenes, "ddp"), unfused=True),
            job(out / "zero2", recipe(scenes, "zero2", checkpoint={"every": 3}), unfused=True),
            job(out / "two-double", recipe(scenes, "zero2", micro=1), **DOUBLE),
            job(out / "copies", recipe(scenes, steps=3), data=[str(scenes), str(copy)]),
        ],
    )
    return out


@pytest.fixture(scope="module")
def all_runs(scenes, few_runs) -> Path:
    out = few_runs
    run(job(out / "one-20", recipe(scenes, micro=4, steps=20)))
    clip = {"optimizer": {"clip_norm": CLIP}}
    run(job(out / "one-clipped", recipe(scenes, micro=4, **clip), **DOUBLE))
    run_jobs(
        2,
        [
            job(out / "ddp-fused", recipe(scenes, "ddp")),
            job(out / "zero2-20", recipe(scenes, steps=20)),
            job(out / "ddp-bf16", recipe(scenes, "ddp", precision={"autocast": "bf16"}), unfused=True),
            job(out / "zero2-bf16", recipe(scenes, "zero2", precision={"autocast": "bf16"}), unfused=True),
            job(out / "zero3-double", recipe(scenes, "zero3", micro=4), **DOUBLE),
            job(out / "stopped", recipe(scenes, "zero2", micro=1), stop_after=4, **DOUBLE),
            job(out / "resumed-two", recipe(scenes, "zero2", micro=1), copy=str(out / "stopped"), **DOUBLE),
            job(out / "two-clipped", recipe(scenes, "zero2", **clip), **DOUBLE),
            job(out / "ddp-clipped", recipe(scenes, "ddp", **clip), **DOUBLE),
            job(
                out / "four-micros", recipe(scenes, "zero2", micro=1, steps=3), reductions=str(out / "four-micros.txt")
            ),
            job(out / "one-micro", recipe(scenes, "zero2", micro=4, steps=3), reductions=str(out / "one-micro.txt")),
        ],
    )
    run(job(out / "resumed-one", recipe(scenes, "none", micro=2), copy=str(out / "stopped"), **DOUBLE))
    hsdp = recipe(scenes, "hsdp", micro=1, parallel={"shard": 2})
    run_jobs(
        4,
        [
            job(out / "hsdp-double", hsdp, **DOUBLE),
            job(out / "four-clipped", recipe(scenes, "zero3", **clip), **DOUBLE),
            job(out / "resumed-four", recipe(scenes, "zero2", micro=2), copy=str(out / "stopped"), **DOUBLE),
        ],
    )
    return out


def parameters(run: Path) -> dict[str, torch.Tensor]:
    """Return the encoders' weights of a run's last checkpoint by name, whatever form it has."""
    return {
        f"{which}.{name}": tensor
        for which in ("target", "context")
        for name, tensor in load_encoder(run, which).state_dict().items()
    }


@pytest.mark.distributed
@pytest.mark.parametrize(
    "kind",
    ["", pytest.param("-bf16", marks=pytest.mark.slow)],  # weights are gathered and used in bfloat16
)
def test_ddp_and_zero2_are_identical(runs, kind):
    for ours, theirs in zip(rows(runs / f"ddp{kind}"), rows(runs / f"zero2{kind}"), strict=True):
        assert {**ours, "grad_norm": 0} == {**theirs, "grad_norm": 0}
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-6)  # summed in another order
    ddp, zero2 = parameters(runs / f"ddp{kind}"), parameters(runs / f"zero2{kind}")
    assert ddp.keys() == zero2.keys() and len(ddp) > 20
    assert all(torch.equal(ddp[name], zero2[name]) for name in ddp)


@pytest.mark.slow
@pytest.mark.distributed
def test_fused_optimizer_changes_rounding_only(runs):
    for ours, theirs in zip(rows(runs / "ddp"), rows(runs / "ddp-fused"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "name",
    [
        "two-double",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("zero3-double", "hsdp-double", "resumed-one", "resumed-two", "resumed-four")
        ),
    ],
)
def test_ranks_micro_batches_and_resume_agree_in_float64(runs, name):
    one, other = rows(runs / "one-double"), rows(runs / name)
    assert [row["step"] for row in other] == list(range(1, 9))
    for ours, theirs in zip(one, other, strict=True):
        for key in ("loss", "skill", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-10), (key, ours["step"])


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", ["ddp-clipped", "two-clipped", "four-clipped"])
def test_clipping_uses_the_norm_of_all_shards(runs, name):
    one, other, free = rows(runs / "one-clipped"), rows(runs / name), rows(runs / "one-double")
    for ours, theirs in zip(one, other, strict=True):
        assert ours["grad_norm"] > 10 * CLIP
        for key in ("loss", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-10), (key, ours["step"])
    assert max(abs(ours["loss"] - plain["loss"]) for ours, plain in zip(one, free, strict=True)) > 1e-6


@pytest.mark.slow
@pytest.mark.distributed
def test_gradients_are_reduced_once_per_step(runs):
    several, one = ((runs / f"{name}.txt").read_text() for name in ("four-micros", "one-micro"))
    assert several == one and int(one) >= 3 * 2 and int(one) % 3 == 0


@pytest.mark.slow
@pytest.mark.distributed
def test_losses_of_one_and_two_processes_agree_in_float32(runs):
    one, two = rows(runs / "one-20"), rows(runs / "zero2-20")
    assert len(one) == len(two) == 20
    assert max(abs(ours["loss"] - theirs["loss"]) for ours, theirs in zip(one, two, strict=True)) < 1e-4


@pytest.mark.slow
@pytest.mark.distributed
def test_signal_to_one_rank_stops_all_after_the_same_step(runs):
    """The signal comes after step 4. The run stops one or two steps later, because no rank waits for the others'
    answer. The resume on two ranks is identical."""
    assert last(runs / "stopped").name == f"step-{len(rows(runs / 'stopped')):08d}"
    assert len(rows(runs / "stopped")) in (5, 6)
    assert (runs / "resumed-two/metrics.jsonl").read_bytes() == (runs / "two-double/metrics.jsonl").read_bytes()


@pytest.mark.distributed
def test_sharded_checkpoint_has_no_pickle_and_torch_reads_it(runs):
    import torch.distributed.checkpoint as dcp

    folder = last(runs / "zero2")
    assert sorted({file.suffix for file in folder.iterdir()}) == [".json", ".safetensors"]
    assert len(list(folder.glob("shard-*.safetensors"))) == 2
    wanted = {"context_encoder.blocks.0.attn.qkv.weight": torch.zeros(96, 32)}
    dcp.load(wanted, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=True)
    whole = load_file(last(runs / "ddp") / "context_encoder.safetensors")
    assert torch.equal(wanted["context_encoder.blocks.0.attn.qkv.weight"], whole["blocks.0.attn.qkv.weight"])


def built(scenes: Path):
    model = IJEPA(Recipe.read(recipe(scenes), "test").model)
    return model, make_optimizer(model, OptimizerSection())


@pytest.mark.distributed
def test_load_checkpoint_reads_moments_of_two_ranks(runs, scenes):
    (ours, optimizer), (theirs, other) = built(scenes), built(scenes)
    load_checkpoint(last(runs / "ddp"), ours, optimizer)
    load_checkpoint(last(runs / "zero2"), theirs, other)
    for parameter, twin in zip(ours.predictor.parameters(), theirs.predictor.parameters(), strict=True):
        assert torch.equal(parameter, twin)
        for key, value in optimizer.state[parameter].items():
            assert torch.equal(value, other.state[twin][key]), key
    assert torch.equal(ours.position_mean, theirs.position_mean) and ours.position_mean.any()


@pytest.mark.distributed
def test_missing_or_short_shard_is_refused(runs, scenes, tmp_path):
    folder = tmp_path / "step-00000008"
    shutil.copytree(last(runs / "zero2"), folder)
    shard = sorted(folder.glob("shard-*"))[1]
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(UserError, match="shard-00002"):
        load_checkpoint(folder, *built(scenes))
    shard.unlink()
    with pytest.raises(UserError, match="shard-00002"):
        load_checkpoint(folder, *built(scenes))
    shutil.copy(runs / "zero2/recipe.yaml", folder)
    with pytest.raises(UserError, match="shard-00002"):
        load_encoder(folder)


def test_initial_rows_equal_rows_of_the_whole_weight():
    from ijepa.model.init import initial_rows

    for name, shape in (("blocks.3.mlp.fc2.weight", (7, 9)), ("proj.weight", (5, 3, 2, 2)), ("norm.weight", (6,))):
        whole = initial_rows(name, shape, (0, shape[0]), 3, scheme="xavier")
        for start, stop in ((0, 2), (2, 5), (5, 5), (1, shape[0])):
            assert torch.equal(initial_rows(name, shape, (start, stop), 3, scheme="xavier"), whole[start:stop])


def command(scenes: Path, run: Path, *more: str) -> list[str]:
    file = run.parent / f"{run.name}.yaml"
    file.write_text(Recipe.read(recipe(scenes, steps=3000, checkpoint={"every": 3}), "test").dump())
    return [sys.executable, "-m", "ijepa", "pretrain", str(file), "--output", str(run), *more]


def one_line(ranks: list[tuple[int, str]]) -> str:
    """Return the only line that ranks have printed which all ended with exit code 2."""
    assert [code for code, _ in ranks] == [2] * len(ranks), ranks
    (line,) = [line for _, text in ranks for line in text.splitlines()]
    return line


@pytest.mark.distributed
def test_different_seeds_are_reported_once(scenes, tmp_path):
    whole = command(scenes, tmp_path / "run")
    ranks = spawn(2, ["sh", "-c", 'exec "$@" --seed $RANK', "sh", *whole])
    line = "ijepa: seed: is 1 on rank 1 and 0 on rank 0; start every rank with the same recipe, flags and data"
    assert one_line(ranks) == line
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.distributed
def test_missing_shard_is_reported_once(runs, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(runs / "zero2", out)
    sorted(last(out).glob("shard-*"))[1].unlink()
    line = one_line(spawn(2, [sys.executable, "-m", "ijepa", "pretrain", str(out), "--output", str(out)]))
    assert line.startswith("ijepa: ") and "shard-00002" in line
    assert "does not exist; the checkpoint is incomplete; use an earlier checkpoint" in line


@pytest.mark.slow
@pytest.mark.distributed
def test_damaged_shard_is_reported_once_and_skipped_by_all_ranks(runs, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(runs / "zero2", out)
    shard = sorted(last(out).glob("shard-*"))[1]
    flip(shard, -1)
    line = one_line(spawn(2, [sys.executable, "-m", "ijepa", "pretrain", str(out), "--output", str(out)]))
    assert line.startswith(f"ijepa: {shard}: is damaged: its content does not match its checksum in state.json; ")
    with pytest.raises(UserError, match="shard-00002"):
        load_encoder(out)
    values = Recipe.load(out / "recipe.yaml").model_dump(mode="json", by_alias=True)
    run_jobs(2, [{"recipe": values, "output": str(out), "resume": "last-good", "unfused": True}])
    assert [path.name for path in list_checkpoints(out / "checkpoints")] == ["step-00000006", "step-00000008"]
    assert (out / "metrics.jsonl").read_bytes() == (runs / "zero2/metrics.jsonl").read_bytes()
    ours, theirs = parameters(out), parameters(runs / "zero2")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.distributed
def test_ranks_may_read_different_copies_of_the_data(runs, scenes):
    assert [row["step"] for row in rows(runs / "copies")] == [1, 2, 3]
    info = json.loads((runs / "copies/run.json").read_text())
    assert info["fingerprint"] == open_dataset(scenes, split="train").fingerprint


@pytest.mark.slow
@pytest.mark.distributed
def test_missing_float8_support_is_reported_once(scenes, tmp_path):
    without = (
        "import importlib.util as util; plain = util.find_spec; from ijepa.__main__ import main; "
        "util.find_spec = lambda name, *more: None if name == 'torchao' else plain(name, *more); main()"
    )
    whole = command(scenes, tmp_path / "run", "--precision.fp8", "tensorwise")
    line = one_line(spawn(2, [sys.executable, "-c", without, *whole[3:]]))
    assert line.startswith("ijepa: precision.fp8 = tensorwise: ") and "torchao" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.distributed
def test_killed_rank_is_named_and_the_run_resumes(scenes, tmp_path):
    out = tmp_path / "run"
    launched = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    launcher = subprocess.Popen(
        [*launched, "-m", *command(scenes, out)[2:]],
        env={**os.environ, "PYTHONPATH": environment(0, 2, 0)["PYTHONPATH"], "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_until(lambda: count_lines(out / "metrics.jsonl") >= 12, lambda: launcher.poll() is None)
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        second = next(pid for pid in children if b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
        os.kill(int(second), signal.SIGKILL)
        _, said = launcher.communicate(timeout=LIMIT)
    finally:
        launcher.kill()
    ours = [line for line in said.splitlines() if line.startswith("ijepa: ")]
    assert launcher.returncode == 1 and len(ours) == 1, said
    assert "waits for rank 1, which does not respond (last seen at step" in ours[0]
    assert "the same command resumes from step-0" in ours[0]
    step = int(last(out).name[-8:])
    run({"recipe": recipe(scenes, steps=3000), "output": str(out), "stop_after": 2})
    assert len(rows(out)) == int(last(out).name[-8:]) > step
