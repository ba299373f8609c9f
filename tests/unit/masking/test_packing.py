"""Packed batches against plain lists."""

import numpy as np
import pytest
import torch

from ijepa.masking.masks import MaskRule, draw_masks
from ijepa.masking.packing import Packer, draw_drop_path, layer_rates, pack

PIXELS = torch.zeros(6, 3, 64, 64, dtype=torch.uint8)


def packed(drop_path=0.0, rule=None):
    rule = rule or MaskRule(min_context=4)
    masks = draw_masks(rule, (8, 8), 1, np.arange(6))
    return masks, pack(masks, PIXELS, 16, draw_drop_path(1, np.arange(6), 4, drop_path), range(6))


def pieces(sequences):
    return [part.tolist() for part in sequences.index.split(list(sequences.lengths))]


@pytest.mark.parametrize("rule", [None, MaskRule(targets=12, target_scale=(0.3, 0.4), min_context=18)])
def test_pack_gives_the_indices_of_plain_lists(rule):
    masks, batch = packed(rule=rule)
    context = [[64 * i + int(p) for p in np.flatnonzero(row)] for i, row in enumerate(masks.context)]
    blocks = [
        (i, [64 * i + int(p) for p in np.flatnonzero(block)])
        for i, image in enumerate(masks.targets)
        for block in image
        if block.any()
    ]
    assert pieces(batch.context) == context
    assert pieces(batch.targets) == [patches for _, patches in blocks]
    rows = [*[p for image in context for p in image], *[p for _, patches in blocks for p in patches]]
    for (image, patches), sequence, queries in zip(blocks, pieces(batch.predictor), pieces(batch.queries), strict=True):
        assert [rows[row] for row in sequence] == context[image] + patches
        assert [rows[batch.predictor.index[q]] for q in queries] == patches
    for sequences in (batch.context, batch.targets, batch.predictor, batch.queries):
        assert sequences.cu_seqlens.tolist() == [0, *np.cumsum(sequences.lengths)]
        assert sequences.cu_seqlens.dtype == torch.int32 and sequences.longest == max(sequences.lengths)


@pytest.mark.parametrize("rule", [None, MaskRule(targets=12, target_scale=(0.3, 0.4), min_context=18)])
def test_pack_weighs_images_and_their_blocks_equally(rule):
    _masks, batch = packed(rule=rule)
    shares = [float(part.sum()) for part in batch.loss_weight.split(list(batch.targets.lengths))]
    image = [part[0] // 64 for part in pieces(batch.targets)]
    for number in range(6):
        mine = [share for share, i in zip(shares, image, strict=True) if i == number]
        assert sum(mine) == pytest.approx(1 / 16) and max(mine) == pytest.approx(min(mine))


def test_draw_drop_path_keeps_whole_images_at_linear_rates():
    assert layer_rates(5, 0.4) == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    keep = draw_drop_path(0, np.arange(20000), 5, 0.4)
    assert 1 - keep.mean(0) == pytest.approx([0, 0.1, 0.2, 0.3, 0.4], abs=0.012)
    assert abs(np.corrcoef(keep[:, 3], keep[:, 4])[0, 1]) < 0.03
    assert draw_drop_path(0, [1, 2], 5, 0.0) is None
    _masks, batch = packed(drop_path=0.7)
    drawn = draw_drop_path(1, np.arange(6), 4, 0.7)
    for layer, column in zip(batch.drop_path_rows, drawn.T, strict=True):
        if column.all():
            assert layer is None
        else:
            images = torch.arange(len(batch.context.index)).split(list(batch.context.lengths))
            assert pieces(layer) == [rows.tolist() for rows, kept in zip(images, column, strict=True) if kept]


def test_packer_depends_on_positions_alone():
    packer = Packer(MaskRule(min_context=4), (8, 8), 3, 16, 4, 0.5)
    whole, part = packer(np.arange(6), PIXELS), packer(np.arange(2, 4), PIXELS[:2])
    cut = [[p - 128 for p in image] for image in pieces(whole.context)[2:4]]
    assert pieces(part.context) == cut
    assert part.positions == (2, 3)


def test_batch_map_and_to_reach_every_tensor():
    _, batch = packed(drop_path=0.7)
    double = batch.map(lambda t: t.double() if t.is_floating_point() else t)
    assert double.loss_weight.dtype == torch.float64 and double.positions == batch.positions
    moved = batch.to("meta")
    assert moved.pixels.is_meta and moved.predictor.index.is_meta
    assert all(rows is None or rows.index.is_meta for rows in moved.drop_path_rows)
