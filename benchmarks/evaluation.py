"""The cost of evaluation: many heads compared with one, and kNN and a patch bank at full size.

    python benchmarks/evaluation.py --output benchmarks/results/cpu-evaluation.json

Features are drawn, not encoded: a spectrum that falls with 1 / j, and in the patch bank patches that are close to the
objects of their image, so that an inverted index has neighbors in several lists. The recall measured here shows that
the code works; the recall of an evaluation is in its result.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import click
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ijepa.bench.timing import interleaved, medians, ratio
from ijepa.config.recipe import Recipe
from ijepa.data.sources.base import Source
from ijepa.evaluation.classification.compare import Origin, Split
from ijepa.evaluation.classification.knn import TEST_CHUNK, TRAIN_CHUNK, knn_ranks
from ijepa.evaluation.classification.linear_heads import LinearHeads
from ijepa.evaluation.features.loaders import AugmentedLoader
from ijepa.evaluation.protocols import LinearProtocol
from ijepa.evaluation.segmentation.bank_search import BankSearch
from ijepa.evaluation.segmentation.protocol import Searched
from ijepa.evaluation.segmentation.retrieval import search
from ijepa.model.encoder import FrozenEncoder
from ijepa.prepare.scenes.scenes import draw_scene, scene_record
from ijepa.utils.environment import machine
from ijepa.utils.files import write_json

Part = Literal["forward", "cached", "knn", "bank"]

PARTS: tuple[Part, ...] = ("forward", "cached", "knn", "bank")

GRID = tuple(product([10.0 ** (-4 + step / 4) for step in range(13)], (0.0, 0.01, 0.1, 0.5)))
"""Rates and decays of 52 heads."""

KNN = {"train": 1_281_167, "test": 50_000, "width": 1280, "classes": 1000}
BANK = {"patches": 1_000_000, "width": 384, "queries": 784, "k": 30}
OBJECTS = 16
PICTURE = 448
"""Side in pixels of the images that are decoded, near ImageNet's mean."""


def heads_behind_a_backbone(name: str, images: int, repeats: int, classes: int = 1000) -> dict[str, Any]:
    """Return what a step of 52 heads, half on the last block and half on the last 4, costs in steps of one head.

    Augmentation is on: images are decoded, cropped and flipped at random before the backbone goes over them.
    """
    recipe = Recipe.load(name)
    encoder = FrozenEncoder.initial(recipe.model, 0)
    width = recipe.model.encoder.width
    places = np.arange(images)
    pictures = _Pictures(images)
    origin = Origin(encoder, pictures, pictures, places, places, recipe.model.image_size)
    empty = torch.empty(images, 0, 0)
    split = Split(empty, torch.zeros(images), empty, torch.zeros(images), classes, origin)
    four, last = (
        AugmentedLoader(split, LinearProtocol(name="bench", blocks=(blocks,), lrs=(1.0,), weight_decays=(0.0,)), 0)
        for blocks in (4, 1)
    )
    y = torch.randint(classes, (images,), generator=_draw(1))
    groups = {1: LinearHeads(width, classes, GRID[::2]), 4: LinearHeads(4 * width, classes, GRID[1::2])}
    one = LinearHeads(width, classes, GRID[:1])

    @torch.no_grad()
    def many() -> None:
        x = four.train_batch(places, places)
        for blocks, heads in groups.items():
            heads.step(x[:, -blocks:].flatten(1), y, 1.0)

    @torch.no_grad()
    def single() -> None:
        one.step(last.train_batch(places, places).flatten(1), y, 1.0)

    seconds = interleaved({"one": single, "many": many}, repeats)
    settings = {"recipe": name, "images": images, "classes": classes, "heads": len(GRID)}
    return {**settings, "cpu_seconds": medians(seconds), "ratio": ratio(seconds, "many", "one")}


def cached_heads(width: int, classes: int, repeats: int, batch: int = 256, steps: int = 4) -> dict[str, Any]:
    """Return what 52 heads cost together, as our heads one by one, and as modules with an optimizer each.

    `products` is what a step's two products alone take: no way of training heads can be faster than those, so that
    where each head's own are most of what it costs, `times faster at most` is all that can be had.
    """
    x = _features(8 * batch, width, 0).half()
    y = torch.randint(classes, (len(x),), generator=_draw(1))
    fixed = (torch.zeros(width), torch.ones(width))
    together = LinearHeads(width, classes, GRID, fixed=fixed)
    alone = [LinearHeads(width, classes, [point], fixed=fixed) for point in GRID]
    modules = [_module(width, classes, *point) for point in GRID]
    batches = torch.randint(len(x), (steps, batch), generator=_draw(2))
    left = torch.randn(width, len(GRID) * classes)

    def one_by_one() -> None:
        for heads in alone:
            for chosen in batches:
                heads.step(x[chosen], y[chosen], 1.0)

    def at_once() -> None:
        for chosen in batches:
            together.step(x[chosen], y[chosen], 1.0)

    def by_modules() -> None:
        for module, optimizer in modules:
            for chosen in batches:
                optimizer.zero_grad()
                cross_entropy(module(x[chosen].float()), y[chosen]).backward()
                optimizer.step()

    part = x[:batch].float()
    logits, gradient = torch.empty(batch, left.shape[1]), torch.empty_like(left)

    def products() -> None:
        for _ in batches:
            torch.mm(part, left, out=logits)
            torch.mm(part.T, logits, out=gradient)

    ways = {"together": at_once, "one by one": one_by_one, "modules": by_modules, "products": products}
    seconds = interleaved(ways, repeats)
    return {
        "batch": batch,
        "heads": len(GRID),
        "cpu_seconds": medians(seconds),
        "times faster than one by one": ratio(seconds, "one by one", "together"),
        "times faster than modules": ratio(seconds, "modules", "together"),
        "share of products": ratio(seconds, "products", "together"),
        "times faster at most": {name: ratio(seconds, name, "products") for name in ("one by one", "modules")},
    }


def planned_memory(train: int, test: int, width: int, *, k: int, classes: int) -> dict[str, int]:
    """Return the peak memory of kNN in bytes, by item. Only the features, in float16, grow with the train set.

    Args:
        train, test: numbers of images.
        width: channels of the features.
        k: largest number of neighbors.
        classes: number of classes.
    """
    chunk, rows = min(TRAIN_CHUNK, train), min(TEST_CHUNK, test)
    return {
        "features": 2 * (train + test) * width + 8 * (train + test),
        "queries": 3 * 4 * test * width,  # float32: as they are, standardized, and normalized
        "chunk": 4 * 4 * chunk * width,  # the same, and the chunk before, which is freed after the next one exists
        "scores": 4 * rows * chunk + 2 * 12 * rows * (chunk + k) // 4,
        "neighbors": 20 * test * k,  # similarity, class, and vote twice
        "votes": 3 * 4 * rows * classes,
    }


def knn_at(share: float) -> dict[str, Any]:
    """Return the planned memory of kNN at full size, and time and memory of both sets at a share of it."""
    train, test = (max(256, round(share * KNN[key])) for key in ("train", "test"))
    width, classes, ks = KNN["width"], KNN["classes"], (10, 20, 100, 200)
    whole = planned_memory(KNN["train"], KNN["test"], width, k=max(ks), classes=classes)
    here = planned_memory(train, test, width, k=max(ks), classes=classes)
    before = _reset_peak()
    x = torch.empty(train + test, width, dtype=torch.float16)
    for place, rows in enumerate(x.split(16384)):
        rows.copy_(_features(len(rows), width, place))
    y = torch.randint(classes, (len(x),), generator=_draw(1))
    begun, wall = time.process_time(), time.perf_counter()
    knn_ranks(x[:train], y[:train], x[train:], y[train:], neighbors=ks, temperature=0.07, classes=classes)
    cpu, wall = time.process_time() - begun, time.perf_counter() - wall
    return {
        "planned bytes at full size": {**whole, "sum": sum(whole.values())},
        "train": train,
        "test": test,
        "planned bytes": sum(here.values()),
        "measured bytes": _peak() - before,
        "cpu_seconds": cpu,
        "seconds": wall,
    }


def bank_at(share: float, repeats: int, probes: Sequence[int] = (8, 16, 32, 64)) -> dict[str, Any]:
    """Return the time to search a bank for the patches of an image, exactly and by a faiss index, and its recall."""
    patches, width, k = max(1024, round(share * BANK["patches"])), BANK["width"], BANK["k"]
    before = _reset_peak()
    keys = torch.empty(patches, width)
    for place, rows in enumerate(keys.split(16384)):
        rows.copy_(_patches(len(rows), width, place))
    queries = _patches(BANK["queries"], width, -1)
    begun = time.process_time()
    bank = BankSearch(keys, Searched(search="faiss"), seed=0)
    index = bank.index("cosine")
    built = time.process_time() - begun
    ways: dict[str, Callable[[], object]] = {"exact": lambda: search(queries, keys, k, "cosine")}

    def probe(count: int) -> None:
        index.nprobe = count
        bank.nearest(queries, k, "cosine")

    for count in probes:
        ways[f"{count} lists"] = partial(probe, count)
    cpu, wall = interleaved(ways, repeats), {}
    for name, way in ways.items():
        begun = time.perf_counter()
        way()
        wall[name] = time.perf_counter() - begun
    exact, recalls = search(queries, keys, k, "cosine"), {}
    for count in probes:
        index.nprobe = count
        found = bank.nearest(queries, k, "cosine")
        recalls[str(count)] = float((exact[:, :, None] == found[:, None, :]).any(2).double().mean())
    return {
        "patches": patches,
        "width": width,
        "queries": len(queries),
        "k": k,
        "lists": index.nlist,
        "build_cpu_seconds": built,
        "cpu_seconds": medians(cpu),
        "seconds": wall,
        "recall": recalls,
        "bank bytes": keys.nbytes,
        "measured bytes": _peak() - before,
    }


class _Pictures(Source):
    """Drawn scenes as JPEGs in memory."""

    def __init__(self, count: int) -> None:
        self.files = [scene_record(draw_scene(0, place, size=PICTURE), "").image for place in range(count)]
        self.labels = None

    def __len__(self) -> int:
        return len(self.files)

    @property
    def has_masks(self) -> bool:
        """None has."""
        return False

    def _name(self, index: int) -> str:
        return f"scene {index}"

    def _image(self, index: int) -> bytes:
        return self.files[index]


def _module(width: int, classes: int, lr: float, decay: float) -> tuple[torch.nn.Linear, torch.optim.AdamW]:
    module = torch.nn.Linear(width, classes)
    groups = [{"params": [module.weight], "weight_decay": decay}, {"params": [module.bias], "weight_decay": 0.0}]
    return module, torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))


def _draw(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number & 0xFFFF)


def _spectrum(width: int) -> Tensor:
    return torch.arange(1, width + 1).rsqrt()


def _features(count: int, width: int, number: int) -> Tensor:
    return torch.randn(count, width, generator=_draw(number)).mul_(_spectrum(width))


def _patches(count: int, width: int, number: int) -> Tensor:
    """Return patches of images that hold a few objects each."""
    draw = _draw(number)
    images = -(-count // 196)
    objects = torch.randn(images * OBJECTS, width, generator=draw)
    chosen = torch.randint(OBJECTS, (count,), generator=draw) + torch.arange(count) // 196 * OBJECTS
    return (objects[chosen] + 0.5 * torch.randn(count, width, generator=draw)).mul_(_spectrum(width))


def _reset_peak() -> int:
    """Begin to measure this process's peak memory again, where the system allows it; return what it holds now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return 0
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(key: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(key + ":")), 0)


@click.command()
@click.option("--part", "parts", type=click.Choice(PARTS), multiple=True, help="Only this part. Can be repeated.")
@click.option(
    "--recipe", default="vit-small-16", show_default=True, help="Recipe of the encoder in front of the heads."
)
@click.option("--images", type=click.IntRange(min=1), default=32, show_default=True, help="Images per batch.")
@click.option(
    "--knn-share",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.1,
    show_default=True,
    help="Size of the kNN measurement, as a share of 1.28 M features of width 1280 and 50,000 queries.",
)
@click.option(
    "--bank-share",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="Size of the patch bank, as a share of 1 M patches of width 384.",
)
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True, help="Number of rounds.")
@click.option("--output", type=click.Path(path_type=Path), required=True)
def main(
    parts: tuple[Part, ...],
    recipe: str,
    images: int,
    knn_share: float,
    bank_share: float,
    repeats: int,
    output: Path,
) -> None:
    """Measure parts of evaluation."""
    run: dict[Part, Callable[[], dict[str, Any]]] = {
        "forward": lambda: heads_behind_a_backbone(recipe, images, repeats),
        "cached": lambda: {
            f"{width} features, {classes} classes": cached_heads(width, classes, repeats)
            for width, classes in ((192, 8), (1280, 10), (384, 100))
        },
        "knn": lambda: knn_at(knn_share),
        "bank": lambda: bank_at(bank_share, repeats),
    }
    result: dict[str, Any] = {"threads": torch.get_num_threads()}
    for part in parts or PARTS:
        result[part] = run[part]()
        click.echo(f"{part}: {result[part]}")
    write_json(output, {**machine(), **result})


if __name__ == "__main__":
    main()
