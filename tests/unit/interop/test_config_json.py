import pytest

from ijepa.interop.config_json import TimmConfig, TransformersConfig
from ijepa.model.vision_transformer import NORM_EPS
from ijepa.utils.errors import UserError

VALID = {"model_type": "ijepa", "layer_norm_eps": NORM_EPS}


def test_transformers_config_reads_sizes_and_ignores_other_fields():
    found = TransformersConfig.read({**VALID, "image_size": 96, "torch_dtype": "float32"}, "config.json")
    assert (found.image_size, found.num_attention_heads) == ((96, 96), 12)
    assert TransformersConfig.read({**VALID, "image_size": [96, 48]}, "config.json").image_size == (96, 48)


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        ({"model_type": "bert"}, "model_type"),
        ({"layer_norm_eps": 1e-12}, "layer_norm_eps"),
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"image_size": 0}, "image_size"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
    ],
)
def test_transformers_config_refuses_what_would_compute_something_else(changed, key):
    with pytest.raises(UserError) as err:
        TransformersConfig.read({**VALID, **changed}, "config.json")
    assert err.value.where.startswith(f"config.json: {key}")


@pytest.mark.parametrize("name", ["LayerNorm", "layer_norm", "layernorm"])
def test_timm_config_accepts_every_name_of_a_layer(name):
    values = {"architecture": "vit", "model_args": {"norm_layer": name, "act_layer": "GELU"}}
    assert TimmConfig.read(values, "config.json").model_args.norm_layer == "layernorm"


def test_timm_config_refuses_another_norm():
    with pytest.raises(UserError) as err:
        TimmConfig.read({"architecture": "vit", "model_args": {"norm_layer": "rmsnorm"}}, "config.json")
    assert err.value.where.startswith("config.json: model_args.norm_layer")
