"""`batch.micro: auto`: the largest that fits, once; kept by a run that goes on."""

import pytest
import torch

from ijepa.config.recipe import Recipe
from ijepa.planning import size
from ijepa.planning.memory import USABLE
from ijepa.training import micro_batch
from ijepa.training.micro_batch import find_micro_batch_size
from ijepa.training.runtime import resolve
from ijepa.utils.errors import UserError

CPU = torch.device("cpu")


def fitted(
    recipe: Recipe, gigabytes: float, monkeypatch, *, ranks: int = 1, device: torch.device = CPU, autocast: bool = True
) -> int:
    monkeypatch.setattr(micro_batch, "memory_of", lambda device: int(gigabytes * 1e9))
    return find_micro_batch_size(recipe, device, share=recipe.batch.total // ranks, ranks=ranks, autocast=autocast)


def test_more_memory_takes_more_images_and_always_a_divisor(monkeypatch):
    recipe = Recipe.load("vit-base-16-in1k")
    found = [fitted(recipe, gigabytes, monkeypatch) for gigabytes in (8, 16, 32, 64, 4000)]
    assert found == sorted(found) and found[0] < found[1] < found[-1] <= 1024
    assert all(recipe.batch.total % micro == 0 for micro in found)


def test_recomputation_and_sharding_leave_room_for_more(monkeypatch):
    plain = Recipe.load("vit-large-16-in1k")
    lean = Recipe.load("vit-large-16-in1k", {"activation_checkpointing": "full"})
    assert fitted(lean, 64, monkeypatch) > fitted(plain, 64, monkeypatch)
    # Three bytes in four of the state lie elsewhere then.
    sharded = Recipe.load("vit-huge-16-in22k", {"parallel.strategy": "zero3"})
    with pytest.raises(UserError, match="batch.micro = auto"):
        fitted(sharded, 24, monkeypatch)
    assert fitted(sharded, 24, monkeypatch, ranks=64) >= 1


def test_kernels_that_pad_are_given_room_for_it(monkeypatch):
    """Half of an image's patches are context: padded to all of them, attention saves twice as much."""

    def found(kernel: str, autocast: bool = True) -> int:
        recipe = Recipe.load("vit-base-16-in1k", {"precision.attention": kernel})
        return fitted(recipe, 30, monkeypatch, device=torch.device("cuda"), autocast=autocast)

    assert found("auto") == found("flash") >= 2 * found("cudnn") == 2 * found("efficient")
    assert found("efficient") >= found("math") > 0
    assert found("auto", False) <= found("auto") / 2  # without FlashAttention probabilities are kept, in float32


def test_loaders_share_the_cores_of_a_machine_with_its_other_ranks(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(48)))
    recipe = Recipe.load("vit-base-16-in1k", {"batch.micro": 4, "precision.autocast": "bf16"})
    found = {}
    for ranks in (1, 4, 8, 48):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        found[ranks] = resolve(recipe).workers
    assert found == {1: 16, 4: 10, 8: 4, 48: 1}


def test_the_plan_and_the_run_agree(monkeypatch):
    from ijepa.planning.outlook import outlook

    recipe = Recipe.load("vit-huge-16-in22k")
    monkeypatch.setattr(micro_batch, "memory_of", lambda device: 80e9)
    monkeypatch.setattr(micro_batch, "_USABLE_ON_CPU", USABLE)
    flash = find_micro_batch_size(recipe, torch.device("meta"), share=256, ranks=8, autocast=True)
    planned = outlook(recipe, gpu="h100", devices=8).row.chosen.fits[0].micro
    # A CPU's attention keeps its probabilities, FlashAttention does not.
    assert flash <= planned <= 4 * flash


def test_the_length_of_the_run_is_not_asked(monkeypatch):
    """It hangs on the data set: a warm-up in steps would be too long for that of one image. Masks are drawn once."""
    drawn, draw = [], size.draw_masks
    monkeypatch.setattr(size, "draw_masks", lambda *given: drawn.append(given) or draw(*given))
    recipe = Recipe.load("vit-tiny-64", {"schedule.warmup": "1000 steps"})
    with pytest.raises(UserError, match="1000 steps of warm-up in a run of 1;"):
        recipe.lengths(1)
    assert fitted(recipe, 16, monkeypatch) == fitted(Recipe.load("vit-tiny-64"), 16, monkeypatch) > 1
    assert len(drawn) == 2


@pytest.mark.parametrize(
    ("same", "recipe", "autocast"),
    [
        ("math", {"compile": True}, False),
        ("math", {"model.encoder.heads": 64}, True),  # 12 wide
        ("flash", {}, True),
    ],
)
def test_room_is_made_for_the_kernel_that_auto_becomes(same, recipe, autocast, monkeypatch):
    kernels = [Recipe.load("vit-base-16-in1k", {**recipe, "precision.attention": kernel}) for kernel in ("auto", same)]
    found = [fitted(each, 60, monkeypatch, device=torch.device("cuda"), autocast=autocast) for each in kernels]
    assert found[0] == found[1] > 0


def test_one_image_too_many_is_refused_in_one_line(monkeypatch):
    with pytest.raises(UserError, match=r"one image and the model need .* GiB .*`ijepa plan`"):
        fitted(Recipe.load("vit-huge-16-in22k"), 8, monkeypatch)


def test_a_run_keeps_its_micro_batch(monkeypatch):
    recipe = Recipe.load("vit-base-16-in1k")
    monkeypatch.setattr(micro_batch, "memory_of", lambda device: 16e9)
    first = resolve(recipe)
    monkeypatch.setattr(micro_batch, "memory_of", lambda device: 400e9)
    assert resolve(recipe).micro > first.micro
    assert resolve(recipe, first.as_json()).micro == first.micro
    # Among more ranks it stays as far as it divides a rank's share.
    share = recipe.batch.total // 128
    again = resolve(recipe, first.as_json(), 128).micro
    assert share % again == 0 and again <= first.micro
    named = Recipe.load("vit-base-16-in1k", {"batch.micro": 4})
    assert resolve(named, first.as_json()).micro == 4
