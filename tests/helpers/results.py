"""Files of evaluation results."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write_result(
    file: Path,
    rows: Sequence[dict[str, Any]],
    *,
    kind: str = "linear",
    name: str = "ijepa",
    fingerprint: str = "f",
    notes: Sequence[str] = (),
    **settings: Any,
) -> Path:
    """Write a result with the given rows and settings of the protocol."""
    encoders = [str(row["encoder"]) for row in rows]
    values = {
        "kind": kind,
        "protocol": {"name": name, "description": file.stem, **settings},
        "data": {"train": {"n": 5, "fingerprint": "t"}, "test": {"n": 9, "fingerprint": fingerprint, "path": "a/val"}},
        "weights_sha256": {encoder: f"{encoder}0123456789" for encoder in encoders},
        "rows": list(rows),
        "notes": list(notes),
    }
    file.write_text(json.dumps(values))
    return file
