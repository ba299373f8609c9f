import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ijepa.masking.masks import MaskRule, block_sizes, draw_masks
from ijepa.utils.random import Stream, random_bits, uniform
from tests.reference import masks as slow

sides = st.integers(6, 32)


@settings(max_examples=60, deadline=None)
@given(height=sides, width=sides, seed=st.integers(0, 2**62), start=st.integers(0, 2**50))
def test_draw_masks_gives_disjoint_rectangles_and_enough_context_on_every_grid(height, width, seed, start):
    rule = MaskRule(min_context=4)
    masks = draw_masks(rule, (height, width), seed, np.arange(start, start + 32))
    assert not (masks.context & masks.targets.any(1)).any(), "the context holds a target patch"
    assert masks.context.sum(1).min() >= rule.min_context, "the context is too short"
    sizes = masks.targets.sum(2)
    assert (sizes[:, 0] > 0).all(), "an image lost all its targets"
    for block in masks.targets.reshape(-1, height, width):
        rows, columns = np.flatnonzero(block.any(1)), np.flatnonzero(block.any(0))
        assert block.sum() == len(rows) * len(columns), "a target is not a rectangle"
        assert len(rows) == 0 or (np.ptp(rows) + 1, np.ptp(columns) + 1) == (len(rows), len(columns))


@settings(max_examples=25, deadline=None)
@given(height=sides, width=sides, seed=st.integers(0, 2**62), least=st.integers(1, 12))
def test_draw_masks_agrees_with_the_slow_reference(height, width, seed, least):
    rule = MaskRule(min_context=min(least, height * width // 4))
    masks = draw_masks(rule, (height, width), seed, np.arange(8))
    for position in range(8):
        context, targets = slow.draw(rule, (height, width), seed, position)
        assert np.flatnonzero(masks.context[position]).tolist() == context
        found = [np.flatnonzero(block).tolist() for block in masks.targets[position]]
        assert [block for block in found if block] == targets


def test_draw_masks_removes_targets_if_the_rule_leaves_too_little_context():
    """If 16 draws leave too little context, the last targets are removed; the reference agrees on which."""
    rule = MaskRule(targets=12, target_scale=(0.3, 0.4), min_context=18)
    masks = draw_masks(rule, (8, 8), 0, np.arange(60))
    removed = (masks.targets.sum(2) == 0).sum(1)
    assert (masks.context.sum(1) >= 18).all() and (removed > 0).any() and (removed < 12).all()
    for position in range(60):
        context, targets = slow.draw(rule, (8, 8), 0, position)
        assert np.flatnonzero(masks.context[position]).tolist() == context
        assert [np.flatnonzero(b).tolist() for b in masks.targets[position] if b.any()] == targets


@pytest.mark.parametrize(("grid", "found"), [((3, 3), False), ((4, 4), False), ((6, 6), True), ((6, 32), True)])
def test_has_target_block(grid, found):
    assert MaskRule().has_target_block(grid) == found


@pytest.mark.parametrize("grid", [(6, 6), (14, 14), (8, 12)])
def test_largest_target_and_smallest_context_bound_all_draws(grid):
    rule = MaskRule(min_context=1)
    masks = draw_masks(rule, grid, 0, np.arange(3000))
    assert masks.targets.sum(2).max() == rule.largest_target(grid)
    blocks = masks.context.sum(1) + masks.targets.any(1).sum(1)  # at least the context block
    assert blocks.min() >= rule.smallest_context(grid) >= 0.7 * grid[0] * grid[1]


def test_block_sizes_round_values_that_fill_their_bounds_independently():
    draw = random_bits(0, Stream.MASK, np.arange(20000), 2)
    share, aspect = 0.15 + 0.05 * uniform(draw[:, 0]), 0.75 + 0.75 * uniform(draw[:, 1])
    high, wide = np.sqrt(share * aspect) * 14, np.sqrt(share / aspect) * 14
    area, ratio = high * wide / 196, high / wide
    assert area.min() >= 0.15 - 1e-12 and area.max() <= 0.2 + 1e-12 and np.ptp(area) > 0.0499
    assert ratio.min() >= 0.75 - 1e-12 and ratio.max() <= 1.5 + 1e-12 and np.ptp(ratio) > 0.749
    assert abs(np.corrcoef(area, ratio)[0, 1]) < 0.02
    found = block_sizes(draw[:, 0], draw[:, 1], (0.15, 0.2), (0.75, 1.5), (14, 14))
    assert np.array_equal(found[0], np.rint(high)) and np.array_equal(found[1], np.rint(wide))
    outside = (found[0] * found[1] / 196 < 0.15) | (found[0] * found[1] / 196 > 0.2)
    assert 0.05 < outside.mean() < 0.2  # rounding leaves the bounds for about a tenth of blocks


@pytest.fixture(scope="module")
def many():
    return draw_masks(MaskRule(), (14, 14), 0, np.arange(20000))


def test_draw_masks_mean_lengths(many):
    """89.7 context patches and 34.2 patches per target block, measured independently; sd 18 over 20,000 draws."""
    assert many.context.sum(1).mean() == pytest.approx(89.7, abs=0.5)
    assert many.context.sum(1).std() == pytest.approx(18, abs=0.6)
    assert many.targets.sum(2).mean() == pytest.approx(34.2, abs=0.15)


def test_draw_masks_uses_every_patch_including_the_border(many):
    context = many.context.mean(0).reshape(14, 14)
    target = many.targets.any(1).mean(0).reshape(14, 14)
    assert context.min() > 0.1 and target.min() > 0.02
    for frequency in (context, target):
        for flipped in (frequency[::-1], frequency[:, ::-1]):
            assert np.abs(frequency - flipped).max() < 0.03, "the frequency is not symmetric"
    assert np.abs(context - context.T).max() < 0.05
    assert target[0].mean() == pytest.approx(target[-1].mean(), rel=0.1)
    assert target[:, 0].mean() == pytest.approx(target[:, -1].mean(), rel=0.1)


def test_draw_masks_varies_block_sizes_within_an_image_and_across_images(many):
    sizes = {(int(block.any(1).sum()), int(block.any(0).sum())) for block in many.targets.reshape(-1, 14, 14)}
    assert len(sizes) == 10, sizes  # all roundings of area 0.15 to 0.2 and aspect 0.75 to 1.5
    assert (np.ptp(many.targets.sum(2), axis=1) > 0).mean() > 0.9


def test_draw_masks_depends_on_seed_and_position_alone(many):
    some = draw_masks(MaskRule(), (14, 14), 0, [7, 19999, 3])
    assert np.array_equal(some.context, many.context[[7, 19999, 3]])
    assert np.array_equal(some.targets, many.targets[[7, 19999, 3]])
    assert not np.array_equal(draw_masks(MaskRule(), (14, 14), 1, [7]).context[0], many.context[7])
