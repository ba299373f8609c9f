import pytest
import torch
from torch import Tensor, nn

from ijepa.evaluation.classification import optimizers
from ijepa.evaluation.classification.linear_heads import FEW, Heads, softmax_

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


def module_of(heads: Heads, head: int, norm: str) -> nn.Sequential:
    """The same head as torch has it."""
    linear = nn.Linear(heads.weight.shape[0], heads.weight.shape[2])
    linear.weight.data = heads.weight[:, head].T.clone()
    linear.bias.data.zero_()
    if norm == "none":
        return nn.Sequential(linear)
    return nn.Sequential(nn.BatchNorm1d(heads.weight.shape[0], affine=norm == "batch-affine"), linear)


@pytest.mark.parametrize("norm", ["none", "batch", "batch-affine"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_against_modules_trained_one_after_the_other(norm, optimizer):
    heads = Heads(6, 4, GRID, norm=norm, optimizer=optimizer, initial_std=0.1, seed=3)
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
def test_biases_decay_where_it_is_said(optimizer):
    heads = Heads(6, 4, GRID, optimizer=optimizer, decay_bias=True, initial_std=0.1)
    for head, (lr, decay) in enumerate(GRID):
        module = module_of(Heads(6, 4, GRID, initial_std=0.1), head, "none")
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
        torch.testing.assert_close(heads.bias[head], module[0].bias.detach(), atol=5e-5, rtol=1e-4)
        torch.testing.assert_close(heads.weight[:, head], module[0].weight.detach().T, atol=5e-5, rtol=1e-4)


def test_a_batch_norm_over_parts_is_one_module_for_each_part():
    """As several devices without synchronisation: each normalises its own images, the first one's figures are kept."""
    heads = Heads(6, 4, [(5e-2, 0.0)], norm="batch", optimizer="sgd", norm_batch=8, initial_std=0.1)
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
    whole = Heads(6, 4, [(5e-2, 0.0)], norm="batch", optimizer="sgd", norm_batch=20, initial_std=0.1)
    for x, y in batches:
        whole.step(x, y, 1.0)
    assert (whole.logits(probe)[:, 0] - expected).abs().max() > 0.01, "or parts would not matter"


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars"])
@pytest.mark.parametrize("norm", ["none", "batch-affine"])
def test_together_as_alone(optimizer, norm):
    together = Heads(6, 4, GRID, norm=norm, optimizer=optimizer, initial_std=0.1)
    alone = [Heads(6, 4, [setting], norm=norm, optimizer=optimizer, initial_std=0.1) for setting in GRID]
    for x, y in data():
        for heads in (together, *alone):
            heads.step(x, y, 1.0)
    x, y = data(1, batch=50)[0]
    for head, other in enumerate(alone):
        torch.testing.assert_close(together.logits(x)[:, head], other.logits(x)[:, 0], atol=1e-5, rtol=1e-4)
        assert (together.ranks(x, y, head) == other.ranks(x, y, 0)).all()
    accuracies = [float((other.ranks(x, y, 0) == 0).double().mean()) for other in alone]
    assert (together.logits(x).argmax(2) == y[:, None]).double().mean(0).tolist() == accuracies


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("slab", [1, 30])
def test_slabs_change_nothing(optimizer, slab, monkeypatch):
    """Slabs of one row, and of two with a rest, of five rows of 12 numbers."""
    weights = []
    for size in (optimizers.SLAB, slab):
        monkeypatch.setattr(optimizers, "SLAB", size)
        heads = Heads(5, 4, GRID, norm="batch-affine", optimizer=optimizer, initial_std=0.1)
        for x, y in data(width=5):
            heads.step(x, y, 1.0)
        weights.append(torch.cat([heads.weight.flatten(), heads.gain.flatten(), heads.bias.flatten()]))
    torch.testing.assert_close(*weights, atol=1e-6, rtol=1e-5)  # a row's place in a slab decides its rounding


def test_the_start_is_the_seed_s():
    first, second, other = (Heads(50, 8, GRID, initial_std=0.01, seed=seed).weight for seed in (1, 1, 2))
    assert (first == second).all()
    assert (first != other).any()
    assert float(first.std()) == pytest.approx(0.01, rel=0.1)
    assert (first[:, 0] == first[:, 2]).all()


def test_the_start_of_a_linear_layer_is_torch_s():
    """Weights and biases uniform within 1 / sqrt(width), as `torch.nn.Linear.reset_parameters` leaves them."""
    heads, module = Heads(400, 50, GRID, initial_std="linear", seed=1), nn.Linear(400, 50)
    for found, expected in ((heads.weight[:, 1], module.weight.data), (heads.bias[1], module.bias.data)):
        assert float(found.abs().max()) <= 1 / 400**0.5
        assert float(found.abs().max()) > 0.9 / 400**0.5
        assert float(found.std()) == pytest.approx(float(expected.std()), rel=0.3)
    assert float(heads.weight[:, 0].std()) == pytest.approx(1 / (3 * 400) ** 0.5, rel=0.02)
    assert (heads.bias[0] == heads.bias[2]).all()


@pytest.mark.parametrize("classes", [2, 8, FEW, FEW + 1, 100])
def test_softmax_of_few_and_of_many_classes(classes):
    scores = 100 * torch.randn(7, 5, classes)
    scores[0, 0] = 1e4  # would overflow as they are
    wanted = torch.softmax(scores.double(), 2)
    found = softmax_(scores)
    assert found is scores or found.data_ptr() == scores.data_ptr()
    assert (found - wanted).abs().max() < 1e-6


def test_a_head_that_diverged_is_always_wrong():
    heads = Heads(6, 4, [(1.0, 0.0), (1.0, 0.0)])
    heads.weight[:, 1] = float("nan")
    x, y = torch.randn(50, 6), torch.zeros(50, dtype=torch.int64)  # argmax takes "no number" for class 0
    assert (heads.ranks(x, y, 0) == 0).all()
    assert (heads.ranks(x, y, 1) == 3).all()
