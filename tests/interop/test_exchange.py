"""Weights out and in again, through the libraries that others use, and what is refused on the way."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ijepa.errors import Failed, Refused
from ijepa.interop import graphs
from ijepa.interop import tensors as lazy
from ijepa.interop.exchange import export_weights, import_weights
from ijepa.interop.heads import Head
from ijepa.interop.tensors import Lazy, open_tensors, write_tensors
from ijepa.interop.weights import load_encoder, resolve_weights
from ijepa.model.encoder import Encoder
from tests.interop.peers import SHAPES, pixels, random_model, recipe

PARTS = ("context_encoder", "target_encoder", "predictor")


@pytest.fixture(scope="module", params=SHAPES)
def ours(request, tmp_path_factory) -> Path:
    """A weights folder of ours with all three parts."""
    folder = tmp_path_factory.mktemp("ours") / request.param
    folder.mkdir()
    (folder / "recipe.yaml").write_text(recipe(request.param).dump())
    model = random_model(request.param)
    for part in PARTS:
        save_file(dict(getattr(model, part).state_dict()), folder / f"{part}.safetensors")
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "tiny"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(recipe("tiny").dump())
    model = random_model("tiny")
    for part in PARTS:
        save_file(dict(getattr(model, part).state_dict()), folder / f"{part}.safetensors")
    return folder


@torch.no_grad()
def theirs_of(folder: Path, form: str, normalised: torch.Tensor) -> torch.Tensor:
    """What the other library makes of our export, by eager attention."""
    if form == "transformers":
        import transformers

        model, report = transformers.AutoModel.from_pretrained(
            folder, attn_implementation="eager", output_loading_info=True, add_pooling_layer=False
        )
        assert type(model).__name__ == "IJepaModel"
        assert not report["missing_keys"] and not report["unexpected_keys"], report
        return model.eval()(normalised).last_hidden_state
    os.environ["TIMM_FUSED_ATTN"] = "0"
    import timm

    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    return model.eval().forward_features(normalised)


@pytest.mark.parametrize("which", ["target", "context"])
@pytest.mark.parametrize("form", ["transformers", "timm"])
def test_other_libraries_compute_what_we_do(ours, tmp_path, form, which):
    out = export_weights(ours, tmp_path / "out", form, which=which)
    encoder = load_encoder(ours, which)
    raw, normalised = pixels(encoder)
    wanted = encoder(raw)
    torch.testing.assert_close(theirs_of(out, form, normalised), wanted, rtol=1e-6, atol=2e-5)
    # And in again: the same numbers, so the same bits.
    again = load_encoder(out, which)
    assert torch.equal(again(raw), wanted)
    assert json.loads((out / "config.json").read_text())["ijepa"]["encoder"] == which
    assert resolve_weights(out).recipe.model.encoder == recipe(ours.name).model.encoder


def test_the_original_layout_and_back(ours, tmp_path):
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


def original_file(path: Path, *, prefix: str = "module.", predictor: bool = True) -> Path:
    """A checkpoint as the original's training writes it, of a small ViT-S/16."""
    model = random_model("small")
    states = {"encoder": model.context_encoder, "target_encoder": model.target_encoder}
    states |= {"predictor": model.predictor} if predictor else {}
    content = {name: {prefix + key: value for key, value in part.state_dict().items()} for name, part in states.items()}
    for name in ("encoder", "target_encoder"):
        content[name][f"{prefix}pos_embed"] = model.context_encoder.pos_embed[None].clone()
    if predictor:
        content["predictor"][f"{prefix}predictor_pos_embed"] = model.predictor.predictor_pos_embed[None].clone()
    more = {"opt": {"state": {}, "param_groups": [{"lr": 1e-3}]}, "scaler": None, "epoch": 300, "loss": 0.14}
    torch.save({**content, **more, "batch_size": 128, "world_size": 16, "lr": 1e-3}, path)
    return path


@pytest.mark.parametrize("prefix", ["module.", ""])
@pytest.mark.parametrize("predictor", [True, False])
def test_an_original_checkpoint_is_weights(tmp_path, prefix, predictor):
    file = original_file(tmp_path / "vits.16.pth.tar", prefix=prefix, predictor=predictor)
    model = random_model("small")
    raw, normalised = pixels(Encoder(model.target_encoder))
    for which in ("target", "context"):
        assert torch.equal(load_encoder(file, which)(raw), Encoder(getattr(model, f"{which}_encoder"))(raw))
    assert resolve_weights(file).parts == sorted(PARTS if predictor else PARTS[:2])
    out = export_weights(file, tmp_path / "out", "transformers")
    torch.testing.assert_close(
        theirs_of(out, "transformers", normalised), Encoder(model.target_encoder)(raw), rtol=1e-6, atol=2e-5
    )


def test_plain_safetensors_out_and_in(tiny, tmp_path):
    folder = export_weights(tiny, tmp_path / "folder", "safetensors")
    assert {path.name for path in folder.iterdir()} == {"recipe.yaml", "target_encoder.safetensors"}
    file = export_weights(tiny, tmp_path / "one.safetensors", "safetensors")
    assert "pos_embed" in load_file(file)
    raw, _ = pixels(load_encoder(tiny))
    assert torch.equal(load_encoder(folder)(raw), load_encoder(tiny)(raw))
    with pytest.raises(Refused, match=r"how many attention heads 32 channels have; .*--heads N"):
        resolve_weights(file)
    import_weights(file, tmp_path / "again", heads=4)
    assert torch.equal(load_encoder(tmp_path / "again")(raw), load_encoder(tiny)(raw))


def test_a_head_becomes_the_classifier(tiny, tmp_path):
    import transformers

    draw = torch.Generator().manual_seed(5)
    head = Head(torch.randn(3, 32, generator=draw), torch.randn(3, generator=draw), ("cat", "dog", "cow"))
    head.write(tmp_path / "head.safetensors")
    encoder = load_encoder(tiny)
    raw, normalised = pixels(encoder)
    wanted = encoder(raw).mean(1) @ head.weight.T + head.bias
    out = export_weights(tiny, tmp_path / "hf", "transformers", head=tmp_path / "head.safetensors")
    model, report = transformers.AutoModelForImageClassification.from_pretrained(out, output_loading_info=True)
    assert type(model).__name__ == "IJepaForImageClassification" and not report["missing_keys"]
    assert model.config.id2label == {0: "cat", 1: "dog", 2: "cow"}
    out = export_weights(tiny, tmp_path / "timm", "timm", head=tmp_path / "head.safetensors")
    import timm

    theirs = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(normalised).logits, wanted, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(theirs(normalised), wanted, rtol=1e-5, atol=1e-4)
    # A classifier is still an encoder.
    assert torch.equal(load_encoder(tmp_path / "hf")(raw), encoder(raw))
    with pytest.raises(Refused, match="has no place in official"):
        export_weights(tiny, tmp_path / "x.pth.tar", "official", head=tmp_path / "head.safetensors")
    Head(torch.zeros(3, 8), torch.zeros(3), ("a", "b", "c")).write(tmp_path / "wrong.safetensors")
    with pytest.raises(Refused, match="reads 8 channels, the encoder has 32"):
        export_weights(tiny, tmp_path / "y", "timm", head=tmp_path / "wrong.safetensors")
    assert not (tmp_path / "x.pth.tar").exists() and not (tmp_path / "y").exists()


def test_the_processor_is_the_encoders(tiny, tmp_path):
    import transformers

    out = export_weights(tiny, tmp_path / "hf", "transformers")
    values = json.loads((out / "preprocessor_config.json").read_text())
    assert values["image_mean"] == [0.485, 0.456, 0.406] and values["image_std"] == [0.229, 0.224, 0.225]
    assert values["size"] == {"height": 48, "width": 48}
    assert transformers.AutoConfig.from_pretrained(out).layer_norm_eps == 1e-6


def test_graphs_compute_what_we_do_for_any_number_of_images(tiny, tmp_path):
    import onnx
    import onnxruntime

    encoder = load_encoder(tiny)
    about = {"encoder": "", "source": ""}
    program = torch.export.load(export_weights(tiny, tmp_path / "vit.pt2", "program"), extra_files=about).module()
    assert about == {"encoder": "target", "source": "tiny"}
    file = export_weights(tiny, tmp_path / "vit.onnx", "onnx")
    assert [(each.domain, each.version) for each in onnx.load(file).opset_import] == [("", graphs.OPSET)]
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map["encoder"] == "target"
    for count in (1, 3):
        raw, normalised = pixels(encoder, count)
        wanted = encoder(raw)
        torch.testing.assert_close(program(normalised), wanted, rtol=1e-5, atol=2e-5)
        (found,) = session.run(["last_hidden_state"], {"pixel_values": normalised.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-4, atol=1e-4)


def test_weights_of_a_large_graph_lie_beside_it(tiny, tmp_path, monkeypatch):
    import onnxruntime

    monkeypatch.setattr(graphs, "LARGE", 1000)
    (tmp_path / "out").mkdir()
    file = export_weights(tiny, tmp_path / "out" / "vit.onnx", "onnx")
    assert {path.name for path in file.parent.iterdir()} == {"vit.onnx", "vit.onnx.data"}
    assert file.stat().st_size < (file.parent / "vit.onnx.data").stat().st_size
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    raw, normalised = pixels(load_encoder(tiny))
    (found,) = session.run(None, {"pixel_values": normalised.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), load_encoder(tiny)(raw), rtol=1e-4, atol=1e-4)
    file.unlink()
    with pytest.raises(Refused, match=r"vit.onnx.data: exists already"):
        export_weights(tiny, file, "onnx")
    assert {path.name for path in file.parent.iterdir()} == {"vit.onnx.data"}


def test_large_models_are_written_in_shards(tiny, tmp_path):
    tensors = resolve_weights(tiny).tensors("target_encoder")
    size = sum(tensor.size for tensor in tensors.values())
    names = write_tensors(tmp_path, "model", tensors, shard=size // 3)
    assert names[-1] == "model.safetensors.index.json" and len(names) >= 4
    again = open_tensors(tmp_path / names[-1])
    assert all(torch.equal(again[name].make(), tensor.make()) for name, tensor in tensors.items())
    listed = json.loads((tmp_path / names[-1]).read_text())
    assert listed["metadata"]["total_size"] == size
    (tmp_path / names[0]).unlink()
    with pytest.raises(Refused, match="does not exist"):
        open_tensors(tmp_path / names[-1])


def test_what_is_written_is_safetensors_and_depends_on_values_alone(tmp_path):
    values = {"b": torch.arange(6.0).view(2, 3), "a": torch.tensor([1.5], dtype=torch.bfloat16)}
    for name in ("one", "two"):
        write_tensors(tmp_path, name, {key: Lazy.of(value) for key, value in values.items()})
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    found = load_file(tmp_path / "one.safetensors")
    assert all(torch.equal(found[key], value) for key, value in values.items())


class Malicious:
    """Runs when it is unpickled, if it may."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    mark = tmp_path / "run"
    torch.save({"encoder": Malicious(mark)}, tmp_path / "bad.pth.tar")
    (tmp_path / "old.pth").write_bytes(pickle.dumps({"encoder": Malicious(mark)}, protocol=2))
    for name in ("bad.pth.tar", "old.pth"):
        with pytest.raises(Refused, match=f"{name}: holds code"):
            import_weights(tmp_path / name, tmp_path / "out")
    assert not mark.exists() and not (tmp_path / "out").exists()


def _cut(folder: Path, tiny: Path) -> Path:
    file = original_file(folder / "cut.pth.tar")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return file


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


def _with_more(folder: Path, tiny: Path) -> Path:
    out = export_weights(tiny, folder / "more", "timm")
    values = load_file(out / "model.safetensors")
    save_file({**values, "blocks.0.ls1.gamma": torch.ones(32)}, out / "model.safetensors", {"format": "pt"})
    return out


def _other_shape(folder: Path, tiny: Path) -> Path:
    out = export_weights(tiny, folder / "shape", "timm")
    values = load_file(out / "model.safetensors")
    save_file({**values, "blocks.1.mlp.fc1.weight": torch.ones(8, 32)}, out / "model.safetensors", {"format": "pt"})
    return out


def _learned(folder: Path, tiny: Path) -> Path:
    out = export_weights(tiny, folder / "learned", "timm")
    values = load_file(out / "model.safetensors")
    save_file({**values, "pos_embed": torch.randn(1, 36, 32)}, out / "model.safetensors", {"format": "pt"})
    return out


def _other_model(folder: Path, tiny: Path) -> Path:
    (folder / "other").mkdir()
    (folder / "other" / "config.json").write_text('{"model_type": "bert"}')
    return folder / "other"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_cut, r"cut.pth.tar: (cannot be read|is no whole file|holds)"),
        (_short, "not a whole safetensors file"),
        (_without, "blocks.1.mlp.fc2.bias is missing"),
        (_with_more, "blocks.0.ls1.gamma is unknown"),
        (_other_shape, "blocks.1.mlp.fc1.weight has shape"),
        (_learned, "is not the sin-cos table"),
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
        with pytest.raises(Refused, match=message) as error:
            act()
        assert "\n" not in str(error.value)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_a_full_disk_leaves_nothing(tiny, tmp_path, monkeypatch):
    def full(file, tensors):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lazy, "_write", full)
    with pytest.raises(Failed, match="No space left"):
        export_weights(tiny, tmp_path / "out", "timm")
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tiny, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(Refused, match="exists already"):
        export_weights(tiny, tmp_path / "there", "timm")
    with pytest.raises(Refused, match="is no folder"):
        import_weights(tiny, tmp_path / "nowhere" / "out")
