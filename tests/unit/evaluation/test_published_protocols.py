"""Presets of the linear probe, held to their sources number by number, and run to their end."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ijepa.config.recipe import ModelSection
from ijepa.evaluation.classification.linear_probe import FLATTERED, evaluate_linear
from ijepa.evaluation.features.precision import resolved
from ijepa.evaluation.protocols import KINDS, load_protocol, presets
from ijepa.model.encoder import FrozenEncoder
from tests.helpers.feature_clouds import color_sets

RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2)
AUGMENTED = {"augment": True, "crop_scale": (0.08, 1.0), "crop_fraction": 0.875, "standardize": False}
PUBLISHED: dict[str, dict[str, Any]] = {
    # VISSL, vit_h16_no_cls.yaml over eval_resnet_8gpu_transfer_in1k_linear.yaml: 256 images on each of 64 devices, 8 of
    # them a machine, which shares a batch norm's figures; heads scaled by 1 and 0.1; linear layers as torch starts
    # them, biases regularized
    "ijepa": {
        **AUGMENTED,
        "head": "linear",
        "blocks": (1, 4),
        "norms": ("none", "batch-affine"),
        "norm_eps": 1e-5,
        "norm_batch": 8 * 256,
        "optimizer": "lars",
        "momentum": 0.9,
        "initial_std": "linear",
        "lrs": (0.1, 0.01),
        "weight_decays": (5e-4, 0.0),
        "decay_bias": True,
        "last_batch": "keep",
        "batch": 16384,
        "steps": None,
        "epochs": 50,
        "warmup": 0,
        "milestones": (15, 30, 45),
        "interpolation": "bicubic",
        "selection": "test",
        "autocast": "none",
    },
    # MAE, main_linprobe.py, util/crop.py, util/lr_sched.py, engine_finetune.py: 512 images on each of 32 devices
    "mae": {
        **AUGMENTED,
        "head": "linear",
        "blocks": (1,),
        "norms": ("batch",),
        "norm_eps": 1e-6,
        "norm_batch": 512,
        "optimizer": "lars",
        "momentum": 0.9,
        "initial_std": 0.01,
        "lrs": (0.1,),
        "weight_decays": (0.0,),
        "batch": 16384,
        "steps": None,
        "epochs": 90,
        "warmup": pytest.approx(10 / 90, abs=1e-6),
        "ramp": "from-zero",
        "last_batch": "drop",
        "crop_rule": "clamp",
        "decay_bias": False,
        "autocast": "auto",
        "milestones": (),
        "interpolation": "bicubic",
        "selection": "test-epochs",
    },
    # DINOv2, eval/linear.py: 10 "epochs" of 1250 steps, 128 images on each of 8 devices, an endless sampler
    "dinov2": {
        **AUGMENTED,
        "head": "linear",
        "blocks": (1, 4),
        "norms": ("none",),
        "optimizer": "sgd",
        "momentum": 0.9,
        "initial_std": 0.01,
        "last_batch": "wrap",
        "autocast": "auto",
        "lrs": (*RATES, 2e-2, 5e-2, 0.1),
        "weight_decays": (0.0,),
        "batch": 1024,
        "steps": 12500,
        "epochs": 1e9,
        "warmup": 0,
        "milestones": (),
        "interpolation": "bicubic",
        "selection": "test",
    },
    # CAPI, eval_classification.py, launched by benchmark.py: 128 images on each of 8 devices, an endless sampler
    "capi": {
        **AUGMENTED,
        "head": "linear",
        "blocks": (1,),
        "norms": ("none",),
        "optimizer": "adamw",
        "betas": (0.9, 0.95),
        "initial_std": 0.02,
        "ramp": "closed",
        "last_batch": "wrap",
        "decay_bias": False,
        "autocast": "none",
        "lrs": RATES,
        "weight_decays": (5e-4, 1e-3, 5e-2),
        "batch": 1024,
        "steps": 12500,
        "epochs": 1e9,
        "warmup": 0.1,
        "milestones": (),
        "interpolation": "bicubic",
        "selection": "held-out",
        "held_out": 0.1,
    },
    # V-JEPA, vith16_in1k.yaml and image_classification_frozen/eval.py: a rate of 1e-3 for 64 times 16 images
    "attentive": {
        **AUGMENTED,
        "head": "attentive",
        "attention_heads": None,
        "blocks": (1,),
        "optimizer": "adamw",
        "betas": (0.9, 0.999),
        "lrs": (1e-3 * 256 / 1024,),
        "weight_decays": (1e-3,),
        "final_weight_decay": 1e-6,
        "clip": 1.0,
        "last_batch": "keep",
        "autocast": "auto",
        "batch": 1024,
        "steps": None,
        "epochs": 20,
        "warmup": 0,
        "milestones": (),
        "selection": "test",
    },
    # Our own: what docs/evaluation.md says of them
    "heldout": {
        "head": "linear",
        "blocks": (1, 4),
        "norms": ("none",),
        "optimizer": "adamw",
        "betas": (0.9, 0.95),
        "initial_std": 0.0,
        "lrs": RATES,
        "weight_decays": (5e-4, 1e-3, 5e-2),
        "batch": 1024,
        "steps": 12500,
        "epochs": 100,
        "warmup": 0.1,
        "milestones": (),
        "augment": False,
        "standardize": True,
        "selection": "held-out",
        "held_out": 0.1,
    },
    "low-shot": {
        "head": "linear",
        "blocks": (1, 4),
        "norms": ("none",),
        "optimizer": "adamw",
        "betas": (0.9, 0.95),
        "lrs": (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1),
        "weight_decays": (1e-3, 5e-2, 0.5),
        "batch": 512,
        "steps": None,
        "epochs": 50,
        "warmup": 0.1,
        "milestones": (),
        "augment": False,
        "standardize": True,
        "selection": "held-out",
        "held_out": 0.2,
    },
}
PUBLISHED["capi-attentive"] = {
    **{key: value for key, value in PUBLISHED["capi"].items() if key != "initial_std"},
    "head": "query",
    "attention_heads": None,
    "clip": None,
    "final_weight_decay": None,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_are_as_published(name: str):
    found = load_protocol("linear", name)
    assert {key: getattr(found, key) for key in PUBLISHED[name]} == PUBLISHED[name]
    assert (found.image_size, found.train_images, found.test_images) == (None, None, None)


STATED = {
    ("linear", "ijepa"): ["appendix states different learning rates", "same random weights"],
    ("linear", "mae"): ["uses the class token", "head in float16"],
    ("linear", "dinov2"): [
        "uses class tokens",
        "read the mean patch of the last block",
        "bfloat16 instead of float16",
    ],
    ("linear", "capi"): ["same share of every class"],
    ("linear", "capi-attentive"): ["as in the protocol capi"],
    ("linear", "attentive"): ["without AutoAugment and erasing", "instead of its end", "head in float16"],
    ("knn", "dino"): ["instead of the class token", "not the best of the four"],
    ("segmentation", "capi"): ["4 million patches", "predicted as ignored", "uses bfloat16"],
    ("segmentation", "hummingbird"): [
        "is 224",
        "belong to no class",
        "not matched again",
        "without augmentation",
        "float16 instead of float32",
        "the search is exact",
    ],
    ("propagation", "davis"): ["a multiple of 64 pixels"],
}


@pytest.mark.parametrize(("kind", "name"), STATED)
def test_what_differs_from_the_source_is_stated(kind: str, name: str):
    said = load_protocol(kind, name).description
    assert "Differences from the original: " in said
    for words in STATED[kind, name]:
        assert words in said
    assert "From memory" not in said


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in KINDS for name in presets(kind)])
def test_encoders_compute_as_published_and_in_float32_on_a_cpu(kind: str, name: str):
    """Sources that use half precision get bfloat16 on a GPU, those that do not get float32; our own are free."""
    protocol = load_protocol(kind, name)
    half, single = {"mae", "dinov2", "attentive"}, {"ijepa", "capi", "capi-attentive", "dino", "davis"}
    single |= {"hummingbird", "kmeans", "tokencut"} | ({"linear"} if kind == "segmentation" else set())
    own = {name for name in presets(kind) if name.startswith("demo")} | {"heldout", "low-shot"}
    assert name in half | single | own
    assert protocol.autocast == ("none" if name in single else "auto")
    assert resolved(protocol.autocast, torch.device("cpu")) == torch.float32


def test_every_preset_is_held_to_its_source():
    assert {*presets("linear")} == {*PUBLISHED, "demo"}
    counted = {"attentive": 1, "capi": 30, "capi-attentive": 30, "dinov2": 26, "heldout": 60, "ijepa": 16, "mae": 1}
    assert {name: load_protocol("linear", name).heads for name in counted} == counted
    assert load_protocol("linear").name == "heldout"


SHORT = {"batch": 20, "epochs": 4.0, "forward_batch": 32}


@pytest.mark.parametrize("name", ["ijepa", "mae", "dinov2", "capi", "attentive", "capi-attentive"])
def test_published_presets_run_to_their_end(name: str, tmp_path: Path):
    """LARS, batch norms and pooling heads behind a real encoder, with fewer epochs and milestones among them."""
    train, test = color_sets(tmp_path)
    shape = ModelSection(image_size=32, patch_size=8, encoder={"width": 64, "depth": 4, "heads": 2})
    whole = load_protocol("linear", name)
    short = SHORT | ({"milestones": (1, 2, 3)} if whole.milestones else {})
    if whole.optimizer == "lars":  # 16384 images a step are a rate of 6.4
        short["lrs"] = tuple(lr * 16384 / 20 for lr in whole.lrs)
    result = evaluate_linear({"toy": FrozenEncoder.initial(shape, 0)}, train, test, whole.model_copy(update=short))
    (row,) = result.rows
    assert row["heads"] == whole.heads
    assert row["top1"] > 0.5, "three plain colors"
    assert ("held_out" in row) == (whole.selection == "held-out")
    assert (FLATTERED in result.notes) == (name in ("ijepa", "mae", "dinov2"))
    if name == "mae":
        assert 1 <= row["head"]["epoch"] <= 4
