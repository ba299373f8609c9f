from pathlib import Path

import numpy as np
import pytest

from ijepa.data.open import open_dataset
from ijepa.evaluation.segmentation.dataset import Classes, SegmentationDataset
from ijepa.evaluation.segmentation.patch_bank import PatchBank
from tests.helpers.encoders import MeanColor, block_mask, write_pairs


def test_extend_keeps_the_standardization(tmp_path: Path) -> None:
    train = open_dataset(write_pairs(tmp_path / "train", [block_mask(i) for i in range(20)]))
    classes = Classes(4, ("a", "b", "c", "d"), (255,))
    first, second = (
        SegmentationDataset(train, part, "--train", classes, 32, 32) for part in np.split(np.arange(20), 2)
    )
    bank = PatchBank(MeanColor(), first, images=20)
    np.testing.assert_allclose(bank.keys.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(bank.keys.std(0, correction=0), 1, atol=1e-5)
    mean, size = bank.mean.clone(), bank.nbytes
    bank.extend(second)
    assert len(bank) == 320
    assert (bank.mean == mean).all()
    assert bank.nbytes == size == 320 * (3 * 4 + 64)


@pytest.mark.parametrize("patches", [None, 30])
def test_patch_bank_is_standardized_by_all_patches_of_its_images(tmp_path: Path, patches: int | None) -> None:
    """Ignored patches and patches that a bank of limited size does not keep count too."""
    masks = [block_mask(i) for i in range(10)]
    for mask in masks:
        mask[:16] = 255
    source = open_dataset(write_pairs(tmp_path / "half", masks))
    classes = Classes(4, ("a", "b", "c", "d"), (255,))
    images = SegmentationDataset(source, np.arange(10), "--train", classes, 32, 32)
    bank = PatchBank(MeanColor(), images, images=10, patches=patches, batch=3)
    every = np.concatenate([x.flatten(0, 1) for x, _ in images.patch_features(MeanColor(), 3)])
    assert len(bank) < len(every) == 160
    np.testing.assert_allclose(bank.mean, every.mean(0), rtol=1e-5)
    np.testing.assert_allclose(1 / bank.scale, every.std(0), rtol=1e-5)
