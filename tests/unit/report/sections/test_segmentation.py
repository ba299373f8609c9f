import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ijepa.data.loading.crop import Box, crop_resize
from ijepa.data.loading.decode import decode
from ijepa.data.open import open_dataset
from ijepa.report.feature_figures import SegmentationSettings, segment
from ijepa.report.run_data import read_run_data
from ijepa.report.run_images import RunImages
from ijepa.report.sections.segmentation import SegmentationSection, segmentation_section
from tests.helpers.encoders import MeanColor, block_mask, write_pairs


def section(run: Path) -> SegmentationSection:
    data = read_run_data(run)
    return segmentation_section(data, RunImages(data, None))


@pytest.fixture
def sparse(run: Path, tmp_path: Path) -> Path:
    """The run, but its segmentation has masks with the labels 0, 5, 10 and 15, 21 classes, and a list of images."""
    file = run / "evaluations" / "segmentation-demo.json"
    result = json.loads(file.read_text())
    for role, first, count in (("train", 0, 6), ("test", 100, 5)):
        root = write_pairs(tmp_path / role, [5 * block_mask(first + i) for i in range(count)])
        result["data"][role] = {"n": count, "path": str(root)}
    (tmp_path / "names.txt").write_text("001\n003\n")
    result["data"]["test"] |= {"n": 2, "list": str(tmp_path / "names.txt")}
    result["protocol"] |= {"classes": 21, "interpolation": "bicubic"}
    file.write_text(json.dumps(result))
    return run


def test_segmentation_section_has_the_settings_and_images_of_the_evaluation(sparse: Path) -> None:
    found = section(sparse)
    wanted = SegmentationSettings(48, "bicubic", k=3, distance="l2", classes=21)
    assert found.settings == {"trained": wanted, "random": wanted} and found.clusters == 21
    rows = dict(found.masks.rows)
    assert len(rows["truth"]) == 2, "of the images in the list"


def test_segmentation_section_prefers_a_result_by_nearest_patches(sparse: Path, tmp_path: Path) -> None:
    """Another result comes first by name, but has clusters only, of other images and classes."""
    clustered = json.loads((sparse / "evaluations" / "segmentation-demo.json").read_text())
    clustered["protocol"] = {"name": "aaa", "image_size": 16, "ignore": [255], "classes": 4}
    clustered["data"] |= {"train": {"n": 0}, "test": {"n": 5, "path": str(tmp_path / "gone")}}
    clustered["rows"] = [{"encoder": name, "miou": 0.5} for name in ("trained", "random")]
    (sparse / "evaluations" / "segmentation-aaa.json").write_text(json.dumps(clustered))
    found = section(sparse)
    assert found.settings["trained"].image_size == 48 and len(found.masks.rows[0][1]) == 2


def test_segmentation_section_of_an_older_result_without_these_settings(run: Path) -> None:
    assert section(run).settings["trained"].interpolation == "bilinear"


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_segment_resizes_images_by_the_interpolation(tmp_path: Path, interpolation: Any) -> None:
    train = open_dataset(write_pairs(tmp_path / "train", [block_mask(i) for i in range(6)]))
    test = open_dataset(write_pairs(tmp_path / "test", [block_mask(100 + i) for i in range(4)]))
    found = segment(MeanColor(), train, test, [2, 0], SegmentationSettings(48, interpolation, k=3))
    for picture, index in zip(found.images, (2, 0), strict=True):
        wanted = crop_resize(decode(test.image(index)), Box(0, 0, 32, 32), (48, 48), interpolation)
        np.testing.assert_array_equal(picture, wanted.permute(1, 2, 0).numpy())
