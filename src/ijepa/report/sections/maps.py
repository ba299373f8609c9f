"""Similarity between patches, predictions against targets, and singular values of patch features."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import cosine_similarity

from ijepa.checkpoint.format import load_part
from ijepa.data.sources.base import Source
from ijepa.evaluation.features.extract import PatchEncoder
from ijepa.evaluation.features.sampling import choose, crops, encoded
from ijepa.model.ijepa import IJEPA, layer_norm
from ijepa.model.vision_transformer import patchify
from ijepa.report.charts import spectrum_chart
from ijepa.report.images import THUMBNAIL, Grid, Picture, heat_map, masked_picture, picture
from ijepa.report.run_data import MissingInput, RunData
from ijepa.report.run_images import SEED, RunImages, choose_varied, first_batch, to_arrays
from ijepa.utils.errors import UserError

_IMAGES, _SPECTRUM_IMAGES = 8, 64
_FLOOR = 1e-4
"""Singular values below this share of the largest are drawn at this share."""


@dataclass(frozen=True)
class MapSection:
    """Maps of cosines, and singular values of the features of `images` images."""

    similarity: Grid
    prediction: Grid | None
    spectrum: Picture
    images: int


def map_section(run: RunData, images: RunImages) -> MapSection:
    """Return maps of both encoders; the prediction is left out if the training set or the predictor is missing."""
    encoders, test = images.encoders, images.sets(run.result("linear", "knn", "segmentation")).test
    pixels = crops(test, choose(len(test), _SPECTRUM_IMAGES, SEED), run.recipe.model.image_size)
    similarity, prediction = _similarity(run, test, encoders), _prediction(run, images)
    return MapSection(similarity, prediction, _spectrum(pixels, encoders), len(pixels))


def _similarity(run: RunData, test: Source, encoders: Mapping[str, PatchEncoder]) -> Grid:
    model, chosen = run.recipe.model, choose_varied(test, _IMAGES)
    pixels = crops(test, chosen, model.image_size)
    rows, columns = model.grid
    middle = rows // 2 * columns + columns // 2
    outlined = np.zeros((1, rows, columns), dtype=np.bool_)
    outlined[0].flat[middle] = True
    visible = np.ones((rows, columns), dtype=np.bool_)
    plain = [
        masked_picture(image, visible, outlined, model.patch_size, f"Image {i} with its middle patch outlined")
        for i, image in enumerate(to_arrays(pixels), start=1)
    ]
    shown: list[tuple[str, list[Picture]]] = [("image", plain)]
    for name, encoder in encoders.items():
        features = encoded(encoder, pixels)  # (n, N, D)
        features = features - features.mean((0, 1))  # what all patches have in common says nothing about similarity
        cosine = cosine_similarity(features, features[:, middle, None], dim=2).unflatten(1, (rows, columns))
        alt = f"Cosine between the middle patch and each patch, {name} encoder, image"
        painted = heat_map(cosine.numpy())
        shown.append((name, [picture(image, f"{alt} {i}", exact=True) for i, image in enumerate(painted, start=1)]))
    return Grid("Similarity to a patch", shown)


def _prediction(run: RunData, images: RunImages) -> Grid | None:
    """Return the cosine between prediction and target for each target patch, averaged where targets overlap."""
    recipe, (rows, columns) = run.recipe, run.recipe.model.grid
    model = IJEPA(recipe.model, recipe.seed)
    try:
        source = images.training()
        assert images.checkpoint is not None
        for part in ("context_encoder", "target_encoder", "predictor"):
            load_part(getattr(model, part), images.checkpoint, part)
    except (MissingInput, UserError):
        return None
    count = min(_IMAGES, len(source))
    batch = first_batch(recipe, source, count)
    model.eval()
    with torch.no_grad():
        patches = patchify(batch.pixels, recipe.model.patch_size)
        truth = layer_norm(model.encode_targets(patches, count)).index_select(0, batch.targets.index)
        visible = model.pixel_norm(patches.index_select(0, batch.context.index))
        (context,) = model.context_encoder(visible, batch.context)
        cosine = cosine_similarity(model.predictor(context, batch).float(), truth.float(), dim=1)
    place = batch.targets.index.numpy()
    sums = np.bincount(place, cosine.numpy(), minlength=count * rows * columns)
    times = np.bincount(place, minlength=count * rows * columns)
    maps = np.where(times > 0, sums / np.maximum(times, 1), np.nan).reshape(count, rows, columns)
    plain = [
        picture(pixels, f"Crop {i}, whose target blocks are predicted", max_side=THUMBNAIL)
        for i, pixels in enumerate(to_arrays(batch.pixels), start=1)
    ]
    painted = [
        picture(pixels, f"Cosine of prediction and target, crop {i + 1}, mean {np.nanmean(maps[i]):.2f}", exact=True)
        for i, pixels in enumerate(heat_map(maps))
    ]
    return Grid("Prediction against target", [("crop", plain), ("cosine", painted)])


def _spectrum(pixels: torch.Tensor, encoders: Mapping[str, PatchEncoder]) -> Picture:
    spectra = {}
    for name, encoder in encoders.items():
        features = torch.cat([encoded(encoder, part) for part in pixels.split(32)]).flatten(0, 1).double()
        values = torch.linalg.svdvals(features - features.mean(0)).numpy()
        spectra[name] = np.maximum(values / max(values[0], 1e-300), _FLOOR)
    return spectrum_chart(spectra, _FLOOR)
