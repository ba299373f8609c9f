"""Test images with their nearest training images."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ijepa.evaluation.features.extract import PatchEncoder, extract
from ijepa.evaluation.features.sampling import Indices, choose, crops
from ijepa.evaluation.features.standardize import mean_and_std
from ijepa.evaluation.segmentation.retrieval import search
from ijepa.report.images import Picture, Pixels, picture
from ijepa.report.run_data import RunData
from ijepa.report.run_images import (
    SEED,
    ImageSets,
    RunImages,
    affordable_images,
    choose_varied,
    class_name,
    sample_name,
    to_arrays,
)

_QUERIES, _NEIGHBORS = 6, 6
_SIDE = 96


@dataclass(frozen=True)
class RetrievalSection:
    """Rows of a query and its neighbors by encoder, out of `searched` images; `labeled` if classes are known."""

    rows: list[tuple[Picture, dict[str, list[Picture]]]]
    searched: int
    labeled: bool
    standardized: bool


def retrieval_section(run: RunData, images: RunImages) -> RetrievalSection:
    """Return test images with the training images whose mean patch features are most similar, for both encoders."""
    encoders, sets = images.encoders, images.sets(run.result("knn", "linear", "segmentation"))
    size = run.recipe.model.image_size
    queries = choose_varied(sets.test, _QUERIES)
    pool = choose(len(sets.train), affordable_images(run.recipe.model), SEED)
    pool = np.setdiff1d(pool, queries) if sets.same else pool
    result = run.result("knn")
    standardized = result is not None and bool(result.protocol.get("standardize"))
    rows: list[tuple[Picture, dict[str, list[Picture]]]] = [
        (picture(pixels, f"Query: {sample_name(sets.test, query)}", max_side=_SIDE), {})
        for query, pixels in zip(queries, to_arrays(crops(sets.test, queries, size)), strict=True)
    ]
    for name, encoder in encoders.items():
        found = pool[_nearest(encoder, sets, pool, queries, size, standardized)]  # (queries, neighbors)
        for query, near, (_, neighbors) in zip(queries, found, rows, strict=True):
            pixels = to_arrays(crops(sets.train, near, size))
            neighbors[name] = [_neighbor(sets, query, *one, name) for one in zip(near, pixels, strict=True)]
    labeled = sets.test.labels is not None and sets.train.labels is not None
    return RetrievalSection(rows, len(pool), labeled, standardized)


def _nearest(
    encoder: PatchEncoder, sets: ImageSets, pool: Indices, queries: Indices, size: tuple[int, int], standardized: bool
) -> Indices:
    """Return which of the pool's images are nearest to each query (q, k), by cosine of mean patch features."""
    options: dict[str, Any] = {"last": 1, "cache": None, "label": "images of the report", "crop_fraction": 1.0}
    x, y = (
        extract(encoder, source, chosen, image_size=size, **options)[:, 0]  # (images, D)
        for source, chosen in ((sets.train, pool), (sets.test, queries))
    )
    if standardized:
        shift, scale = mean_and_std(x)
        x, y = (x - shift) / scale, (y - shift) / scale
    return search(y.float(), x.float(), _NEIGHBORS, "cosine").numpy()


def _neighbor(sets: ImageSets, query: np.integer, index: np.integer, pixels: Pixels, encoder: str) -> Picture:
    """Return a training image that was found, with whether it has the class of the query, if both classes are known."""
    ours, theirs = sets.test.label(int(query)), sets.train.label(int(index))
    correct = None
    if ours is not None and theirs is not None:
        # The two sets may number their classes differently, so names are compared if there are any.
        has_names = sets.test.classes is not None and sets.train.classes is not None
        correct = class_name(sets.test, query) == class_name(sets.train, index) if has_names else ours == theirs
    verdict = {None: "", True: ", same class as the query", False: ", not the class of the query"}[correct]
    alt = f"Neighbor by the {encoder} encoder: {sample_name(sets.train, index)}{verdict}"
    return replace(picture(pixels, alt, max_side=_SIDE), correct=correct)
