import pytest
import torch

from ijepa.model.padded_attention import padded_attention
from tests.helpers.sequences import sequences
from tests.reference.dense import attend


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("empty", "limit"), [(0, 0), (2, 0), (2, 16)])
def test_padded_attention_of_chosen_rows_equals_the_definition(empty, limit):
    """Two of five, one of nine, and all of one token; the last rows of `qkv` and of `rows` belong to no sequence."""
    lengths, chosen = (5, 9, 1), ([1, 4], [0], [0])
    qkv = random(17, 3, 2, 8)
    starts = (0, 5, 14)
    rows = torch.tensor([start + row for start, part in zip(starts, chosen, strict=True) for row in part] + [16])
    queries = sequences([len(part) for part in chosen], empty, limit)
    found = padded_attention(qkv, queries, sequences(lengths, empty, limit), rows, "math")
    wanted = [
        attend(qkv[start : start + length].flatten(1), 2)[part]
        for start, length, part in zip(starts, lengths, chosen, strict=True)
    ]
    torch.testing.assert_close(found.flatten(1), torch.cat([*wanted, torch.zeros(1, 16, dtype=torch.float64)]))


def test_padded_attention_has_no_gradient_from_other_sequences():
    where, qkv = sequences((3, 4)), random(7, 3, 2, 8).requires_grad_()
    out = padded_attention(qkv, where, where, None, "math")
    (gradient,) = torch.autograd.grad(out[:3].square().sum(), qkv)
    assert gradient[:3].any() and not gradient[3:].any()
