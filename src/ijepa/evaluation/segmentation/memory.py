"""What a segmentation protocol holds in memory, told before it runs: one that does not fit should not take hours to.

Beside what is counted here stand the encoder and what a forward pass takes.
"""

from ijepa.evaluation.segmentation.linear import KEPT
from ijepa.evaluation.segmentation.protocol import SegmentationProtocol
from ijepa.evaluation.segmentation.retrieval import KEYS, QUERIES


def planned_memory(
    protocol: SegmentationProtocol, *, support: int, samples: int, width: int, patch_size: int, classes: int
) -> dict[str, int]:
    """Return the bytes that one encoder's evaluation takes, by what takes them.

    Args:
        protocol: see `segmentation_protocol`.
        support, samples: training and test images.
        width: of a patch's features.
        patch_size: side of a patch in pixels.
        classes: number of them.
    """
    patches, pixels = (protocol.image_size // patch_size) ** 2, protocol.image_size**2
    batch = {"batch": protocol.batch * (4 * patches * width + 8 * pixels + 3 * pixels)}
    if protocol.method == "tokencut":
        return {**batch, "graph": 4 * 8 * patches**2}
    if protocol.method == "kmeans":
        rule, mask = protocol.kmeans, 1 if classes <= 255 else 4
        components = 2 * 4 * min(width, rule.components)  # twice: scikit-learn works on its own
        return {
            **batch,
            "features": 4 * samples * patches * width,
            "components": samples * patches * components,
            "masks": mask * samples * rule.mask_size**2,
        }
    if protocol.method == "linear":
        kept = support * (2 * patches * width + 8 * pixels)
        return {**batch, "kept": kept if kept <= KEPT else 0}
    bound = (protocol.retrieval if protocol.method == "retrieval" else protocol.hummingbird).bank_patches
    each = patches if bound is None else min(patches, max(1, bound // support))
    label = patch_size**2 * (1 if classes <= 256 else 4)
    entry = 4 * width + label if protocol.method == "retrieval" else 2 * (width + classes)
    search = 4 * QUERIES * KEYS + 8 * width * KEYS
    return {**batch, "bank": support * each * entry, "search": search}


def told(planned: dict[str, int]) -> str:
    """Return a plan in words: the sum, and its parts of at least a tenth."""
    total = sum(planned.values())
    parts = ", ".join(f"{name} {bytes_ / 1e9:.2f}" for name, bytes_ in planned.items() if 10 * bytes_ >= total)
    return f"about {total / 1e9:.2f} GB of memory ({parts})"
