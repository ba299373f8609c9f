import json
from pathlib import Path

import numpy as np
import pytest

from ijepa.report.run_data import read_columns, read_run_data
from ijepa.utils.errors import UserError


def test_read_columns_has_a_value_for_every_row(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"step": 1, "a": 2}\n{"step": 2, "a": null, "b": 0.5, "words": "no"}\n{"step": 3, "void": true}\n')
    columns = read_columns(file)
    assert set(columns) == {"step", "a", "b", "void"}
    np.testing.assert_array_equal(columns["step"], [1, 2, 3])
    np.testing.assert_array_equal(columns["a"], [2, np.nan, np.nan])
    np.testing.assert_array_equal(columns["b"], [np.nan, 0.5, np.nan])
    np.testing.assert_array_equal(columns["void"], [np.nan, np.nan, 1])


def test_read_columns_leaves_out_a_last_line_without_a_line_break(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"step": 1, "a": 2}\n{"step": 2, "a"')
    np.testing.assert_array_equal(read_columns(file)["step"], [1])


def test_read_columns_of_a_missing_file_is_empty(tmp_path: Path) -> None:
    assert read_columns(tmp_path / "none.jsonl") == {}


@pytest.mark.parametrize("line", ["{step", "[1]", '{"loss": 1}'])
def test_read_columns_refuses_a_line_that_is_not_a_row_with_its_number(tmp_path: Path, line: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"step": 1}\n' + line + "\n")
    with pytest.raises(UserError) as err:
        read_columns(file)
    assert err.value.where == f"{file}:2"


def test_read_run_data_reads_logs_and_results(whole_run: Path) -> None:
    data = read_run_data(whole_run)
    assert [result.kind for result in data.results] == ["linear", "knn", "segmentation"]
    assert data.result("diagnosis", "knn") is data.results[1] and data.result("none") is None
    assert np.isnan(data.metrics["loss"][20]) and data.metrics["void"][20] == 1


def test_read_run_data_refuses_other_json_files_among_the_results(run: Path) -> None:
    (run / "evaluations" / "notes.json").write_text(json.dumps({"kind": "notes"}))
    with pytest.raises(UserError) as err:
        read_run_data(run)
    assert err.value.where.endswith("notes.json")
