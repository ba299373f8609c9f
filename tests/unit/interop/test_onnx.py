"""ONNX graphs and programs, run by other runtimes."""

import onnx
import onnxruntime
import pytest
import torch

from ijepa.interop import onnx as interop_onnx
from ijepa.interop.exchange import export_weights
from ijepa.interop.weights import load_encoder
from ijepa.utils.errors import UserError
from tests.helpers.libraries import pixels


def test_graphs_give_our_features_for_any_number_of_images(tiny, tmp_path):
    encoder = load_encoder(tiny)
    about = {"encoder": "", "source": ""}
    program = torch.export.load(export_weights(tiny, tmp_path / "vit.pt2", "program"), extra_files=about).module()
    assert about == {"encoder": "target", "source": "tiny"}
    file = export_weights(tiny, tmp_path / "vit.onnx", "onnx")
    assert [(each.domain, each.version) for each in onnx.load(file).opset_import] == [("", interop_onnx.OPSET)]
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map["encoder"] == "target"
    for count in (1, 3):
        raw, normalized = pixels(encoder, count)
        wanted = encoder(raw)
        torch.testing.assert_close(program(normalized), wanted, rtol=1e-5, atol=2e-5)
        (found,) = session.run(["last_hidden_state"], {"pixel_values": normalized.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-4, atol=1e-4)


def test_weights_of_a_large_graph_are_in_a_second_file(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(interop_onnx, "LARGE", 1000)
    (tmp_path / "out").mkdir()
    file = export_weights(tiny, tmp_path / "out" / "vit.onnx", "onnx")
    assert {path.name for path in file.parent.iterdir()} == {"vit.onnx", "vit.onnx.data"}
    assert file.stat().st_size < (file.parent / "vit.onnx.data").stat().st_size
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    raw, normalized = pixels(load_encoder(tiny))
    (found,) = session.run(None, {"pixel_values": normalized.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), load_encoder(tiny)(raw), rtol=1e-4, atol=1e-4)
    file.unlink()
    with pytest.raises(UserError) as err:
        export_weights(tiny, file, "onnx")
    assert err.value.where == f"{file}.data"
    assert {path.name for path in file.parent.iterdir()} == {"vit.onnx.data"}
