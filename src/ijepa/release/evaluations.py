"""The evaluations on a model card: those of the released weights, which their hash identifies.

The folder of a run may also have results of an earlier checkpoint. A row is on the card if the hash of its weights is
that of a released encoder, or if it is a baseline in the same result.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from ijepa.evaluation.features.extract import weights_hash
from ijepa.evaluation.results.compare import COMPARED
from ijepa.evaluation.results.schema import METRIC_NAMES, EvaluationResult, ResultRow
from ijepa.evaluation.results.store import read_result
from ijepa.interop.weights import Weights, Which, load_encoder
from ijepa.utils.names import printable


@dataclass(frozen=True)
class ReleasedResult:
    """A result, and which encoder of the release each of its rows is; baselines are not in `encoders`."""

    result: EvaluationResult
    encoders: dict[str, Which]

    @property
    def rows(self) -> list[ResultRow]:
        """Rows of released encoders and of baselines, without those of other weights."""
        others = set(self.result.weights) - set(self.encoders)
        return [row for row in self.result.rows if row.encoder not in others]

    @property
    def metrics(self) -> dict[str, str]:
        """Names of the metrics on the card, by key."""
        return {key: METRIC_NAMES[key] for key in COMPARED if any(key in row.metrics for row in self.rows)}

    def index_entries(self) -> list[dict[str, Any]]:
        """Return the entry of the target encoder in the hub's index, if there is one."""
        row = next((row for row in self.rows if self.encoders.get(row.encoder) == "target"), None)
        if row is None:
            return []
        metrics = [
            {"type": "accuracy" if key == "top1" else key, "name": f"{name} (%)", "value": round(100 * row[key], 2)}
            for key, name in self.metrics.items()
            if key in row.metrics
        ]
        result = self.result
        task = {
            "type": "image-segmentation" if result.kind == "segmentation" else "image-classification",
            "name": f"{result.kind}, protocol {result.protocol_name}",
        }
        data = data_name(result.data.test.path)
        return [{"task": task, "dataset": {"type": data, "name": data}, "metrics": metrics}]


def released_results(found: Weights, files: Sequence[Path]) -> tuple[list[ReleasedResult], list[str]]:
    """Return the results of released weights, target encoder first, and the names of the other files.

    Raises:
        UserError: a file is not a result.
    """
    results = {file: read_result(file) for file in files}
    # Before training, both encoders are equal; then the target encoder, which comes last here, has the hash.
    hashes = {weights_hash(load_encoder(found.folder, w)): w for w in reversed(get_args(Which))} if files else {}
    released, others = [], []
    for file, result in results.items():
        digests = result.weights_sha256
        encoders = {name: hashes[digests[name]] for name in result.weights if digests.get(name) in hashes}
        if encoders:
            released.append(ReleasedResult(result, encoders))
        else:
            others.append(file.name)
    released.sort(key=lambda each: "target" not in each.encoders.values())
    return released, others


def data_name(path: object) -> str:
    """Return the printable name of data at a path: its last part that is not a pattern of files."""
    parts = [part for part in Path(str(path or "unknown")).parts if not set(part) & set("*?[{")]
    return printable(parts[-1]) if parts else "unknown"
