import torch

from ijepa.model.config import EncoderConfig, ModelConfig, PredictorConfig
from ijepa.model.ijepa import IJEPA
from ijepa.model.parameter_groups import decayed, parameter_groups, trained

CONFIG = ModelConfig(
    image_size=(48, 48),
    patch_size=8,
    encoder=EncoderConfig(width=16, depth=1, heads=2),
    predictor=PredictorConfig(width=16, depth=1, heads=2),
)


def test_decayed_excludes_biases_norms_and_mask_token():
    names = [n for n, p in IJEPA(CONFIG).named_parameters() if p.requires_grad]
    free = {name for name in names if not decayed(name)}
    assert free == {n for n in names if n.endswith(("bias", "mask_token")) or ".norm" in n or "predictor_norm" in n}
    assert "context_encoder.patch_embed.proj.weight" not in free


def test_parameter_groups_hold_each_trained_parameter_once():
    model = IJEPA(CONFIG)
    groups = list(parameter_groups(model))
    assert [group[:2] for group in groups] == [
        ("encoder", True),
        ("encoder", False),
        ("predictor", True),
        ("predictor", False),
    ]
    held = [id(parameter) for *_, named in groups for _, parameter in named]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_trained_names_each_tensor_of_the_optimizer_as_in_the_model():
    model = IJEPA(CONFIG)
    groups = [{"params": [p for _, p in named]} for *_, named in parameter_groups(model)]
    found = list(trained(model, torch.optim.SGD(groups, lr=0.1)))
    parameters = dict(model.named_parameters())
    assert len(found) == sum(len(group["params"]) for group in groups)
    assert all(parameters[name] is parameter is tensor for name, parameter, tensor in found)
