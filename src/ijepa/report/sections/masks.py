"""Training crops with their masks."""

from dataclasses import dataclass

import numpy as np

from ijepa.masking.masks import draw_masks
from ijepa.report.images import TARGET_COLORS, THUMBNAIL, Grid, masked_picture, picture
from ijepa.report.run_data import RunData
from ijepa.report.run_images import RunImages, first_batch, sample_name, to_arrays

_IMAGES = 6


@dataclass(frozen=True)
class MaskSection:
    """Crops with and without masks; `from_run` if these are the first samples of the run."""

    crops: Grid
    legend: list[tuple[str, str]]
    from_run: bool


def mask_section(run: RunData, images: RunImages) -> MaskSection:
    """Return the first training samples of the run, as step 1 saw them."""
    source, recipe, grid = images.training(), run.recipe, run.recipe.model.grid
    batch = first_batch(recipe, source, _IMAGES)
    masks = draw_masks(recipe.mask, grid, recipe.seed, np.arange(_IMAGES))
    plain, drawn = [], []
    for number, pixels in enumerate(to_arrays(batch.pixels)):
        context = masks.context[number].reshape(grid)
        targets = masks.targets[number].reshape(-1, *grid)
        areas = ", ".join(str(int(target.sum())) for target in targets if target.any())
        alt = f"Crop {number + 1} with its masks: {int(context.sum())} of {context.size} patches are context; the"
        plain.append(
            picture(pixels, f"Crop {number + 1}: {sample_name(source, batch.indices[number])}", max_side=2 * THUMBNAIL)
        )
        drawn.append(
            masked_picture(pixels, context, targets, recipe.model.patch_size, f"{alt} targets have {areas} patches")
        )
    crops = Grid("Training crops and their masks", [("crop", plain), ("masks", drawn)], cell=110)
    outlines = [(color, f"target {i}") for i, color in enumerate(TARGET_COLORS[: masks.targets.shape[1]], start=1)]
    return MaskSection(crops, [("var(--context)", "context"), *outlines], images.is_training_set())
