"""A recipe's switches reach the model and the packer, or are refused in one line."""

import pytest
import torch

from ijepa.errors import Refused
from ijepa.model.jepa import IJEPA
from ijepa.recipe import Recipe
from ijepa.training.prepare import compiles, prepare, token_budget
from tests.conftest import TINY

CPU = torch.device("cpu")


def recipe(**changes) -> Recipe:
    return Recipe.read({**TINY, "batch": {"global": 8, "micro": 4}, **changes}, "here")


def test_nothing_is_done_unless_asked():
    chosen = recipe()
    model = IJEPA(chosen.model)
    kinds = [type(module) for module in model.modules()]
    prepare(model, chosen, CPU)
    assert [type(module) for module in model.modules()] == kinds
    assert not any("forward" in vars(module) or "finish" in vars(module) for module in model.modules())
    assert token_budget(chosen, 4, CPU) is None


@pytest.mark.parametrize(
    ("asked", "on_cpu", "on_cuda"), [(False, False, False), (True, True, True), ("auto", False, True)]
)
def test_blocks_are_compiled_where_asked(asked, on_cpu, on_cuda):
    chosen = recipe(parallel={"compile": asked})
    assert [compiles(chosen, torch.device(name)) for name in ("cpu", "cuda")] == [on_cpu, on_cuda]


def test_switches_reach_the_model():
    pytest.importorskip("torchao")
    chosen = recipe(
        precision={"autocast": "none", "fp8": "tensorwise", "attention": "math"}, parallel={"recompute": "full"}
    )
    model = IJEPA(chosen.model)
    prepare(model, chosen, CPU)
    block = model.context_encoder.blocks[0]
    assert block.attn.backend == "math" and "forward" in vars(block)
    assert type(block.mlp.fc1).__name__ == "Float8Linear"
    assert "forward" not in vars(model.target_encoder.blocks[0])


def test_budgets_follow_the_recipe():
    assert token_budget(recipe(), 4, torch.device("cuda")).context % 128 == 0
    static = token_budget(recipe(parallel={"compile": True}), 4, CPU)
    assert static.context > 0 and static.granule == 16
    aligned = token_budget(recipe(precision={"fp8": "rowwise"}), 4, CPU)
    assert (aligned.context, aligned.granule) == (0, 16)
    assert token_budget(recipe(parallel={"static": False}), 4, torch.device("cuda")) is None


@pytest.mark.parametrize("kernel", ["flash", "cudnn", "efficient"])
def test_kernels_of_a_gpu_are_refused_on_a_cpu(kernel):
    chosen = recipe(precision={"attention": kernel})
    with pytest.raises(Refused, match=f"precision.attention = {kernel}: needs a GPU"):
        prepare(IJEPA(chosen.model), chosen, CPU)
