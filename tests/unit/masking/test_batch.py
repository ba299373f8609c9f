import torch

from ijepa.masking.batch import Batch, Sequences


def sequences(*lengths: int, limit: int = 0, padded: bool = False) -> Sequences:
    total = sum(lengths)
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    return Sequences(torch.arange(total), ends, lengths, limit, torch.ones(total, dtype=torch.bool) if padded else None)


def test_longest_is_the_limit_or_the_longest_length():
    assert sequences(3, 5, 2).longest == 5
    assert sequences(3, 5, 2, limit=8).longest == 8
    assert sequences().longest == 0


def test_batch_map_reaches_every_tensor_and_keeps_the_rest():
    parts = [sequences(2, 3, limit=4, padded=True), *(sequences(n) for n in (1, 2, 3))]
    batch = Batch(
        torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
        *parts,
        torch.ones(6),
        drop_path_rows=(None, sequences(4)),
        positions=(7,),
        indices=(3,),
        replaced=("a.jpg",),
    )
    seen: list[torch.Tensor] = []

    def double(tensor: torch.Tensor) -> torch.Tensor:
        seen.append(tensor)
        return tensor.clone()

    copy = batch.map(double)
    # pixels and weights, two tensors for each of five sequences, and the mask of padding
    assert len(seen) == 2 + 5 * 2 + 1
    assert copy.context.real is not batch.context.real and torch.equal(copy.context.real, batch.context.real)
    assert (copy.context.lengths, copy.context.limit) == ((2, 3), 4)
    assert copy.drop_path_rows[0] is None and copy.drop_path_rows[1].index is not batch.drop_path_rows[1].index
    assert (copy.positions, copy.indices, copy.replaced) == ((7,), (3,), ("a.jpg",))


def test_batch_to_moves_every_tensor():
    part = sequences(2, 3)
    batch = Batch(torch.zeros(1, 3, 8, 8), part, part, part, part, torch.ones(5), (part,)).to("meta")
    assert batch.pixels.is_meta and batch.loss_weight.is_meta
    assert batch.targets.index.is_meta and batch.drop_path_rows[0].cu_seqlens.is_meta
