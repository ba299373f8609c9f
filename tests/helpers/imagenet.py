"""Small tars in the form of ImageNet's archives."""

import io
import tarfile
from pathlib import Path

from tests.helpers.images import write_tar

WNIDS = ("n01440764", "n01443537", "n02085620")


def tar(members: list[tuple[str, bytes]]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def class_tar(wnid: str, count: int) -> bytes:
    return tar([(f"{wnid}_{i}.JPEG", f"{wnid} {i}".encode() * (i + 1) * 90) for i in range(count)])


def write_train(path: Path) -> Path:
    return write_tar(path, [(f"{wnid}.tar", class_tar(wnid, i + 2)) for i, wnid in reversed([*enumerate(WNIDS)])])
