import json

import pytest

from ijepa.interop.config_json import TimmConfig
from ijepa.interop.exchange import export_weights
from ijepa.interop.timm import read_timm, timm_config
from ijepa.utils.errors import UserError
from tests.helpers.libraries import recipe


def config_of(folder) -> TimmConfig:
    return TimmConfig.read(json.loads((folder / "config.json").read_text()), "config.json")


@pytest.mark.parametrize("name", ["tiny", "odd"])
def test_timm_builds_an_encoder_of_our_shape_from_the_config(name):
    import timm

    model = recipe(name).model
    arguments = timm_config(model)["model_args"]
    theirs = timm.create_model(timm_config(model)["architecture"], pretrained=False, **arguments)
    encoder = model.encoder
    assert len(theirs.blocks) == encoder.depth and theirs.embed_dim == encoder.width
    assert theirs.blocks[0].attn.num_heads == encoder.heads
    assert theirs.blocks[0].mlp.fc1.out_features == round(encoder.width * encoder.mlp_ratio)
    assert theirs.patch_embed.grid_size == model.grid and theirs.cls_token is None


def test_read_timm_gives_the_exported_shape_and_no_classifier(tiny, tmp_path):
    folder = export_weights(tiny, tmp_path / "out", "timm")
    model, tensors, notes = read_timm(folder, config_of(folder))
    wanted = recipe("tiny").model
    assert (model.encoder, model.grid, model.patch_size) == (wanted.encoder, wanted.grid, wanted.patch_size)
    assert not notes and not any(name.startswith(("head.", "fc_norm.")) for name in tensors)


def test_read_timm_refuses_a_class_token_by_the_name_of_the_architecture(tiny, tmp_path):
    folder = export_weights(tiny, tmp_path / "out", "timm")
    config = TimmConfig(architecture="vit_base_patch16_224")
    with pytest.raises(UserError) as err:
        read_timm(folder, config)
    assert err.value.where == str(folder / "config.json") and "class token" in err.value.problem
