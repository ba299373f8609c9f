"""Attention over packed sequences."""

import pytest
import torch

from ijepa.model.attention import attention
from ijepa.model.ijepa import whole_images
from tests.helpers.sequences import sequences
from tests.reference.dense import attend


@pytest.mark.parametrize("kernel", ["auto", "math"])
@pytest.mark.parametrize(
    ("lengths", "empty", "limit", "beyond"),
    # The last case has as many rows as two sequences of the longest one's length.
    [((5, 9, 1), 0, 0, 3), ((7, 7), 0, 7, 0), ((5, 12), 3, 16, 0), ((61, 62), 0, 0, 1)],
)
def test_attention_kernels_equal_the_definition(kernel, lengths, empty, limit, beyond):
    where = sequences(lengths, empty, limit)
    total = sum(lengths) + beyond
    qkv = torch.randn(total, 3, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    out = attention(qkv, where, where, backend=kernel)
    start, parts = 0, []
    for length in lengths:
        parts.append(attend(qkv[start : start + length].flatten(1), 2))
        start += length
    wanted = torch.cat([*parts, torch.zeros(beyond, 16, dtype=torch.float64)])
    torch.testing.assert_close(out.flatten(1), wanted, rtol=1e-12, atol=1e-12)
    weight = torch.randn(wanted.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (found,) = torch.autograd.grad((out.flatten(1) * weight).sum(), qkv, retain_graph=True)
    (expected,) = torch.autograd.grad((wanted * weight).sum(), qkv)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_attention_does_not_pad_whole_images(monkeypatch):
    monkeypatch.setattr(torch, "searchsorted", lambda *given, **options: pytest.fail("padded"))
    where = whole_images(torch.empty(21, 5), 3)
    qkv = torch.randn(21, 3, 2, 8, generator=torch.Generator().manual_seed(0))
    out, plain = (attention(qkv, where, where, backend=kernel) for kernel in ("math", "auto"))
    torch.testing.assert_close(out, plain)


def test_flash_attention_is_refused_on_a_cpu():
    where = sequences((4,))
    with pytest.raises(ValueError, match="16 bits"):
        attention(torch.zeros(4, 3, 1, 8), where, where, backend="flash")
