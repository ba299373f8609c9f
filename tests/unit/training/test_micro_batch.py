"""`batch.micro: auto` is the largest micro-batch that fits; a resume keeps it."""

import os
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

from ijepa.config.recipe import Recipe
from ijepa.planning.memory import USABLE
from ijepa.training.micro_batch import USABLE_ON_CPU, find_micro_batch_size
from ijepa.training.runtime import resolve
from ijepa.utils.errors import UserError

CPU = torch.device("cpu")


def set_memory(monkeypatch, size: float) -> None:
    """Make the operating system and CUDA report `size` bytes of memory."""
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": int(size)}[name])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=int(size)))


def fitted(
    recipe: Recipe, gigabytes: float, monkeypatch, *, ranks: int = 1, device: torch.device = CPU, autocast: bool = True
) -> int:
    set_memory(monkeypatch, gigabytes * 1e9)
    return find_micro_batch_size(recipe, device, share=recipe.batch.total // ranks, ranks=ranks, autocast=autocast)


def test_micro_batch_size_grows_with_memory_and_divides_the_batch(monkeypatch):
    recipe = Recipe.load("vit-base-16-in1k")
    found = [fitted(recipe, gigabytes, monkeypatch) for gigabytes in (8, 16, 32, 64, 4000)]
    assert found == sorted(found) and found[0] < found[1] < found[-1] <= 1024
    assert all(recipe.batch.total % micro == 0 for micro in found)


def test_micro_batch_size_grows_with_checkpointing_and_sharding(monkeypatch):
    plain = Recipe.load("vit-large-16-in1k")
    lean = Recipe.load("vit-large-16-in1k", {"activation_checkpointing": "full"})
    assert fitted(lean, 64, monkeypatch) > fitted(plain, 64, monkeypatch)
    # Sharding puts most of the state on other ranks.
    sharded = Recipe.load("vit-huge-16-in22k", {"parallel.strategy": "zero3"})
    with pytest.raises(UserError) as caught:
        fitted(sharded, 24, monkeypatch)
    assert caught.value.where == "batch.micro = auto"
    assert fitted(sharded, 24, monkeypatch, ranks=64) >= 1


def test_micro_batch_size_includes_padding_of_kernels(monkeypatch):
    """Half of an image's patches are context, so padding to all patches doubles what attention saves."""

    def found(kernel: str, autocast: bool = True) -> int:
        recipe = Recipe.load("vit-base-16-in1k", {"precision.attention": kernel})
        return fitted(recipe, 30, monkeypatch, device=torch.device("cuda"), autocast=autocast)

    assert found("auto") == found("flash") >= 2 * found("cudnn") == 2 * found("efficient")
    assert found("efficient") >= found("math") > 0
    assert found("auto", False) <= found("auto") / 2  # without FlashAttention, probabilities are saved in float32


def test_resolve_divides_cores_among_local_ranks(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(48)))
    recipe = Recipe.load("vit-base-16-in1k", {"batch.micro": 4, "precision.autocast": "bf16"})
    found = {}
    for ranks in (1, 4, 8, 48):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        found[ranks] = resolve(recipe).workers
    assert found == {1: 16, 4: 10, 8: 4, 48: 1}


def test_micro_batch_size_agrees_with_the_plan(monkeypatch):
    from ijepa.planning.plan import make_plan

    recipe = Recipe.load("vit-huge-16-in22k")
    set_memory(monkeypatch, 80e9 * USABLE / USABLE_ON_CPU)
    flash = find_micro_batch_size(recipe, torch.device("meta"), share=256, ranks=8, autocast=True)
    planned = make_plan(recipe, gpu="h100", devices=8).asked.chosen.fits[0].micro
    # A CPU's attention saves its probabilities, and FlashAttention does not.
    assert flash <= planned <= 4 * flash


def test_micro_batch_size_ignores_the_length_of_the_run(monkeypatch):
    """It depends on the data set: a warm-up in steps would be too long for a data set of one image."""
    recipe = Recipe.load("vit-tiny-64", {"schedule.warmup": "1000 steps"})
    with pytest.raises(UserError, match="warm-up"):
        recipe.lengths(1)
    assert fitted(recipe, 16, monkeypatch) == fitted(Recipe.load("vit-tiny-64"), 16, monkeypatch) > 1


@pytest.mark.parametrize(
    ("same", "recipe", "autocast"),
    [
        ("math", {"compile": True}, False),
        ("math", {"model.encoder.heads": 64}, True),  # heads of width 12
        ("flash", {}, True),
    ],
)
def test_micro_batch_size_uses_the_resolved_kernel(same, recipe, autocast, monkeypatch):
    kernels = [Recipe.load("vit-base-16-in1k", {**recipe, "precision.attention": kernel}) for kernel in ("auto", same)]
    found = [fitted(each, 60, monkeypatch, device=torch.device("cuda"), autocast=autocast) for each in kernels]
    assert found[0] == found[1] > 0


def test_micro_batch_size_refuses_a_model_that_does_not_fit(monkeypatch):
    with pytest.raises(UserError) as caught:
        fitted(Recipe.load("vit-huge-16-in22k"), 8, monkeypatch)
    assert caught.value.where == "batch.micro = auto"


def test_resolve_keeps_the_micro_batch_of_a_resumed_run(monkeypatch):
    recipe = Recipe.load("vit-base-16-in1k")
    set_memory(monkeypatch, 16e9)
    first = resolve(recipe)
    set_memory(monkeypatch, 400e9)
    assert resolve(recipe).micro > first.micro
    assert resolve(recipe, asdict(first)).micro == first.micro
    # On more ranks it is kept as far as it divides a rank's share.
    share = recipe.batch.total // 128
    again = resolve(recipe, asdict(first), 128).micro
    assert share % again == 0 and again <= first.micro
    named = Recipe.load("vit-base-16-in1k", {"batch.micro": 4})
    assert resolve(named, asdict(first)).micro == 4
