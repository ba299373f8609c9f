import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ijepa.data.loading.crop import Box, crop_resize
from ijepa.data.loading.decode import decode
from ijepa.data.open import open_source
from ijepa.report import image_sections
from ijepa.report.feature_figures import Panels, segment
from ijepa.report.markup import Part, Section
from ijepa.report.material import Images, load_encoders
from ijepa.report.run_data import read_record
from tests.helpers.encoders import MeanColour, block_mask, write_pairs
from tests.helpers.images import write_tar


def section(run: Path) -> Part:
    record = read_record(run)
    return image_sections.segmentation_section(record, Images(record, None), load_encoders(record))


@pytest.fixture
def gaps(run: Path, tmp_path: Path) -> Path:
    """The run, whose segmentation was of masks with the labels 0, 5, 10 and 15, 21 classes, and of listed images."""
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


def test_panels_follow_the_protocol(gaps: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []

    def recorded(*args: Any, **settings: Any) -> Panels:
        given.append(settings)
        return segment(*args, **settings)

    monkeypatch.setattr(image_sections, "segment", recorded)
    part = section(gaps)
    assert isinstance(part, Section)
    assert "21 clusters" in part.body
    assert part.body.count('alt="truth, ') == 2, "of the images listed"
    assert len(given) == 2
    for settings in given:
        assert (settings["image_size"], settings["classes"], settings["interpolation"]) == (48, 21, "bicubic")
        assert (settings["k"], settings["distance"]) == (3, "l2")


def test_sets_and_settings_are_of_one_evaluation(gaps: Path, tmp_path: Path) -> None:
    """One that looked labels up is followed, though another stands first, of other images and classes."""
    clustered = json.loads((gaps / "evaluations" / "segmentation-demo.json").read_text())
    clustered["protocol"] = {"name": "aaa", "image_size": 16, "ignore": [255], "classes": 4}
    clustered["data"] |= {"train": {"n": 0}, "test": {"n": 5, "path": str(tmp_path / "gone")}}
    clustered["rows"] = [{"encoder": name, "miou": 0.5} for name in ("trained", "random")]
    (gaps / "evaluations" / "segmentation-aaa.json").write_text(json.dumps(clustered))
    part = section(gaps)
    assert isinstance(part, Section) and "48 × 48" in part.body and part.body.count('alt="truth, ') == 2


def test_an_older_result_without_these_settings_has_panels(run: Path) -> None:
    assert isinstance(section(run), Section)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_panels_are_resized_as_asked(tmp_path: Path, interpolation: Any) -> None:
    train = open_source(write_pairs(tmp_path / "train", [block_mask(i) for i in range(6)]))
    test = open_source(write_pairs(tmp_path / "test", [block_mask(100 + i) for i in range(4)]))
    panels = segment(MeanColour(), train, test, [2, 0], image_size=48, interpolation=interpolation, k=3)
    for picture, index in zip(panels.images, (2, 0), strict=True):
        wanted = crop_resize(decode(test.image(index)), Box(0, 0, 32, 32), (48, 48), interpolation)
        np.testing.assert_array_equal(picture, wanted.permute(1, 2, 0).numpy())


def test_a_label_beyond_the_named_classes_is_shown_as_a_number(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("a.jpg", b"1"), ("a.cls", b"0"), ("b.jpg", b"2"), ("b.cls", b"999999999")])
    (tmp_path / "classes.txt").write_text("cat\n")
    source = open_source(tmp_path)
    assert [image_sections._called(source, index) for index in (0, 1)] == [
        "a.tar/a.jpg, cat",
        "a.tar/b.jpg, class 999999999",
    ]
