"""Folders that timm loads with `timm.create_model("local-dir:FOLDER", pretrained=True)`.

`config.json` names a Vision Transformer that has no class token and averages its patches after the final norm. The
names of tensors are the same as here. A head becomes its classifier.
"""

from pathlib import Path
from typing import Any

from ijepa.config.recipe import ModelSection
from ijepa.interop.config_json import TimmArguments, TimmConfig
from ijepa.interop.heads import Head
from ijepa.interop.infer_config import infer_encoder
from ijepa.interop.tensors import LazyTensor, Tensors, open_tensors, write_tensors
from ijepa.model.ijepa import IMAGENET_MEAN, IMAGENET_STD
from ijepa.utils.errors import UserError
from ijepa.utils.files import write_json

_ARCHITECTURE = "vit_base_patch16_gap_224"
"""timm's entry for a ViT that averages patches; `model_args` overrides every size of it."""


def timm_config(model: ModelSection, classes: int = 0) -> dict[str, Any]:
    """Return the content of `config.json`; `classes` is 0 without a head."""
    height, width = model.image_size
    encoder = model.encoder
    return {
        "architecture": _ARCHITECTURE,
        "num_classes": classes,
        "num_features": encoder.width,
        "global_pool": "avg",
        "model_args": {
            "img_size": height if height == width else [height, width],
            "patch_size": model.patch_size,
            "embed_dim": encoder.width,
            "depth": encoder.depth,
            "num_heads": encoder.heads,
            "mlp_ratio": encoder.mlp_ratio,
            "class_token": False,
            "global_pool": "avg",
            "fc_norm": False,
            "num_classes": classes,
        },
        "pretrained_cfg": {
            "tag": "ijepa",
            "custom_load": False,
            "input_size": [3, height, width],
            "fixed_input_size": True,  # timm stretches positions in another way
            "interpolation": "bilinear",
            "crop_pct": 0.875,
            "crop_mode": "center",
            "mean": list(IMAGENET_MEAN),
            "std": list(IMAGENET_STD),
            "num_classes": classes,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def write_timm(folder: Path, model: ModelSection, tensors: Tensors, head: Head | None, about: dict[str, str]) -> None:
    """Write an encoder, and a classifier if there is a head, into an empty folder."""
    classifier = head.named("head") if head else {}
    write_tensors(folder, "model", {**tensors, **classifier})
    config = timm_config(model, len(head.classes) if head else 0)
    write_json(folder / "config.json", {**config, "ijepa": about})


def read_timm(
    folder: Path, config: TimmConfig, *, heads: int | None = None
) -> tuple[ModelSection, dict[str, LazyTensor], list[str]]:
    """Return the shape, tensors and notes of a folder, without its classifier.

    Args:
        folder: The folder.
        config: Its configuration.
        heads: Attention heads, if the configuration does not state them.

    Raises:
        UserError: The folder holds a model of another kind.
    """
    arguments, file = config.model_args or TimmArguments(), folder / "model.safetensors"
    has_class_token = "_gap_" not in config.architecture if arguments.class_token is None else arguments.class_token
    if has_class_token:
        raise UserError(folder / "config.json", f"{config.architecture} has a class token", "I-JEPA has none")
    # A classifier and the norm in front of it are not part of the encoder.
    tensors = {name: t for name, t in open_tensors(file).items() if not name.startswith(("head.", "fc_norm."))}
    model, notes = infer_encoder(tensors, file, heads=arguments.num_heads or heads, image_size=arguments.img_size)
    return model, tensors, notes
