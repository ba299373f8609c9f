"""Memory that a segmentation protocol needs, reported before it runs, not counting the encoder and its forward pass."""

from ijepa.evaluation.segmentation.linear import CACHE_BYTES
from ijepa.evaluation.segmentation.protocol import SegmentationProtocol
from ijepa.evaluation.segmentation.retrieval import KEYS, QUERIES


def planned_memory(
    protocol: SegmentationProtocol, *, support: int, samples: int, width: int, patch_size: int, classes: int
) -> dict[str, int]:
    """Return the bytes that the evaluation of one encoder needs, by use.

    Args:
        protocol: the protocol.
        support, samples: numbers of training and test images.
        width: width of the features of a patch.
        patch_size: side of a patch in pixels.
        classes: number of classes.
    """
    patches, pixels = (protocol.image_size // patch_size) ** 2, protocol.image_size**2
    batch = {"batch": protocol.batch * (4 * patches * width + 8 * pixels + 3 * pixels)}
    if protocol.method == "tokencut":
        return {**batch, "graph": 4 * 8 * patches**2}
    if protocol.method == "kmeans":
        rule, mask = protocol.kmeans, 1 if classes <= 255 else 4
        components = 2 * 4 * min(width, rule.components)  # twice, because scikit-learn makes a copy
        return {
            **batch,
            "features": 4 * samples * patches * width,
            "components": samples * patches * components,
            "masks": mask * samples * rule.mask_size**2,
        }
    if protocol.method == "linear":
        kept = support * (2 * patches * width + 8 * pixels)
        return {**batch, "kept": kept if kept <= CACHE_BYTES else 0}
    retrieval = protocol.retrieval if protocol.method == "retrieval" else protocol.hummingbird
    limit = retrieval.bank_patches
    rows = support * (patches if limit is None else min(patches, max(1, limit // support)))
    label = patch_size**2 * (1 if classes <= 256 else 4)
    row = 4 * width + label if protocol.method == "retrieval" else 2 * (width + classes)
    search = 4 * QUERIES * KEYS + 8 * width * KEYS
    if retrieval.search == "faiss":  # float32 copies, one for each distance that is tried
        search = 4 * width * rows * (len(protocol.retrieval.distances) if protocol.method == "retrieval" else 1)
    return {**batch, "bank": rows * row, "search": search}


def describe_memory(planned: dict[str, int]) -> str:
    """Return planned memory as text: the sum, and the parts that are at least a tenth of it."""
    total = sum(planned.values())
    parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in planned.items() if 10 * size >= total)
    return f"about {total / 1e9:.2f} GB of memory ({parts})"
