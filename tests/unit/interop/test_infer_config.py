"""Shapes of models that are too large for a test: on the meta device, only their positions have values."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from ijepa.config.recipe import EncoderSection, ModelSection, PredictorSection, Recipe
from ijepa.interop import init_from
from ijepa.interop.infer_config import infer_encoder, infer_predictor
from ijepa.interop.init_from import initial_weights
from ijepa.interop.positions import Positions
from ijepa.interop.tensors import LazyTensor
from ijepa.interop.timm import timm_config
from ijepa.interop.transformers import from_transformers, to_transformers, transformers_config
from ijepa.interop.weights import Weights
from ijepa.model.ijepa import IJEPA
from tests.helpers.paths import ROOT

HUGE = EncoderSection(width=1280, depth=32, heads=16)
GIANT = EncoderSection(width=1408, depth=40, heads=16, mlp_ratio=6144 / 1408)
PAGE = ROOT / "docs" / "interop.md"


def parts_of(model: ModelSection) -> dict[str, dict[str, LazyTensor]]:
    """Every part's tensors as in a checkpoint of the original, on the meta device except for the positions."""
    with torch.device("meta"):
        whole = IJEPA(model)
    found = {}
    for part in ("context_encoder", "target_encoder", "predictor"):
        sizes, name = (model.predictor, "predictor_pos_embed") if part == "predictor" else (model.encoder, "pos_embed")
        found[part] = {key: LazyTensor.of(value) for key, value in getattr(whole, part).state_dict().items()}
        found[part][name] = LazyTensor.of(Positions(model.grid).table(sizes.width))
    return found


@pytest.mark.parametrize("encoder", [HUGE, GIANT], ids=["huge", "giant"])
@pytest.mark.parametrize(("patch", "side"), [(14, 224), (16, 224), (16, 448)])
def test_infer_encoder_and_infer_predictor_read_the_largest_models(encoder, patch, side):
    model = ModelSection(
        image_size=(side, side),
        patch_size=patch,
        encoder=encoder,
        predictor=PredictorSection(width=384, depth=12, heads=16),
    )
    parts = parts_of(model)
    shape, notes = infer_encoder(parts["target_encoder"], "file")
    assert infer_predictor(shape, parts["predictor"], "file") == model and not notes
    hidden, last = {1280: (5120, 31), 1408: (6144, 39)}[encoder.width]
    assert parts["target_encoder"][f"blocks.{last}.mlp.fc1.weight"].shape == (hidden, encoder.width)
    assert transformers_config(model)["intermediate_size"] == hidden
    assert int(encoder.width * timm_config(model)["model_args"]["mlp_ratio"]) == hidden  # as timm computes it
    theirs = to_transformers(parts["target_encoder"])
    assert theirs["encoder.layer.0.attention.attention.key.weight"].shape == (encoder.width, encoder.width)
    back = from_transformers(theirs, "file")
    assert {name: tensor.shape for name, tensor in back.items()} == {
        name: tensor.shape for name, tensor in parts["target_encoder"].items()
    }


def test_initial_weights_accepts_the_examples_of_the_documentation(monkeypatch):
    text = PAGE.read_text()
    (name,) = set(re.findall(r"IN22K-vit\.h\.(\d+)-\d+e\.pth\.tar", text))
    theirs = Recipe.load("vit-huge-14-in1k")
    theirs = theirs.model_copy(update={"model": theirs.model.model_copy(update={"patch_size": int(name)})})
    found = Weights(Path("huge"), theirs, "huge", imported=parts_of(theirs.model))
    monkeypatch.setattr(init_from, "resolve_weights", lambda path, heads: found)
    lines = re.findall(r"^ijepa pretrain (\S+) (.*)$", text, flags=re.M)
    assert len(lines) == 2
    grids = []
    for preset, flags in lines:
        words = shlex.split(flags)
        given = {key[2:]: value for key, value in zip(words[::2], words[1::2], strict=True) if key != "--output"}
        grids.append(initial_weights(Recipe.load(preset, given)).recipe.model.position_grid)
    assert grids == [None, (16, 16)]
