from pathlib import Path

from ijepa.cli.tables import comparison_table, result_table
from ijepa.evaluation.results.compare import compare_results
from ijepa.evaluation.results.schema import Data, EvaluationResult, ResultRow
from tests.helpers.results import write_result


def test_result_table_has_metrics_chance_notes_and_classes() -> None:
    rows = (
        ResultRow(encoder="trained", miou=0.5, k=3, per_class=[0.25, None]),
        ResultRow(encoder="pixels", miou=0.125, k=1, per_class=[0.75, None]),
    )
    result = EvaluationResult(
        kind="segmentation",
        level=1,
        protocol={"name": "capi"},
        precision="float32",
        data=Data(classes=("road", "car")),
        chance=0.2,
        rows=rows,
        notes=("a note",),
    )
    text = result_table(result)
    assert "segmentation, protocol capi, level 1, float32" in " ".join(text.split())
    assert "50.00" in text and "12.50" in text and "chance: 20.00" in text and "note: a note" in text
    (car,) = [line for line in text.splitlines() if "car" in line]
    assert car.count("-") == 2  # it occurs nowhere
    assert "IoU by class" not in result_table(
        result.model_copy(update={"rows": (ResultRow(encoder="a", miou=0.5),), "chance": None})
    )


def test_comparison_table_has_intervals_and_published_values(tmp_path: Path) -> None:
    first = write_result(tmp_path / "a.json", [{"encoder": "a", "top1": 0.5, "ci": [0.4, 0.6]}])
    second = write_result(tmp_path / "b.json", [{"encoder": "a", "top1": 0.7}], epochs=90, notes=["a note"])
    text = comparison_table(compare_results([first, second]))
    (row,) = [line for line in text.splitlines() if "a [a0123456]" in line]
    assert [cell.strip() for cell in row.split("│")[2:-1]] == ["50.00 (40.0 to 60.0)", "70.00", "-"]
    (row,) = [line for line in text.splitlines() if "I-JEPA ViT-H/14" in line]
    assert [cell.strip() for cell in row.split("│")[2:-1]] == ["-", "-", "79.3"]
    assert "b.json: a note" in text and "arXiv 2301.08243" in text
