import json
from pathlib import Path
from typing import Any

import pytest

from ijepa.data.open import open_dataset
from ijepa.evaluation.protocols import KINDS, presets
from ijepa.evaluation.results.compare import COMPARED, Comparison, compare_results, published
from ijepa.evaluation.segmentation.evaluate import evaluate_segmentation
from ijepa.evaluation.segmentation.protocol import SegmentationProtocol
from ijepa.utils.errors import UserError
from tests.helpers.encoders import MeanColor, block_mask, write_pairs
from tests.helpers.results import write_result


def values(comparison: Comparison, row: str) -> list[list[float]]:
    """Return the values of a row, column by column."""
    return [[cell.percent for cell in comparison.cells.get((row, column), [])] for column in comparison.columns]


def columns(*files: Path, **options: bool) -> int:
    return len(compare_results(files, **options).columns)


def test_results_share_a_column_only_if_protocol_and_data_are_equal(tmp_path: Path) -> None:
    first = write_result(tmp_path / "a.json", [{"encoder": "a", "top1": 0.5, "ci": [0.4, 0.6]}], epochs=50)
    same = write_result(tmp_path / "b.json", [{"encoder": "b", "top1": 0.6}], epochs=50, notes=["chosen on test"])
    settings = write_result(tmp_path / "c.json", [{"encoder": "a", "top1": 0.7}], epochs=90)
    data = write_result(tmp_path / "d.json", [{"encoder": "a", "top1": 0.8}], epochs=50, fingerprint="g")
    assert columns(first, same, with_published=False) == 1
    assert columns(first, settings, with_published=False) == 2
    assert columns(first, data, with_published=False) == 2
    comparison = compare_results([first, same, settings, data], with_published=False)
    assert list(comparison.rows) == ["a [a0123456]", "b [b0123456]"]
    assert values(comparison, "a [a0123456]") == [[50], [70], [80]]
    assert next(iter(comparison.cells.values()))[0].ci == (40, 60)
    assert comparison.notes == ["b.json: chosen on test"]


def test_results_of_a_label_map_with_other_classes_have_another_column(tmp_path: Path) -> None:
    train, test = (
        open_dataset(write_pairs(tmp_path / name, [block_mask(i) for i in (1, 2, 3, 4)[:count]]))
        for name, count in (("a", 4), ("b", 3))
    )
    rule = {"name": "r", "method": "retrieval", "image_size": 32, "retrieval": {"neighbors": [1]}}
    protocol = SegmentationProtocol.read({**rule, "labels": str(tmp_path / "map.yaml")}, "r")
    files = []
    for number, classes in enumerate(("{a: 0, b: 1, c: 2, d: 3}", "{a: [0, 1], b: [2, 3]}", "{a: [0, 2], b: [1, 3]}")):
        (tmp_path / "map.yaml").write_text(f"name: own\nclasses: {classes}\n")
        result = evaluate_segmentation({"toy": MeanColor()}, train, test, protocol)
        assert set(result.data.labels_sha256) == {"train", "test"}
        files.append(tmp_path / f"{number}.json")
        files[-1].write_text(json.dumps(result.to_json()))
    assert columns(files[0], files[0]) == 1
    comparison = compare_results(files)
    heads = [" ".join(head) for head in comparison.columns.values()]
    assert ["4 classes" in head for head in heads] == [True, False, False]


def test_published_results_have_a_column_and_a_source(tmp_path: Path) -> None:
    comparison = compare_results([write_result(tmp_path / "a.json", [{"encoder": "mine", "top1": 0.793}])])
    assert len(comparison.columns) == 2
    assert values(comparison, "I-JEPA ViT-H/14 (published)") == [[], [79.3]]
    assert any("arXiv 2301.08243" in note for note in comparison.notes)
    assert not any("DINOv2" in row for row in comparison.rows)  # published by another protocol


def test_only_compared_metrics_have_columns(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"encoder": "mine", "miou": 0.1, "miou_overclustered": 0.2, "pixel_accuracy": 0.9}]
    file = write_result(tmp_path / "a.json", rows, kind="segmentation", name="kmeans")
    assert columns(file, with_published=False) == 2


def test_published_results_are_of_existing_protocols() -> None:
    for entry in published():
        assert entry.kind in KINDS
        assert entry.protocol in presets(entry.kind)
        assert entry.figure in COMPARED
        assert entry.source
        assert all(0 < value < 100 for value in entry.values.values())


def test_compare_results_refuses_files_without_a_result(tmp_path: Path) -> None:
    with pytest.raises(UserError) as err:
        compare_results([])
    assert err.value.where == "compare"
    (tmp_path / "a.json").write_text('{"kind": "diagnosis"}')
    (tmp_path / "c.json").write_text('{"kind": "diagnosis", "numbers": {"rankme": 1.0}}')
    for name in ("a", "b", "c"):
        with pytest.raises(UserError) as err:
            compare_results([tmp_path / f"{name}.json"])
        assert err.value.where == str(tmp_path / f"{name}.json")
