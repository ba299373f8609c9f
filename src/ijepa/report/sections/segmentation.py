"""Images with their true masks and with masks that were predicted without training."""

from dataclasses import dataclass, replace

import numpy as np

from ijepa.evaluation.results.schema import EvaluationResult
from ijepa.evaluation.segmentation.clustering import require_clustering
from ijepa.report.feature_figures import SegmentationSettings, segment
from ijepa.report.images import THUMBNAIL, Grid, class_legend, class_map, picture
from ijepa.report.run_data import MissingInput, RunData
from ijepa.report.run_images import ImageSets, RunImages, affordable_images, choose_varied, sample_name
from ijepa.utils.errors import RunError, UserError

_IMAGES = 6


@dataclass(frozen=True)
class SegmentationSection:
    """Images and masks; `settings` by encoder name; `support` annotated images were searched."""

    masks: Grid
    legend: list[tuple[str, str]]
    settings: dict[str, SegmentationSettings]
    support: int
    clusters: int


def segmentation_section(run: RunData, images: RunImages) -> SegmentationSection:
    """Return images with true masks, masks by nearest patches and masks by clusters, for both encoders."""
    encoders, result = images.encoders, _retrieval_result(run)
    sets = images.sets(result or run.result("linear", "knn"))
    _check_sets(run, sets)
    settings = _settings(run, result)
    chosen = choose_varied(sets.test, _IMAGES).tolist()
    try:
        segmented = {
            name: segment(encoder, sets.train, sets.test, chosen, settings[name]) for name, encoder in encoders.items()
        }
    except RunError as error:
        raise MissingInput(str(error), _command(run)) from error
    first = segmented["trained"]
    classes, palette = first.classes, first.palette
    masks = {"truth": first.truth}
    masks |= {f"nearest patches, {name}": found.retrieved for name, found in segmented.items()}
    masks |= {f"clusters, {name}": found.clustered for name, found in segmented.items()}
    names = [sample_name(sets.test, index) for index in chosen]
    rows = [("image", [picture(p, name, max_side=THUMBNAIL) for p, name in zip(first.images, names, strict=True)])]
    for kind, labels in masks.items():
        pictures = []
        for mask, name in zip(labels, names, strict=True):
            present = ", ".join(classes[label] for label in np.unique(mask) if label < len(classes))
            painted = class_map(mask, len(classes), palette)
            pictures.append(picture(painted, f"{kind}, {name}: {present}", max_side=THUMBNAIL, exact=True))
        rows.append((kind, pictures))
    seen = {int(label) for labels in masks.values() for label in np.unique(labels)}
    return SegmentationSection(
        Grid("Images, true masks and predictions", rows),
        class_legend(seen, classes, palette),
        settings,
        support=min(settings["trained"].support, len(sets.train)),
        clusters=len(classes) - sum(label < len(classes) for label in settings["trained"].ignore),
    )


def _retrieval_result(run: RunData) -> EvaluationResult | None:
    """Return the first segmentation result by nearest patches, else the first segmentation result."""
    found = [result for result in run.results if result.kind == "segmentation"]
    return next((result for result in found if result.rows[0].get("k")), found[0] if found else None)


def _check_sets(run: RunData, sets: ImageSets) -> None:
    if not (sets.train.has_masks and sets.test.has_masks):
        raise MissingInput("the images have no masks", _command(run))
    if sets.same:
        raise MissingInput("there is only one set of images, but nearest patches need two", _command(run))
    try:
        require_clustering("clustering")
    except UserError as error:
        raise MissingInput(f"{error.where} {error.problem}", error.hint) from None


def _settings(run: RunData, result: EvaluationResult | None) -> dict[str, SegmentationSettings]:
    """Return the settings of an evaluation by encoder, with the k and the distance that it selected for each."""
    model, protocol = run.recipe.model, {} if result is None else result.protocol
    size = int(protocol.get("image_size", model.image_size[0]))
    affordable = affordable_images(model, (size // model.patch_size) ** 2) // 2
    shared = SegmentationSettings(
        image_size=size,
        interpolation=protocol.get("interpolation", "bilinear"),
        classes=protocol.get("classes"),
        ignore=tuple(protocol.get("ignore", [255])),
        labels=protocol.get("labels"),
        support=min(200, affordable),
        others=min(100, affordable),
    )
    rows = {name: result and result.row(name) for name in ("trained", "random")}
    return {
        name: replace(shared, k=int(row.get("k", 10)), distance=row.get("distance", "cosine")) if row else shared
        for name, row in rows.items()
    }


def _command(run: RunData) -> str:
    return f"ijepa evaluate segmentation {run.folder} --train PATH --test PATH"
