"""The packed model against the slow, obvious one: loss and every gradient."""

import numpy as np
import pytest
import torch

from ijepa.masking.masks import MaskRule, draw_masks
from ijepa.masking.packing import draw_drop_path, pack
from ijepa.model.config import EncoderConfig, ModelConfig, PredictorConfig
from ijepa.model.ijepa import IJEPA, skill_of
from tests.helpers.models import randomized
from tests.reference.dense import baseline_of, loss_of, normalized, target_of


def shape_of(**changes) -> ModelConfig:
    encoder = {"width": 32, "depth": 3, "heads": 4, **changes.pop("encoder", {})}
    return ModelConfig(
        image_size=changes.pop("image_size", (64, 64)),
        patch_size=8,
        encoder=EncoderConfig(**encoder),
        predictor=PredictorConfig(width=16, depth=changes.pop("predictor_depth", 3), heads=2),
        **changes,
    )


def case(shape: ModelConfig, images: int = 5, seed: int = 3):
    positions = np.arange(images)
    masks = draw_masks(MaskRule(min_context=4), shape.grid, seed, positions)
    keep = draw_drop_path(seed, positions, shape.encoder.depth, shape.encoder.drop_path)
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (images, 3, *shape.image_size), dtype=np.uint8))
    return masks, keep, pixels


@pytest.mark.parametrize(
    "shape",
    [
        shape_of(),
        shape_of(image_size=(64, 96)),
        shape_of(encoder={"drop_path": 0.6, "depth": 4, "position_scale": 0.25}),
        shape_of(predictor_depth=1),
    ],
    ids=["plain", "oblong", "stochastic depth", "shallow predictor"],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-6)])
def test_loss_and_gradients_agree_with_the_reference(shape, dtype, tolerance):
    masks, keep, pixels = case(shape)
    model = randomized(shape, dtype)
    slow = loss_of(model, shape, pixels, masks.context, masks.targets, keep, global_batch=8)
    slow.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    batch = pack(masks, pixels, 8, keep)
    fast = model(batch).loss
    fast.backward()
    assert fast.item() == pytest.approx(slow.item(), rel=max(tolerance, 1e-6))
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() >= wanted.keys()
    for name, gradient in found.items():
        gap = (gradient - wanted.get(name, torch.zeros_like(gradient))).abs().max().item()
        assert gap < tolerance * max(1.0, wanted[name].abs().max().item()) if name in wanted else gap == 0, name
    assert not any(name.startswith("target_encoder") for name in found)


def test_outputs_of_micro_batches_sum_to_those_of_the_batch():
    shape = shape_of(encoder={"drop_path": 0.5})
    masks, keep, pixels = case(shape, images=6)
    model = randomized(shape)
    whole = model(pack(masks, pixels, 6, keep))
    whole.loss.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    parts = []
    for start in range(0, 6, 2):
        some = slice(start, start + 2)
        cut = type(masks)(masks.context[some], masks.targets[some], masks.grid)
        output = model(pack(cut, pixels[some], 6, keep[some]))
        output.loss.backward()
        parts.append(output)
    for name in ("loss", "baseline", "target_sums", "position_sums"):
        total = sum(getattr(part, name) for part in parts)
        torch.testing.assert_close(total, getattr(whole, name), rtol=1e-12, atol=1e-12)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-10, atol=1e-13)


def test_target_encoder_stays_in_eval_mode_and_without_gradient():
    model = IJEPA(shape_of())
    model.train()
    assert model.training and model.context_encoder.training and not model.target_encoder.training
    assert not any(p.requires_grad for p in model.target_encoder.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_baseline_agrees_with_the_reference(dtype):
    """The baseline of skill, and the sums of targets from which its mean is computed."""
    shape = shape_of(image_size=(64, 96))
    masks, keep, pixels = case(shape)
    model = randomized(shape, dtype)
    with torch.no_grad():
        model.position_mean.normal_(generator=torch.Generator().manual_seed(1))
        output = model(pack(masks, pixels, 8, keep))
    wanted = baseline_of(model, shape, pixels, masks.targets, global_batch=8)
    assert output.baseline.item() == pytest.approx(wanted.item(), rel=1e-5 if dtype == torch.float32 else 1e-6)
    weights = dict(model.target_encoder.named_parameters())
    targets = [target_of(weights, shape, normalized(image).to(dtype)) for image in pixels]
    torch.testing.assert_close(output.position_sums, torch.stack(targets).sum(0), rtol=1e-4, atol=1e-5)


class Fixed(torch.nn.Module):
    """A predictor that knows the prediction of every patch of every image, (B, N, D)."""

    def __init__(self, predictions: torch.Tensor) -> None:
        super().__init__()
        self.predictions = predictions.flatten(0, 1)

    def forward(self, context: torch.Tensor, batch) -> torch.Tensor:
        return self.predictions[batch.targets.index]


def test_skill_of_the_position_mean_is_zero_and_of_the_targets_one():
    """The predictions are computed by the reference: its targets (B, N, D) and their mean over images (N, D)."""
    shape = shape_of()
    masks, keep, pixels = case(shape)
    model = randomized(shape)
    weights = dict(model.target_encoder.named_parameters())
    targets = torch.stack([target_of(weights, shape, normalized(image)) for image in pixels])
    mean = targets.mean(0)
    model.position_mean = mean
    batch = pack(masks, pixels, 5, keep)

    def skill(predictions: torch.Tensor) -> float:
        model.predictor = Fixed(predictions)
        with torch.no_grad():
            output = model(batch)
        return skill_of(output.loss, output.baseline).item()

    assert skill(mean.expand_as(targets)) == pytest.approx(0, abs=1e-9)
    assert skill(targets) == pytest.approx(1, abs=1e-9)
    assert skill(torch.zeros_like(targets)) < -0.1
    assert 0.1 < skill((mean + targets) / 2) < 0.9
