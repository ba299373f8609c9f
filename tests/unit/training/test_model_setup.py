"""A recipe's switches are applied to the model and the packer, or refused."""

import pytest
import torch

from ijepa.config.recipe import Recipe
from ijepa.model.ijepa import IJEPA
from ijepa.training.model_setup import attention_of, check_float8, compiles, setup_model, token_budget
from ijepa.utils.errors import UserError
from tests.conftest import TINY

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def recipe(**changes) -> Recipe:
    return Recipe.read({**TINY, "batch": {"global": 8, "micro": 4}, **changes}, "here")


def test_setup_model_changes_nothing_by_default():
    chosen = recipe()
    model = IJEPA(chosen.model)
    kinds = [type(module) for module in model.modules()]
    setup_model(model, chosen, CPU, autocast=False)
    assert [type(module) for module in model.modules()] == kinds
    assert not any("forward" in vars(module) or "attend_and_mlp" in vars(module) for module in model.modules())
    assert token_budget(chosen, 4, CPU) is None


@pytest.mark.parametrize(
    ("asked", "on_cpu", "on_cuda"), [(False, False, False), (True, True, True), ("auto", False, True)]
)
def test_compiles_follows_recipe_and_device(asked, on_cpu, on_cuda):
    chosen = recipe(compile=asked)
    assert [compiles(chosen, torch.device(name)) for name in ("cpu", "cuda")] == [on_cpu, on_cuda]


def test_setup_model_applies_all_switches():
    pytest.importorskip("torchao")
    chosen = recipe(
        precision={"autocast": "none", "fp8": "tensorwise", "attention": "math"}, activation_checkpointing="full"
    )
    model = IJEPA(chosen.model)
    setup_model(model, chosen, CPU, autocast=False)
    block = model.context_encoder.blocks[0]
    assert block.attn.backend == "math" and "forward" in vars(block)
    assert type(block.mlp.fc1).__name__ == "Float8Linear"
    assert "forward" not in vars(model.target_encoder.blocks[0])


def test_token_budget_follows_the_recipe():
    assert token_budget(recipe(), 4, CUDA).context % 128 == 0
    static = token_budget(recipe(compile=True), 4, CPU)
    assert static.context > 0 and static.granule == 16
    aligned = token_budget(recipe(precision={"fp8": "rowwise"}), 4, CPU)
    assert (aligned.context, aligned.granule) == (0, 16)
    assert token_budget(recipe(batch={**TINY["batch"], "pad_to_budget": False}), 4, CUDA) is None


def test_check_float8_names_the_key(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_float8(recipe(), CPU, autocast=False)
    with pytest.raises(UserError) as caught:
        check_float8(recipe(precision={"fp8": "tensorwise"}), CPU, autocast=False)
    assert caught.value.where == "precision.fp8 = tensorwise"


@pytest.mark.parametrize("kernel", ["flash", "cudnn", "efficient"])
def test_attention_of_refuses_gpu_kernels_on_a_cpu(kernel):
    chosen = recipe(precision={"attention": kernel})
    with pytest.raises(UserError, match="GPU") as err:
        setup_model(IJEPA(chosen.model), chosen, CPU, autocast=True)
    assert err.value.where == f"precision.attention = {kernel}"


@pytest.mark.parametrize(
    ("device", "autocast", "compiled", "heads", "kernel"),
    [
        (CPU, True, False, 2, "auto"),
        (CPU, True, True, 2, "math"),
        (CUDA, True, "auto", 2, "auto"),
        (CUDA, False, False, 2, "auto"),
        (CUDA, False, "auto", 2, "math"),  # compiled: the shapes of a CPU's buckets differ at every step
        (CUDA, True, False, 16, "math"),  # FlashAttention does not support heads of width 2
        (CPU, True, False, 16, "auto"),
    ],
)
def test_attention_of_resolves_auto(device, autocast, compiled, heads, kernel):
    """The recipe's `auto` may be resolved to none, as on a GPU without bfloat16."""
    model = {**TINY["model"], "encoder": {**TINY["model"]["encoder"], "heads": heads}}
    for wanted in ("auto", "bf16" if autocast else "none"):
        chosen = recipe(precision={"autocast": wanted}, compile=compiled, model=model)
        assert attention_of(chosen, device, autocast=autocast) == kernel


def test_attention_of_uses_the_resolved_autocast():
    chosen = recipe(precision={"autocast": "auto"}, compile=False)
    model = IJEPA(chosen.model)
    setup_model(model, chosen, CUDA, autocast=True)
    assert model.predictor.predictor_blocks[0].attn.backend == "auto"
    with pytest.raises(UserError, match="bf16") as err:
        setup_model(model, recipe(precision={"autocast": "auto", "attention": "flash"}), CUDA, autocast=False)
    assert err.value.where == "precision.attention = flash"


@pytest.mark.parametrize(
    ("part", "width", "heads", "said"),
    [
        ("encoder", 48, 4, "encoder has 12"),
        ("predictor", 48, 4, "predictor has 12"),
        ("encoder", 528, 2, "encoder has 264"),
    ],
)
def test_attention_of_refuses_flash_for_unsupported_head_widths(part, width, heads, said):
    model = {**TINY["model"], part: {**TINY["model"][part], "width": width, "heads": heads}}
    with pytest.raises(UserError) as refused:
        attention_of(recipe(precision={"attention": "flash"}, model=model), CUDA, autocast=True)
    line = str(refused.value)
    assert line.startswith("precision.attention = flash: needs heads") and f"model.{said};" in line and "math" in line
    assert attention_of(recipe(precision={"attention": "flash"}), CUDA, autocast=True) == "flash"
