import json
from typing import Any

import pytest

from ijepa.evaluation.results.schema import HEADLINE, METRIC_NAMES, EvaluationResult
from ijepa.utils.errors import UserError

CLASSIFICATION: dict[str, Any] = {
    "kind": "linear",
    "level": None,
    "protocol": {"name": "demo", "lrs": [0.1, 1.0]},
    "image_size": [64, 64],
    "seed": 0,
    "data": {
        "train": {"n": 60, "classes": 3, "fingerprint": "a", "path": "train", "list": "names.txt"},
        "test": {"n": 24, "classes": 3, "fingerprint": "b", "path": "test"},
        "classes": None,
    },
    "chance": 0.5,
    "rows": [
        {"encoder": "trained", "top1": 0.75, "top5": 1.0, "ci": [0.5, 0.9], "heads": 4, "head": {"lr": 0.1}},
        {"encoder": "pixels", "top1": 0.5, "top5": 1.0, "ci": [0.4, 0.6], "heads": 4, "head": {"lr": 1.0}},
    ],
    "versions": {"torch": "2"},
    "notes": ["a note"],
    "seconds": 1.25,
    "weights": {"trained": "run"},
    "weights_sha256": {"trained": "0", "pixels": "1"},
    "which": "context",
    "commit": None,
    "devices": ["a CPU"],
    "cpu": {"name": "a CPU"},
    "precision": "float32",
}
SEGMENTATION: dict[str, Any] = {
    "kind": "segmentation",
    "level": 0,
    "protocol": {"name": "demo-kmeans"},
    "seed": 0,
    "data": {
        "train": {"n": 0},
        "test": {"n": 24, "fingerprint": "b"},
        "classes": ["ground", "ring"],
        "labels": {},
        "labels_sha256": {},
    },
    "chance": 0.25,
    "rows": [{"encoder": "trained", "miou": 0.5, "ci": [0.25, 0.75], "per_class": [1.0, None]}],
    "versions": {},
    "seconds": 2.0,
    "weights": {"trained": "run"},
    "notes": [],
    "weights_sha256": {"trained": "0"},
    "which": "target",
    "devices": ["a CPU"],
    "cpu": {"name": "a CPU"},
    "precision": "float32",
}
DIAGNOSIS: dict[str, Any] = {"kind": "diagnosis", "data": {"images": 5}, "numbers": {"rankme": 9.5}, "verdict": "good"}


@pytest.mark.parametrize("values", [CLASSIFICATION, SEGMENTATION, DIAGNOSIS], ids=lambda values: values["kind"])
def test_to_json_returns_the_same_keys_in_the_same_order_as_from_json_read(values: dict[str, Any]) -> None:
    assert json.dumps(EvaluationResult.from_json(values).to_json()) == json.dumps(values)


def test_from_json_reads_files_without_later_keys_and_keeps_unknown_ones() -> None:
    values = {"kind": "knn", "rows": [{"encoder": "a", "top1": 0.5}], "new": {"x": 1}}
    result = EvaluationResult.from_json(values)
    assert result.to_json() == values
    assert (result.which, result.weights, result.data.of("test").path) == ("target", {}, None)


def test_properties_name_the_result_and_its_headline_metric() -> None:
    result = EvaluationResult.from_json(CLASSIFICATION)
    assert result.title == "Linear probe, protocol demo (context encoder)"
    assert (result.protocol_name, result.headline) == ("demo", "top1")
    assert result.data.of("train").list == "names.txt" and result.data.of("test").n == 24
    assert HEADLINE.keys() == {"linear", "knn", "segmentation", "propagation"}
    assert set(HEADLINE.values()) <= METRIC_NAMES.keys()


def test_row_separates_metrics_intervals_and_settings() -> None:
    row = EvaluationResult.from_json(CLASSIFICATION).row("trained")
    assert row is not None
    assert (row["top1"], row.get("miou"), row.ci, row.per_class) == (0.75, None, (0.5, 0.9), None)
    assert row.metrics == {"top1": 0.75, "top5": 1.0}
    assert row.settings == {"heads": 4, "head": {"lr": 0.1}}
    assert EvaluationResult.from_json(SEGMENTATION).rows[0].per_class == [1.0, None]
    assert EvaluationResult.from_json(SEGMENTATION).row("random") is None


@pytest.mark.parametrize(
    "values",
    [{"rows": []}, {"kind": "knn"}, {"kind": "knn", "rows": [{"top1": 1.0}]}, {"kind": "knn", "rows": 3}],
)
def test_from_json_refuses_what_is_not_a_result(values: dict[str, Any]) -> None:
    with pytest.raises(UserError) as err:
        EvaluationResult.from_json(values, "a.json")
    assert err.value.where == "a.json"
