"""Random weights, the features that other libraries compute from them, and a plain encoder to compare with."""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from ijepa.config.recipe import Recipe
from ijepa.model.encoder import FrozenEncoder
from ijepa.model.ijepa import IJEPA

SHAPES = {
    "tiny": {"image_size": 48, "patch_size": 8, "encoder": {"width": 32, "depth": 2, "heads": 4, "mlp_ratio": 3.0}},
    "small": {"image_size": 224, "patch_size": 16, "encoder": {"width": 384, "depth": 12, "heads": 6}},
    "odd": {"image_size": 96, "patch_size": 16, "encoder": {"width": 88, "depth": 1, "heads": 4, "mlp_ratio": 48 / 11}},
}
PREDICTOR = {"width": 48, "depth": 2, "heads": 4}
PARTS = ("context_encoder", "target_encoder", "predictor")


def recipe(name: str, *, encoder: dict | None = None, predictor: dict | None = None, **changes) -> Recipe:
    shape = {**SHAPES[name], **changes}
    shape["encoder"] = {**shape["encoder"], **(encoder or {})}
    predictor = {**PREDICTOR, "heads": shape["encoder"]["heads"], **(predictor or {})}
    return Recipe.read(
        {
            "name": name,
            "steps": 1,
            "schedule": {"warmup": "0 steps"},
            "mask": {"min_context": 1},
            "model": {**shape, "predictor": predictor},
        },
        "test",
    )


def random_model(chosen: Recipe) -> IJEPA:
    """A model whose parameters are all random, biases and norms too, so that the two encoders differ."""
    model = IJEPA(chosen.model, seed=3)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
    return model


def pixels(encoder: FrozenEncoder, count: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Random images (B, 3, H, W) as bytes, and normalized for other libraries."""
    height, width = (side * encoder.patch_size for side in encoder.grid)
    draw = torch.Generator().manual_seed(1)
    raw = torch.randint(0, 256, (count, 3, height, width), generator=draw, dtype=torch.uint8)
    mean, deviation = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return raw, (raw / 255 - mean) / deviation


def write_weights(folder: Path, chosen: Recipe) -> Path:
    """Write a weights folder with all three parts."""
    folder.mkdir()
    (folder / "recipe.yaml").write_text(chosen.dump())
    model = random_model(chosen)
    for part in PARTS:
        save_file(dict(getattr(model, part).state_dict()), folder / f"{part}.safetensors")
    return folder


def averaged(exact: torch.Tensor, steps: int) -> torch.Tensor:
    """The target encoder's position table after training with the original code, which averages the fixed table."""
    table = exact.clone()
    for step in range(steps):
        momentum = 0.996 + step * (1 - 0.996) / steps
        table.mul_(momentum).add_((1 - momentum) * exact)
    return table


@torch.no_grad()
def features_of_library(folder: Path, form: str, normalized: Tensor) -> Tensor:
    """Features (B, N, D) that the other library computes from our export with eager attention."""
    if form == "transformers":
        import transformers

        model, report = transformers.AutoModel.from_pretrained(
            folder, attn_implementation="eager", output_loading_info=True, add_pooling_layer=False
        )
        assert type(model).__name__ == "IJepaModel"
        assert not report["missing_keys"] and not report["unexpected_keys"], report
        return model.eval()(normalized).last_hidden_state
    import timm

    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    for block in model.blocks:  # TIMM_FUSED_ATTN is read only at the first import
        block.attn.fused_attn = False
    return model.eval().forward_features(normalized)


@torch.no_grad()
def eager(state: dict[str, Tensor], heads: int, normalized: Tensor, form: str) -> Tensor:
    """Features of whole images, with the bits of other libraries, from weights by the original's names.

    `pos_embed` (1, N, D) is among them. transformers scales the attention matrix, timm the queries.
    """
    kernel, width = state["patch_embed.proj.weight"], len(state["norm.weight"])
    x = F.conv2d(normalized, kernel, state["patch_embed.proj.bias"], stride=kernel.shape[-1])
    x = x.flatten(2).transpose(1, 2) + state["pos_embed"]
    scale = (width // heads) ** -0.5

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (width,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    layer = 0
    while f"blocks.{layer}.norm1.weight" in state:
        block = f"blocks.{layer}"
        qkv = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x))
        q, k, v = qkv.reshape(*x.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(2, 3)) * scale if form == "transformers" else (q * scale) @ k.transpose(2, 3)
        x = x + linear(f"{block}.attn.proj", (scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape))
        x = x + linear(f"{block}.mlp.fc2", F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x))))
        layer += 1
    return norm("norm", x)
