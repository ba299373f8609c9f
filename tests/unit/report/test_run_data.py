import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ijepa.report.run_data import read_columns, read_record
from ijepa.utils.errors import UserError


def test_columns_have_a_place_for_every_row(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"step": 1, "a": 2}\n{"step": 2, "a": null, "b": 0.5, "words": "no"}\n{"step": 3, "void": true}\n')
    columns = read_columns(file)
    assert set(columns) == {"step", "a", "b", "void"}
    np.testing.assert_array_equal(columns["step"], [1, 2, 3])
    np.testing.assert_array_equal(columns["a"], [2, np.nan, np.nan])
    np.testing.assert_array_equal(columns["b"], [np.nan, 0.5, np.nan])
    np.testing.assert_array_equal(columns["void"], [np.nan, np.nan, 1])


def test_line_without_its_end_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"step": 1, "a": 2}\n{"step": 2, "a"')
    np.testing.assert_array_equal(read_columns(file)["step"], [1])


def test_missing_file_has_no_columns(tmp_path: Path) -> None:
    assert read_columns(tmp_path / "none.jsonl") == {}


@pytest.mark.parametrize("line", ["{step", "[1]", '{"loss": 1}'])
def test_line_that_is_no_row_is_refused_with_its_number(tmp_path: Path, line: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"step": 1}\n' + line + "\n")
    with pytest.raises(UserError, match=r"rows\.jsonl:2: "):
        read_columns(file)


def test_reads_the_whole_run(whole_run: Path) -> None:
    record = read_record(whole_run)
    assert [result.kind for result in record.results] == ["linear", "knn", "segmentation"]
    assert record.result("diagnosis", "knn") is record.results[1] and record.result("none") is None
    assert record.results[0].title == "Linear probe, protocol demo"
    context = replace(record.results[0], values={**record.results[0].values, "which": "context"})
    assert context.title == "Linear probe, protocol demo (context encoder)"
    assert record.results[0].row("random") == record.results[0].rows[1] and record.results[0].row("none") is None
    assert record.results[0].path("test") == record.results[1].path("test")
    assert np.isnan(record.metrics["loss"][20]) and record.metrics["void"][20] == 1


def test_foreign_json_among_evaluations_is_refused(run: Path) -> None:
    (run / "evaluations" / "notes.json").write_text(json.dumps({"kind": "notes"}))
    with pytest.raises(UserError, match=r"notes\.json: is no result"):
        read_record(run)
