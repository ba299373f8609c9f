"""Model folders of transformers."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from ijepa.interop import transformers as interop_transformers
from ijepa.interop.exchange import export_weights
from ijepa.interop.weights import load_encoder, resolve_weights
from tests.helpers.libraries import pixels, recipe


def test_the_processor_has_our_normalization_and_size(tiny, tmp_path):
    import transformers

    out = export_weights(tiny, tmp_path / "hf", "transformers")
    values = json.loads((out / "preprocessor_config.json").read_text())
    assert values["image_mean"] == [0.485, 0.456, 0.406] and values["image_std"] == [0.229, 0.224, 0.225]
    assert values["size"] == {"height": 48, "width": 48}
    assert transformers.AutoConfig.from_pretrained(out).layer_norm_eps == 1e-6


def test_transformers_reads_shards(tiny, tmp_path, monkeypatch):
    import transformers

    whole = export_weights(tiny, tmp_path / "whole", "transformers")
    monkeypatch.setattr(interop_transformers, "SHARD", 20_000)
    out = export_weights(tiny, tmp_path / "out", "transformers")
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 2 and not (out / "model.safetensors").exists()
    first, second = (
        transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False).state_dict() for folder in (whole, out)
    )
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    raw, _ = pixels(load_encoder(tiny))
    assert torch.equal(load_encoder(out)(raw), load_encoder(tiny)(raw))
    for form in ("timm", "safetensors"):  # which read one file
        assert len(list(export_weights(tiny, tmp_path / form, form).glob("*.safetensors"))) == 1


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_weights_become_float32(tiny, tmp_path, kind):
    out = export_weights(tiny, tmp_path / "hf", "transformers")
    half = {name: value.to(kind) for name, value in load_file(out / "model.safetensors").items()}
    save_file(half, out / "model.safetensors", {"format": "pt"})
    found = resolve_weights(out)
    assert found.recipe.model.encoder == recipe("tiny").model.encoder
    again = load_file(export_weights(out, tmp_path / "again", "transformers") / "model.safetensors")
    assert {value.dtype for value in again.values()} == {torch.float32}
    name = "encoder.layer.0.output.dense.weight"
    assert torch.equal(again[name], half[name].float())
