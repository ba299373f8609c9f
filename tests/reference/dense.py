"""The slow, obvious I-JEPA: one image and one block at a time, with full attention matrices and without packing.

It reads the weights of the fast modules by name and shares none of their code.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(qkv: Tensor, heads: int) -> Tensor:
    """(L, 3D) -> (L, D), head by head."""
    length, width = qkv.shape[0], qkv.shape[1] // 3
    d = width // heads
    out = torch.zeros(length, width, dtype=qkv.dtype)
    for head in range(heads):
        q, k, v = (qkv[:, part * width + head * d : part * width + (head + 1) * d] for part in range(3))
        out[:, head * d : (head + 1) * d] = torch.softmax(q @ k.T / math.sqrt(d), dim=1) @ v
    return out


def linear(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def norm(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    scaled = centered / torch.sqrt(centered.pow(2).mean(-1, keepdim=True) + 1e-6)
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def block(weights: dict[str, Tensor], name: str, x: Tensor, heads: int, scale: float = 1.0) -> Tensor:
    y = attend(linear(weights, f"{name}.attn.qkv", norm(weights, f"{name}.norm1", x)), heads)
    x = x + scale * linear(weights, f"{name}.attn.proj", y)
    hidden = linear(weights, f"{name}.mlp.fc1", norm(weights, f"{name}.norm2", x))
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    return x + scale * linear(weights, f"{name}.mlp.fc2", hidden)


def positions(width: int, grid: tuple[int, int]) -> Tensor:
    """(N, width), element by element: columns in the first half, rows in the second, sines before cosines."""
    table = torch.zeros(grid[0] * grid[1], width, dtype=torch.float64)
    quarter = width // 4
    for row in range(grid[0]):
        for column in range(grid[1]):
            for i in range(quarter):
                omega = 1 / 10000 ** (i / quarter)
                place = table[row * grid[1] + column]
                place[i], place[quarter + i] = math.sin(column * omega), math.cos(column * omega)
                place[2 * quarter + i], place[3 * quarter + i] = math.sin(row * omega), math.cos(row * omega)
    return table


def encode(
    weights: dict[str, Tensor],
    image: Tensor,
    keep: list[int],
    *,
    patch: int,
    depth: int,
    heads: int,
    drop_path: float = 0.0,
    kept: list[bool] | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Encode the patches `keep` of one normalized image (3, H, W) by a strided convolution: (len(keep), D)."""
    tokens = F.conv2d(image[None], weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], stride=patch)
    grid = (tokens.shape[2], tokens.shape[3])
    x = tokens[0].flatten(1).T
    x = (x + scale * positions(x.shape[1], grid).to(x.dtype))[keep]
    for layer in range(depth):
        if kept is None or kept[layer]:
            rate = drop_path * layer / max(depth - 1, 1)
            x = block(weights, f"blocks.{layer}", x, heads, 1 / (1 - rate) if kept is not None else 1.0)
    return norm(weights, "norm", x)


def predict(
    weights: dict[str, Tensor],
    context: Tensor,
    seen: list[int],
    asked: list[int],
    *,
    grid: tuple[int, int],
    depth: int,
    heads: int,
) -> Tensor:
    """Predict the patches `asked` of one image from its context (len(seen), D): (len(asked), D)."""
    table = positions(weights["mask_token"].shape[-1], grid).to(context.dtype)
    x = linear(weights, "predictor_embed", context) + table[seen]
    queries = weights["mask_token"][0] + table[asked]
    x = torch.cat([x, queries])
    for layer in range(depth):
        x = block(weights, f"predictor_blocks.{layer}", x, heads)
    x = norm(weights, "predictor_norm", x)[len(seen) :]
    return linear(weights, "predictor_proj", x)


def smooth_l1(x: Tensor, y: Tensor) -> Tensor:
    gap = (x - y).abs()
    return torch.where(gap < 1, 0.5 * gap * gap, gap - 0.5)


def normalized(image: Tensor) -> Tensor:
    """Normalize an image (3, H, W) uint8 by the mean and standard deviation of ImageNet, in float64."""
    mean = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64)[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64)[:, None, None]
    return (image.double() / 255 - mean) / std


@torch.no_grad()
def target_of(target: dict[str, Tensor], shape, image: Tensor) -> Tensor:
    """Return the normalized targets (N, D) of all patches of one normalized image (3, H, W)."""
    sizes = {"patch": shape.patch_size, "depth": shape.encoder.depth, "heads": shape.encoder.heads}
    everything = list(range(shape.grid[0] * shape.grid[1]))
    goal = encode(target, image, everything, scale=shape.encoder.position_scale, **sizes)
    centered = goal - goal.mean(-1, keepdim=True)
    return centered / torch.sqrt(centered.pow(2).mean(-1, keepdim=True) + 1e-5)


def baseline_of(model, shape, pixels, targets, global_batch: int) -> Tensor:
    """The loss of predicting `model.position_mean` (N, D) for the targets (B, T, N) of B images."""
    weights = dict(model.target_encoder.named_parameters())
    total = torch.zeros((), dtype=model.position_mean.dtype)
    for image, wanted in zip(pixels, targets, strict=True):
        goal = target_of(weights, shape, normalized(image).to(total.dtype))
        blocks = [b.nonzero()[0].tolist() for b in wanted if b.any()]
        for asked in blocks:
            total += smooth_l1(model.position_mean[asked], goal[asked]).mean() / len(blocks) / global_batch
    return total


def loss_of(model, shape, pixels, context, targets, kept, global_batch: int) -> Tensor:
    """The loss of B images: pixels (B, 3, H, W) uint8, masks as booleans (B, N) and (B, T, N), kept (B, L) or None."""
    encoder = dict(model.context_encoder.named_parameters())
    target = dict(model.target_encoder.named_parameters())
    predictor = dict(model.predictor.named_parameters())
    dtype = encoder["norm.weight"].dtype
    total = torch.zeros((), dtype=dtype)
    sizes = {"patch": shape.patch_size, "depth": shape.encoder.depth, "heads": shape.encoder.heads}
    for number in range(len(pixels)):
        image = normalized(pixels[number]).to(dtype)
        goal = target_of(target, shape, image)
        seen = context[number].nonzero()[0].tolist()
        layers = None if kept is None else kept[number].tolist()
        z = encode(
            encoder,
            image,
            seen,
            kept=layers,
            drop_path=shape.encoder.drop_path,
            scale=shape.encoder.position_scale,
            **sizes,
        )
        blocks = [b.nonzero()[0].tolist() for b in targets[number] if b.any()]
        for asked in blocks:
            guess = predict(
                predictor, z, seen, asked, grid=shape.grid, depth=shape.predictor.depth, heads=shape.predictor.heads
            )
            total = total + smooth_l1(guess, goal[asked]).mean() / len(blocks) / global_batch
    return total
