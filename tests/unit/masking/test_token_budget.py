"""Padded batches have constant shapes, and the same loss and gradients as without padding."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from ijepa.masking.masks import MaskRule, draw_masks
from ijepa.masking.packing import Packer, draw_drop_path, layer_rates
from ijepa.masking.token_budget import Budget
from ijepa.model.config import EncoderConfig, ModelConfig, PredictorConfig
from ijepa.model.ijepa import IJEPA

RULE = MaskRule(min_context=4)
SHAPE = ModelConfig(
    image_size=(64, 64),
    patch_size=8,
    encoder=EncoderConfig(width=32, depth=4, heads=4, drop_path=0.5),
    predictor=PredictorConfig(width=16, depth=3, heads=2),
)
RATES = layer_rates(4, 0.5)
PIXELS = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (6, 3, 64, 64), dtype=np.uint8))


def packer(budget: Budget | None, drop_path: float = 0.5) -> Packer:
    return Packer(RULE, (8, 8), 3, 12, 4, drop_path, budget)


def budget(**changes) -> Budget:
    return Budget.for_masks(RULE, (8, 8), 6, RATES, **{"granule": 16, **changes})


def shapes(batch):
    tensors = []
    batch.map(lambda tensor: tensors.append(tuple(tensor.shape)) or tensor)
    return tensors


def test_for_masks_is_the_mean_plus_deviations():
    masks = draw_masks(RULE, (8, 8), 0, np.arange(4096))
    seen, asked = masks.context.sum(1), masks.targets.sum((1, 2))
    wide = Budget.for_masks(RULE, (8, 8), 256, RATES, deviations=2, granule=1)
    assert wide.context == pytest.approx(256 * seen.mean() + 2 * 16 * seen.std(), abs=2)
    assert wide.targets == pytest.approx(256 * asked.mean() + 2 * 16 * asked.std(), abs=2)
    assert wide.layers[0] is None and wide.limit == 64
    kept = seen[:, None] * draw_drop_path(0, np.arange(4096), 4, 0.5)
    for layer in (1, 2, 3):
        assert wide.layers[layer] == pytest.approx(256 * kept.mean(0)[layer] + 32 * kept.std(0)[layer], rel=0.02)
    assert list(wide.layers[1:]) == sorted(wide.layers[1:], reverse=True)
    assert all(size and size % 128 == 0 for size in Budget.for_masks(RULE, (8, 8), 256, RATES).layers[1:])


def test_room_grows_by_sixteenths_above_the_budget():
    room = Budget(1600, 0, 0, (), 64, granule=16)
    assert [room.room(t, 1600) for t in (0, 1600, 1601, 1697, 5000)] == [1600, 1600, 1696, 1792, 5056]
    assert [room.room(t, 0) for t in (1, 16, 17)] == [16, 16, 32]


def test_packer_with_a_budget_gives_constant_shapes():
    seen = {str(shapes(packer(budget(deviations=6))(np.arange(6 * s, 6 * s + 6), PIXELS))) for s in range(20)}
    assert len(seen) == 1
    assert len({str(shapes(packer(None)(np.arange(6 * s, 6 * s + 6), PIXELS))) for s in range(20)}) == 20


@pytest.mark.parametrize("chosen", [budget(), budget(deviations=-3), Budget.aligned((8, 8), RATES, 16)])
def test_padding_follows_the_batch_in_sequences_of_its_own(chosen):
    plain, padded = packer(None)(np.arange(6), PIXELS), packer(chosen)(np.arange(6), PIXELS)
    tokens = len(plain.context.index)
    pairs = [(getattr(plain, n), getattr(padded, n)) for n in ("context", "targets", "predictor", "queries")]
    pairs += [(a, b) for a, b in zip(plain.drop_path_rows, padded.drop_path_rows, strict=True) if a is not None]
    for old, new in pairs:
        assert new.lengths == old.lengths and len(new.index) % 16 == 0 and new.longest == 64
        real = len(old.index)
        assert new.real.tolist() == [True] * real + [False] * (len(new.index) - real)
        ends = new.cu_seqlens.tolist()
        assert ends[: len(old.lengths) + 1] == old.cu_seqlens.tolist() and ends[-1] == len(new.index)
        assert all(0 <= b - a <= 64 for a, b in pairwise(ends))
    for old, new in pairs[:2] + pairs[4:]:
        assert torch.equal(new.index[: len(old.index)], old.index)
    moved = torch.where(plain.predictor.index < tokens, 0, len(padded.context.index) - tokens)
    assert torch.equal(padded.predictor.index[: len(moved)], plain.predictor.index + moved)
    last = len(padded.context.index) - 1
    assert len(pairs) > 4 and not padded.context.real[last]
    for old, new in pairs[4:]:  # the padding of a layer does not belong to an image
        assert set(new.index[len(old.index) :].tolist()) <= {last}
    assert torch.equal(padded.loss_weight[: len(plain.loss_weight)], plain.loss_weight)
    assert not padded.loss_weight[len(plain.loss_weight) :].any()
    # A padding query has padding keys: its attention is finite.
    asked, answers = padded.queries.cu_seqlens.diff(), padded.predictor.cu_seqlens.diff()
    assert len(asked) == len(answers) and (asked <= answers).all()
    assert not padded.predictor.real[padded.queries.index[~padded.queries.real]].any()


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
@pytest.mark.parametrize("chosen", [budget(), Budget.aligned((8, 8), RATES, 16), budget(granule=64, deviations=9)])
def test_padding_changes_neither_loss_nor_gradients(drop_path, chosen):
    shape = replace(SHAPE, encoder=replace(SHAPE.encoder, drop_path=drop_path))
    model = IJEPA(shape, seed=1)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
    found = []
    for each in (None, chosen):
        output = model(packer(each, drop_path)(np.arange(6), PIXELS))
        output.loss.backward()
        found.append((output, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
        model.zero_grad()
    (plain, wanted), (padded, gradients) = found
    assert padded.loss.item() == pytest.approx(plain.loss.item(), rel=1e-6)
    assert padded.baseline.item() == pytest.approx(plain.baseline.item(), rel=1e-6)
    for name, gradient in gradients.items():
        assert (gradient - wanted[name]).abs().max() < 1e-6 * max(1, wanted[name].abs().max()), name


@pytest.mark.parametrize("aligned", [False, True])
def test_padding_enters_a_layer_with_stochastic_depth_as_zeros(aligned):
    """So a scale over all tokens does not depend on images that skip the layer."""
    chosen = Budget.aligned((8, 8), RATES, 16) if aligned else budget()
    model, entering = IJEPA(SHAPE, seed=1), []
    for block in model.context_encoder.blocks:
        block.register_forward_pre_hook(lambda block, given: entering.append((given[0].detach(), given[1].real)))
    batch = packer(chosen)(np.arange(6), PIXELS)
    model(batch).loss.backward()
    assert len(entering) == 4 and sum(int((~real).sum()) for _, real in entering) > 16
    for x, real in entering:
        assert not x[: len(real)][~real].any() and x[: len(real)][real].any(1).all()


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_values_of_padding_depend_on_weights_and_not_on_images(drop_path):
    shape = replace(SHAPE, encoder=replace(SHAPE.encoder, drop_path=drop_path))
    model, real, seen = IJEPA(shape, seed=1), [], []
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.ones_like(parameter))  # biases too: padding does not stay zero
    for block in model.context_encoder.blocks:
        block.register_forward_pre_hook(lambda block, given: real.append(given[1].real))
        for layer in block.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.register_forward_pre_hook(
                    lambda layer, given: seen.append(given[0].detach()[: len(real[-1])][~real[-1]])
                )
    found = []
    for pixels in (PIXELS, 255 - PIXELS):
        model(packer(budget(), drop_path)(np.arange(6), pixels))
        found.append(seen[:])
        seen.clear()
    assert len(found[0]) == 16 and sum(map(len, found[0])) > 16 and any(rows.any() for rows in found[0])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("aligned", [False, True])
def test_layer_that_keeps_no_image_runs_on_padding(aligned):
    rates = layer_rates(4, 0.9)
    chosen = Budget.aligned((8, 8), rates, 16) if aligned else Budget.for_masks(RULE, (8, 8), 1, rates, granule=16)
    found = []
    for each in (None, chosen):
        model = IJEPA(SHAPE, seed=1)
        batch = Packer(RULE, (8, 8), 3, 12, 4, 0.9, each)(np.arange(1, 2), PIXELS[:1])
        assert not batch.drop_path_rows[3].lengths
        output = model(batch)
        output.loss.backward()
        assert not model.context_encoder.blocks[3].mlp.fc1.weight.grad.any()
        found.append((output.loss.item(), model.context_encoder.blocks[0].mlp.fc1.weight.grad))
    assert len(batch.drop_path_rows[3].index) % 16 == 0 < len(batch.drop_path_rows[3].index)
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-6)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-5, atol=1e-8)
