"""Folders of transformers' I-JEPA models: `config.json`, `preprocessor_config.json`, safetensors.

Names in the files are those that versions 4 and 5 read: as in BERT, with q, k and v apart. With a classifier, a linear
layer on the mean of the patches, the class is IJepaForImageClassification and encoder names begin with `ijepa.`.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from ijepa.config.recipe import ModelSection
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

# Our names of tensors, and the names in transformers, outside and inside blocks.
_OUTSIDE: dict[str, tuple[str, ...]] = {
    "pos_embed": ("embeddings.position_embeddings",),
    "patch_embed.proj.weight": ("embeddings.patch_embeddings.projection.weight",),
    "patch_embed.proj.bias": ("embeddings.patch_embeddings.projection.bias",),
    "norm.weight": ("layernorm.weight",),
    "norm.bias": ("layernorm.bias",),
}
_INSIDE: dict[str, tuple[str, ...]] = {
    "norm1": ("layernorm_before",),
    # One matrix (3 D, D) of ours is three (D, D) in transformers.
    "attn.qkv": ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    "attn.proj": ("attention.output.dense",),
    "norm2": ("layernorm_after",),
    "mlp.fc1": ("intermediate.dense",),
    "mlp.fc2": ("output.dense",),
}


def _names(blocks: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return the names in transformers by our names, for an encoder with blocks of these numbers."""
    names = dict(_OUTSIDE)
    for number in blocks:
        for ours, theirs in _INSIDE.items():
            for kind in ("weight", "bias"):
                layers = (f"encoder.layer.{number}.{layer}.{kind}" for layer in theirs)
                names[f"blocks.{number}.{ours}.{kind}"] = tuple(layers)
    return names


def to_transformers(tensors: Tensors, prefix: str = "") -> dict[str, LazyTensor]:
    """Rename an encoder's tensors, positions included, for transformers."""
    names = _names({found[1] for name in tensors if (found := re.match(r"blocks\.(\d+)\.", name))})
    renamed: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        rows = tensor.shape[0] // len(names[name])
        for place, theirs in enumerate(names[name]):
            renamed[prefix + theirs] = tensor.rows(place * rows, (place + 1) * rows)
    return renamed


def from_transformers(tensors: Tensors, where: object) -> dict[str, LazyTensor]:
    """Rename transformers' tensors to our names, without a classifier.

    Raises:
        UserError: A name is unknown, or query, key or value is missing or has another shape.
    """
    given = {key.removeprefix("ijepa."): tensor for key, tensor in tensors.items()}
    # The numbers of the blocks there are: a damaged file may name block 10^9.
    names = _names({found[1] for name in given if (found := re.match(r"encoder\.layer\.(\d+)\.", name))})
    known = {layer for theirs in names.values() for layer in theirs}
    for key in tensors:
        name = key.removeprefix("ijepa.")
        if name not in known and not name.startswith(("classifier.", "pooler.")):
            raise UserError(where, f"{key} is unknown", "is this an I-JEPA model of transformers?")
    renamed: dict[str, LazyTensor] = {}
    for name, theirs in names.items():
        parts = [given[layer] for layer in theirs if layer in given]
        if not parts:  # whether the model needs it is checked later, with its recipe
            continue
        if len(parts) < len(theirs):
            missing = next(layer for layer in theirs if layer not in given)
            raise UserError(where, f"{missing} is missing", "the file is incomplete")
        if len(parts) > 1 and (len({part.shape for part in parts}) > 1 or not parts[0].shape):
            raise UserError(
                where, f"query, key and value of {name} differ in shape", "the file belongs to a different model"
            )
        renamed[name] = parts[0] if len(parts) == 1 else _concatenate(parts)
    return renamed


def _concatenate(parts: Sequence[LazyTensor]) -> LazyTensor:
    rows = sum(part.shape[0] for part in parts)
    shape = (rows, *parts[0].shape[1:])
    return LazyTensor(shape, lambda: torch.cat([part.load() for part in parts]), parts[0].dtype)


def transformers_config(model: ModelSection, classes: Sequence[str] | None = None) -> dict[str, Any]:
    """Return the content of `config.json`; `classes` are the names of a classifier's classes."""
    height, width = model.image_size
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


def _processor(model: ModelSection) -> dict[str, Any]:
    """Return the content of `preprocessor_config.json`: native size, bilinear, ImageNet mean and deviation."""
    height, width = model.image_size
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


def write_transformers(
    folder: Path, model: ModelSection, tensors: Tensors, head: Head | None, about: dict[str, str]
) -> None:
    """Write an encoder, and a classifier if there is a head, into an empty folder."""
    named = to_transformers(tensors, "ijepa." if head else "")
    write_tensors(folder, "model", named | (head.named("classifier") if head else {}), shard=SHARD)
    config = transformers_config(model, head.classes if head else None)
    write_json(folder / "config.json", {**config, "ijepa": about})
    write_json(folder / "preprocessor_config.json", _processor(model))


def read_transformers(
    folder: Path, config: TransformersConfig
) -> tuple[ModelSection, dict[str, LazyTensor], list[str]]:
    """Return the shape, tensors and notes of a folder, without its classifier.

    Raises:
        UserError: The folder holds another model than its configuration states.
    """
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    tensors = from_transformers(open_tensors(index if index.is_file() else single), single)
    model, notes = infer_encoder(tensors, single, heads=config.num_attention_heads, image_size=config.image_size)
    width = model.encoder.width
    if config.hidden_size not in (None, width):
        raise UserError(
            folder / "config.json", f"hidden_size is {config.hidden_size}, but the tensors have width {width}"
        )
    return model, tensors, notes
