"""Propagation of the labels of a video's first frame to the other frames by the similarity of patches.

Level 1 in the terms of `segmentation`: nothing is trained, and only the mask of the first frame is given. The rule is
that of Jabri et al. (arXiv 2006.14613) as DINO uses it (arXiv 2104.14294, eval_video_segmentation.py): a patch gets the
mean of the labels of its `neighbors` most similar patches, weighted by exp(cosine / temperature). These patches are in
the first frame or the last `memory` frames, and at most `radius` patches away. The labels are soft; they are upsampled
bilinearly, the map of each object is scaled to [0, 1], and the largest is the prediction. The long side of a frame is
cropped to whole patches, in DINO's code to a multiple of 64 pixels.

Scores are J and F of DAVIS (`region_contour`): means over all frames of an object except the first and the last of the
video, then over all objects. The interval resamples whole videos.
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
from ijepa.evaluation.context import DEFAULT_CONTEXT, EvaluationContext
from ijepa.evaluation.features.extract import PatchEncoder
from ijepa.evaluation.features.sampling import encoded
from ijepa.evaluation.metrics.bootstrap import mean_interval
from ijepa.evaluation.metrics.region_contour import contour, region
from ijepa.evaluation.results.schema import Data, DataSet, EvaluationResult, ResultRow
from ijepa.evaluation.segmentation.dataset import Labels, nearest_resize
from ijepa.evaluation.video.dataset import VOID, Video, fingerprint
from ijepa.evaluation.video.protocol import PropagationProtocol
from ijepa.utils.environment import versions
from ijepa.utils.errors import UserError
from ijepa.utils.extras import require_extra

QUERIES = 1024
"""Patches of a frame that are compared at once, which bounds the memory of their similarities."""

Scores = list[tuple[float, float]]
"""J and F of each object of a video."""


def evaluate_propagation(
    encoders: Mapping[str, PatchEncoder],
    videos: tuple[Video, ...],
    protocol: PropagationProtocol,
    context: EvaluationContext = DEFAULT_CONTEXT,
) -> EvaluationResult:
    """Evaluate encoders by one protocol.

    Returns:
        A row has `jf` (the mean of J and F), `ci`, `j`, `f`, the shares of objects with more than a half, `j_recall`
        and `f_recall`, and the number of objects. `chance` is `jf` of the mask of the first frame in all frames.

    Raises:
        UserError: a mask that does not match its frame, or a first frame without an object.
        RunError: a frame cannot be decoded, or features are not finite.
    """
    begun = time.perf_counter()
    require_extra("scipy", "evaluation", f"protocol {protocol.name}")
    rows = []
    for name, encoder in encoders.items():
        scores: list[Scores] = []
        for (pairs,) in context.world.map_in_turns(len(videos), partial(_score_videos, encoder, videos, protocol)):
            scores.append([(float(j), float(f)) for j, f in pairs])
            context.report(f"propagation: {name}, {len(scores)} of {len(videos)} videos")
        rows.append(ResultRow(encoder=name, **_summary(scores, context.seed)))
    constant = [score(video, [_first_mask(video)] * len(video.frames)) for video in videos]
    return EvaluationResult(
        kind="propagation",
        level=1,
        protocol=protocol.model_dump(mode="json"),
        seed=context.seed,
        data=Data(test=DataSet(n=len(videos), fingerprint=fingerprint(videos))),
        chance=_summary(constant, context.seed)["jf"],
        rows=tuple(rows),
        versions=versions(),
        seconds=round(time.perf_counter() - begun, 2),
    )


def _score_videos(
    encoder: PatchEncoder, videos: tuple[Video, ...], protocol: PropagationProtocol, numbers: Iterable[int]
) -> Iterator[tuple[Tensor, ...]]:
    """Yield J and F (objects, 2) of videos."""
    for number in numbers:
        pairs = score(videos[number], propagate(encoder, videos[number], protocol))
        yield (torch.tensor(pairs, dtype=torch.float64),)


@torch.no_grad()
def propagate(encoder: PatchEncoder, video: Video, protocol: PropagationProtocol) -> list[Labels]:
    """Return the masks (H, W) of all frames; the first is the given one."""
    first = _first_mask(video)
    size = input_size(first.shape, protocol.short_side, encoder.patch_size)
    grid = size[0] // encoder.patch_size, size[1] // encoder.patch_size
    values = np.unique(np.append(first, 0))  # the ground, and the values of the objects, which may have gaps
    numbers = torch.from_numpy(np.searchsorted(values, nearest_resize(first, grid)))
    first_labels = one_hot(numbers.flatten(), len(values)).float()  # (N, C)
    first_features = _features(encoder, video.frame(0), size)
    memory: deque[tuple[Tensor, Tensor]] = deque(maxlen=protocol.memory)
    near, masks = within(grid, protocol.radius), [first]
    for number in range(1, len(video.frames)):
        frame = video.frame(number)
        if frame.shape[:2] != first.shape:
            raise UserError(video.frames[number], "does not have the size of the first frame")
        features = _features(encoder, frame, size)
        keys, labels = (torch.cat(parts) for parts in zip((first_features, first_labels), *memory, strict=True))
        soft = propagate_labels(features, keys, labels, near, protocol)
        memory.append((features, soft))
        masks.append(values[_prediction(soft, grid, size, first.shape)])
    return masks


def propagate_labels(
    queries: Tensor, keys: Tensor, labels: Tensor, near: Tensor, protocol: PropagationProtocol
) -> Tensor:
    """Return the soft labels (N, C) of the patches of a frame.

    Args:
        queries: features (N, D) of length 1.
        keys, labels: features and labels of other frames, concatenated: (frames * N, D) and (frames * N, C).
        near: which patches of a frame are neighbors of a patch, (N, N) bool.
        protocol: number of neighbors and temperature.
    """
    found = []
    frames = len(keys) // len(near)
    for some, allowed in zip(queries.split(QUERIES), near.split(QUERIES), strict=True):
        cosine = (some @ keys.T).unflatten(1, (frames, -1))  # (q, frames, N)
        cosine = cosine.masked_fill_(~allowed[:, None], -torch.inf).flatten(1)
        value, place = cosine.topk(min(protocol.neighbors, cosine.shape[1]), dim=1)
        weights = (value / protocol.temperature).softmax(1)
        found.append(torch.einsum("qk,qkc->qc", weights, labels[place]))
    return torch.cat(found)


def within(grid: tuple[int, int], radius: int) -> Tensor:
    """Return which pairs (N, N) of the patches of a grid are at most `radius` rows and columns apart."""
    rows, columns = (x.flatten() for x in torch.meshgrid(*map(torch.arange, grid), indexing="ij"))
    return ((rows[:, None] - rows).abs() <= radius) & ((columns[:, None] - columns).abs() <= radius)


def score(video: Video, masks: list[Labels]) -> Scores:
    """Return the mean J and F of each object over the labeled frames except the first and the last of the video."""
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
            predicted, true = (masks[number] == label) & scored, truth == label
            sums[place] += region(predicted, true), contour(predicted, true)
    if not frames:
        raise UserError(video.name, "no frame except the first and the last has a mask")
    return [(float(j), float(f)) for j, f in sums / frames]


def input_size(shape: tuple[int, ...], short_side: int, patch: int) -> tuple[int, int]:
    """Return height and width, multiples of the patch, to which frames of `shape` are resized."""
    scale = short_side / min(shape)
    # Rounded first, so that rounding errors do not remove a patch from a side that is a multiple of the patch.
    height, width = (max(patch, int(round(scale * side, 6)) // patch * patch) for side in shape)
    return height, width


def _summary(scores: list[Scores], seed: int) -> dict[str, Any]:
    """Return the metrics of all objects of all videos."""
    pairs = np.array([pair for video in scores for pair in video])  # (objects, 2)
    sums = [float(np.mean(np.array(video), 1).sum()) for video in scores]
    return {
        "jf": float(pairs.mean()),
        "ci": list(mean_interval(sums, counts=[len(video) for video in scores], seed=seed)),
        "j": float(pairs[:, 0].mean()),
        "f": float(pairs[:, 1].mean()),
        "j_recall": float((pairs[:, 0] > 0.5).mean()),
        "f_recall": float((pairs[:, 1] > 0.5).mean()),
        "objects": len(pairs),
    }


def _first_mask(video: Video) -> Labels:
    mask = video.mask(0, video.frame(0).shape[:2])
    assert mask is not None
    mask = np.where(mask == VOID, 0, mask)
    if not mask.any():
        raise UserError(video.name, "the mask of its first frame has no object")
    return mask


def _features(encoder: PatchEncoder, frame: npt.NDArray[np.uint8], size: tuple[int, int]) -> Tensor:
    """Return patch features (N, D) of length 1."""
    pixels = crop_resize(frame, Box(0, 0, *frame.shape[:2]), size)
    return normalize(encoded(encoder, pixels[None])[0], dim=1)


def _prediction(soft: Tensor, grid: tuple[int, int], size: tuple[int, int], shape: tuple[int, ...]) -> Labels:
    """Return the mask (H, W) of class numbers for labels (N, C) of patches."""
    maps = interpolate(soft.T.unflatten(1, grid)[None], size, mode="bilinear")[0]  # (C, h, w)
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    scaled = torch.where(high > 0, (maps - low) / (high - low).clamp_min(1e-12), maps)
    return nearest_resize(scaled.argmax(0).numpy(), (shape[0], shape[1]))
