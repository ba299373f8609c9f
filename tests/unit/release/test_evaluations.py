from pathlib import Path

import pytest

from ijepa.evaluation.run import evaluate
from ijepa.interop.weights import resolve_weights
from ijepa.release.evaluations import data_name, released_results


def test_released_results_are_those_of_the_released_weights(run: Path, scenes: Path) -> None:
    sets = (f"{scenes}/train-*.tar", f"{scenes}/val-*.tar")
    (run / "other.yaml").write_text("base: demo\nname: other\nneighbors: [5]\nk: 5\n")
    folder, earlier = run / "evaluations", min((run / "checkpoints").iterdir())
    assert earlier.name != "step-00000008"
    evaluate("knn", str(earlier), *sets, protocol=str(run / "other.yaml"), output=folder, baselines=False)
    evaluate("knn", str(run), *sets, protocol="demo", which="context", output=folder, baselines=False)
    released, others = released_results(resolve_weights(run), sorted(folder.glob("*.json")))
    assert others == ["knn-other.json"]
    assert [each.result.protocol_name for each in released] == ["small", "demo"]  # the target encoder comes first
    assert [each.encoders for each in released] == [{"trained": "target"}, {"trained": "context"}]
    assert [row.encoder for row in released[0].rows] == ["trained", "random", "pixels"]
    (entry,) = [entry for each in released for entry in each.index_entries()]
    assert entry["task"] == {"type": "image-classification", "name": "knn, protocol small"}


@pytest.mark.parametrize(
    ("path", "name"), [("a/scenes/train-*.tar", "scenes"), ("a/b.tar", "b.tar"), (None, "unknown"), ("*", "unknown")]
)
def test_data_name_is_the_last_part_that_is_not_a_pattern(path: str | None, name: str) -> None:
    assert data_name(path) == name
