"""The file of a result, chosen so that no result overwrites a different one.

The name is made of kind and protocol. A second evaluation of the same weights under that name, with other data, another
seed or another precision, gets a name with a hash of these settings. A result of other weights, such as an earlier
checkpoint, is moved to `earlier/`, so that the files in the folder itself are of the same weights.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from ijepa.evaluation.results.schema import EvaluationResult
from ijepa.utils.errors import UserError
from ijepa.utils.files import read_json

EARLIER = "earlier"


def read_result(file: Path) -> EvaluationResult:
    """Read the result of an evaluation.

    Raises:
        UserError: the file is missing, not JSON, or not a result.
    """
    return EvaluationResult.from_json(read_json(file), file)


def result_path(folder: Path, stem: str, result: EvaluationResult) -> Path:
    """Return the file for `result` in an existing folder, after moving a result of other weights out of its way.

    A file that is not a result may be overwritten.
    """
    file = folder / f"{stem}.json"
    try:
        existing = read_result(file)
    except UserError:
        return file
    if _weights(existing) != _weights(result):
        (folder / EARLIER).mkdir(exist_ok=True)
        file.replace(folder / EARLIER / f"{stem}-{_hash(_weights(existing), *_settings(existing))}.json")
    elif _settings(existing) != _settings(result):
        return folder / f"{stem}-{_hash(*_settings(result))}.json"
    return file


def _weights(result: EvaluationResult) -> dict[str, str]:
    """Return the hashes of the evaluated weights, without those of baselines."""
    return {name: sha for name, sha in result.weights_sha256.items() if name in (result.weights or {name})}


def _settings(result: EvaluationResult) -> list[Any]:
    """Return what distinguishes results of the same weights; not descriptions and paths of the same data."""
    values = result.to_json()
    protocol = {key: value for key, value in result.protocol.items() if key != "description"}
    data = {
        role: {key: value for key, value in part.items() if key != "path"} if isinstance(part, dict) else part
        for role, part in values.get("data", {}).items()
    }
    return [protocol, data, values.get("seed"), values.get("precision")]


def _hash(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]
