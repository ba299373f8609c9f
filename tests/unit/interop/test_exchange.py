"""Weights exported to other libraries and imported again."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ijepa.interop.exchange import export_weights, import_weights
from ijepa.interop.heads import Head
from ijepa.interop.weights import load_encoder, resolve_weights
from ijepa.utils.errors import RunError, UserError
from tests.helpers.libraries import PARTS, eager, features_of_library, pixels, recipe


@pytest.mark.parametrize("which", ["target", "context"])
@pytest.mark.parametrize("form", ["transformers", "timm"])
def test_other_libraries_give_our_features(ours, tmp_path, form, which):
    out = export_weights(ours, tmp_path / "out", form, which=which)
    encoder = load_encoder(ours, which)
    raw, normalized = pixels(encoder)
    wanted = encoder(raw)
    found = features_of_library(out, form, normalized)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=2e-5)
    # With the exported weights, a plain encoder gives their bits: only packed attention adds in another order.
    file = export_weights(ours, tmp_path / "file.safetensors", "safetensors", which=which)
    assert torch.equal(found, eager(load_file(file), recipe(ours.name).model.encoder.heads, normalized, form))
    # Imported again, the same numbers give the same bits.
    again = load_encoder(out, which)
    assert torch.equal(again(raw), wanted)
    assert json.loads((out / "config.json").read_text())["ijepa"]["encoder"] == which
    assert resolve_weights(out).recipe.model.encoder == recipe(ours.name).model.encoder


def test_the_original_format_and_back(ours, tmp_path):
    file = export_weights(ours, tmp_path / "jepa.pth.tar", "official")
    content = torch.load(file, weights_only=True)
    assert set(content) == {"encoder", "target_encoder", "predictor", "epoch"}
    assert all(name.startswith("module.") for name in content["encoder"])
    assert content["encoder"]["module.pos_embed"].shape[0] == 1
    assert "module.predictor_pos_embed" in content["predictor"]
    heads = recipe(ours.name).model.encoder.heads
    found = import_weights(file, tmp_path / "back", heads=heads)
    assert found.recipe.model == recipe(ours.name).model
    for part in PARTS:
        before, after = load_file(ours / f"{part}.safetensors"), load_file(tmp_path / "back" / f"{part}.safetensors")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_safetensors_and_back(tiny, tmp_path):
    folder = export_weights(tiny, tmp_path / "folder", "safetensors")
    assert {path.name for path in folder.iterdir()} == {"recipe.yaml", "target_encoder.safetensors"}
    file = export_weights(tiny, tmp_path / "one.safetensors", "safetensors")
    assert "pos_embed" in load_file(file)
    raw, _ = pixels(load_encoder(tiny))
    assert torch.equal(load_encoder(folder)(raw), load_encoder(tiny)(raw))
    import_weights(file, tmp_path / "again", heads=4)
    assert torch.equal(load_encoder(tmp_path / "again")(raw), load_encoder(tiny)(raw))


def test_a_head_becomes_the_classifier(tiny, tmp_path):
    import transformers

    draw = torch.Generator().manual_seed(5)
    head = Head(torch.randn(3, 32, generator=draw), torch.randn(3, generator=draw), ("cat", "dog", "cow"))
    head.write(tmp_path / "head.safetensors")
    encoder = load_encoder(tiny)
    raw, normalized = pixels(encoder)
    wanted = encoder(raw).mean(1) @ head.weight.T + head.bias
    out = export_weights(tiny, tmp_path / "hf", "transformers", head=tmp_path / "head.safetensors")
    model, report = transformers.AutoModelForImageClassification.from_pretrained(out, output_loading_info=True)
    assert type(model).__name__ == "IJepaForImageClassification" and not report["missing_keys"]
    assert model.config.id2label == {0: "cat", 1: "dog", 2: "cow"}
    out = export_weights(tiny, tmp_path / "timm", "timm", head=tmp_path / "head.safetensors")
    import timm

    theirs = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(normalized).logits, wanted, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(theirs(normalized), wanted, rtol=1e-5, atol=1e-4)
    # A classifier is still an encoder.
    assert torch.equal(load_encoder(tmp_path / "hf")(raw), encoder(raw))
    with pytest.raises(UserError) as err:
        export_weights(tiny, tmp_path / "x.pth.tar", "official", head=tmp_path / "head.safetensors")
    assert err.value.where == "--head" and not (tmp_path / "x.pth.tar").exists()


def test_every_format_states_that_it_has_the_context_encoder(tiny, tmp_path):
    raw, _ = pixels(load_encoder(tiny))
    wanted = load_encoder(tiny, "context")(raw)
    places = {"a": "safetensors", "b.safetensors": "safetensors", "c": "transformers", "d": "timm"}
    for place, form in places.items():
        out = export_weights(tiny, tmp_path / place, form, which="context")
        assert resolve_weights(out, heads=4).parts == ["context_encoder"]
        assert torch.equal(load_encoder(out, "context", heads=4)(raw), wanted)
        with pytest.raises(UserError) as err:
            load_encoder(out, heads=4)
        assert err.value.where == str(out) and "--which context" in err.value.hint


@pytest.mark.parametrize(("name", "form"), [("out", "timm"), ("out", "safetensors"), ("a.pth.tar", "official")])
def test_a_full_disk_leaves_nothing(tiny, tmp_path, monkeypatch, name, form):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("ijepa.utils.files.os.fsync", full)
    with pytest.raises(RunError, match="No space left"):
        export_weights(tiny, tmp_path / name, form)
    assert not list(tmp_path.iterdir())


def test_check_output_refuses_what_cannot_be_created(tiny, tmp_path):
    (tmp_path / "there").mkdir()
    not_utf8 = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.safetensors"))
    for path in (tmp_path / "there", tmp_path / "nowhere" / "out", not_utf8):
        with pytest.raises(UserError) as err:
            export_weights(tiny, path, "timm")
        assert err.value.where == UserError(path, "").where
        with pytest.raises(UserError):
            import_weights(tiny, path)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
