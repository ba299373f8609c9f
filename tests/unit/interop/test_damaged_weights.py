"""Weights that are damaged, of another model, or say one thing and hold another: one line each, nothing written."""

import errno
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ijepa.interop.exchange import export_weights, import_weights
from ijepa.interop.heads import Head
from ijepa.interop.weights import load_encoder
from ijepa.utils.errors import RunError, UserError


def _short(folder: Path, tiny: Path) -> Path:
    data = (tiny / "target_encoder.safetensors").read_bytes()
    (folder / "short.safetensors").write_bytes(data[: len(data) // 2])
    return folder / "short.safetensors"


def _without(folder: Path, tiny: Path) -> Path:
    out = export_weights(tiny, folder / "without", "transformers")
    values = load_file(out / "model.safetensors")
    del values["encoder.layer.1.output.dense.bias"]
    save_file(values, out / "model.safetensors", {"format": "pt"})
    return out


def _other_model(folder: Path, tiny: Path) -> Path:
    (folder / "other").mkdir()
    (folder / "other" / "config.json").write_text('{"model_type": "bert"}')
    return folder / "other"


def _cut(folder: Path, tiny: Path) -> Path:
    file = export_weights(tiny, folder / "cut.pth.tar", "official")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return file


def _index(folder: Path, tiny: Path) -> Path:
    out = export_weights(tiny, folder / "index", "transformers")
    (out / "model.safetensors.index.json").write_text('{"weight_map": {"a": "1.safetensors"}}')
    return out


def _index_of_itself(folder: Path, tiny: Path) -> Path:
    out = export_weights(tiny, folder / "itself", "transformers")
    (out / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model.safetensors.index.json"}}')
    return out


def _tensor(form: str, **changed: torch.Tensor) -> Callable[[Path, Path], Path]:
    def make(folder: Path, tiny: Path) -> Path:
        out = export_weights(tiny, folder / "tensor", form)
        values = load_file(out / "model.safetensors")
        save_file({**values, **changed}, out / "model.safetensors", {"format": "pt"})
        return out

    return make


def _arguments(**changed: object) -> Callable[[Path, Path], Path]:
    def make(folder: Path, tiny: Path) -> Path:
        out = export_weights(tiny, folder / "arguments", "timm")
        values = json.loads((out / "config.json").read_text())
        values["model_args"] |= changed
        (out / "config.json").write_text(json.dumps(values))
        return out

    return make


def _config(form: str, **changed: object) -> Callable[[Path, Path], Path]:
    def make(folder: Path, tiny: Path) -> Path:
        out = export_weights(tiny, folder / "config", form)
        values = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps({**values, **changed}))
        return out

    return make


QUERY = "encoder.layer.0.attention.attention.{}.weight"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_cut, r"cut.pth.tar: cannot be read"),
        (_index, r"index/1.safetensors: does not exist"),
        (_index_of_itself, "names model.safetensors.index.json, which is no .safetensors"),
        (_short, "not a whole safetensors file"),
        (_without, "blocks.1.mlp.fc2.bias is missing"),
        (_tensor("timm", **{"blocks.0.ls1.gamma": torch.ones(32)}), "blocks.0.ls1.gamma is unknown"),
        (_tensor("timm", **{"blocks.1.mlp.fc1.weight": torch.ones(8, 32)}), "blocks.1.mlp.fc1.weight has shape"),
        (_tensor("timm", pos_embed=torch.ones(1, 36, 32)), "is not the sin-cos table"),
        (_tensor("timm", **{"foo.pos_embed": torch.ones(2)}), "foo.pos_embed is unknown"),
        (_tensor("transformers", **{"ijepa.norm.pos_embed": torch.ones(2)}), "ijepa.norm.pos_embed is unknown"),
        (_tensor("transformers", **{QUERY.format("bogus"): torch.ones(32, 32)}), "attention.bogus.weight is unknown"),
        (
            _tensor(
                "transformers", **{QUERY.format("query"): torch.ones(31, 32), QUERY.format("key"): torch.ones(33, 32)}
            ),
            "query, key and value of blocks.0.attn.qkv.weight differ in shape",
        ),
        (_config("transformers", image_size="abc"), "config.json: image_size = 'abc'; one number of pixels"),
        (_config("transformers", image_size=[48, 48, 3]), r"config.json: image_size = \[48, 48, 3\]"),
        (_config("transformers", image_size=64), "pos_embed has 36 positions; a grid of 8 x 8"),
        (_config("transformers", num_attention_heads="x"), "num_attention_heads = 'x'; a whole number"),
        (_config("transformers", num_attention_heads=5), "5 attention heads do not divide the width 32"),
        (_config("transformers", ijepa="x"), "config.json: ijepa = 'x'; an object"),
        (_config("transformers", layer_norm_eps=1e-12), "layer_norm_eps = 1e-12; only encoders with 1e-06"),
        (_config("transformers", hidden_act="relu"), "hidden_act = relu; only encoders with gelu"),
        (_config("timm", model_args=[1]), r"config.json: model_args = \[1\]; an object"),
        (_config("timm", model_args={"class_token": False, "num_heads": -4}), "num_heads = -4; a whole number"),
        (_config("timm", model_args={"class_token": False, "img_size": "x"}), "img_size = 'x'; one number of pixels"),
        (_arguments(act_layer="relu"), "config.json: act_layer = relu; only encoders with gelu are read"),
        (_arguments(act_layer="gelu_tanh"), "config.json: act_layer = gelu_tanh; only encoders with gelu are read"),
        (_arguments(norm_layer="rmsnorm"), "config.json: norm_layer = rmsnorm; only encoders with layernorm are read"),
        (_arguments(norm_layer=["layernorm", 1e-5]), "config.json: norm_layer = .*; only encoders with layernorm"),
        (_other_model, "model_type is bert"),
    ],
)
def test_bad_files_are_one_line_and_write_nothing(tiny, tmp_path, make, message):
    bad = make(tmp_path, tiny)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    for act in (
        lambda: import_weights(bad, tmp_path / "out"),
        lambda: export_weights(bad, tmp_path / "out", "timm"),
        lambda: load_encoder(bad),
    ):
        with pytest.raises(UserError, match=message) as error:
            act()
        assert "\n" not in str(error.value)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_what_timm_calls_its_own_layers_is_read(tiny, tmp_path):
    for number, changed in enumerate(({"act_layer": None, "norm_layer": "layer_norm"}, {"act_layer": "gelu"})):
        (tmp_path / str(number)).mkdir()
        load_encoder(_arguments(**changed)(tmp_path / str(number), tiny))


@pytest.mark.parametrize(
    ("weight", "classes", "message"),
    [
        (torch.zeros(3), '["a", "b", "c"]', r"is no head \(weight \(3,\), bias \(3,\) and 3 classes"),
        (torch.zeros(3, 32), "3", r"is no head \(its classes are no list\)"),
        (torch.zeros(3, 32), '"abc"', r"is no head \(its classes are no list\)"),
        (torch.zeros(3, 32), '["a"]', r"is no head \(weight \(3, 32\), bias \(3,\) and 1 classes"),
        (torch.zeros(4, 32), '["a", "b", "c"]', r"is no head \(weight \(4, 32\), bias \(3,\) and 3 classes"),
    ],
)
def test_what_is_no_head_is_one_line(tiny, tmp_path, weight, classes, message):
    save_file({"weight": weight, "bias": torch.zeros(3)}, tmp_path / "head", {"classes": classes})
    with pytest.raises(UserError, match=f"--head .*{message}"):
        export_weights(tiny, tmp_path / "out", "timm", head=tmp_path / "head")
    assert not (tmp_path / "out").exists()


def test_a_head_is_complete_or_absent(tmp_path, monkeypatch):
    head = Head(torch.ones(2, 4), torch.zeros(2), ("a", "b"))
    head.write(tmp_path / "head.safetensors")
    found = Head.read(tmp_path / "head.safetensors")
    assert torch.equal(found.weight, head.weight) and found.classes == ("a", "b")
    assert [path.name for path in tmp_path.iterdir()] == ["head.safetensors"]

    def full(descriptor):
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr("ijepa.utils.files.os.fsync", full)
    with pytest.raises(RunError, match="other: the head cannot be saved: no space left"):
        head.write(tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["head.safetensors"]
