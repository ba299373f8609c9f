"""The shapes of models too large for a test's memory: on the meta device, with nothing but their positions real."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from ijepa.config.recipe import EncoderSection, ModelSection, PredictorSection, Recipe
from ijepa.interop import init_from, timm, transformers
from ijepa.interop.infer_config import encoder_shape, with_predictor
from ijepa.interop.init_from import beginning
from ijepa.interop.positions import Positions
from ijepa.interop.tensors import Lazy
from ijepa.interop.weights import Weights
from ijepa.model.ijepa import IJEPA
from tests.helpers.paths import ROOT

HUGE = EncoderSection(width=1280, depth=32, heads=16)
GIANT = EncoderSection(width=1408, depth=40, heads=16, mlp_ratio=6144 / 1408)
PAGE = ROOT / "docs" / "interop.md"


def parts_of(model: ModelSection) -> dict[str, dict[str, Lazy]]:
    """Every part's tensors as a checkpoint of the original has them, without memory for any but the positions."""
    with torch.device("meta"):
        whole = IJEPA(model)
    found = {}
    for part in ("context_encoder", "target_encoder", "predictor"):
        sizes, name = (model.predictor, "predictor_pos_embed") if part == "predictor" else (model.encoder, "pos_embed")
        found[part] = {key: Lazy.of(value) for key, value in getattr(whole, part).state_dict().items()}
        found[part][name] = Lazy.of(Positions(model.grid).table(sizes.width))
    return found


@pytest.mark.parametrize("encoder", [HUGE, GIANT], ids=["huge", "giant"])
@pytest.mark.parametrize(("patch", "side"), [(14, 224), (16, 224), (16, 448)])
def test_the_largest_models_are_read(encoder, patch, side):
    model = ModelSection(
        image_size=(side, side),
        patch_size=patch,
        encoder=encoder,
        predictor=PredictorSection(width=384, depth=12, heads=16),
    )
    parts = parts_of(model)
    shape, notes = encoder_shape(parts["target_encoder"], "file")
    assert with_predictor(shape, parts["predictor"], "file") == model and not notes
    hidden, last = {1280: (5120, 31), 1408: (6144, 39)}[encoder.width]
    assert parts["target_encoder"][f"blocks.{last}.mlp.fc1.weight"].shape == (hidden, encoder.width)
    assert transformers.config(model)["intermediate_size"] == hidden
    assert int(encoder.width * timm.config(model)["model_args"]["mlp_ratio"]) == hidden  # as timm computes it
    theirs = transformers.to_theirs(parts["target_encoder"])
    assert theirs["encoder.layer.0.attention.attention.key.weight"].shape == (encoder.width, encoder.width)
    back = transformers.to_ours(theirs, "file")
    assert {name: tensor.shape for name, tensor in back.items()} == {
        name: tensor.shape for name, tensor in parts["target_encoder"].items()
    }


def test_the_pages_example_of_going_on_is_one_that_goes_on(monkeypatch):
    text = PAGE.read_text()
    (name,) = set(re.findall(r"IN22K-vit\.h\.(\d+)-\d+e\.pth\.tar", text))
    theirs = Recipe.load("vit-huge-14-in1k")
    theirs = theirs.model_copy(update={"model": theirs.model.model_copy(update={"patch_size": int(name)})})
    found = Weights(Path("huge"), theirs, "huge", foreign=parts_of(theirs.model))
    monkeypatch.setattr(init_from, "resolve_weights", lambda path, heads: found)
    lines = re.findall(r"^ijepa pretrain (\S+) (.*)$", text, flags=re.M)
    assert len(lines) == 2
    grids = []
    for preset, flags in lines:
        words = shlex.split(flags)
        given = {key[2:]: value for key, value in zip(words[::2], words[1::2], strict=True) if key != "--output"}
        grids.append(beginning(Recipe.load(preset, given)).recipe.model.position_grid)
    assert grids == [None, (16, 16)]
