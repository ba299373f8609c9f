"""The page's sections with images: masks, patch features, nearest neighbours, segmentation.

Each is made anew from the run's latest checkpoint and its data, on few images, with the functions and settings that
its evaluations used; the same run gives the same pictures. Beside what training made stands what the initial encoder
makes of the same images, because much of what looks learned is there before.
"""

from dataclasses import dataclass
from html import escape

import numpy as np
import torch

from ijepa.data.loading.crop import Interpolation
from ijepa.data.sources.base import Source
from ijepa.evaluation.features.extract import Encoder, extract
from ijepa.evaluation.features.sampling import Indices, choose, crops, encoded
from ijepa.evaluation.features.standardize import mean_and_std
from ijepa.evaluation.segmentation.clustering import require_extra
from ijepa.evaluation.segmentation.retrieval import Distance
from ijepa.masking.masks import draw_masks
from ijepa.report.feature_figures import nearest, pca_rgb, segment
from ijepa.report.markup import Gap, Part, Section, figure
from ijepa.report.material import Encoders, Images, Pair, affordable, first_batch, shown, varied
from ijepa.report.pictures import (
    TARGETS,
    Pixels,
    class_legend,
    class_map,
    colours,
    grid,
    hit,
    legend,
    masked,
    picture,
    strips,
)
from ijepa.report.run_data import Record, Result
from ijepa.utils.errors import UserError

MASKS, FEATURES = ("masks", "Masks"), ("features", "Patch features")
RETRIEVAL, PANELS = ("retrieval", "Nearest neighbours"), ("panels", "Segmentation without training")
"""Key and title of each section."""

_SEED = 0
_MASKED, _FEATURES, _FITTED, _QUERIES, _NEIGHBOURS, _SEGMENTED = 6, 8, 64, 6, 6, 6
_SUPPORT, _CLUSTERED = 200, 100
_THUMBNAIL = 160


def mask_section(record: Record, images: Images) -> Part:
    """Return the first training samples of the run, as step 1 saw them."""
    source = images.training()
    if isinstance(source, str):
        return Gap(*MASKS, source, f"ijepa report {record.run.folder} --data IMAGES")
    recipe, count = record.recipe, _MASKED
    patch, (rows, columns) = recipe.model.patch_size, recipe.model.grid
    batch = first_batch(recipe, source, count)
    masks = draw_masks(recipe.mask, recipe.model.grid, recipe.seed, np.arange(count))
    plain, drawn = list[str](), list[str]()
    for number, pixels in enumerate(shown(batch.pixels)):
        context = masks.context[number].reshape(rows, columns)
        targets = masks.targets[number].reshape(-1, rows, columns)
        areas = ", ".join(str(int(target.sum())) for target in targets if target.any())
        told = f"{int(context.sum())} of {context.size} patches are context; targets have {areas} patches"
        plain.append(
            picture(pixels, f"Crop {number + 1}: {_called(source, batch.indices[number])}", most=2 * _THUMBNAIL)
        )
        drawn.append(masked(pixels, context, targets, patch, f"Crop {number + 1} with its masks: {told}"))
    which = (
        "The first samples of this run, cropped as its first step saw them"
        if images.trained_here()
        else "Images cropped by the recipe's rule"
    )
    caption = (
        f"{which}, and their masks on the {rows} × {columns} grid of patches. The context encoder sees the tinted "
        "patches alone; dark ones are hidden from it. From them the predictor must foretell the features, not the "
        "pixels, of each outlined target block, which the target encoder computes with the whole image in view."
    )
    key = legend(
        [("var(--context)", "context"), *((c, f"target {i + 1}") for i, c in enumerate(TARGETS[: len(targets)]))]
    )
    body = grid([("crop", plain), ("masks", drawn)], "Training crops and their masks", cell=110)
    return Section(*MASKS, figure(body + key, caption, kind="wide"))


def feature_section(record: Record, images: Images, encoders: Encoders | str) -> Part:
    """Return principal components of patch features as colours, of both encoders."""
    pair = images.pair("linear", "knn", "segmentation")
    if isinstance(pair, str) or isinstance(encoders, str):
        return _gap(record, FEATURES, pair, encoders)
    chosen = varied(pair.test, _FEATURES, _SEED)
    others = np.setdiff1d(choose(len(pair.test), _FITTED, _SEED), chosen)
    pixels = crops(pair.test, np.concatenate([chosen, others]), encoders.image_size)
    words = [_called(pair.test, index) for index in chosen]
    rows = [("image", [picture(p, w, most=_THUMBNAIL) for p, w in zip(shown(pixels), words, strict=False)])]
    for name, encoder in encoders.items():
        features = torch.cat([encoded(encoder, part) for part in pixels.split(32)])
        # What all patches of an image share, its ground's colour above all, would fill the first components.
        within = features - features.mean(1, keepdim=True)
        painted = colours(pca_rgb(within, record.recipe.model.grid))
        told = (f"{name} encoder's patch features of {word} as colours" for word in words)
        rows.append((name, [picture(p, w, exact=True) for p, w in zip(painted, told, strict=False)]))
    caption = (
        "Patch features of the last block, a square a patch, in false colours: the trained encoder "
        f"({escape(encoders.step)}) above the same encoder as it was initialised. Each image's mean is taken out; then "
        "the first principal component (PCA) parts foreground from ground (black), and three more of the foreground "
        f"are red, green and blue. They are fitted to {len(pixels)} images at once, so equal colours in a row mean "
        "like features; between rows colours mean nothing. Look for colours that follow objects and their parts, and "
        "not a patch's place or brightness."
    )
    return Section(*FEATURES, figure(grid(rows, "Images and their patch features"), caption, kind="wide"))


def retrieval_section(record: Record, images: Images, encoders: Encoders | str) -> Part:
    """Return test images with the most similar training images, by both encoders."""
    pair = images.pair("knn", "linear", "segmentation")
    if isinstance(pair, str) or isinstance(encoders, str):
        return _gap(record, RETRIEVAL, pair, encoders)
    queries = varied(pair.test, _QUERIES, _SEED)
    pool = choose(len(pair.train), affordable(record.recipe.model), _SEED)
    pool = np.setdiff1d(pool, queries) if pair.same else pool
    result = record.result("knn")
    standardised = result is not None and bool(result.values["protocol"].get("standardise"))
    found = {
        name: pool[_nearest(encoder, pair, pool, queries, encoders.image_size, standardised)]
        for name, encoder in encoders.items()
    }
    rows = []
    for row, (query, asked) in enumerate(
        zip(queries, shown(crops(pair.test, queries, encoders.image_size)), strict=True)
    ):
        strip = [[hit(asked, None, f"Query: {_called(pair.test, query)}")]]
        for name, hits in found.items():
            near = shown(crops(pair.train, hits[row], encoders.image_size))
            strip.append([_hit(pair, query, *one, name) for one in zip(hits[row], near, strict=True)])
        rows.append(strip)
    body = strips(["query", *(f"nearest by the {name} encoder" for name in found)], rows, RETRIEVAL[1])
    known = pair.test.labels is not None and pair.train.labels is not None
    marks = "A green border with ✓ is the query's class, a red one with ✗ another. " if known else ""
    manner = ", standardised as in the kNN evaluation" if standardised else ""
    caption = (
        f"Test images at the left, and the nearest of {len(pool):,} training images, nearest first, by cosine of mean "
        f"patch features{manner}. {marks}Neighbours of an untrained encoder share colours and texture; a trained one's "
        "should share what the image shows."
    )
    return Section(*RETRIEVAL, figure(body, caption, kind="wide"))


def segmentation_section(record: Record, images: Images, encoders: Encoders | str) -> Part:
    """Return images beside their true masks and what is said of them without training."""
    result = _looked_up(record)
    pair = images.pair_of(result or record.result("linear", "knn"))
    if isinstance(pair, str) or isinstance(encoders, str):
        return _gap(record, PANELS, pair, encoders)
    missing = _missing(record, pair)
    if missing is not None:
        return Gap(*PANELS, *missing)
    manner = _manner(record, result)
    size, ignore = manner.image_size, manner.ignore
    afford = affordable(record.recipe.model, (size // record.recipe.model.patch_size) ** 2) // 2
    chosen = varied(pair.test, _SEGMENTED, _SEED).tolist()
    panels = {
        name: segment(
            encoder,
            pair.train,
            pair.test,
            chosen,
            image_size=size,
            interpolation=manner.interpolation,
            support=min(_SUPPORT, afford),
            clustered=min(_CLUSTERED, afford),
            k=manner.lookups[name][0],
            distance=manner.lookups[name][1],
            classes=manner.classes,
            ignore=ignore,
            labels=manner.labels,
            seed=_SEED,
        )
        for name, encoder in encoders.items()
    }
    first, classes, palette = panels["trained"], panels["trained"].classes, panels["trained"].palette
    maps = {"truth": first.truth}
    maps |= {f"looked up, {name}": found.retrieval for name, found in panels.items()}
    maps |= {f"clusters, {name}": found.clusters for name, found in panels.items()}
    words = [_called(pair.test, index) for index in chosen]
    rows = [("image", [picture(p, w, most=_THUMBNAIL) for p, w in zip(first.images, words, strict=True)])]
    for name, labels in maps.items():
        cells = []
        for mask, word in zip(labels, words, strict=True):
            told = f"{name}, {word}: {_present(mask, classes)}"
            cells.append(picture(class_map(mask, len(classes), palette), told, most=_THUMBNAIL, exact=True))
        rows.append((name, cells))
    seen = [int(label) for labels in maps.values() for label in np.unique(labels)]
    scored = len(classes) - sum(label < len(classes) for label in ignore)
    lookups = "; ".join(f"{name}: k = {k}, {distance}" for name, (k, distance) in manner.lookups.items())
    caption = (
        f"Test images at {size} × {size} pixels and their true masks. “Looked up”: each patch takes the labels of its "
        f"nearest patches in {min(_SUPPORT, afford, len(pair.train))} annotated training images ({escape(lookups)}). "
        f"“Clusters”: k-means over the patches of these and other test images, {scored} clusters matched one to "
        "one to classes afterwards, so that labels only score. Nothing is trained for either; the initial encoder "
        "stands beside."
    )
    body = grid(rows, "Images, true masks and predictions") + class_legend(seen, classes, palette)
    return Section(*PANELS, figure(body, caption, kind="wide"))


def segmentation_command(record: Record) -> str:
    """Return the command whose result the panels would follow."""
    return f"ijepa evaluate segmentation {record.run.folder} --train PATH --test PATH"


def _nearest(
    encoder: Encoder, pair: Pair, pool: Indices, queries: Indices, size: tuple[int, int], standardised: bool
) -> Indices:
    """Return which of the pool's images are nearest to each query (q, k), by mean patch features of the last block."""
    x, y = (
        extract(
            encoder, source, chosen, image_size=size, last=1, cache=None, label="the report's images", crop_fraction=1.0
        ).x[:, 0]
        for source, chosen in ((pair.train, pool), (pair.test, queries))
    )
    if standardised:
        shift, scale = mean_and_std(x)
        x, y = (x - shift) / scale, (y - shift) / scale
    return nearest(x, y, _NEIGHBOURS)


def _hit(pair: Pair, query: np.integer, index: np.integer, pixels: Pixels, encoder: str) -> str:
    """Return a found training image, marked by whether it is of the query's class, where both are known."""
    ours, theirs = pair.test.label(int(query)), pair.train.label(int(index))
    right = None
    if ours is not None and theirs is not None:
        named = pair.test.classes is not None and pair.train.classes is not None
        right = _class(pair.test, query) == _class(pair.train, index) if named else ours == theirs
    told = {None: "", True: ", the query's class", False: ", another class"}[right]
    return hit(pixels, right, f"Near to the {encoder} encoder: {_called(pair.train, index)}{told}")


@dataclass(frozen=True)
class _Manner:
    """How images are segmented; `lookups` holds k and distance by encoder, the rest is a protocol's."""

    image_size: int
    lookups: dict[str, tuple[int, Distance]]
    interpolation: Interpolation = "bilinear"
    classes: int | None = None
    ignore: tuple[int, ...] = (255,)
    labels: str | None = None


def _looked_up(record: Record) -> Result | None:
    """Return the segmentation that the panels follow: the first that looked labels up, else the first."""
    found = [result for result in record.results if result.kind == "segmentation"]
    return next((result for result in found if "k" in result.rows[0]), found[0] if found else None)


def _manner(record: Record, result: Result | None) -> _Manner:
    """Return the evaluation's settings, if there is one."""
    names = ("trained", "random")
    if result is None:
        return _Manner(record.recipe.model.image_size[0], dict.fromkeys(names, (10, "cosine")))
    rows = {name: result.row(name) or {} for name in names}
    protocol = result.values["protocol"]
    return _Manner(
        int(protocol["image_size"]),
        {name: (int(row.get("k", 10)), row.get("distance", "cosine")) for name, row in rows.items()},
        protocol.get("interpolation", "bilinear"),
        protocol.get("classes"),
        tuple(protocol["ignore"]),
        protocol.get("labels"),
    )


def _missing(record: Record, pair: Pair) -> tuple[str, str] | None:
    """Return what is missing for segmentation and the command that would bring it, None where nothing is."""
    command = segmentation_command(record)
    if not (pair.train.has_masks and pair.test.has_masks):
        return "the images have no masks", command
    if pair.same:
        return "looking up needs a second set of images, and there is only one", command
    try:
        require_extra()
    except UserError as refusal:
        return f"{refusal.where} {refusal.problem}", refusal.hint
    return None


def _gap(record: Record, names: tuple[str, str], pair: Pair | str, encoders: Encoders | str) -> Gap:
    if isinstance(encoders, str):
        return Gap(*names, encoders, f"ijepa pretrain {record.recipe.name} --output {record.run.folder}")
    return Gap(*names, str(pair), f"ijepa report {record.run.folder} --data IMAGES")


def _class(source: Source, index: int | np.integer) -> str | None:
    """Return the name of a sample's class, its number where it has no name, None without a label."""
    label = source.label(int(index))
    if label is None:
        return None
    names = source.classes or ()
    return names[label] if label < len(names) else f"class {label}"


def _called(source: Source, index: int | np.integer) -> str:
    """Return a sample's name, with its class where it has one."""
    named = _class(source, index)
    return source.name(int(index)) + (f", {named}" if named else "")


def _present(labels: np.ndarray, classes: tuple[str, ...]) -> str:
    return ", ".join(classes[label] for label in np.unique(labels) if label < len(classes))
