"""The page's section of maps: what a patch resembles, what the predictor foretold, how many directions features use."""

from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import cosine_similarity

from ijepa.checkpoint.format import list_checkpoints, load_part
from ijepa.evaluation.features.sampling import choose, crops, encoded
from ijepa.model.ijepa import IJEPA, layer_norm
from ijepa.model.vision_transformer import patchify
from ijepa.report.drawing import COLORS, RULE, draw, tick
from ijepa.report.markup import Gap, Part, Section, figure, number
from ijepa.report.material import Encoders, Images, Pair, first_batch, shown, varied
from ijepa.report.pictures import Pixels, colours, grid, masked, picture
from ijepa.report.run_data import Record
from ijepa.utils.errors import UserError

MAPS = "maps", "What patches resemble"
"""The section's key and title."""

_SEED, _IMAGES, _SPREAD, _THUMBNAIL = 0, 8, 64, 160
_FLOOR = 1e-4
"""Shares of the largest singular value below this are drawn as this."""


def map_section(record: Record, images: Images, encoders: Encoders | str) -> Part:
    """Return maps of cosines and the singular values of features."""
    pair = images.pair("linear", "knn", "segmentation")
    if isinstance(encoders, str):
        return Gap(*MAPS, encoders, f"ijepa pretrain {record.recipe.name} --output {record.run.folder}")
    if isinstance(pair, str):
        return Gap(*MAPS, pair, f"ijepa report {record.run.folder} --data IMAGES")
    parts = [_similarity(record, pair, encoders), _prediction(record, images), _singular_values(pair, encoders)]
    return Section(*MAPS, "\n".join(part for part in parts if part))


def heat(cosine: npt.NDArray[np.floating]) -> Pixels:
    """Return cosines (..., h, w), 0 and below darkest and 1 brightest, as colours (..., h, w, 3); NaN is grey."""
    from matplotlib import colormaps

    painted = colours(np.asarray(colormaps["viridis"](np.nan_to_num(cosine).clip(0, 1)))[..., :3])
    painted[np.isnan(cosine)] = 128
    return painted


def _similarity(record: Record, pair: Pair, encoders: Encoders) -> str:
    chosen = varied(pair.test, _IMAGES, _SEED)
    pixels = crops(pair.test, chosen, encoders.image_size)
    rows, columns = record.recipe.model.grid
    asked = rows // 2 * columns + columns // 2
    patch, marked = record.recipe.model.patch_size, np.zeros((1, rows, columns), dtype=np.bool_)
    marked[0].flat[asked] = True
    everything = np.ones((rows, columns), dtype=np.bool_)
    words = [f"Image {place + 1} with its middle patch outlined" for place in range(len(chosen))]
    shown_rows = [
        ("image", [masked(p, everything, marked, patch, w) for p, w in zip(shown(pixels), words, strict=True)])
    ]
    for name, encoder in encoders.items():
        features = encoded(encoder, pixels)
        features = features - features.mean((0, 1))  # what all patches share resembles nothing
        cosine = cosine_similarity(features, features[:, asked, None], dim=2).unflatten(1, (rows, columns))
        told = (f"Cosine of the {name} encoder's patches to the middle one, image {i + 1}" for i in range(len(chosen)))
        painted = heat(cosine.numpy())
        shown_rows.append((name, [picture(p, w, exact=True) for p, w in zip(painted, told, strict=True)]))
    caption = (
        "How much each patch resembles the outlined one: the cosine of their features after the mean of all patches "
        f"is taken out, dark at 0 and bright at 1, by the trained encoder ({escape(encoders.step)}) and by the initial "
        "one. What the patch belongs to should light up, and not its surroundings or its row."
    )
    return figure(grid(shown_rows, "Similarity to a patch"), caption, kind="wide")


def _prediction(record: Record, images: Images) -> str:
    """Return what the predictor foretold beside what the target encoder made; nothing where it cannot be had."""
    source, saved = images.training(), list_checkpoints(record.run.checkpoints)
    if isinstance(source, str) or not saved:
        return ""
    recipe = record.recipe
    model = IJEPA(recipe.model, recipe.seed)
    try:
        for part in ("context_encoder", "target_encoder", "predictor"):
            load_part(getattr(model, part), saved[-1], part)
    except UserError:  # weights alone, without what pretraining needs besides
        return ""
    count, (rows, columns) = min(_IMAGES, len(source)), recipe.model.grid
    batch = first_batch(recipe, source, count)
    model.eval()
    with torch.no_grad():
        patches = patchify(batch.pixels, recipe.model.patch_size)
        truth = layer_norm(model.encode_targets(patches, count)).index_select(0, batch.targets.index)
        (context,) = model.context_encoder(
            model.pixel_norm(patches.index_select(0, batch.context.index)), batch.context
        )
        cosine = cosine_similarity(model.predictor(context, batch).float(), truth.float(), dim=1)
    place = batch.targets.index.numpy()
    sums = np.bincount(place, cosine.numpy(), minlength=count * rows * columns)
    times = np.bincount(place, minlength=count * rows * columns)
    maps = np.where(times > 0, sums / np.maximum(times, 1), np.nan).reshape(count, rows, columns)
    plain = [
        picture(pixels, f"Crop {i + 1}, whose targets are foretold", most=_THUMBNAIL)
        for i, pixels in enumerate(shown(batch.pixels))
    ]
    found = [
        picture(painted, f"Cosine of prediction and target, crop {i + 1}, mean {np.nanmean(maps[i]):.2f}", exact=True)
        for i, painted in enumerate(heat(maps))
    ]
    caption = (
        "Where the predictor was right: the cosine of what it foretold of a target's patches and what the target "
        "encoder made of them with the whole image in view, dark at 0 and bright at 1, the mean where targets overlap. "
        "Grey patches were no target."
    )
    return figure(grid([("crop", plain), ("cosine", found)], "Prediction against target"), caption, kind="wide")


def _singular_values(pair: Pair, encoders: Encoders) -> str:
    pixels = crops(pair.test, choose(len(pair.test), _SPREAD, _SEED), encoders.image_size)
    lines = {}
    for name, encoder in encoders.items():
        features = torch.cat([encoded(encoder, part) for part in pixels.split(32)]).flatten(0, 1).double()
        values = torch.linalg.svdvals(features - features.mean(0)).numpy()
        lines[name] = np.maximum(values / max(values[0], 1e-300), _FLOOR)

    def paint(axes: Any) -> None:
        for (name, values), color in zip(lines.items(), COLORS, strict=False):
            axes.plot(np.arange(1, len(values) + 1), values, color=color, linewidth=1.4, label=name)
        axes.set_yscale("log")
        axes.set_ylim(_FLOOR, 1.5)
        axes.xaxis.set_major_formatter(lambda value, _: tick(value))
        axes.grid(axis="y", color=RULE, linewidth=0.6)
        axes.legend(loc="lower left", frameon=False)

    told = "; ".join(
        f"{name}: half of the largest up to direction {number(int((values > 0.5).sum()))}, a hundredth up to "
        f"{number(int((values > 0.01).sum()))} of {len(values)}"
        for name, values in lines.items()
    )
    caption = (
        f"Singular values of the centred patch features of {len(pixels)} images, as shares of the largest, in order. A "
        "curve that falls off early says that few directions are used; one that reaches the bottom, that some are dead "
        "(the last one is: the final norm takes it out)."
    )
    return figure(draw(paint, (5.5, 2.4), (0.1, 0.12, 0.98, 0.96), f"Singular values. {told}"), caption)
