import pytest
import torch
from torch import Tensor, nn

from ijepa.evaluation.classification.linear_heads import FEW_CLASSES, LinearHeads, summed_cross_entropy

GRID = ((3e-3, 0.0), (5e-2, 0.3), (1e-2, 0.01))


def data(steps=12, batch=20, width=6, classes=4, seed=0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(batch, width, generator=generator) * 3 + 1,
            torch.randint(classes, (batch,), generator=generator),
        )
        for _ in range(steps)
    ]


def module_of(heads: LinearHeads, head: int, norm: str) -> nn.Sequential:
    """The same head as torch modules."""
    _, classes, width = heads.weight.shape
    linear = nn.Linear(width, classes)
    linear.weight.data = heads.weight[head].detach().clone()
    linear.bias.data.zero_()
    if norm == "none":
        return nn.Sequential(linear)
    return nn.Sequential(nn.BatchNorm1d(width, affine=norm == "batch-affine"), linear)


@pytest.mark.parametrize("norm", ["none", "batch", "batch-affine"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_step_agrees_with_torch_modules(norm, optimizer):
    heads = LinearHeads(6, 4, GRID, norm=norm, optimizer=optimizer, initial_std=0.1, seed=3)
    modules = [module_of(heads, head, norm) for head in range(3)]
    batches = data()
    for x, y in batches:
        heads.step(x, y, 0.5)
    probe = batches[0][0]
    for head, (module, (lr, decay)) in enumerate(zip(modules, GRID, strict=True)):
        matrix = module[-1].weight
        others = [p for p in module.parameters() if p is not matrix]
        groups = [{"params": [matrix], "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
        own = (
            torch.optim.AdamW(groups, lr=lr / 2, betas=(0.9, 0.95))
            if optimizer == "adamw"
            else torch.optim.SGD(groups, lr=lr / 2, momentum=0.9)
        )
        for x, y in batches:
            own.zero_grad()
            nn.functional.cross_entropy(module(x), y).backward()
            own.step()
        module.eval()
        torch.testing.assert_close(heads.logits(probe)[:, head], module(probe).detach(), atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_decay_bias_agrees_with_torch_modules(optimizer):
    heads = LinearHeads(6, 4, GRID, optimizer=optimizer, decay_bias=True, initial_std=0.1)
    for head, (lr, decay) in enumerate(GRID):
        module = module_of(LinearHeads(6, 4, GRID, initial_std=0.1), head, "none")
        kind, settings = {
            "adamw": (torch.optim.AdamW, {"betas": (0.9, 0.95)}),
            "sgd": (torch.optim.SGD, {"momentum": 0.9}),
        }[optimizer]
        own = kind(module.parameters(), lr=lr, weight_decay=decay, **settings)
        for x, y in data():
            if head == 0:
                heads.step(x, y, 1.0)
            own.zero_grad()
            nn.functional.cross_entropy(module(x), y).backward()
            own.step()
        torch.testing.assert_close(heads.bias[head], module[0].bias, atol=5e-5, rtol=1e-4)
        torch.testing.assert_close(heads.weight[head], module[0].weight, atol=5e-5, rtol=1e-4)


def test_norm_batch_agrees_with_one_batch_norm_per_part():
    """Like devices without synchronization: each normalizes its own images; the first one's statistics are kept."""
    heads = LinearHeads(6, 4, [(5e-2, 0.0)], norm="batch", optimizer="sgd", norm_batch=8, initial_std=0.1)
    linear = module_of(heads, 0, "none")
    norms = [nn.BatchNorm1d(6, affine=False) for _ in range(3)]
    own = torch.optim.SGD(linear.parameters(), lr=5e-2, momentum=0.9)
    batches = data(batch=20)  # 7, 7 and 6 images: equal parts of at most 8
    for x, y in batches:
        heads.step(x, y, 1.0)
        own.zero_grad()
        parts = [norm(part) for norm, part in zip(norms, x.tensor_split(3), strict=True)]
        nn.functional.cross_entropy(linear(torch.cat(parts)), y).backward()
        own.step()
    norms[0].eval()
    probe = batches[0][0]
    expected = linear(norms[0](probe)).detach()
    torch.testing.assert_close(heads.logits(probe)[:, 0], expected, atol=5e-5, rtol=1e-4)
    whole = LinearHeads(6, 4, [(5e-2, 0.0)], norm="batch", optimizer="sgd", norm_batch=20, initial_std=0.1)
    for x, y in batches:
        whole.step(x, y, 1.0)
    assert (whole.logits(probe)[:, 0] - expected).abs().max() > 0.01, "parts make a difference"


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars"])
@pytest.mark.parametrize("norm", ["none", "batch-affine"])
def test_heads_do_not_influence_each_other(optimizer, norm):
    together = LinearHeads(6, 4, GRID, norm=norm, optimizer=optimizer, initial_std=0.1)
    alone = [LinearHeads(6, 4, [setting], norm=norm, optimizer=optimizer, initial_std=0.1) for setting in GRID]
    for x, y in data():
        for heads in (together, *alone):
            heads.step(x, y, 1.0)
    x, y = data(1, batch=50)[0]
    for head, other in enumerate(alone):
        torch.testing.assert_close(together.logits(x)[:, head], other.logits(x)[:, 0], atol=1e-5, rtol=1e-4)
        assert (together.class_ranks(x, y, head) == other.class_ranks(x, y, 0)).all()
    accuracies = [float((other.class_ranks(x, y, 0) == 0).double().mean()) for other in alone]
    assert (together.logits(x).argmax(2) == y[:, None]).double().mean(0).tolist() == accuracies


def test_initial_values_depend_on_the_seed_only():
    first, second, other = (LinearHeads(50, 8, GRID, initial_std=0.01, seed=seed).weight.detach() for seed in (1, 1, 2))
    assert (first == second).all()
    assert (first != other).any()
    assert float(first.std()) == pytest.approx(0.01, rel=0.1)
    assert (first[0] == first[2]).all()


def test_initial_std_linear_has_the_distribution_of_torch():
    """Weights and biases uniform within 1 / sqrt(width), as in `torch.nn.Linear.reset_parameters`."""
    heads, module = LinearHeads(400, 50, GRID, initial_std="linear", seed=1), nn.Linear(400, 50)
    for found, expected in ((heads.weight.data[1], module.weight.data), (heads.bias.data[1], module.bias.data)):
        assert float(found.abs().max()) <= 1 / 400**0.5
        assert float(found.abs().max()) > 0.9 / 400**0.5
        assert float(found.std()) == pytest.approx(float(expected.std()), rel=0.3)
    assert float(heads.weight.data[0].std()) == pytest.approx(1 / (3 * 400) ** 0.5, rel=0.02)
    assert (heads.bias[0] == heads.bias[2]).all()


def test_class_ranks_of_a_diverged_head_are_last():
    heads = LinearHeads(6, 4, [(1.0, 0.0), (1.0, 0.0)])
    heads.weight.data[1] = float("nan")
    x, y = torch.randn(50, 6), torch.zeros(50, dtype=torch.int64)  # argmax of NaN is class 0
    assert (heads.class_ranks(x, y, 0) == 0).all()
    assert (heads.class_ranks(x, y, 1) == 3).all()


@pytest.mark.parametrize("classes", [2, FEW_CLASSES, FEW_CLASSES + 1])
def test_summed_cross_entropy_agrees_with_torch(classes):
    logits = 100 * torch.randn(7, 5, classes, dtype=torch.float64)
    logits[0, 0] = 1e4  # exp would overflow
    y = torch.arange(7) % classes
    expected = sum(nn.functional.cross_entropy(logits[:, head], y, reduction="sum") for head in range(5))
    torch.testing.assert_close(summed_cross_entropy(logits, y), expected)
