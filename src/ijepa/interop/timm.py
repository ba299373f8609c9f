"""Folders that timm loads: `timm.create_model("local-dir:FOLDER", pretrained=True)`.

`config.json` names a Vision Transformer without class token that averages its patches behind the final norm; keys are
ours. A head, where there is one, is its classifier.
"""

from pathlib import Path
from typing import Any

from ijepa.config.recipe import ModelSection
from ijepa.interop.config_json import size, table, whole
from ijepa.interop.infer_config import encoder_shape
from ijepa.interop.tensors import Lazy, open_tensors
from ijepa.model.ijepa import IMAGENET_MEAN, IMAGENET_STD
from ijepa.utils.errors import UserError

_ARCHITECTURE = "vit_base_patch16_gap_224"
"""timm's entry for a ViT that averages patches; every size is given beside it."""
_FUNCTION = {"act_layer": "gelu", "norm_layer": "layernorm"}
"""What decides the function and is in no tensor, where the file says it: timm's own are these, with our epsilon."""


def config(model: ModelSection, classes: int = 0) -> dict[str, Any]:
    """Return `config.json`; `classes` is 0 without a head."""
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
            "fixed_input_size": True,
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


def read_timm(
    folder: Path, values: dict[str, Any], *, heads: int | None = None
) -> tuple[ModelSection, dict[str, Lazy], list[str]]:
    """Return shape, tensors and notes of a folder whose `config.json` holds `values`; a classifier is left out.

    Args:
        folder: the folder.
        values: its configuration.
        heads: attention heads, where the configuration does not say.

    Raises:
        UserError: another kind of model.
    """
    where, file = folder / "config.json", folder / "model.safetensors"
    arguments = table(values, "model_args", where)
    if arguments.get("class_token", "_gap_" not in str(values.get("architecture"))):
        raise UserError(where, f"{values.get('architecture')} has a class token", "I-JEPA's encoders have none")
    for key, ours in _FUNCTION.items():
        value = arguments.get(key)
        if value and str(value).replace("_", "").lower() != ours:
            raise UserError(where, f"{key} = {value}", f"only encoders with {ours} are read")
    tensors = {
        name: tensor for name, tensor in open_tensors(file).items() if not name.startswith(("head.", "fc_norm."))
    }
    heads, image_size = whole(arguments, "num_heads", heads, where), size(arguments, "img_size", None, where)
    model, notes = encoder_shape(tensors, file, heads=heads, image_size=image_size)
    return model, tensors, notes
