"""Images that are looked at: what cannot be read gives way to what can, the same every time and never twice."""

from pathlib import Path

import pytest
import torch

from ijepa.data.open import open_source
from ijepa.evaluation.features.sampling import crops, readable_crops
from ijepa.utils.errors import RunError
from tests.helpers.encoders import block_mask, write_pairs


def folder(root: Path, broken: set[int]) -> Path:
    images = write_pairs(root, [block_mask(i, 48) for i in range(8)]) / "images"
    for index, file in enumerate(sorted(images.iterdir())):
        if index in broken:
            file.write_bytes(file.read_bytes()[:40])
    return images


def test_an_unreadable_image_gives_way_to_the_next_that_is_not_taken(tmp_path: Path) -> None:
    source = open_source(folder(tmp_path, {2, 7}))
    pixels, chosen = readable_crops(source, [1, 2, 3, 7], (48, 48))
    assert chosen.tolist() == [1, 4, 3, 0]  # 2 becomes 4, for 3 is taken; 7, the last, the first
    assert torch.equal(pixels, crops(source, [1, 4, 3, 0], (48, 48)))
    with pytest.raises(RunError, match=source.name(2)):
        crops(source, [1, 2, 3, 7], (48, 48))


def test_where_none_is_left_the_batch_is_smaller(tmp_path: Path) -> None:
    source = open_source(folder(tmp_path, {0, 1, 5}))
    _, chosen = readable_crops(source, range(8), (48, 48))
    assert chosen.tolist() == [2, 3, 4, 6, 7]


def test_a_source_without_a_readable_image_fails(tmp_path: Path) -> None:
    source = open_source(folder(tmp_path, set(range(8))))
    with pytest.raises(RunError, match="none of the 8 images can be decoded"):
        readable_crops(source, [3, 5], (48, 48))
