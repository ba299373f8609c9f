"""The step of the original code on the same device, from a checkout of it: its modules are imported, not copied.

Its own settings cut every sequence to the shortest of the batch, so that it learns from fewer tokens. `equal` gives it
as many context and target tokens as our masks have on average.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from step import Choice
from timing import Clock, free, peak_memory

from ijepa.masking.masks import draw_masks


def original(path: Path, device: torch.device, *, equal: bool, images: int, steps: int, tiny: bool) -> dict[str, Any]:
    """Images a second of the checkout at `path`, at `images` a step, or half as many until they fit."""
    if str(path) not in sys.path:
        sys.path.insert(0, str(path))
    while True:
        try:
            return _measure(device, equal, images, steps, tiny)
        except torch.OutOfMemoryError:
            if images == 1:
                raise
        images //= 2
        free(device)


def _measure(device: torch.device, equal: bool, images: int, steps: int, tiny: bool) -> dict[str, Any]:
    from src.masks.multiblock import MaskCollator
    from src.masks.utils import apply_masks
    from src.models import vision_transformer as vit
    from src.utils.tensors import repeat_interleave_batch

    free(device)
    torch.manual_seed(0)
    recipe = Choice().recipe(images, tiny=tiny)
    shape, (height, width) = recipe.model, recipe.model.image_size
    patches = shape.grid[0] * shape.grid[1]
    with torch.device(device):
        encoder, target = (
            vit.VisionTransformer(
                img_size=[height],
                patch_size=shape.patch_size,
                embed_dim=shape.encoder.width,
                depth=shape.encoder.depth,
                num_heads=shape.encoder.heads,
                mlp_ratio=4,
                qkv_bias=True,
                norm_layer=lambda size: torch.nn.LayerNorm(size, eps=1e-6),
            )
            for _ in range(2)
        )
        predictor = vit.vit_predictor(
            num_patches=patches,
            embed_dim=shape.encoder.width,
            predictor_embed_dim=shape.predictor.width,
            depth=shape.predictor.depth,
            num_heads=shape.predictor.heads,
        )
    target.load_state_dict(encoder.state_dict())
    target.requires_grad_(False)
    trained = [*encoder.parameters(), *predictor.parameters()]
    optimizer = torch.optim.AdamW([p for p in trained if p.requires_grad], lr=1e-4)
    scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda")
    collator = MaskCollator(
        input_size=(height, width),
        patch_size=shape.patch_size,
        pred_mask_scale=recipe.mask.target_scale,
        enc_mask_scale=recipe.mask.context_scale,
        aspect_ratio=recipe.mask.target_aspect,
        nenc=1,
        npred=recipe.mask.targets,
        allow_overlap=False,
        min_keep=recipe.mask.min_context,
    )
    pixels = torch.randn(images, 3, height, width, device=device)
    made = [_masks(collator, recipe, images, patches, equal, number) for number in range(4)]
    made = [tuple([mask.to(device) for mask in part] for part in masks) for masks in made]

    def step(number: int) -> None:
        seen, asked = made[number % len(made)]
        with torch.autocast(device.type, torch.bfloat16):
            with torch.no_grad():
                h = target(pixels)
                h = F.layer_norm(h, (h.size(-1),))
                h = repeat_interleave_batch(apply_masks(h, asked), images, repeat=len(seen))
            loss = F.smooth_l1_loss(predictor(encoder(pixels, seen), seen, asked), h)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        with torch.no_grad():
            for current, average in zip(encoder.parameters(), target.parameters(), strict=True):
                average.mul_(0.996).add_(current.detach(), alpha=0.004)

    for number in range(2):
        step(number)
    clock = Clock(device)
    clock.mark("begin")
    for number in range(steps):
        step(number)
        clock.mark("step")
    seconds = sorted(each for _, each in clock.seconds())[steps // 2]
    return {
        "images": images,
        "images_per_second": images / seconds,
        "seconds": seconds,
        "context_tokens": float(np.mean([masks[0][0].shape[1] for masks in made])),
        "target_tokens": float(np.mean([masks[1][0].shape[1] for masks in made])),
        "memory": peak_memory(device),
    }


def _masks(collator: Any, recipe: Any, images: int, patches: int, equal: bool, number: int) -> tuple[list, list]:
    """Its own masks, or as many tokens as ours have on average, at random places."""
    if not equal:
        _, seen, asked = collator([torch.zeros(1)] * images)
        return seen, asked
    ours = draw_masks(recipe.mask, recipe.model.grid, 0, np.arange(2048))
    context, block = round(ours.context.sum(1).mean()), round(ours.targets.sum(2).mean())
    order = np.random.default_rng(number).random((recipe.mask.targets + 1, images, patches)).argsort(2)
    seen, *asked = (torch.from_numpy(np.sort(each[:, :size])) for each, size in zip(
        order, [context] + [block] * recipe.mask.targets, strict=True))  # fmt: skip
    return [seen], list(asked)
