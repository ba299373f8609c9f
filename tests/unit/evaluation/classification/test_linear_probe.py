from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from ijepa.config.recipe import ModelSection
from ijepa.data.loading.shuffle import sample_indices
from ijepa.evaluation.classification.compare import Origin, Split
from ijepa.evaluation.classification.linear_probe import (
    FLATTERED,
    LabeledImages,
    StepPlan,
    edge_notes,
    edge_of,
    evaluate_linear,
    make_groups,
    probe,
    rate_factor,
    train_heads,
)
from ijepa.evaluation.features.loaders import CachedLoader
from ijepa.evaluation.protocols import LinearProtocol, load_protocol
from ijepa.evaluation.results.schema import ResultRow
from ijepa.model.encoder import FrozenEncoder
from ijepa.utils.errors import UserError
from tests.helpers.feature_clouds import clouds, color_sets
from tests.reference import classifiers


def protocol(**fields):
    defaults = {"name": "toy", "blocks": (1,), "lrs": (3e-3,), "weight_decays": (0.0,), "batch": 64, "epochs": 20}
    return LinearProtocol(**{**defaults, **fields})


def test_train_heads_agrees_with_the_reference():
    split = clouds(n=90, m=10, width=6, classes=3)
    rule = protocol(
        batch=32, steps=25, epochs=99, warmup=0.2, standardize=False, lrs=(1e-3, 5e-2), weight_decays=(0.0, 0.3)
    )
    kept = np.arange(90)
    (group,) = groups = make_groups(split, kept, rule, seed=4)
    for _ in train_heads(groups, CachedLoader(split), LabeledImages.of(split, "train"), rule, seed=4):
        pass
    order = sample_indices(4, np.arange(25 * 32), 90).reshape(25, 32)
    factors = [min(step / 5, (1 + np.cos(np.pi * (step - 6) / 20)) / 2 if step > 5 else 1) for step in range(1, 26)]
    x, y = split.train_x[:, 0].double().numpy(), split.train_y.numpy()
    for head, (lr, decay) in enumerate([(1e-3, 0.0), (1e-3, 0.3), (5e-2, 0.0), (5e-2, 0.3)]):
        rates = [lr * 32 / 256 * factor for factor in factors]
        weight, bias = classifiers.adamw_head(x, y, 3, order, rates, decay, rule.betas, eps=1e-8)
        np.testing.assert_allclose(group.heads.weight[head].detach().numpy(), weight, atol=2e-5)
        np.testing.assert_allclose(group.heads.bias[head].detach().numpy(), bias, atol=2e-5)


def test_probe_agrees_with_logistic_regression():
    split = clouds(n=4000, m=4000, width=16, spread=0.5)
    rule = protocol(batch=500, epochs=60, lrs=(3e-3, 3e-2))
    found = probe(split, rule, seed=0)
    scaler = StandardScaler().fit(split.train_x.flatten(1).float())
    other = LogisticRegression(C=1e4, max_iter=1000)
    other.fit(scaler.transform(split.train_x.flatten(1).float()), split.train_y)
    expected = other.score(scaler.transform(split.test_x.flatten(1).float()), split.test_y)
    assert 0.5 < expected < 0.97
    assert found["top1"] == pytest.approx(expected, abs=0.003)
    low, high = found["ci"]
    assert low < found["top1"] < high
    assert found["top5"] == 1.0


def test_probe_with_weight_decay_agrees_with_penalized_logistic_regression():
    """Weight decay of SGD is part of the gradient, so both minimize mean loss + decay / 2 |W|^2."""
    split, decay = clouds(n=400, m=4000, width=64, spread=0.2), 0.02
    rule = protocol(
        optimizer="sgd", batch=200, epochs=200, lrs=(0.5,), weight_decays=(decay,), warmup=0.02, selection="test"
    )
    kept: list[torch.Tensor] = []
    found = probe(split, rule, seed=0, keep=lambda *head: kept.extend(head))
    scaler = StandardScaler().fit(split.train_x.flatten(1).float())
    train, test = (scaler.transform(x.flatten(1).float()) for x in (split.train_x, split.test_x))
    expected, loose = (
        LogisticRegression(C=c, max_iter=2000, tol=1e-8).fit(train, split.train_y) for c in (1 / (400 * decay), 1e4)
    )
    assert found["top1"] == pytest.approx(expected.score(test, split.test_y), abs=0.003)
    assert expected.score(test, split.test_y) > loose.score(test, split.test_y) + 0.02, "the penalty matters"
    weight = kept[0].numpy() * scaler.scale_  # on standardized features; logits have a free constant
    assert np.abs(weight - weight.mean(0) - expected.coef_).max() < 0.02 * np.abs(expected.coef_).max()


def test_probe_chooses_the_head_on_held_out_images_only():
    """Wrong test labels change the accuracy, but not the chosen head."""
    split = clouds(n=600, m=200, blocks=4, spread=0.2)
    rule = protocol(blocks=(1, 4), lrs=(1e-5, 1e-2), weight_decays=(0.0, 0.1))
    row = probe(split, rule, seed=0)
    wrong = probe(replace(split, test_y=(split.test_y + 1) % 5), rule, seed=0)
    assert row["head"] == wrong["head"]
    assert row["held_out"] == wrong["held_out"]
    assert row["top1"] > wrong["top1"]
    assert row["head"]["blocks"] == 4, "four blocks hold four times as much here"


def test_probe_of_shuffled_labels_and_of_noise_is_at_chance():
    split = clouds(n=2000, m=2000, classes=4)
    # Labels of both sets: else all test images of a cloud would be correct or wrong together.
    mixed, other = (torch.randperm(2000, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    shuffled = replace(split, train_y=split.train_y[mixed], test_y=split.test_y[other])
    noise = torch.randn(4000, 1, 24, generator=torch.Generator().manual_seed(2))
    random = replace(split, train_x=noise[:2000], test_x=noise[2000:])
    for without in (shuffled, random):
        row = probe(without, protocol(), seed=0)
        low, high = row["ci"]
        assert row["top1"] == pytest.approx(0.25, abs=0.04)
        assert low <= 0.25 <= high
    assert probe(split, protocol(), seed=0)["top1"] > 0.95


def test_probe_depends_on_the_seed_only():
    split = clouds(n=500, m=300, spread=0.25)
    assert probe(split, protocol(), seed=1) == probe(split, protocol(), seed=1)
    assert probe(split, protocol(), seed=1) != probe(split, protocol(), seed=2)


def test_selection_on_the_test_set_gives_better_results():
    """Labels are noise: the best of many heads on the test set is better than a held-out choice."""
    noise = torch.randn(600, 1, 24, generator=torch.Generator().manual_seed(2)).half()
    y = torch.arange(600) % 4
    split = Split(noise[:400], y[:400], noise[400:], y[400:], 4, None)
    lrs, decays = tuple(np.geomspace(1e-5, 1, 12)), (0.0, 0.3)
    rows = {
        rule: probe(split, protocol(lrs=lrs, weight_decays=decays, selection=rule, epochs=5), seed=0)
        for rule in ("held-out", "test", "test-epochs")
    }
    assert rows["held-out"]["top1"] < rows["test"]["top1"] <= rows["test-epochs"]["top1"]
    assert "held_out" not in rows["test"]
    assert 1 <= rows["test-epochs"]["head"]["epoch"] <= 5
    assert rows["test"]["heads"] == 24


def test_rate_factor_falls_at_milestones():
    rule = protocol(warmup=0, milestones=(15, 30, 45))
    factors = [rate_factor(1 + epoch, 50, rule, epoch=epoch) for epoch in (0, 14, 15, 29, 30, 45, 49)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.001, 0.001])


def test_rate_factor_of_capi_is_two_linspaces():
    """As in eval_classification.py: warm-up from 0 to the peak, cosine from the peak to 0, both ends included."""
    rule, steps, warmup = load_protocol("linear", "capi"), 12500, 1250
    found = [rate_factor(step, steps, rule, epoch=0) for step in range(1, steps + 1)]
    cosine = (1 + np.cos(np.linspace(0, np.pi, steps - warmup))) / 2
    np.testing.assert_allclose(found, np.concatenate([np.linspace(0, 1, warmup), cosine]), atol=1e-12)


def test_rate_factor_of_mae_depends_on_the_epoch():
    rule, epoch = load_protocol("linear", "mae"), 78
    for step in (1, 2, 400, 780, 781, 3000, 7020):
        done = (step - 1) / epoch  # epochs before the step
        expected = done / 10 if done < 10 else (1 + np.cos(np.pi * (done - 10) / 80)) / 2
        assert rate_factor(step, 90 * epoch, rule, epoch=done) == pytest.approx(expected, abs=1e-12)


def test_rate_factor_of_very_short_schedules_is_a_share():
    for ramp in ("open", "from-zero", "closed"):
        for steps in (1, 2, 3):
            rule = protocol(ramp=ramp, warmup=0.4)
            assert all(0 <= rate_factor(step, steps, rule, epoch=0) <= 1 for step in range(1, steps + 1))


@pytest.mark.parametrize(
    ("last_batch", "expected"),
    [
        ("wrap", [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15], [16, 17, 18, 19]]),
        ("keep", [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [10, 11, 12, 13], [14, 15, 16, 17], [18, 19]]),
        ("drop", [[0, 1, 2, 3], [4, 5, 6, 7], [10, 11, 12, 13], [14, 15, 16, 17]]),
    ],
)
def test_step_plan_at_the_end_of_an_epoch(last_batch, expected):
    """Ten images, batches of four, two epochs: the second epoch has the positions 10 to 19."""
    rule = protocol(batch=4, epochs=2, steps=None, last_batch=last_batch)
    plan = StepPlan.of(10, rule)
    assert [plan.positions(step).tolist() for step in range(1, plan.steps + 1)] == expected
    split = clouds(n=10, m=10)
    groups = make_groups(split, np.arange(10), rule, seed=0)
    ends = list(train_heads(groups, CachedLoader(split), LabeledImages.of(split, "train"), rule, seed=0))
    assert ends == [1, 2]
    assert StepPlan.of(3, rule).positions(1).tolist() == [0, 1, 2], "a set that is smaller than a batch"


def test_edge_of_a_grid():
    grid = (1e-3, 0.01, 0.1)
    assert edge_of({0.1}, grid) == "highest"
    assert edge_of({1e-3}, grid) == "lowest"
    assert edge_of({0.01}, grid) is None
    assert edge_of({0.01, 0.1}, grid) is None, "a head inside the grid is as good"
    assert edge_of({0.1}, (0.01, 0.1)) is None, "a grid of two rates has no inside"


def test_edge_notes_name_encoders_and_rate(tmp_path: Path):
    rows = [ResultRow(encoder=name, head={"lr": 0.1, "edge": "highest"}) for name in "ac"]
    rows.insert(1, ResultRow(encoder="b", head={"lr": 0.01}))
    (note,) = edge_notes(rows)
    assert (
        note == "the head chosen for a, c has the highest learning rate of the grid, 0.1; a wider grid may score higher"
    )
    split, slow, fits, diverges = clouds(n=600, m=200), (1e-7, 1e-6), (0.3,), (1e38, 2e38)
    for lrs, edge in ((slow + fits, "highest"), (fits + diverges, "lowest"), (slow + fits + diverges, None)):
        rule = protocol(lrs=lrs, initial_std=1.0)  # the slow heads stay at random
        assert probe(split, rule, seed=0)["head"].get("edge") == edge
    train, test = color_sets(tmp_path)
    result = evaluate_linear({"toy": Color()}, train, test, protocol(lrs=(1e-9, 1e-8, 1e-7)))
    assert list(result.notes) == edge_notes(result.rows)


@pytest.mark.parametrize("rule", ["held-out", "test-epochs"])
def test_probe_reads_train_batches_by_position(rule):
    """A loader that returns cached features gives the same heads; each position is read once."""
    split = clouds(n=200, m=100, spread=0.3)
    asked: list[np.ndarray] = []

    class Views(CachedLoader):
        def train_batch(self, positions, numbers):
            asked.append(positions)
            return super().train_batch(positions, numbers).float()

    settings = protocol(selection=rule, epochs=3)
    assert probe(split, settings, seed=0) == probe(split, settings, seed=0, loader=Views(split))
    everything = np.concatenate(asked)
    assert (everything == np.arange(len(everything))).all()
    assert len(everything) >= 3 * 180


class Color:
    """Mean color of patches; `seen` holds all inputs."""

    embed_dim, patch_size, grid = 3, 16, (2, 2)

    def __init__(self):
        self.seen: list[torch.Tensor] = []

    def forward_blocks(self, pixels, last):
        self.seen.append(pixels)
        return [torch.nn.functional.avg_pool2d(pixels.float() / 255, 16).flatten(2).transpose(1, 2)] * last

    def __call__(self, pixels):
        return self.forward_blocks(pixels, 1)[0]


def test_augmented_probe_runs_the_encoder_once_for_all_heads(tmp_path: Path):
    train, test = color_sets(tmp_path)
    few = protocol(augment=True, standardize=False, epochs=4.0, batch=10)
    many = few.model_copy(update={"blocks": (1, 2), "norms": ("none", "batch"), "lrs": (1e-2, 1e-1, 1.0)})
    counted = []
    for rule in (few, many):
        encoder = Color()
        result = evaluate_linear({"toy": encoder}, train, test, rule)
        counted.append(sum(map(len, encoder.seen)))
    assert counted[0] == counted[1], "images that the encoder processed"
    (row,) = result.rows
    assert row["heads"] == 12
    assert row["top1"] > 0.8, "three colors"
    views = torch.cat(encoder.seen[2:]).flatten(1)
    assert len(torch.unique(views, dim=0)) > 0.9 * len(views), "crops differ"
    again = evaluate_linear({"toy": Color()}, train, test, rule)
    assert again.rows == result.rows
    assert FLATTERED not in result.notes
    rule = rule.model_copy(update={"selection": "test"})
    assert FLATTERED in evaluate_linear({"toy": Color()}, train, test, rule).notes


def test_interpolation_applies_to_random_and_center_crops(tmp_path: Path):
    train, test = color_sets(tmp_path)
    seen = []
    for interpolation in ("bilinear", "bicubic"):
        encoder = Color()
        rule = protocol(augment=True, standardize=False, epochs=1, batch=60, image_size=48, interpolation=interpolation)
        evaluate_linear({"toy": encoder}, train, test, rule)
        seen.append(encoder.seen)
    assert sum(len(pixels) > 1 for pixels in seen[0]) == 3, (
        "random and center crops of the train set, center crops of the test set"
    )
    for bilinear, bicubic in zip(*seen, strict=True):
        assert len(bilinear) == 1 or (bilinear.float() - bicubic.float()).abs().mean() > 1


def test_center_crops_of_the_train_set_are_computed_only_to_choose_a_head(tmp_path: Path):
    train, test = color_sets(tmp_path)
    rule = protocol(augment=True, standardize=False, epochs=1, batch=60)
    made = {}
    for selection in ("held-out", "test", "test-epochs"):
        encoder = Color()
        settings = rule.model_copy(update={"selection": selection, "norms": ("batch",)})
        result = evaluate_linear({"toy": encoder}, train, test, settings)
        assert result.rows[0]["heads"] == 1
        made[selection] = sum(len(pixels) for pixels in encoder.seen if len(pixels) > 1)
    assert made["test"] == made["test-epochs"] == 60 + len(test)
    assert made["held-out"] == 54 + len(train) + len(test)


def test_attentive_probe_reads_patches(tmp_path: Path):
    train, test = color_sets(tmp_path)
    rule = load_protocol("linear", "attentive").model_copy(
        update={"lrs": (0.5,), "batch": 10, "epochs": 10.0, "attention_heads": 1, "selection": "test"}
    )
    results = [evaluate_linear({"toy": Color()}, train, test, rule) for _ in range(2)]
    (row,) = results[0].rows
    assert row["top1"] > 0.6, "chance is 1 / 3"
    assert results[1].rows == (row,)
    assert results[0].notes == (), "with one head nothing is chosen"


def test_linear_protocol_refuses_settings_that_contradict():
    for fields, where in (
        ({"norms": ("batch",)}, "norms = ['batch']"),
        ({"clip": 1.0}, "clip = 1.0"),
        ({"head": "query", "blocks": (1, 4)}, "head = query"),
    ):
        with pytest.raises(UserError) as err:
            protocol(**fields)
        assert err.value.where == where


def test_make_groups_takes_the_number_of_attention_heads_from_the_encoder(tmp_path: Path):
    train, test = color_sets(tmp_path)
    shape = ModelSection(image_size=32, patch_size=8, encoder={"width": 64, "depth": 1, "heads": 4})
    places = np.arange(len(train))
    origin = Origin(FrozenEncoder.initial(shape, 0), train, test, places, np.arange(len(test)), (32, 32))
    split = replace(clouds(classes=3), origin=origin)
    for name, count in (("attentive", 4), ("capi-attentive", 1)):
        (group,) = make_groups(split, places, load_protocol("linear", name), seed=0)
        assert {head.attention_heads for head in group.heads.heads} == {count}
