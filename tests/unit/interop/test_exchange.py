"""Weights out and in again, through the libraries that others use, and what is refused on the way."""

import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from ijepa.cli import cli
from ijepa.interop import exchange
from ijepa.interop import onnx as graphs
from ijepa.interop import tensors as lazy
from ijepa.interop.exchange import export_weights, import_weights
from ijepa.interop.heads import Head
from ijepa.interop.tensors import Lazy, open_tensors, write_tensors
from ijepa.interop.weights import load_encoder, resolve_weights
from ijepa.utils.errors import RunError, UserError
from tests.helpers.libraries import PARTS, eager, pixels, recipe, theirs_of


@pytest.mark.parametrize("which", ["target", "context"])
@pytest.mark.parametrize("form", ["transformers", "timm"])
def test_other_libraries_compute_what_we_do(ours, tmp_path, form, which):
    out = export_weights(ours, tmp_path / "out", form, which=which)
    encoder = load_encoder(ours, which)
    raw, normalised = pixels(encoder)
    wanted = encoder(raw)
    found = theirs_of(out, form, normalised)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=2e-5)
    # The weights are theirs bit by bit: packed attention adds in another order, and nothing else differs.
    file = export_weights(ours, tmp_path / "file.safetensors", "safetensors", which=which)
    assert torch.equal(found, eager(load_file(file), recipe(ours.name).model.encoder.heads, normalised, form))
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


def test_plain_safetensors_out_and_in(tiny, tmp_path):
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
    with pytest.raises(UserError, match="has no place in official"):
        export_weights(tiny, tmp_path / "x.pth.tar", "official", head=tmp_path / "head.safetensors")
    Head(torch.zeros(3, 8), torch.zeros(3), ("a", "b", "c")).write(tmp_path / "wrong.safetensors")
    with pytest.raises(UserError, match="reads 8 channels, the encoder has 32"):
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
    with pytest.raises(UserError, match=r"vit.onnx.data: exists already"):
        export_weights(tiny, file, "onnx")
    assert {path.name for path in file.parent.iterdir()} == {"vit.onnx.data"}


def test_transformers_reads_shards(tiny, tmp_path, monkeypatch):
    import transformers

    whole = export_weights(tiny, tmp_path / "whole", "transformers")
    monkeypatch.setattr(exchange, "SHARD", 20_000)
    out = export_weights(tiny, tmp_path / "out", "transformers")
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 2 and not (out / "model.safetensors").exists()
    first, second = (
        transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False).state_dict() for folder in (whole, out)
    )
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    raw, _ = pixels(load_encoder(tiny))
    assert torch.equal(load_encoder(out)(raw), load_encoder(tiny)(raw))
    for form in ("timm", "safetensors"):  # one file, which is what others read
        assert len(list(export_weights(tiny, tmp_path / form, form).glob("*.safetensors"))) == 1


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_weights_of_half_the_bytes_are_read_and_written_as_float32(tiny, tmp_path, kind):
    out = export_weights(tiny, tmp_path / "hf", "transformers")
    half = {name: value.to(kind) for name, value in load_file(out / "model.safetensors").items()}
    save_file(half, out / "model.safetensors", {"format": "pt"})
    found = resolve_weights(out)
    assert found.recipe.model.encoder == recipe("tiny").model.encoder
    again = load_file(export_weights(out, tmp_path / "again", "transformers") / "model.safetensors")
    assert {value.dtype for value in again.values()} == {torch.float32}
    name = "encoder.layer.0.output.dense.weight"
    assert torch.equal(again[name], half[name].float())


def test_the_context_encoder_says_so_wherever_it_is_written(tiny, tmp_path):
    raw, _ = pixels(load_encoder(tiny))
    wanted = load_encoder(tiny, "context")(raw)
    places = {"a": "safetensors", "b.safetensors": "safetensors", "c": "transformers", "d": "timm"}
    for place, form in places.items():
        out = export_weights(tiny, tmp_path / place, form, which="context")
        assert resolve_weights(out, heads=4).parts == ["context_encoder"]
        assert torch.equal(load_encoder(out, "context", heads=4)(raw), wanted)
        with pytest.raises(UserError, match="holds no target encoder; it holds context encoder; add --which context"):
            load_encoder(out, heads=4)


def test_the_command_takes_the_encoder_by_either_flag_and_heads(tiny, tmp_path):
    file = export_weights(tiny, tmp_path / "one.safetensors", "safetensors", which="context")
    for flag in ("--which", "--weights"):
        words = ["export", str(file), str(tmp_path / flag), "--format", "timm", flag, "context", "--heads", "4"]
        CliRunner().invoke(cli, words, catch_exceptions=False, standalone_mode=False)
        assert json.loads((tmp_path / flag / "config.json").read_text())["ijepa"]["encoder"] == "context"


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
    with pytest.raises(UserError, match="does not exist"):
        open_tensors(tmp_path / names[-1])


def test_what_is_written_is_safetensors_and_depends_on_values_alone(tmp_path):
    values = {"b": torch.arange(6.0).view(2, 3), "a": torch.tensor([1.5], dtype=torch.bfloat16)}
    for name in ("one", "two"):
        write_tensors(tmp_path, name, {key: Lazy.of(value) for key, value in values.items()})
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    found = load_file(tmp_path / "one.safetensors")
    assert all(torch.equal(found[key], value) for key, value in values.items())


def test_a_full_disk_leaves_nothing(tiny, tmp_path, monkeypatch):
    def full(file, tensors, about):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lazy, "_write", full)
    with pytest.raises(RunError, match="No space left"):
        export_weights(tiny, tmp_path / "out", "timm")
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tiny, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="exists already"):
        export_weights(tiny, tmp_path / "there", "timm")
    with pytest.raises(UserError, match="is no folder"):
        import_weights(tiny, tmp_path / "nowhere" / "out")
