"""Principal components of patch features as colors."""

from dataclasses import dataclass

import numpy as np
import torch

from ijepa.evaluation.features.sampling import choose, crops, encoded
from ijepa.report.feature_figures import pca_rgb
from ijepa.report.images import THUMBNAIL, Grid, picture, to_bytes
from ijepa.report.run_data import RunData
from ijepa.report.run_images import SEED, RunImages, choose_varied, sample_name, to_arrays

_IMAGES, _FITTED = 8, 64


@dataclass(frozen=True)
class FeatureSection:
    """Images and their features as colors; components are fitted to `fitted` images."""

    images: Grid
    fitted: int


def feature_section(run: RunData, images: RunImages) -> FeatureSection:
    """Return a few test images with the patch features of both encoders."""
    encoders, source = images.encoders, images.sets(run.result("linear", "knn", "segmentation")).test
    shown = choose_varied(source, _IMAGES)
    others = np.setdiff1d(choose(len(source), _FITTED, SEED), shown)
    pixels = crops(source, np.concatenate([shown, others]), run.recipe.model.image_size)
    names = [sample_name(source, index) for index in shown]
    plain = to_arrays(pixels[: len(shown)])
    rows = [("image", [picture(p, name, max_side=THUMBNAIL) for p, name in zip(plain, names, strict=True)])]
    for encoder_name, encoder in encoders.items():
        features = torch.cat([encoded(encoder, part) for part in pixels.split(32)])  # (n, N, D)
        # What all patches of an image have in common, above all the background color, would fill the first components.
        within = features - features.mean(1, keepdim=True)
        painted = to_bytes(pca_rgb(within, run.recipe.model.grid)[: len(shown)])
        alts = (f"{encoder_name} encoder's patch features of {name} as colors" for name in names)
        rows.append((encoder_name, [picture(p, alt, exact=True) for p, alt in zip(painted, alts, strict=True)]))
    return FeatureSection(Grid("Images and their patch features", rows), len(pixels))
