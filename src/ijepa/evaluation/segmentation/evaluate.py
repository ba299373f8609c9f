"""Segmentation of a labelled set by frozen patch features: five methods, one form of result.

Every encoder meets the same images, the same masks, the same held-out part and the same clusters' seeds. Results say
their level: 0 where labels only score (`clustering`, and
`tokencut`, for which all classes are one foreground), 1 where a labelled support set is looked up (`retrieval`,
`hummingbird`), 2 where a linear layer is trained on it (`linear_segmentation`). The memory is what the features take:
of the clustered test patches at level 0, of the bank at level 1; both are in the result, and told beforehand
(`segmentation_memory`).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ijepa.data.sources.base import Source
from ijepa.distributed.process_group import SINGLE_PROCESS, World
from ijepa.evaluation.features.extract import Encoder, Progress
from ijepa.evaluation.features.sampling import choose, hold_out
from ijepa.evaluation.metrics.bootstrap import miou_interval
from ijepa.evaluation.metrics.iou import Confusion
from ijepa.evaluation.segmentation.clustering import (
    by_precision,
    collect,
    hungarian,
    kmeans,
    reduced,
    require_extra,
    scored,
)
from ijepa.evaluation.segmentation.dataset import Annotated, Classes, find_classes, patch_features
from ijepa.evaluation.segmentation.hummingbird import SoftBank
from ijepa.evaluation.segmentation.linear import train_layer
from ijepa.evaluation.segmentation.memory import planned_memory, told
from ijepa.evaluation.segmentation.patch_bank import PatchBank
from ijepa.evaluation.segmentation.protocol import SegmentationProtocol
from ijepa.evaluation.segmentation.retrieval import vote, whole_masks
from ijepa.evaluation.segmentation.tokencut import cut_set
from ijepa.utils.environment import versions
from ijepa.utils.errors import UserError
from ijepa.utils.random import Stream, random_bits


def evaluate_segmentation(
    encoders: Mapping[str, Encoder],
    train: Source | None,
    test: Source,
    protocol: SegmentationProtocol,
    *,
    seed: int,
    cache: Path | None = None,
    progress: Progress | None = None,
    ranks: World = SINGLE_PROCESS,
) -> dict[str, Any]:
    """Evaluate encoders by one protocol.

    Args:
        encoders: by the name that their row shall have.
        train: the support set; level 0 has none.
        test: the set that is scored.
        protocol: see `segmentation_protocol`.
        seed: chooses images, the held-out part and k-means' starts.
        cache: not used: patch features of a set are larger than the set, and reading them no faster than making them.
        progress: told one line an encoder, with the memory it takes.
        ranks: the processes that share the forward passes; each holds all that is made of them.

    Returns:
        `{"kind", "level", "protocol", "seed", "data", "chance", "rows", "versions", "seconds"}`, a row an encoder with
        `miou`, `ci` (its 95 % interval, `bootstrap`), `miou_absent_zero`, `pixel_accuracy`, `per_class` (None where a
        class is not there) and the method's own. `chance` is the mIoU of giving every pixel the commonest class.

    Raises:
        UserError: masks missing or not matching their images, labels out of range, a size the patch does not divide,
            the same set to look up and to score.
        RunError: an image cannot be decoded, or features are not finite.
    """
    begun = time.perf_counter()
    sets = _sets(train, test, protocol)
    _check(encoders, sets, protocol)
    classes = find_classes(sets, protocol.classes, protocol.ignore, protocol.labels)
    mask_size = protocol.kmeans.mask_size if protocol.method == "kmeans" else protocol.image_size
    size, most = protocol.image_size, {"--train": protocol.train_images, "--test": _tested(encoders, protocol)}
    used = {
        flag: Annotated(
            source,
            choose(len(source), most[flag] or len(source), seed),
            flag,
            size,
            mask_size,
            ranks,
            protocol.interpolation,
        )
        for source, flag in sets
    }
    samples, support = used["--test"], used.get("--train", used["--test"])
    rows, confusion = [], Confusion(classes.count, classes.ignore)
    for name, encoder in encoders.items():
        if progress is not None:
            planned = planned_memory(
                protocol,
                support=len(support),
                samples=len(samples),
                width=encoder.embed_dim,
                patch_size=encoder.patch_size,
                classes=classes.count,
            )
            progress(f"segmentation: {name}: {told(planned)}")
        row, confusion = _METHODS[protocol.method](encoder, support, samples, classes, protocol, seed)
        rows.append({"encoder": name, **row})
        if not confusion.counts.any():
            raise UserError("--test", "no pixel of its masks is scored", "check its label map, or `ignore`")
    return {
        "kind": "segmentation",
        "level": protocol.level,
        "protocol": protocol.model_dump(mode="json", exclude=protocol.others),
        "seed": seed,
        "data": {
            "train": {"n": 0},
            **{flag.lstrip("-"): {"n": len(x), "fingerprint": x.source.fingerprint} for flag, x in used.items()},
            "classes": ["ground", "foreground"] if protocol.method == "tokencut" else list(classes.names),
            "labels": {flag.lstrip("-"): labels.name for flag, labels in classes.maps.items()},
            "labels_sha256": {flag.lstrip("-"): labels.sha256 for flag, labels in classes.maps.items()},
        },
        "chance": confusion.miou_constant,  # from the truth alone: the same for every encoder
        "rows": rows,
        "versions": {**versions(), "sklearn": version("scikit-learn")} if protocol.level == 0 else versions(),
        "seconds": round(time.perf_counter() - begun, 2),
    }


def _by_retrieval(
    encoder: Encoder,
    support: Annotated,
    samples: Annotated,
    classes: Classes,
    protocol: SegmentationProtocol,
    seed: int,
) -> tuple[dict[str, Any], Confusion]:
    rule = protocol.retrieval
    held = hold_out(support.indices, rule.held_out, seed)
    kept, chosen_on = replace(support, indices=support.indices[~held]), replace(support, indices=support.indices[held])
    bank = PatchBank(
        encoder,
        kept,
        classes,
        images=len(support),
        patches=rule.bank_patches,
        batch=protocol.batch,
        seed=seed,
        rule=rule,
    )
    tried = {(k, d): Confusion(classes.count, classes.ignore) for d in rule.distances for k in rule.neighbours}
    for patches, masks in patch_features(encoder, chosen_on, classes, protocol.batch):
        for distance in rule.distances:
            near = bank.neighbours(patches, max(rule.neighbours), distance)
            for k in rule.neighbours:
                voted = vote(near[:, :k], classes.count).unflatten(0, patches.shape[:2])
                tried[k, distance].add(masks, whole_masks(voted, encoder.patch_size).numpy())
    k, distance = max(tried, key=lambda setting: tried[setting].miou)  # the first of equals
    bank.extend(chosen_on)
    confusion, recall = Confusion(classes.count, classes.ignore), None
    for patches, masks in patch_features(encoder, samples, classes, protocol.batch):
        recall = bank.recall(patches, k, distance) if recall is None else recall
        confusion.add(masks, bank.masks(patches, k, distance))
    row = {
        **_scores([confusion], seed),
        "miou_held_out": tried[k, distance].miou,
        "k": k,
        "distance": distance,
        "bank": {"patches": len(bank), "bytes": bank.nbytes, **(recall or {})},
    }
    return row, confusion


def _by_clusters(
    encoder: Encoder,
    support: Annotated,
    samples: Annotated,
    classes: Classes,
    protocol: SegmentationProtocol,
    seed: int,
) -> tuple[dict[str, Any], Confusion]:
    rule = protocol.kmeans
    features, masks = collect(encoder, samples, classes, protocol.batch)
    side = protocol.image_size // encoder.patch_size
    components = reduced(features, rule.components)
    exact: list[Confusion] = []
    over: list[Confusion] = []
    for state in random_bits(seed, Stream.EVALUATION, np.arange(rule.seeds), 1)[:, 0]:
        for clusters, match, found in ((classes.scored, hungarian, exact), (rule.overcluster, by_precision, over)):
            assigned = kmeans(
                components, clusters, restarts=rule.restarts, iterations=rule.iterations, state=int(state)
            )
            found.append(scored(assigned.reshape(-1, side, side), masks, classes, match))
    row = {
        **_scores(exact, seed),
        "miou_overclustered": float(np.mean([confusion.miou for confusion in over])),
        "seeds": [confusion.miou for confusion in exact],
        "features": {"patches": len(components), "bytes": features.nbytes},
    }
    return row, exact[0]


def _by_soft_retrieval(
    encoder: Encoder,
    support: Annotated,
    samples: Annotated,
    classes: Classes,
    protocol: SegmentationProtocol,
    seed: int,
) -> tuple[dict[str, Any], Confusion]:
    bank = SoftBank(encoder, support, classes, protocol.hummingbird, batch=protocol.batch, seed=seed)
    confusion, recall = Confusion(classes.count, classes.ignore), None
    for patches, masks in patch_features(encoder, samples, classes, protocol.batch):
        recall = bank.recall(patches) if recall is None else recall
        confusion.add(masks, bank.masks(patches, protocol.image_size))
    bank_row = {"patches": len(bank), "bytes": bank.nbytes, **(recall or {})}
    return {**_scores([confusion], seed), "bank": bank_row}, confusion


def _by_layer(
    encoder: Encoder,
    support: Annotated,
    samples: Annotated,
    classes: Classes,
    protocol: SegmentationProtocol,
    seed: int,
) -> tuple[dict[str, Any], Confusion]:
    layer = train_layer(encoder, support, classes, protocol.linear, seed=seed, batch=protocol.batch)
    confusion = Confusion(classes.count, classes.ignore)
    for patches, masks in patch_features(encoder, samples, classes, protocol.batch):
        confusion.add(masks, layer.masks(patches, protocol.image_size))
    return _scores([confusion], seed), confusion


def _by_cut(
    encoder: Encoder,
    support: Annotated,
    samples: Annotated,
    classes: Classes,
    protocol: SegmentationProtocol,
    seed: int,
) -> tuple[dict[str, Any], Confusion]:
    found = cut_set(encoder, samples, classes, protocol.tokencut, protocol.batch)
    return {**_scores([found.confusion], seed), **found.row(seed)}, found.confusion


_METHODS: dict[str, Callable[..., tuple[dict[str, Any], Confusion]]] = {
    "kmeans": _by_clusters,
    "tokencut": _by_cut,
    "retrieval": _by_retrieval,
    "hummingbird": _by_soft_retrieval,
    "linear": _by_layer,
}


def _scores(confusions: Sequence[Confusion], seed: int) -> dict[str, Any]:
    """Return the mean scores of one or more runs over the same images, and the interval of the mean mIoU."""
    iou = np.stack([confusion.iou for confusion in confusions], axis=1)  # (classes, runs)
    per_class = [float(runs[~np.isnan(runs)].mean()) if not np.isnan(runs).all() else None for runs in iou]
    return {
        "miou": float(np.mean([confusion.miou for confusion in confusions])),
        "ci": list(miou_interval(confusions, seed=seed)),
        "miou_absent_zero": float(np.mean([confusion.miou_absent_zero for confusion in confusions])),
        "pixel_accuracy": float(np.mean([confusion.pixel_accuracy for confusion in confusions])),
        "per_class": per_class,
    }


def _sets(train: Source | None, test: Source, protocol: SegmentationProtocol) -> list[tuple[Source, str]]:
    """Return the sets that a protocol reads, the one whose labels count first, beside their flags."""
    if protocol.level == 0:
        return [(test, "--test")]
    if train is None:
        raise UserError("--train", f"is missing, and protocol {protocol.name} is of level {protocol.level}", "give it")
    return [(train, "--train"), (test, "--test")]


def _tested(encoders: Mapping[str, Encoder], protocol: SegmentationProtocol) -> int | None:
    """Return how many test images are taken at most, the same for every encoder; None for all."""
    if protocol.method != "kmeans":
        return protocol.test_images
    most = max((protocol.image_size // encoder.patch_size) ** 2 for encoder in encoders.values())
    return min(protocol.kmeans.patches // most or 1, protocol.test_images or protocol.kmeans.patches)


def _check(encoders: Mapping[str, Encoder], sets: Sequence[tuple[Source, str]], protocol: SegmentationProtocol) -> None:
    if protocol.level == 0:
        require_extra()
    for source, flag in sets:
        if not len(source):
            raise UserError(flag, "holds no images")
        source.require_masks(flag)
    if len({source.fingerprint for source, _ in sets}) < len(sets):
        raise UserError(
            "--test", "is the train set, where every patch finds itself", "give images that are not looked up"
        )
    if protocol.method == "retrieval" and len(sets[0][0]) < 2:
        raise UserError("--train", "one image cannot be split into a bank and a held-out part", "give at least 2")
    for name, encoder in encoders.items():
        if protocol.image_size % encoder.patch_size:
            raise UserError(
                f"protocol {protocol.name}: image_size = {protocol.image_size}",
                f"the patches of {name}, {encoder.patch_size} pixels, do not divide it",
                f"give a multiple of {encoder.patch_size}",
            )
