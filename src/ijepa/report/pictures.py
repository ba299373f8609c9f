"""The report's pictures, from a run's weights and data: masks, features, neighbours, segmentation. PNG by Pillow.

Every picture is an array (h, w, 3) uint8 with small images enlarged by whole factors, so that a patch stays a square.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ijepa.data.crop import WORDS, crop_resize, random_resized_crop_box
from ijepa.data.decode import decode
from ijepa.data.sources import Source
from ijepa.evaluation.features import Encoder
from ijepa.evaluation.pictures import choose, crops
from ijepa.evaluation.views import Panels, nearest, pca_rgb, segment
from ijepa.masks import draw_masks
from ijepa.randomness import Stream, words
from ijepa.recipe import Recipe

Pixels = npt.NDArray[np.uint8]
TARGET_COLORS = ((230, 80, 60), (250, 170, 30), (60, 140, 230), (170, 90, 200))
CLASS_COLORS = np.array(
    [[40, 44, 52], [228, 87, 86], [245, 158, 60], [237, 201, 72], [89, 161, 79], [78, 168, 190], [76, 114, 176],
     [160, 110, 190], [220, 130, 180], [156, 117, 95], [186, 186, 186], [20, 120, 110], [120, 20, 80]],
    dtype=np.uint8,
)  # fmt: skip
_GAP = 4
_SIDE = 128


@dataclass(frozen=True)
class Picture:
    """One picture with what it shows in words: for those who read captions, and those who cannot see it."""

    title: str
    caption: str
    pixels: Pixels

    @property
    def uri(self) -> str:
        """The picture as a data URI."""
        buffer = io.BytesIO()
        Image.fromarray(self.pixels).save(buffer, "PNG", optimize=True)
        return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def mask_picture(recipe: Recipe, source: Source, count: int = 6) -> Picture:
    """Draw training crops above the same crops with their masks."""
    height, width = recipe.model.image_hw
    grid, patch = recipe.model.grid, recipe.model.patch_size
    masks = draw_masks(recipe.mask, grid, recipe.seed, np.arange(count))
    draws = words(recipe.seed, Stream.CROP, np.arange(count), WORDS)
    scale = max(_SIDE // width, 1)
    top, below = [], []
    for number, index in enumerate(choose(len(source), count, recipe.seed)):
        image = decode(source[int(index)].image)
        box = random_resized_crop_box(
            draws[number], image.shape[0], image.shape[1], recipe.data.crop_scale, recipe.data.crop_ratio
        )
        crop = crop_resize(image, box, (height, width)).permute(1, 2, 0).numpy()
        seen = np.kron(masks.context[number].reshape(grid), np.ones((patch, patch)))[..., None]
        shown = np.where(seen > 0, crop, crop * 0.22 + 24).astype(np.uint8)
        canvas = Image.fromarray(_enlarged(shown, scale))
        pen = ImageDraw.Draw(canvas)
        for target, color in zip(masks.targets[number], TARGET_COLORS * 4, strict=False):
            rows, columns = np.nonzero(target.reshape(grid))
            if len(rows):
                step = patch * scale
                corners = (
                    columns.min() * step,
                    rows.min() * step,
                    (columns.max() + 1) * step - 1,
                    (rows.max() + 1) * step - 1,
                )
                pen.rectangle([int(c) for c in corners], outline=color, width=3)
        top.append(_enlarged(crop, scale))
        below.append(np.asarray(canvas))
    caption = (
        "Above, crops as training sees them. Below, the same crops: what stays bright is the context, the only thing "
        "the context encoder sees; each outline is a target block, whose representation is predicted from the context."
    )
    return Picture("Masks", caption, _rows([top, below]))


def feature_picture(encoders: dict[str, Encoder], source: Source, size: tuple[int, int], count: int = 8) -> Picture:
    """Draw images above the principal components of their patch features, a row an encoder."""
    pixels = crops(source, choose(len(source), count, 1), size)
    scale = max(_SIDE // size[1], 1)
    rows = [[_enlarged(_hwc(image), scale) for image in pixels]]
    for encoder in encoders.values():
        grid = (size[0] // encoder.patch_size, size[1] // encoder.patch_size)
        colors = pca_rgb(encoder.forward_blocks(pixels, 1)[-1], grid)
        rows.append([_enlarged((255 * c).astype(np.uint8), scale * encoder.patch_size) for c in colors])
    caption = (
        f"Rows: images, then {', then '.join(encoders)}. Each square is a patch, coloured by the first three principal "
        "components of the foreground's features over all images shown: like colours are like representations."
    )
    return Picture("Patch features", caption, _rows(rows))


def retrieval_picture(
    encoders: dict[str, Encoder], train: Source, test: Source, size: tuple[int, int], queries: int = 5, k: int = 6
) -> Picture:
    """Draw queries with their nearest training images, framed by whether the label is the same."""
    pool, asked = choose(len(train), 1500, 2), choose(len(test), queries, 3)
    shown, wanted = crops(train, pool, size), crops(test, asked, size)
    scale = max(96 // size[1], 1)
    blocks: list[list[Pixels]] = []
    for encoder in encoders.values():
        keys, needles = _pooled(encoder, shown), _pooled(encoder, wanted)
        mean, deviation = keys.mean(0), keys.std(0) + 1e-6
        found = nearest((keys - mean) / deviation, (needles - mean) / deviation, k)
        for row, hits in enumerate(found):
            label = test.label(int(asked[row]))
            line = [_framed(_enlarged(_hwc(wanted[row]), scale), None)]
            for hit in hits:
                right = None if label is None else train.label(int(pool[hit])) == label
                line.append(_framed(_enlarged(_hwc(shown[hit]), scale), right))
            blocks.append(line)
    side_by_side = [
        [cell for part in range(len(encoders)) for cell in blocks[part * queries + row]] for row in range(queries)
    ]
    caption = (
        f"From left to right: {', then '.join(encoders)}. In each, a test image in gray and its nearest training "
        "images by cosine of pooled features: green with a tick where the class is the same, red with a cross if not."
    )
    return Picture("Nearest neighbours", caption, _rows(side_by_side))


def segmentation_picture(encoder: Encoder, train: Source, test: Source, size: int, count: int = 6) -> Picture:
    """Draw images, true masks, and what dense nearest neighbours and clusters say, nothing trained."""
    chosen = [int(i) for i in choose(len(test), count, 4)]
    panels: Panels = segment(encoder, train, test, chosen, image_size=size)
    scale = max(_SIDE // size, 1)
    rows = [[_enlarged(image, scale) for image in panels.images]]
    for masks in (panels.truth, panels.retrieval, panels.clusters):
        rows.append([_enlarged(CLASS_COLORS[np.where(m < 255, m, 10) % len(CLASS_COLORS)], scale) for m in masks])
    caption = (
        "Rows: images; true masks; dense nearest neighbours in a labelled set (level 1); k-means clusters matched "
        "to classes by the labels that score them (level 0). A colour is a class, the dark one is ground."
    )
    return Picture("Segmentation without training", caption, _rows(rows))


def _pooled(encoder: Encoder, pixels: Tensor) -> Tensor:
    return torch.cat([encoder.forward_blocks(part, 1)[-1].mean(1) for part in pixels.split(128)])


def _hwc(image: Tensor) -> Pixels:
    return image.permute(1, 2, 0).numpy()


def _enlarged(image: Pixels, factor: int) -> Pixels:
    return image.repeat(factor, 0).repeat(factor, 1)


def _framed(image: Pixels, right: bool | None) -> Pixels:
    color = {None: (128, 128, 128), True: (60, 160, 80), False: (205, 70, 60)}[right]
    canvas = Image.fromarray(np.pad(image, ((3, 3), (3, 3), (0, 0))))
    pen = ImageDraw.Draw(canvas)
    pen.rectangle((0, 0, canvas.width - 1, canvas.height - 1), outline=color, width=3)
    if right is not None:
        pen.rectangle((0, 0, 15, 15), fill=color)
        mark = [(3, 8), (6, 12), (12, 3)] if right else [(3, 3), (12, 12), (8, 8), (12, 3), (3, 12)]
        pen.line(mark, fill=(255, 255, 255), width=2)
    return np.asarray(canvas)


def _rows(rows: Sequence[Sequence[Pixels]]) -> Pixels:
    """Put pictures of one size into rows, with gaps of mid-gray between."""
    lines = []
    for row in rows:
        padded = [np.pad(cell, ((0, _GAP), (0, _GAP), (0, 0)), constant_values=255) for cell in row]
        lines.append(np.concatenate(padded, axis=1))
    return np.concatenate(lines)[:-_GAP, :-_GAP]
