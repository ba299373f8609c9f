"""The encoder against an independent implementation: transformers' IJepaModel with the same random weights."""

import pytest
import torch

from ijepa.model.config import EncoderConfig, ModelConfig, PredictorConfig
from ijepa.model.encoder import FrozenEncoder

transformers = pytest.importorskip("transformers")

KEYS = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def theirs_of(ours: FrozenEncoder, shape: ModelConfig):
    config = transformers.IJepaConfig(
        hidden_size=shape.encoder.width,
        num_hidden_layers=shape.encoder.depth,
        num_attention_heads=shape.encoder.heads,
        intermediate_size=4 * shape.encoder.width,
        image_size=shape.image_size[0],
        patch_size=shape.patch_size,
        layer_norm_eps=1e-6,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="eager",
    )
    model = transformers.IJepaModel(config).eval()
    weights, width = ours.vit.state_dict(), shape.encoder.width
    mapped = {
        "embeddings.position_embeddings": ours.vit.pos_embed[None],
        "layernorm.weight": weights["norm.weight"],
        "layernorm.bias": weights["norm.bias"],
    }
    for kind in ("weight", "bias"):
        mapped[f"embeddings.patch_embeddings.projection.{kind}"] = weights[f"patch_embed.proj.{kind}"]
        for layer in range(shape.encoder.depth):
            block, theirs = f"blocks.{layer}", f"encoder.layer.{layer}"
            for mine, other in KEYS.items():
                mapped[f"{theirs}.{other}.{kind}"] = weights[f"{block}.{mine}.{kind}"]
            for name, part in zip(
                ("query", "key", "value"), weights[f"{block}.attn.qkv.{kind}"].split(width), strict=True
            ):
                mapped[f"{theirs}.attention.attention.{name}.{kind}"] = part
    return model, mapped


@pytest.mark.parametrize("size", [64, 96])
def test_frozen_encoder_agrees_with_transformers(tmp_path, size):
    from safetensors.torch import save_file

    shape = ModelConfig(
        image_size=(size, size),
        patch_size=16,
        encoder=EncoderConfig(width=48, depth=3, heads=4, initial="xavier"),
        predictor=PredictorConfig(width=16, depth=1, heads=1),
    )
    ours = FrozenEncoder.initial(shape, seed=0)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in ours.vit.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
    model, mapped = theirs_of(ours, shape)
    model.save_pretrained(tmp_path)
    save_file(
        {key: value.contiguous() for key, value in mapped.items()}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    theirs, report = transformers.IJepaModel.from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True, add_pooling_layer=False
    )
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    pixels = torch.randint(0, 256, (3, 3, size, size), generator=draw, dtype=torch.uint8)
    normalized = (pixels / 255 - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor(
        [0.229, 0.224, 0.225]
    )[:, None, None]
    with torch.no_grad():
        wanted = theirs.eval()(normalized).last_hidden_state
    torch.testing.assert_close(ours(pixels), wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours(normalized), wanted, rtol=0, atol=1e-5)
