"""Weights that are damaged, of another model, or contradict their configuration: one line each, nothing written."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ijepa.interop.exchange import export_weights, import_weights
from ijepa.interop.weights import load_encoder
from ijepa.utils.errors import UserError


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
    ("make", "file", "word"),
    [
        (_cut, "cut.pth.tar", "cannot be read"),
        (_index, "index/1.safetensors", "does not exist"),
        (_index_of_itself, "itself/model.safetensors.index.json", "model.safetensors.index.json"),
        (_short, "short.safetensors", "complete"),
        (_without, "without", "blocks.1.mlp.fc2.bias"),
        (_tensor("timm", **{"blocks.0.ls1.gamma": torch.ones(32)}), "tensor", "blocks.0.ls1.gamma"),
        (_tensor("timm", **{"blocks.1.mlp.fc1.weight": torch.ones(8, 32)}), "tensor", "blocks.1.mlp.fc1.weight"),
        (_tensor("timm", pos_embed=torch.ones(1, 36, 32)), "tensor/model.safetensors", "sin-cos"),
        (_tensor("timm", **{"foo.pos_embed": torch.ones(2)}), "tensor", "foo.pos_embed"),
        (_tensor("transformers", **{"ijepa.norm.pos_embed": torch.ones(2)}), "tensor", "ijepa.norm.pos_embed"),
        (_tensor("transformers", **{QUERY.format("bogus"): torch.ones(32, 32)}), "tensor", "attention.bogus.weight"),
        (
            _tensor(
                "transformers", **{QUERY.format("query"): torch.ones(31, 32), QUERY.format("key"): torch.ones(33, 32)}
            ),
            "tensor/model.safetensors",
            "blocks.0.attn.qkv.weight",
        ),
        (_config("transformers", image_size="abc"), "config/config.json: image_size = 'abc'", ""),
        (_config("transformers", image_size=[48, 48, 3]), "config/config.json: image_size = [48, 48, 3]", ""),
        (_config("transformers", image_size=64), "config/model.safetensors", "8 x 8"),
        (_config("transformers", num_attention_heads="x"), "config/config.json: num_attention_heads = 'x'", ""),
        (_config("transformers", num_attention_heads=5), "config/model.safetensors", "5 attention heads"),
        (_config("transformers", ijepa="x"), "config/config.json: ijepa = 'x'", ""),
        (_config("transformers", layer_norm_eps=1e-12), "config/config.json: layer_norm_eps = 1e-12", "1e-06"),
        (_config("transformers", hidden_act="relu"), "config/config.json: hidden_act = 'relu'", "gelu"),
        (_config("timm", model_args=[1]), "config/config.json: model_args = [1]", ""),
        (_arguments(num_heads=-4), "arguments/config.json: model_args.num_heads = -4", ""),
        (_arguments(img_size="x"), "arguments/config.json: model_args.img_size = 'x'", ""),
        (_arguments(class_token=True), "arguments/config.json", "class token"),
        (_arguments(act_layer="relu"), "arguments/config.json: model_args.act_layer = 'relu'", "gelu"),
        (_arguments(act_layer="gelu_tanh"), "arguments/config.json: model_args.act_layer = 'gelutanh'", "gelu"),
        (_arguments(norm_layer="rmsnorm"), "arguments/config.json: model_args.norm_layer = 'rmsnorm'", "layernorm"),
        (_arguments(norm_layer=["layernorm", 1e-5]), "arguments/config.json: model_args.norm_layer", "layernorm"),
        (_other_model, "other/config.json: model_type = 'bert'", "ijepa"),
    ],
)
def test_bad_files_are_one_line_and_write_nothing(tiny, tmp_path, make, file, word):
    bad = make(tmp_path, tiny)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    for act in (
        lambda: import_weights(bad, tmp_path / "out"),
        lambda: export_weights(bad, tmp_path / "out", "timm"),
        lambda: load_encoder(bad),
    ):
        with pytest.raises(UserError) as err:
            act()
        assert err.value.where.startswith(str(tmp_path / file)) and word in str(err.value)
        assert "\n" not in str(err.value)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_timm_names_of_its_default_layers_are_accepted(tiny, tmp_path):
    for number, changed in enumerate(({"act_layer": None, "norm_layer": "layer_norm"}, {"act_layer": "gelu"})):
        (tmp_path / str(number)).mkdir()
        load_encoder(_arguments(**changed)(tmp_path / str(number), tiny))
