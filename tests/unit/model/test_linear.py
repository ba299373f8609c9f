import pytest
import torch

from ijepa.model.linear import Linear, pad_to_multiple


def test_compiled_layer_equals_the_plain_layer():
    """Inductor does not know the operation of a CPU's layer in bfloat16, so a compiled layer must not contain it."""
    graphs = []

    def keep(graph, inputs):
        graphs.append(str(graph.graph))
        return graph

    torch._dynamo.reset()
    layer, x = Linear(32, 48), torch.randn(7, 32)
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = torch.compile(layer, backend=keep)(x), layer(x)
    assert len(graphs) == 1 and "linear" in graphs[0] and "mkldnn" not in graphs[0] and "autograd" not in graphs[0]
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("rows", "padded"), [(0, 0), (1, 1), (63, 63), (129, 132), (1000, 1008), (100_000, 100_032)])
def test_pad_to_multiple_appends_copies_of_the_first_row(rows, padded):
    x = torch.arange(2 * rows).view(rows, 2)
    found = pad_to_multiple(x)
    assert len(found) == padded and torch.equal(found[:rows], x)
    assert torch.equal(found[rows:], x[:1].expand(padded - rows, 2))


@pytest.mark.parametrize("autocast", [False, True])
def test_linear_and_its_gradients_agree_with_torch(autocast):
    layer, x = Linear(32, 48), torch.randn(7, 32, requires_grad=True)
    operands = (x, layer.weight, layer.bias)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, wanted = layer(x), torch.nn.functional.linear(*operands)
    assert found.dtype == wanted.dtype
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if autocast else {}
    torch.testing.assert_close(found, wanted, **tolerance)
    gradients = zip(
        torch.autograd.grad(found.float().sum(), operands),
        torch.autograd.grad(wanted.float().sum(), operands),
        strict=True,
    )
    for ours, theirs in gradients:
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, **tolerance)
