"""Labels of a video's first frame, carried on to the others by the similarity of patches.

Level 1 in the terms of `segmentation`: nothing is trained, and the first frame's mask is all that is known. The rule is
that of Jabri et al. (arXiv 2006.14613) as DINO (arXiv 2104.14294) uses it: a patch takes the mean of the labels of its
`neighbours` most similar patches, weighted by exp(cosine / temperature), from the first frame and the last
`memory` ones, no farther than `radius` patches away. Soft labels are carried, upsampled bilinearly, each object's map
stretched to [0, 1], and the largest is the answer. The long side is cut down to whole patches; in DINO's code to a
multiple of 64 pixels.

Scores are DAVIS's J and F (`contours`): means over an object's frames but the first and the last of a video, then over
all objects. The interval draws whole videos. Scores of a frame go through (QUERIES, frames * patches) at a time.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize, one_hot

from ijepa.data.loading.crop import Box, crop_resize
from ijepa.distributed.process_group import SINGLE_PROCESS, World
from ijepa.evaluation.features.extract import Encoder, Progress
from ijepa.evaluation.features.sampling import encoded
from ijepa.evaluation.metrics.bootstrap import mean_interval
from ijepa.evaluation.metrics.region_contour import contour, region
from ijepa.evaluation.segmentation.clustering import require_extra
from ijepa.evaluation.segmentation.dataset import nearest_resize
from ijepa.evaluation.video.dataset import VOID, Video, fingerprint
from ijepa.evaluation.video.protocol import PropagationProtocol
from ijepa.utils.environment import versions
from ijepa.utils.errors import UserError

QUERIES = 1024

Labels = npt.NDArray[np.integer]
Scores = list[tuple[float, float]]
"""J and F of each object of a video."""


def evaluate_propagation(
    encoders: Mapping[str, Encoder],
    videos: tuple[Video, ...],
    protocol: PropagationProtocol,
    *,
    seed: int,
    progress: Progress | None = None,
    ranks: World = SINGLE_PROCESS,
) -> dict[str, Any]:
    """Evaluate encoders by one protocol.

    Returns:
        As `segmentation.evaluate_segmentation`; a row has `jf` (the mean of J and F, `ci` its interval), `j`, `f` and
        the share of objects above a half, `j_recall` and `f_recall`. `chance` is `jf` of the first mask left where
        it is.

    Raises:
        UserError: a mask that does not fit, a first frame without an object.
        RunError: a frame cannot be decoded, or features are not finite.
    """
    begun = time.perf_counter()
    require_extra()
    rows = []
    for name, encoder in encoders.items():
        made = ranks.map_in_turns(len(videos), partial(_followed, encoder, videos, protocol))
        scores: list[Scores] = []
        for (pairs,) in made:
            scores.append([(float(j), float(f)) for j, f in pairs])
            if progress is not None:
                progress(f"propagation: {name}, {len(scores)} of {len(videos)} videos")
        rows.append({"encoder": name, **_row(scores, seed)})
    still = [score(video, [_first(video)] * len(video.frames)) for video in videos]
    return {
        "kind": "propagation",
        "level": 1,
        "protocol": protocol.model_dump(mode="json"),
        "seed": seed,
        "data": {"test": {"n": len(videos), "fingerprint": fingerprint(videos)}},
        "chance": _row(still, seed)["jf"],
        "rows": rows,
        "versions": versions(),
        "seconds": round(time.perf_counter() - begun, 2),
    }


def _followed(
    encoder: Encoder, videos: tuple[Video, ...], protocol: PropagationProtocol, numbers: Iterable[int]
) -> Iterator[tuple[Tensor, ...]]:
    """Yield J and F (objects, 2) of videos."""
    for number in numbers:
        pairs = score(videos[number], carry(encoder, videos[number], protocol))
        yield (torch.tensor(pairs, dtype=torch.float64),)


@torch.no_grad()
def carry(encoder: Encoder, video: Video, protocol: PropagationProtocol) -> list[Labels]:
    """Return the masks (H, W) of all frames, the first as it is given."""
    first = _first(video)
    size = patch_size_of(first.shape, protocol.short_side, encoder.patch_size)
    grid = size[0] // encoder.patch_size, size[1] // encoder.patch_size
    labels = np.unique(np.append(first, 0))  # the ground, and objects by whatever number the mask has for them
    known = one_hot(
        torch.from_numpy(np.searchsorted(labels, nearest_resize(first, grid))).flatten(), len(labels)
    ).float()
    features = _features(encoder, video.frame(0), size)
    memory: deque[tuple[Tensor, Tensor]] = deque(maxlen=protocol.memory)
    near, masks = within(grid, protocol.radius), [first]
    for number in range(1, len(video.frames)):
        frame = video.frame(number)
        if frame.shape[:2] != first.shape:
            raise UserError(video.frames[number], "has another size than the first frame")
        now = _features(encoder, frame, size)
        seen = [(features, known), *memory]
        soft = taken(now, torch.cat([x for x, _ in seen]), torch.cat([y for _, y in seen]), near, protocol)
        memory.append((now, soft))
        masks.append(labels[_answer(soft, grid, size, first.shape)])
    return masks


def taken(queries: Tensor, keys: Tensor, labels: Tensor, near: Tensor, rule: PropagationProtocol) -> Tensor:
    """Return the labels (N, C) that patches take.

    Args:
        queries: features (N, D) of length 1.
        keys, labels: of some frames one after the other, (frames * N, D) and (frames * N, C).
        near: (N, N) bool, which patches of a frame a patch may look at.
        rule: neighbours and temperature.
    """
    found = []
    frames = len(keys) // len(near)
    for some, allowed in zip(queries.split(QUERIES), near.split(QUERIES), strict=True):
        cosine = (some @ keys.T).unflatten(1, (frames, -1)).masked_fill_(~allowed[:, None], -torch.inf).flatten(1)
        value, place = cosine.topk(min(rule.neighbours, cosine.shape[1]), dim=1)
        weights = (value / rule.temperature).softmax(1)
        found.append(torch.einsum("qk,qkc->qc", weights, labels[place]))
    return torch.cat(found)


def within(grid: tuple[int, int], radius: int) -> Tensor:
    """Return which pairs of a grid's patches (N, N) lie no farther than `radius` rows and columns apart."""
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    rows, columns = rows.flatten(), columns.flatten()
    return ((rows[:, None] - rows).abs() <= radius) & ((columns[:, None] - columns).abs() <= radius)


def score(video: Video, masks: list[Labels]) -> Scores:
    """Return the mean J and F of each object over the labelled frames but the first and the last of the video."""
    objects = [int(label) for label in np.unique(masks[0]) if label]
    last = len(masks) - 1 if len(masks) > 2 else len(masks)
    sums = np.zeros((len(objects), 2))
    frames = 0
    for number in range(1, last):
        truth = video.mask(number, masks[0].shape)
        if truth is None:
            continue
        frames += 1
        scored = truth != VOID
        for place, label in enumerate(objects):
            ours, theirs = (masks[number] == label) & scored, truth == label
            sums[place] += region(ours, theirs), contour(ours, theirs)
    if not frames:
        raise UserError(video.name, "no frame but the first and the last has a mask")
    return [(float(j), float(f)) for j, f in sums / frames]


def patch_size_of(shape: tuple[int, ...], short_side: int, patch: int) -> tuple[int, int]:
    """Return height and width, multiples of the patch, at which frames of `shape` are seen."""
    scale = short_side / min(shape)
    height, width = (max(patch, int(round(scale * side, 6)) // patch * patch) for side in shape)
    return height, width


def _row(scores: list[Scores], seed: int) -> dict[str, Any]:
    every = np.array([pair for video in scores for pair in video])
    sums, counts = [float(np.mean(np.array(video), 1).sum()) for video in scores], [len(video) for video in scores]
    return {
        "jf": float(every.mean()),
        "ci": list(mean_interval(sums, counts=counts, seed=seed)),
        "j": float(every[:, 0].mean()),
        "f": float(every[:, 1].mean()),
        "j_recall": float((every[:, 0] > 0.5).mean()),
        "f_recall": float((every[:, 1] > 0.5).mean()),
        "objects": len(every),
    }


def _first(video: Video) -> Labels:
    mask = video.mask(0, video.frame(0).shape[:2])
    assert mask is not None
    mask = np.where(mask == VOID, 0, mask)
    if not mask.any():
        raise UserError(video.name, "the mask of its first frame holds no object")
    return mask


def _features(encoder: Encoder, frame: npt.NDArray[np.uint8], size: tuple[int, int]) -> Tensor:
    pixels = crop_resize(frame, Box(0, 0, *frame.shape[:2]), size)
    return normalize(encoded(encoder, pixels[None])[0], dim=1)


def _answer(soft: Tensor, grid: tuple[int, int], size: tuple[int, int], shape: tuple[int, ...]) -> Labels:
    """Return the mask (H, W) of patches' labels (N, C)."""
    maps = interpolate(soft.T.unflatten(1, grid)[None], size, mode="bilinear")[0]
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    stretched = torch.where(high > 0, (maps - low) / (high - low).clamp_min(1e-12), maps)
    return nearest_resize(stretched.argmax(0).numpy(), (shape[0], shape[1]))
