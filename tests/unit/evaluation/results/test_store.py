"""No result takes the place of another: other data and seeds beside it, other weights' earlier ones aside."""

import json
from pathlib import Path
from typing import Any

from ijepa.evaluation.results.store import EARLIER, file_for


def result(**changed: Any) -> dict[str, Any]:
    plain = {
        "protocol": {"name": "p"},
        "data": {"test": {"fingerprint": "a"}},
        "seed": 0,
        "weights": {"trained": "run at step 8"},
        "weights_sha256": {"trained": "1", "random": "r"},
        "rows": [],
    }
    return {**plain, **changed}


def filed(folder: Path, what: dict[str, Any]) -> str:
    file = file_for(folder, "knn-p", what)
    file.write_text(json.dumps(what))
    return file.name


def test_the_same_evaluation_again_takes_its_own_place(tmp_path):
    assert [filed(tmp_path, result(seconds=n)) for n in (1, 2)] == ["knn-p.json"] * 2
    assert filed(tmp_path, result(weights_sha256={"trained": "1"})) == "knn-p.json"  # without the baselines
    elsewhere = {"test": {"fingerprint": "a", "path": "another/way/to/it"}}
    assert filed(tmp_path, result(data=elsewhere)) == "knn-p.json"
    assert filed(tmp_path, result(protocol={"name": "p", "description": "other words"})) == "knn-p.json"
    assert len(list(tmp_path.rglob("*.json"))) == 1


def test_other_data_and_seeds_stand_beside_it(tmp_path):
    others = [result(seed=1), result(data={"test": {"fingerprint": "b"}}), result(protocol={"name": "p", "k": 2})]
    names = [filed(tmp_path, each) for each in (result(), *others, *others)]
    assert names[0] == "knn-p.json" and len(set(names)) == 4 and names[1:4] == names[4:]
    assert all(name.startswith("knn-p") and (tmp_path / name).exists() for name in names)


def test_a_result_of_other_weights_is_put_aside(tmp_path):
    first = result(rows=["first"])
    filed(tmp_path, first)
    assert filed(tmp_path, result(weights_sha256={"trained": "2", "random": "r"})) == "knn-p.json"
    (kept,) = (tmp_path / EARLIER).iterdir()
    assert json.loads(kept.read_text()) == first
    assert [file.name for file in tmp_path.glob("*.json")] == ["knn-p.json"]


def test_what_is_no_result_is_written_over(tmp_path):
    (tmp_path / "knn-p.json").write_text("{half")
    assert file_for(tmp_path, "knn-p", result()).name == "knn-p.json" and not (tmp_path / EARLIER).exists()
