"""The samples of a shard, read with Python's tarfile, all members in memory."""

import tarfile
from pathlib import Path


def samples(path: Path) -> list[dict[str, bytes]]:
    """Return the samples in the order of their images: {"name", "jpg" (for any suffix), "cls", "json", "mask.png"}."""
    runs: list[tuple[str, dict[str, bytes]]] = []
    with tarfile.open(path) as tar:
        for member in tar:
            folder, _, base = member.name.rpartition("/")
            stem, _, field = base.partition(".")
            if not member.isreg() or not stem:
                continue
            key, field = f"{folder}/{stem}", field.lower()
            field = "jpg" if field in ("jpg", "jpeg", "png", "webp") else field
            if not runs or key != runs[-1][0] or field in runs[-1][1]:
                runs.append((key, {}))
            fields = runs[-1][1]
            fields[field] = tar.extractfile(member).read()
            if field == "jpg":
                fields["name"] = member.name.encode()
    for key, fields in runs:
        own = [other for name, other in runs if name == key and "jpg" in other]
        if "jpg" not in fields and len(own) == 1:
            for field, data in fields.items():
                own[0].setdefault(field, data)
    return [fields for _, fields in runs if "jpg" in fields]
