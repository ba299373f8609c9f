import json
from pathlib import Path
from typing import Any

import pytest

from ijepa.evaluation.results.schema import EvaluationResult
from ijepa.evaluation.results.store import EARLIER, read_result, result_path
from ijepa.utils.errors import UserError


def result(**changed: Any) -> EvaluationResult:
    values = {
        "kind": "knn",
        "protocol": {"name": "p"},
        "data": {"test": {"fingerprint": "a"}},
        "seed": 0,
        "weights": {"trained": "run at step 8"},
        "weights_sha256": {"trained": "1", "random": "r"},
        "rows": [{"encoder": "trained", "top1": 0.5}],
    }
    return EvaluationResult.from_json({**values, **changed})


def store(folder: Path, values: EvaluationResult) -> str:
    file = result_path(folder, "knn-p", values)
    file.write_text(json.dumps(values.to_json()))
    return file.name


def test_result_path_of_the_same_evaluation_is_the_same(tmp_path: Path) -> None:
    assert [store(tmp_path, result(seconds=n)) for n in (1, 2)] == ["knn-p.json"] * 2
    assert store(tmp_path, result(weights_sha256={"trained": "1"})) == "knn-p.json"  # without the baselines
    moved = {"test": {"fingerprint": "a", "path": "another/path/of/it"}}
    assert store(tmp_path, result(data=moved)) == "knn-p.json"
    assert store(tmp_path, result(protocol={"name": "p", "description": "other words"})) == "knn-p.json"
    assert len(list(tmp_path.rglob("*.json"))) == 1


def test_result_path_of_other_data_seeds_and_settings_has_a_hash(tmp_path: Path) -> None:
    others = [result(seed=1), result(data={"test": {"fingerprint": "b"}}), result(protocol={"name": "p", "k": 2})]
    names = [store(tmp_path, each) for each in (result(), *others, *others)]
    assert names[0] == "knn-p.json" and len(set(names)) == 4 and names[1:4] == names[4:]
    assert all(name.startswith("knn-p") and (tmp_path / name).exists() for name in names)


def test_result_path_hash_does_not_change_between_versions(tmp_path: Path) -> None:
    store(tmp_path, result())
    assert store(tmp_path, result(seed=1)) == "knn-p-17ad316f.json"


def test_result_path_moves_a_result_of_other_weights(tmp_path: Path) -> None:
    first = result(notes=["first"])
    store(tmp_path, first)
    assert store(tmp_path, result(weights_sha256={"trained": "2", "random": "r"})) == "knn-p.json"
    (moved,) = (tmp_path / EARLIER).iterdir()
    assert read_result(moved) == first
    assert [file.name for file in tmp_path.glob("*.json")] == ["knn-p.json"]


def test_result_path_overwrites_a_file_that_is_not_a_result(tmp_path: Path) -> None:
    (tmp_path / "knn-p.json").write_text("{half")
    assert result_path(tmp_path, "knn-p", result()).name == "knn-p.json" and not (tmp_path / EARLIER).exists()
    with pytest.raises(UserError):
        read_result(tmp_path / "knn-p.json")
