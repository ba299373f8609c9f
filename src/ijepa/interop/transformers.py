"""Folders of transformers' I-JEPA models: `config.json`, `preprocessor_config.json`, safetensors.

Names on disk are those that versions 4 and 5 read: BERT's, with q, k and v apart. With a classifier the encoder's begin
with `ijepa.`, and the class is IJepaForImageClassification, a linear layer on the mean of the patches.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ijepa.config.recipe import ModelSection
from ijepa.interop.config_json import size, whole
from ijepa.interop.infer_config import encoder_shape
from ijepa.interop.tensors import Lazy, Tensors, open_tensors
from ijepa.model.ijepa import IMAGENET_MEAN, IMAGENET_STD
from ijepa.model.vision_transformer import NORM_EPS
from ijepa.utils.errors import UserError

_OUTER = {
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
_INNER = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_QKV = ("query", "key", "value")
_THIRDS = {f"attention.attention.{part}": part for part in _QKV}
_FUNCTION = {"layer_norm_eps": (NORM_EPS, 1e-12), "hidden_act": ("gelu", "gelu")}
"""What decides the function and is in no tensor: our value, and transformers' where the file does not say."""
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)\.(weight|bias)$")
_LAYER = re.compile(r"encoder\.layer\.(\d+)\.(.+)\.(weight|bias)$")


def to_theirs(tensors: Tensors, prefix: str = "") -> dict[str, Lazy]:
    """Return an encoder's tensors, positions included, under transformers' names."""
    found: dict[str, Lazy] = {}
    for name, tensor in tensors.items():
        block = _BLOCK.match(name)
        if block is None:
            found[prefix + _OUTER[name]] = tensor
        elif block[2] == "attn.qkv":
            third = tensor.shape[0] // 3
            for place, part in enumerate(_QKV):
                theirs = f"{prefix}encoder.layer.{block[1]}.attention.attention.{part}.{block[3]}"
                found[theirs] = tensor.rows(place * third, (place + 1) * third)
        else:
            found[f"{prefix}encoder.layer.{block[1]}.{_INNER[block[2]]}.{block[3]}"] = tensor
    return found


def to_ours(tensors: Tensors, where: object) -> dict[str, Lazy]:
    """Return transformers' tensors under our names; a classifier is left out.

    Raises:
        UserError: a name that is none of I-JEPA's, or a third of a qkv that is missing or of another shape.
    """
    outer = {theirs: ours for ours, theirs in _OUTER.items()}
    inner = {theirs: ours for ours, theirs in _INNER.items()}
    found: dict[str, Lazy] = {}
    thirds: dict[str, dict[str, Lazy]] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix("ijepa.")
        layer = _LAYER.match(name)
        if name in outer:
            found[outer[name]] = tensor
        elif layer and layer[2] in inner:
            found[f"blocks.{layer[1]}.{inner[layer[2]]}.{layer[3]}"] = tensor
        elif layer and layer[2] in _THIRDS:
            thirds.setdefault(f"blocks.{layer[1]}.attn.qkv.{layer[3]}", {})[_THIRDS[layer[2]]] = tensor
        elif not name.startswith(("classifier.", "pooler.")):
            raise UserError(where, f"{key} is unknown", "is it transformers' I-JEPA?")
    for name, parts in thirds.items():
        for part in _QKV:
            if part not in parts:
                raise UserError(where, f"{part} of {name} is missing", "the file is not whole")
        if len({tensor.shape for tensor in parts.values()}) > 1 or not parts["query"].shape:
            raise UserError(where, f"query, key and value of {name} differ in shape", "the file is of another model")
        found[name] = _joined([parts[part] for part in _QKV])
    return found


def config(model: ModelSection, classes: Sequence[str] | int | None = None, **more: Any) -> dict[str, Any]:
    """Return `config.json`; with `classes`, their names or number, of a classifier."""
    height, width = model.image_size
    encoder = model.encoder
    found: dict[str, Any] = {
        "architectures": ["IJepaModel" if classes is None else "IJepaForImageClassification"],
        "model_type": "ijepa",
        "hidden_size": encoder.width,
        "num_hidden_layers": encoder.depth,
        "num_attention_heads": encoder.heads,
        "intermediate_size": round(encoder.width * encoder.mlp_ratio),
        "hidden_act": "gelu",
        "layer_norm_eps": NORM_EPS,
        "image_size": height if height == width else [height, width],
        "patch_size": model.patch_size,
        "num_channels": 3,
        "qkv_bias": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "pooler_output_size": encoder.width,
        "torch_dtype": "float32",
    }
    if classes is not None:
        names = [str(n) for n in range(classes)] if isinstance(classes, int) else list(classes)
        found["id2label"] = {str(number): name for number, name in enumerate(names)}
        found["label2id"] = {name: number for number, name in enumerate(names)}
    return {**found, **more}


def processor(model: ModelSection) -> dict[str, Any]:
    """Return `preprocessor_config.json`: the native size, bilinear, ImageNet's mean and deviation."""
    height, width = model.image_size
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
    }


def read_transformers(folder: Path, values: dict[str, Any]) -> tuple[ModelSection, dict[str, Lazy], list[str]]:
    """Return shape, tensors under our names, and notes of a folder whose `config.json` holds `values`.

    Raises:
        UserError: another kind of model, or a config that says other than its tensors.
    """
    where = folder / "config.json"
    if values.get("model_type") != "ijepa":
        raise UserError(where, f"model_type is {values.get('model_type')}", "only I-JEPA models are read")
    for key, (ours, theirs) in _FUNCTION.items():
        if values.get(key, theirs) != ours:
            raise UserError(where, f"{key} = {values.get(key, theirs)}", f"only encoders with {ours} are read")
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    tensors = to_ours(open_tensors(index if index.is_file() else single), single)
    heads, image_size = whole(values, "num_attention_heads", 12, where), size(values, "image_size", 224, where)
    shape, notes = encoder_shape(tensors, single, heads=heads, image_size=image_size)
    if values.get("hidden_size", shape.encoder.width) != shape.encoder.width:
        raise UserError(where, f"hidden_size is {values['hidden_size']}, the tensors' width {shape.encoder.width}")
    return shape, tensors, notes


def _joined(parts: list[Lazy]) -> Lazy:
    rows = sum(part.shape[0] for part in parts)
    return Lazy((rows, *parts[0].shape[1:]), lambda: torch.cat([part.make() for part in parts]), parts[0].dtype)
