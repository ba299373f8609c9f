from pathlib import Path

import numpy as np

from ijepa.masking.masks import draw_masks
from ijepa.report.run_data import read_run_data
from ijepa.report.run_images import RunImages
from ijepa.report.sections.masks import mask_section


def test_mask_section_has_the_masks_of_the_first_samples(whole_run: Path) -> None:
    run = read_run_data(whole_run)
    found = mask_section(run, RunImages(run, None))
    (_, crops), (_, drawn) = found.crops.rows
    masks = draw_masks(run.recipe.mask, run.recipe.model.grid, run.recipe.seed, np.arange(6))
    assert found.from_run and len(crops) == len(drawn) == 6
    for number, each in enumerate(drawn):
        areas = ", ".join(str(int(target.sum())) for target in masks.targets[number] if target.any())
        assert f"{int(masks.context[number].sum())} of 36 patches are context" in each.alt
        assert each.alt.endswith(f"targets have {areas} patches")
    assert [label for _, label in found.legend] == ["context", "target 1", "target 2", "target 3", "target 4"]


def test_mask_section_of_given_images_is_not_of_the_run(whole_run: Path, scenes: Path) -> None:
    run = read_run_data(whole_run)
    assert not mask_section(run, RunImages(run, f"{scenes}/val-*.tar")).from_run
