"""Where a result is filed, so that none takes the place of another.

A result is called after its kind and protocol. A second evaluation of the same weights under that name, on other data,
with another seed or in another precision, is filed beside the first, its name longer by a hash of what differs. A
result of other weights, as of an earlier checkpoint, is moved to `earlier/`: what lies in the folder itself is of one
encoder.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

EARLIER = "earlier"


def file_for(folder: Path, stem: str, result: Mapping[str, Any]) -> Path:
    """Return the file for `result`, after moving one of other weights out of its way; the folder is there."""
    file = folder / f"{stem}.json"
    there = _read(file)
    if there is None or (_same(there, result, "weights_sha256") and _same(there, result, *_WHAT)):
        return file
    if _same(there, result, "weights_sha256"):
        return folder / f"{stem}-{_hash(result, *_WHAT)}.json"
    (folder / EARLIER).mkdir(exist_ok=True)
    file.replace(folder / EARLIER / f"{stem}-{_hash(there, 'weights_sha256', *_WHAT)}.json")
    return file


_WHAT = ("protocol", "data", "seed", "precision")
"""What makes a result of the same weights another one."""


def _read(file: Path) -> dict[str, Any] | None:
    """Return the result that a file holds, None where there is none; what is no result may be written over."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "rows" in found else None


def _same(one: Mapping[str, Any], other: Mapping[str, Any], *keys: str) -> bool:
    return all(_plain(one, key) == _plain(other, key) for key in keys)


def _plain(result: Mapping[str, Any], key: str) -> Any:
    """Return what stands under `key` as far as it decides a result: not how a set's path was written, nor words."""
    value = result.get(key)
    if key == "data" and isinstance(value, dict):
        value = {role: _without(of, "path") for role, of in value.items()}
    if key == "protocol":
        value = _without(value, "description")
    if key == "weights_sha256" and isinstance(value, dict):
        value = {name: sha for name, sha in value.items() if name in result.get("weights", value)}
    return json.loads(json.dumps(value))


def _without(value: Any, name: str) -> Any:
    return {key: each for key, each in value.items() if key != name} if isinstance(value, dict) else value


def _hash(result: Mapping[str, Any], *keys: str) -> str:
    text = json.dumps([_plain(result, key) for key in keys], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
