"""The samples of a shard by the standard library's tarfile, all members in memory."""

import tarfile
from pathlib import Path


def samples(path: Path) -> list[dict[str, bytes]]:
    """In the order of their images: {"name", "jpg" (whatever the suffix), "cls", "json", "mask.png"}."""
    found: dict[str, dict[str, bytes]] = {}
    order: list[str] = []
    with tarfile.open(path) as tar:
        for member in tar:
            if not member.isreg():
                continue
            folder, _, base = member.name.rpartition("/")
            stem, _, field = base.partition(".")
            key, field = f"{folder}/{stem}", field.lower()
            data = tar.extractfile(member).read()
            sample = found.setdefault(key, {})
            if field in ("jpg", "jpeg", "png", "webp"):
                sample["jpg"], sample["name"] = data, member.name.encode()
                order.append(key)
            else:
                sample[field] = data
    return [found[key] for key in order]
