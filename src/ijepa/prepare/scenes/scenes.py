"""The built-in data set: drawn scenes with several instances of one shape class on a random background, with masks.

A joint-embedding predictive model keeps what the parts of an image have in common and what can be predicted from them.
Here, that is the class: all instances of a scene have the same shape, and each has its own color, size and angle, on a
background that is random from patch to patch, under strong grain. From some instances one can predict the form of the
hidden ones and their likely places, and hardly anything else. The shapes match in area and edge length (see `shapes`),
and color, place and number are drawn independently of the class, so that pixel statistics hardly predict the class.
docs/scenes.md gives the reasons.

A scene is a function of (seed, position) and a `SceneRule`: image (S, S, 3) uint8, mask (S, S) uint8 with 0 for the
background and class + 1 for a shape, label in [0, 8). It is drawn in float32 on planes (3, S, S). Shapes are read from
tables of signed distances, for all instances of a scene at once, because a demo draws twelve thousand scenes. Bytes are
reproducible on one machine with the same library versions; sines and JPEG may be rounded differently on other machines.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

from ijepa.prepare.scenes.shapes import CLASSES, EXTENT, RESOLUTION, TILT, Plane, distance_tables
from ijepa.prepare.shard_writer import Record, ShardPlan, write_folder
from ijepa.utils import random as randomness
from ijepa.utils.errors import UserError

VERSION = 2
"""Increase it with every change here or in `shapes` that changes a drawn pixel."""

SHAREABLE = ("rotation", "size", "color", "polarity")
_DRAW_OF = {2: "size", 3: "rotation", 4: "polarity", 5: "color", 6: "color", 7: "color"}
VALIDATION_START = 1 << 40
"""First position of the validation scenes, beyond the largest training set."""

_AREA = 0.45
"""Area of a shape with diameter 1."""
_CLOUDS, _GRAINS = 8, 64
"""Cells of the two noise grids along a side."""
_PER_INSTANCE, _PER_IMAGE = 8, 8
"""Random numbers for each instance and each image."""
_BATCH = 64
"""Scenes whose random numbers are drawn at a time."""

Pixels = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Scene:
    """One drawn scene: `image` (S, S, 3) uint8, `mask` (S, S) uint8 (0 background, class + 1 shape), `label`."""

    image: Pixels
    mask: Pixels
    label: int


@dataclass(frozen=True)
class SceneRule:
    """The ranges of everything that varies in a scene. Lengths are shares of the image side unless stated otherwise.

    Attributes:
        instances: minimum and maximum number of instances; each has its own cell of the layout.
        cells: the layout has `cells` x `cells` places.
        shift: largest shift of the whole layout in each direction, in cells. The layout wraps around, so that no pixel
            has a fixed meaning, but places stay predictable from each other.
        jitter: largest distance of an instance from the center of its cell, in cells. Instances overlap if it is larger
            than the diameter allows.
        diameter: minimum and maximum; a shape of diameter d has area .45 d^2 in every class.
        rotation: range of angles as a share of a full turn: 0 upright, 1 free.
        light: share of instances that are lighter than the background; the others are darker.
        shared: attributes that all instances of a scene have in common, out of `SHAREABLE`.
        contrast: minimum and maximum difference in brightness between instance and background, in [0, 1].
        chroma: maximum strength of color, in [0, 1].
        ground: variation of the background's brightness and color between scenes: 0 the same gray, 1 large.
        clouds: standard deviation of the background noise with eight cells across, in [0, 1].
        grain: standard deviation of the noise over the whole image with 64 cells across, in [0, 1].
    """

    instances: tuple[int, int] = (6, 10)
    cells: int = 4
    shift: float = 0.5
    jitter: float = 0.06
    diameter: tuple[float, float] = (0.22, 0.24)
    rotation: float = 0.08
    light: float = 1.0
    shared: tuple[str, ...] = ()
    contrast: tuple[float, float] = (0.3, 0.5)
    chroma: float = 0.15
    ground: float = 0.0
    clouds: float = 0.2
    grain: float = 0.15

    def __post_init__(self) -> None:
        def require(holds: bool, field: str, hint: str) -> None:
            if not holds:
                raise UserError(f"scenes.{field}", f"{getattr(self, field)!r} is out of range", hint)

        require(1 <= self.cells <= 16, "cells", "give 1 to 16")
        low, high = self.instances
        require(1 <= low <= high <= self.cells**2, "instances", f"give 1 <= least <= most <= {self.cells**2}")
        require(0 <= self.shift <= 0.5, "shift", "give 0 to 0.5")
        require(0 <= self.jitter <= 0.5, "jitter", "give 0 to 0.5")
        require(0.05 <= self.diameter[0] <= self.diameter[1] <= 1, "diameter", "give 0.05 <= least <= most <= 1")
        require(0 <= self.contrast[0] <= self.contrast[1] <= 0.5, "contrast", "give 0 <= least <= most <= 0.5")
        require(set(self.shared) <= set(SHAREABLE), "shared", f"known: {', '.join(SHAREABLE)}")
        for field in ("rotation", "light", "chroma", "ground", "clouds", "grain"):
            require(0 <= getattr(self, field) <= 1, field, "give 0 to 1")

    @property
    def numbers(self) -> int:
        """Number of random numbers of one scene. Each has a fixed place, so that no draw depends on another draw."""
        instances = self.cells**2
        return _PER_IMAGE + instances + instances * _PER_INSTANCE + 3 * (_CLOUDS**2 + _GRAINS**2)


DEFAULT_RULE = SceneRule()


def draw_scene(seed: int, position: int, *, size: int = 64, rule: SceneRule = DEFAULT_RULE) -> Scene:
    """Draw the scene at `position`; `size` is its side in pixels."""
    return next(draw_scenes(seed, [position], size=size, rule=rule))


def draw_scenes(
    seed: int, positions: Sequence[int], *, size: int = 64, rule: SceneRule = DEFAULT_RULE
) -> Iterator[Scene]:
    """Draw the scenes at `positions`, in that order: the same as `draw_scene` for each, but faster."""
    for start in range(0, len(positions), _BATCH):
        some = np.asarray(positions[start : start + _BATCH], dtype=np.int64)
        words = randomness.random_bits(seed, randomness.Stream.SCENES, some, rule.numbers)
        for row in randomness.uniform(words):
            yield _draw(row, size, rule)


def _draw(numbers: Numbers, size: int, rule: SceneRule) -> Scene:
    """Turn one scene's uniform numbers (rule.numbers,) into the scene."""
    places = rule.cells**2
    parts = np.cumsum([_PER_IMAGE, places, places * _PER_INSTANCE, 3 * _CLOUDS**2])
    image, order, instance, clouds, grain = np.split(numbers, parts)
    label = int(image[0] * len(CLASSES))
    low, high = rule.instances
    chosen = np.argsort(order)[: low + int(image[1] * (high - low + 1))]
    draws = instance.reshape(_PER_INSTANCE, places)[:, chosen]
    dx, dy, extent, turn, polarity, contrast, hue, chroma = (
        _share(draw, _DRAW_OF.get(i), rule) for i, draw in enumerate(draws)
    )

    shift_x, shift_y = rule.shift * (2 * image[5:7] - 1)
    center_x = (chosen % rule.cells + 0.5 + shift_x) % rule.cells + rule.jitter * (2 * dx - 1)
    center_y = (chosen // rule.cells + 0.5 + shift_y) % rule.cells + rule.jitter * (2 * dy - 1)
    center_x, center_y = center_x * size / rule.cells, center_y * size / rule.cells
    unit = np.sqrt(_AREA) * size * (rule.diameter[0] + extent * (rule.diameter[1] - rule.diameter[0]))
    angle = 2 * np.pi * rule.rotation * (turn - 0.5)

    brightness = 0.5 + 0.3 * rule.ground * (image[2] - 0.5)
    sign = np.where(polarity < rule.light, 1.0, -1.0)
    level = brightness + sign * (rule.contrast[0] + contrast * (rule.contrast[1] - rule.contrast[0]))
    colors = (level + _tint(hue, chroma * rule.chroma)).astype(np.float32)  # (3, n)
    ground = brightness + _tint(image[3:4], image[4:5] * rule.ground * rule.chroma)

    # Each instance is drawn in a square of `side` pixels, on a canvas with a margin so that nothing is clipped.
    side = int(np.ceil(2 * EXTENT * unit.max())) + 1
    margin = side // 2 + 1 + int(np.ceil(rule.jitter * size / rule.cells))
    canvas = np.zeros((3, size + 2 * margin, size + 2 * margin), dtype=np.float32)
    inner = canvas[:, margin : margin + size, margin : margin + size]
    np.add(_noise(clouds, _CLOUDS, size, rule.clouds), ground[:, :, None].astype(np.float32), out=inner)
    mask = np.zeros(canvas.shape[1:], dtype=np.uint8)

    left = np.floor(center_x - side / 2 + 0.5).astype(np.int64)
    top = np.floor(center_y - side / 2 + 0.5).astype(np.int64)
    steps = np.arange(side) + 0.5
    u = (left[:, None] + steps - center_x[:, None]).astype(np.float32)[:, None, :]
    v = (top[:, None] + steps - center_y[:, None]).astype(np.float32)[:, :, None]
    cell = _cells(u, v, unit, angle)
    alpha = _coverage(label, cell, unit)
    opaque = alpha >= 0.5
    painted, kept = colors.T[:, :, None, None] * alpha[:, None], (1 - alpha)[:, None]  # (n, 3 or 1, side, side)
    for i, (x, y) in enumerate(zip((left + margin).tolist(), (top + margin).tolist(), strict=True)):
        patch = canvas[:, y : y + side, x : x + side]
        patch *= kept[i]
        patch += painted[i]
        mask[y : y + side, x : x + side][opaque[i]] = label + 1
    inner += _noise(grain, _GRAINS, size, rule.grain)
    pixels = np.clip(inner * np.float32(255) + np.float32(0.5), 0, 255).astype(np.uint8)
    return Scene(
        image=np.ascontiguousarray(pixels.transpose(1, 2, 0)),
        mask=np.ascontiguousarray(mask[margin : margin + size, margin : margin + size]),
        label=label,
    )


def _share(draw: Numbers, attribute: str | None, rule: SceneRule) -> Numbers:
    """Return the first instance's draw for all instances if they share the attribute, otherwise the draws."""
    return np.broadcast_to(draw[:1], draw.shape) if attribute in rule.shared else draw


def _tint(hue: Numbers, strength: Numbers) -> Numbers:
    """Return (3, n) offsets of red, green and blue with sum 0: a color of that hue that does not change brightness."""
    angle = 2 * np.pi * (hue + np.array([[0.0], [1 / 3], [2 / 3]]))
    tint: Numbers = strength * np.cos(angle)
    return tint


def _cells(u: Plane, v: Plane, unit: Numbers, angle: Numbers) -> npt.NDArray[np.intp]:
    """Return (n, side, side) cells of the distance tables at offsets u, v in pixels from the instances' centers."""
    scale = RESOLUTION / (2 * EXTENT) / unit
    turn = angle - TILT
    cosine = (np.cos(turn) * scale).astype(np.float32)[:, None, None]
    sine = (np.sin(turn) * scale).astype(np.float32)[:, None, None]
    last = RESOLUTION - 1
    column = np.clip(cosine * u + sine * v + RESOLUTION / 2, 0, last).astype(np.intp)
    row = np.clip(cosine * v - sine * u + RESOLUTION / 2, 0, last).astype(np.intp)
    return row * RESOLUTION + column


def _coverage(label: int, cell: npt.NDArray[np.intp], unit: Numbers) -> Plane:
    """Return (n, side, side) coverage of pixels in [0, 1]; edges are one pixel wide."""
    distance = distance_tables()[label].ravel().take(cell)
    coverage: Plane = np.clip(np.float32(0.5) - distance * unit.astype(np.float32)[:, None, None], 0, 1)
    return coverage


def _noise(numbers: Numbers, cells: int, size: int, deviation: float) -> Plane:
    """Return (3, size, size) noise with that standard deviation: a random grid of `cells` x `cells`, interpolated."""
    grid = ((numbers - 0.5) * (deviation * np.sqrt(12))).astype(np.float32).reshape(3, cells, cells)
    if cells == size:
        return grid
    weights = _interpolation(cells, size)
    noise: Plane = weights @ grid @ weights.T
    return noise


@cache
def _interpolation(cells: int, size: int) -> Plane:
    """Return (size, cells) weights of linear interpolation, with rows of unit norm to keep the standard deviation."""
    place = np.clip((np.arange(size) + 0.5) * cells / size - 0.5, 0, cells - 1)
    weights = np.maximum(1 - np.abs(place[:, None] - np.arange(cells)), 0)
    scaled: Plane = (weights / np.linalg.norm(weights, axis=1, keepdims=True)).astype(np.float32)
    return scaled


def scene_record(scene: Scene, key: str, *, quality: int = 92) -> Record:
    """Return a scene as a record of a shard: JPEG without chroma subsampling, label, mask as PNG of indices."""
    jpeg = simplejpeg.encode_jpeg(scene.image, quality=quality, colorspace="RGB", colorsubsampling="444")
    png = io.BytesIO()
    Image.fromarray(scene.mask).save(png, "PNG", compress_level=6)
    return Record(key, image=jpeg, label=scene.label, mask=png.getvalue())


def _records(plan: ShardPlan, *, seed: int, size: int, rule: SceneRule) -> Iterator[Record]:
    """Yield the records of one shard."""
    offset = VALIDATION_START if plan.split == "val" else 0
    positions = range(offset + plan.start, offset + plan.stop)
    for index, scene in enumerate(draw_scenes(seed, positions, size=size, rule=rule), plan.start):
        yield scene_record(scene, f"{plan.split}-{index:08d}")


def write_scenes(
    out: str | Path,
    *,
    images: int,
    seed: int,
    size: int = 64,
    val_share: float = 1 / 6,
    shard_size: int = 2000,
    rule: SceneRule = DEFAULT_RULE,
    processes: int = 1,
) -> dict[str, Any]:
    """Write train-*.tar, val-*.tar, classes.txt and manifest.json into `out`, and return the manifest.

    The first scenes of a split do not depend on its size, and the bytes do not depend on `processes`.

    Args:
        out: a folder that does not exist or is empty.
        images: number of scenes, both splits together.
        seed: seed of all scenes.
        size: side length of a scene in pixels.
        val_share: share of the scenes in the validation split.
        shard_size: scenes per shard.
        rule: what varies in a scene.
        processes: number of processes.

    Raises:
        UserError: a number out of range, or a folder that is not empty.
        RunError: a file cannot be written.
    """
    if images < 1:
        raise UserError("--images", f"{images} is out of range", "give at least 1")
    if not 16 <= size <= 1024:
        raise UserError("--size", f"{size} pixels is out of range", "give 16 to 1024")
    if not 0 <= val_share < 1:
        raise UserError("--val-share", f"{val_share} is out of range", "give at least 0 and less than 1")
    if not 0 <= seed < 1 << 64:
        raise UserError("--seed", f"{seed} is out of range", "give 0 to 2^64 - 1")
    validation = round(images * val_share)
    about = {
        "drawn_by": "ijepa data scenes",
        "version": VERSION,
        "randomness": randomness.VERSION,
        "seed": seed,
        "size": size,
        "rule": asdict(rule),
    }
    return write_folder(
        out,
        splits={"train": images - validation, "val": validation},
        records=partial(_records, seed=seed, size=size, rule=rule),
        classes=CLASSES,
        about=about,
        shard_size=shard_size,
        processes=processes,
    )
