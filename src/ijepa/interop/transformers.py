"""Folders of transformers' I-JEPA models: `config.json`, `preprocessor_config.json`, safetensors.

Names in the files are those that versions 4 and 5 read: as in BERT, with q, k and v apart. With a classifier, a linear
layer on the mean of the patches, the class is IJepaForImageClassification and encoder names begin with `ijepa.`.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ijepa.config.recipe import Model
from ijepa.interop.config_json import TransformersConfig
from ijepa.interop.heads import Head
from ijepa.interop.infer_config import infer_encoder
from ijepa.interop.tensors import LazyTensor, Tensors, open_tensors, write_tensors
from ijepa.model.ijepa import IMAGENET_MEAN, IMAGENET_STD
from ijepa.model.vision_transformer import NORM_EPS
from ijepa.utils.errors import UserError
from ijepa.utils.files import write_json

SHARD = 5 * 10**9
"""Maximum bytes of tensors per file, as transformers writes them."""

# Names outside and inside blocks, from ours to those of transformers.
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
_OUTER_BACK = {theirs: ours for ours, theirs in _OUTER.items()}
_INNER_BACK = {theirs: ours for ours, theirs in _INNER.items()}
_QKV = {f"attention.attention.{part}": part for part in ("query", "key", "value")}
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)\.(weight|bias)$")
_LAYER = re.compile(r"encoder\.layer\.(\d+)\.(.+)\.(weight|bias)$")


def to_transformers(tensors: Tensors, prefix: str = "") -> dict[str, LazyTensor]:
    """Rename an encoder's tensors, positions included, for transformers."""
    found: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        block = _BLOCK.match(name)
        if block is None:
            found[prefix + _OUTER[name]] = tensor
            continue
        layer, kind = f"{prefix}encoder.layer.{block[1]}.", block[3]
        if block[2] != "attn.qkv":
            found[f"{layer}{_INNER[block[2]]}.{kind}"] = tensor
            continue
        third = tensor.shape[0] // 3  # qkv (3 D, ...) stacks query, key and value
        for place, theirs in enumerate(_QKV):
            found[f"{layer}{theirs}.{kind}"] = tensor.rows(place * third, (place + 1) * third)
    return found


def from_transformers(tensors: Tensors, where: object) -> dict[str, LazyTensor]:
    """Rename transformers' tensors to our names, without a classifier.

    Raises:
        UserError: A name is unknown, or query, key or value is missing or has another shape.
    """
    found: dict[str, LazyTensor] = {}
    split: dict[str, dict[str, LazyTensor]] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix("ijepa.")
        layer = _LAYER.match(name)
        if name in _OUTER_BACK:
            found[_OUTER_BACK[name]] = tensor
        elif layer and layer[2] in _INNER_BACK:
            found[f"blocks.{layer[1]}.{_INNER_BACK[layer[2]]}.{layer[3]}"] = tensor
        elif layer and layer[2] in _QKV:
            split.setdefault(f"blocks.{layer[1]}.attn.qkv.{layer[3]}", {})[_QKV[layer[2]]] = tensor
        elif not name.startswith(("classifier.", "pooler.")):
            raise UserError(where, f"{key} is unknown", "is it an I-JEPA model of transformers?")
    for name, parts in split.items():
        if missing := [part for part in _QKV.values() if part not in parts]:
            raise UserError(where, f"{missing[0]} of {name} is missing", "the file is incomplete")
        if len({tensor.shape for tensor in parts.values()}) > 1 or not parts["query"].shape:
            raise UserError(where, f"query, key and value of {name} differ in shape", "the file is of another model")
        found[name] = _concatenate([parts[part] for part in _QKV.values()])
    return found


def _concatenate(parts: Sequence[LazyTensor]) -> LazyTensor:
    rows = sum(part.shape[0] for part in parts)
    shape = (rows, *parts[0].shape[1:])
    return LazyTensor(shape, lambda: torch.cat([part.load() for part in parts]), parts[0].dtype)


def transformers_config(model: Model, classes: Sequence[str] | None = None) -> dict[str, Any]:
    """Return the content of `config.json`; `classes` are the names of a classifier's classes."""
    height, width = model.image_hw
    encoder = model.encoder
    config: dict[str, Any] = {
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
        config["id2label"] = {str(number): name for number, name in enumerate(classes)}
        config["label2id"] = {name: number for number, name in enumerate(classes)}
    return config


def _processor(model: Model) -> dict[str, Any]:
    """Return the content of `preprocessor_config.json`: native size, bilinear, ImageNet mean and deviation."""
    height, width = model.image_hw
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 2,  # PIL's number for bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
    }


def write_transformers(folder: Path, model: Model, tensors: Tensors, head: Head | None, about: dict[str, str]) -> None:
    """Write an encoder, and a classifier if there is a head, into an empty folder."""
    named = to_transformers(tensors, "ijepa." if head else "")
    write_tensors(folder, "model", named | (head.named("classifier") if head else {}), shard=SHARD)
    config = transformers_config(model, head.classes if head else None)
    write_json(folder / "config.json", {**config, "ijepa": about})
    write_json(folder / "preprocessor_config.json", _processor(model))


def read_transformers(folder: Path, config: TransformersConfig) -> tuple[Model, dict[str, LazyTensor], list[str]]:
    """Return the shape, tensors and notes of a folder, without its classifier.

    Raises:
        UserError: The folder holds another model than its configuration states.
    """
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    tensors = from_transformers(open_tensors(index if index.is_file() else single), single)
    model, notes = infer_encoder(tensors, single, heads=config.num_attention_heads, image_size=config.image_size)
    width = model.encoder.width
    if config.hidden_size not in (None, width):
        raise UserError(folder / "config.json", f"hidden_size is {config.hidden_size}, the width of tensors {width}")
    return model, tensors, notes
