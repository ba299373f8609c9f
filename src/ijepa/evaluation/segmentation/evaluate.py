"""Segmentation of a labeled set by frozen patch features: five methods, one form of result.

All encoders see the same images, masks, held-out part and seeds of clusters. A result states its level, the use of
labels. Level 0: labels are only used for scoring (`clustering`, and `tokencut`, for which all classes are one
foreground). Level 1: labels are in a bank that is searched (`retrieval`, `hummingbird`). Level 2: a linear layer is
trained on them (`linear`). The result also states the memory of the clustered features or of the bank, which is
reported before the evaluation too (`memory`).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
from torch import Tensor

from ijepa.data.sources.base import Source
from ijepa.evaluation.context import DEFAULT_CONTEXT, EvaluationContext
from ijepa.evaluation.features.extract import PatchEncoder
from ijepa.evaluation.features.sampling import choose, hold_out
from ijepa.evaluation.metrics.bootstrap import miou_interval
from ijepa.evaluation.metrics.iou import Confusion
from ijepa.evaluation.results.schema import Data, DataSet, EvaluationResult, ResultRow
from ijepa.evaluation.segmentation.clustering import (
    by_precision,
    cluster_confusion,
    collect,
    hungarian,
    kmeans,
    reduce_features,
    require_clustering,
)
from ijepa.evaluation.segmentation.dataset import Classes, Labels, SegmentationDataset, find_classes
from ijepa.evaluation.segmentation.hummingbird import SoftBank
from ijepa.evaluation.segmentation.linear import train_layer
from ijepa.evaluation.segmentation.memory import describe_memory, planned_memory
from ijepa.evaluation.segmentation.patch_bank import PatchBank
from ijepa.evaluation.segmentation.protocol import SegmentationProtocol
from ijepa.evaluation.segmentation.retrieval import vote, whole_masks
from ijepa.evaluation.segmentation.tokencut import cut_set
from ijepa.utils.environment import versions
from ijepa.utils.errors import UserError
from ijepa.utils.extras import require_extra
from ijepa.utils.random import Stream, random_bits


@dataclass(frozen=True)
class Task:
    """The evaluation of one encoder. At level 0, `support` is the test set."""

    encoder: PatchEncoder
    support: SegmentationDataset
    samples: SegmentationDataset
    protocol: SegmentationProtocol
    seed: int

    def confusion(self) -> Confusion:
        """Return an empty confusion matrix."""
        return Confusion(self.samples.classes.count, self.samples.classes.ignore)


Row = tuple[dict[str, Any], Confusion]
"""The metrics of one encoder, and a confusion matrix."""


def evaluate_segmentation(
    encoders: Mapping[str, PatchEncoder],
    train: Source | None,
    test: Source,
    protocol: SegmentationProtocol,
    context: EvaluationContext = DEFAULT_CONTEXT,
) -> EvaluationResult:
    """Evaluate encoders by one protocol.

    Args:
        encoders: the encoders by the names of their rows.
        train: the support set; None at level 0.
        test: the set that is scored.
        protocol: the protocol.
        context: its seed selects images, the held-out part and the starts of k-means. Its cache is not used, because
            the patch features of a set are larger than the set.

    Returns:
        A row has `miou`, `ci`, `miou_absent_zero`, `pixel_accuracy`, `per_class` (None for a class that does not occur)
        and the values of the method. `chance` is the mIoU of predicting the most frequent class everywhere.

    Raises:
        UserError: masks are missing or do not match their images, labels out of range, a size that the patch does not
            divide, or the same set for train and test.
        RunError: an image cannot be decoded, or features are not finite.
    """
    begun = time.perf_counter()
    sets = _sets(train, test, protocol)
    _check(encoders, sets, protocol)
    classes = find_classes(sets, protocol.classes, protocol.ignore, protocol.labels)
    used = _select(encoders, sets, classes, protocol, context)
    samples, support = used["--test"], used.get("--train", used["--test"])
    rows, confusion = [], Confusion(classes.count, classes.ignore)
    for name, encoder in encoders.items():
        planned = planned_memory(
            protocol,
            support=len(support),
            samples=len(samples),
            width=encoder.embed_dim,
            patch_size=encoder.patch_size,
            classes=classes.count,
        )
        context.report(f"segmentation: {name}: {describe_memory(planned)}")
        task = Task(encoder, support, samples, protocol, context.seed)
        row, confusion = _METHODS[protocol.method](task)
        rows.append(ResultRow(encoder=name, **row))
        if not confusion.counts.any():
            raise UserError("--test", "no pixel of its masks is scored", "check its label map, or `ignore`")
    return EvaluationResult(
        kind="segmentation",
        level=protocol.level,
        protocol=protocol.model_dump(mode="json", exclude=protocol.unused),
        seed=context.seed,
        data=_described(used, classes, protocol),
        chance=confusion.miou_constant,  # depends on the masks only, so it is the same for every encoder
        rows=tuple(rows),
        versions={**versions(), "sklearn": version("scikit-learn")} if protocol.level == 0 else versions(),
        seconds=round(time.perf_counter() - begun, 2),
    )


def _sets(train: Source | None, test: Source, protocol: SegmentationProtocol) -> dict[str, Source]:
    """Return the sets that a protocol reads by their flags. The first one defines the classes."""
    if protocol.level == 0:
        return {"--test": test}
    if train is None:
        raise UserError(
            "--train", f"is missing, but protocol {protocol.name} of level {protocol.level} needs it", "add --train"
        )
    return {"--train": train, "--test": test}


def _check(encoders: Mapping[str, PatchEncoder], sets: Mapping[str, Source], protocol: SegmentationProtocol) -> None:
    if protocol.level == 0:
        require_clustering(f"protocol {protocol.name}")
    searched = {"retrieval": protocol.retrieval, "hummingbird": protocol.hummingbird}.get(protocol.method)
    if searched is not None and searched.search == "faiss":
        require_extra("faiss", "faiss", f"protocol {protocol.name}: search = faiss")
    for flag, source in sets.items():
        if not len(source):
            raise UserError(flag, "has no images")
        source.require_masks(flag)
    if len({source.fingerprint for source in sets.values()}) < len(sets):
        raise UserError("--test", "is the train set, so every patch would find itself", "give different images")
    if protocol.method == "retrieval" and len(sets["--train"]) < 2:
        raise UserError("--train", "one image cannot be divided into a bank and a held-out part", "give at least 2")
    for name, encoder in encoders.items():
        if protocol.image_size % encoder.patch_size:
            raise UserError(
                f"protocol {protocol.name}: image_size = {protocol.image_size}",
                f"is not divisible by the patches of {name}, {encoder.patch_size} pixels",
                f"give a multiple of {encoder.patch_size}",
            )


def _select(
    encoders: Mapping[str, PatchEncoder],
    sets: Mapping[str, Source],
    classes: Classes,
    protocol: SegmentationProtocol,
    context: EvaluationContext,
) -> dict[str, SegmentationDataset]:
    """Return the images of each set that are used, the same for every encoder."""
    mask_size, test_images = protocol.image_size, protocol.test_images
    if protocol.method == "kmeans":
        mask_size = protocol.kmeans.mask_size
        patches = max((protocol.image_size // encoder.patch_size) ** 2 for encoder in encoders.values())
        test_images = min(protocol.kmeans.patches // patches or 1, test_images or protocol.kmeans.patches)
    used = {}
    for flag, source in sets.items():
        most = protocol.train_images if flag == "--train" else test_images
        chosen = choose(len(source), most or len(source), context.seed)
        used[flag] = SegmentationDataset(
            source,
            chosen,
            flag,
            classes,
            protocol.image_size,
            mask_size,
            protocol.interpolation,
            context.world,
        )
    return used


def _described(used: Mapping[str, SegmentationDataset], classes: Classes, protocol: SegmentationProtocol) -> Data:
    sets = {flag.lstrip("-"): DataSet(n=len(x), fingerprint=x.source.fingerprint) for flag, x in used.items()}
    return Data(
        **{"train": DataSet(n=0), **sets},
        classes=("ground", "foreground") if protocol.method == "tokencut" else classes.names,
        labels={flag.lstrip("-"): labels.name for flag, labels in classes.maps.items()},
        labels_sha256={flag.lstrip("-"): labels.sha256 for flag, labels in classes.maps.items()},
    )


def _segment(task: Task, predict: Callable[[Tensor], Labels]) -> Confusion:
    """Return the confusion matrix of the test set, for predicted masks of patches (B, N, D)."""
    confusion = task.confusion()
    for patches, masks in task.samples.patch_features(task.encoder, task.protocol.batch):
        confusion.add(masks, predict(patches))
    return confusion


def _retrieval(task: Task) -> Row:
    rule, protocol, support = task.protocol.retrieval, task.protocol, task.support
    held_out = hold_out(support.indices, rule.held_out, task.seed)
    bank = PatchBank(
        task.encoder,
        support.select(~held_out),
        images=len(support),
        patches=rule.bank_patches,
        batch=protocol.batch,
        seed=task.seed,
        rule=rule,
    )
    tried = {(k, distance): task.confusion() for distance in rule.distances for k in rule.neighbors}
    for patches, masks in support.select(held_out).patch_features(task.encoder, protocol.batch):
        for distance in rule.distances:
            near = bank.neighbor_labels(patches, max(rule.neighbors), distance)
            for k in rule.neighbors:
                voted = vote(near[:, :k], bank.classes.count).unflatten(0, patches.shape[:2])
                tried[k, distance].add(masks, whole_masks(voted, task.encoder.patch_size).numpy())
    k, distance = max(tried, key=lambda setting: tried[setting].miou)  # the first of equals
    bank.extend(support.select(held_out))
    confusion = _segment(task, lambda patches: bank.masks(patches, k, distance))
    row = {
        **_scores([confusion], task.seed),
        "miou_held_out": tried[k, distance].miou,
        "k": k,
        "distance": distance,
        "bank": {"patches": len(bank), "bytes": bank.nbytes, **bank.search.recall()},
    }
    return row, confusion


def _kmeans(task: Task) -> Row:
    rule, classes = task.protocol.kmeans, task.samples.classes
    features, masks = collect(task.encoder, task.samples, task.protocol.batch)
    side = task.protocol.image_size // task.encoder.patch_size
    components = reduce_features(features, rule.components)
    exact: list[Confusion] = []
    over: list[Confusion] = []
    for state in random_bits(task.seed, Stream.EVALUATION, np.arange(rule.seeds), 1)[:, 0]:
        for clusters, match, found in ((classes.scored, hungarian, exact), (rule.overcluster, by_precision, over)):
            assigned = kmeans(
                components, clusters, restarts=rule.restarts, iterations=rule.iterations, state=int(state)
            )
            found.append(cluster_confusion(assigned.reshape(-1, side, side), masks, classes, match))
    row = {
        **_scores(exact, task.seed),
        "miou_overclustered": float(np.mean([confusion.miou for confusion in over])),
        "seeds": [confusion.miou for confusion in exact],
        "features": {"patches": len(components), "bytes": features.nbytes},
    }
    return row, exact[0]


def _hummingbird(task: Task) -> Row:
    protocol = task.protocol
    bank = SoftBank(task.encoder, task.support, protocol.hummingbird, batch=protocol.batch, seed=task.seed)
    confusion = _segment(task, lambda patches: bank.masks(patches, protocol.image_size))
    size = {"patches": len(bank), "bytes": bank.nbytes, **bank.search.recall()}
    return {**_scores([confusion], task.seed), "bank": size}, confusion


def _linear(task: Task) -> Row:
    protocol = task.protocol
    layer = train_layer(task.encoder, task.support, protocol.linear, seed=task.seed, batch=protocol.batch)
    confusion = _segment(task, lambda patches: layer.masks(patches, protocol.image_size))
    return _scores([confusion], task.seed), confusion


def _tokencut(task: Task) -> Row:
    found = cut_set(task.encoder, task.samples, task.protocol.tokencut, task.protocol.batch)
    return {**_scores([found.confusion], task.seed), **found.row(task.seed)}, found.confusion


_METHODS: dict[str, Callable[[Task], Row]] = {
    "kmeans": _kmeans,
    "tokencut": _tokencut,
    "retrieval": _retrieval,
    "hummingbird": _hummingbird,
    "linear": _linear,
}


def _scores(confusions: Sequence[Confusion], seed: int) -> dict[str, Any]:
    """Return the mean scores of one or more runs on the same images, and the interval of the mean mIoU."""
    iou = np.stack([confusion.iou for confusion in confusions], axis=1)  # (classes, runs)
    per_class = [float(runs[~np.isnan(runs)].mean()) if not np.isnan(runs).all() else None for runs in iou]
    return {
        "miou": float(np.mean([confusion.miou for confusion in confusions])),
        "ci": list(miou_interval(confusions, seed=seed)),
        "miou_absent_zero": float(np.mean([confusion.miou_absent_zero for confusion in confusions])),
        "pixel_accuracy": float(np.mean([confusion.pixel_accuracy for confusion in confusions])),
        "per_class": per_class,
    }
