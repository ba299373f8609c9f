import pytest
import torch

from ijepa.interop.dense import DenseEncoder
from ijepa.interop.weights import load_encoder
from tests.helpers.libraries import pixels


@pytest.mark.parametrize("count", [1, 3])
def test_dense_encoder_gives_the_features_of_the_packed_encoder(ours, count):
    encoder = load_encoder(ours)
    raw, normalized = pixels(encoder, count)
    dense = DenseEncoder(encoder.vit)
    with torch.no_grad():
        torch.testing.assert_close(dense(normalized), encoder(raw), rtol=1e-5, atol=2e-5)
    assert not any(parameter.requires_grad for parameter in dense.parameters())
