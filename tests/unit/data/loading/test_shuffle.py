import hashlib
import math
import subprocess
import sys
from itertools import combinations, permutations

import numpy as np
import pytest
from benchmarks.order import write_index

from ijepa.data.loading.shuffle import Order, sample_indices
from ijepa.utils.random import philox
from tests.reference.order import blocks_index, sample_index


def test_sample_indices_known_answers():
    assert sample_indices(0, np.arange(10), 10).tolist() == [9, 1, 0, 2, 8, 7, 6, 5, 3, 4]
    assert sample_indices(2**63 + 5, [0, 1, 14_146_390, 14_146_391, 6 * 10**9], 14_146_391).tolist() == [
        13487438,
        9657398,
        5560375,
        1368621,
        7992977,
    ]


def test_sample_indices_agrees_with_reference():
    for n in (1, 2, 3, 5, 9, 10, 16, 17, 1000, 12345, 14_146_391, 2**33 + 7):
        positions = [0, 1, n - 1, n, 3 * n + n // 2, 10**7 * n + n // 3]
        assert sample_indices(n, positions, n).tolist() == [sample_index(n, p, n) for p in positions]


def test_sample_indices_uses_the_high_half_of_the_epoch():
    n = 1000
    low, high = np.arange(n), np.arange(n) + n * 2**32
    assert sample_indices(0, high[:5], n).tolist() == [sample_index(0, int(p), n) for p in high[:5]]
    assert (sample_indices(0, low, n) != sample_indices(0, high, n)).mean() > 0.9


@pytest.mark.parametrize("n", [*range(1, 201), 1000, 12345])
def test_sample_indices_contains_each_sample_once_per_epoch(n):
    epoch = 7 * n
    assert np.array_equal(np.sort(sample_indices(3, np.arange(epoch, epoch + n), n)), np.arange(n))


def test_sample_indices_does_not_depend_on_the_other_positions():
    whole = sample_indices(1, np.arange(900, 1400), 333)
    pieces = [sample_indices(1, np.arange(start, start + 50), 333) for start in range(900, 1400, 50)]
    assert np.array_equal(whole, np.concatenate(pieces))
    backwards = sample_indices(1, np.arange(900, 1400)[::-1], 333)
    assert np.array_equal(whole, backwards[::-1])


def test_sample_indices_differs_between_epochs_and_seeds():
    n = 1000
    orders = [sample_indices(s, np.arange(n) + e * n, n) for s in (0, 1, 2**32) for e in (0, 1, 2)]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert (one == other).sum() < 12  # fixed points of a random permutation: 1 +- 1


EARLIER = {
    "global": "7e74471d5638cf23c12d5e81a625163d8873063c4386fc50e2f0e8b3a2449e93",
    "blocks": "7620ecbe0951975f28f32a8e5e5f12face957b22245f0516abe4367bfdceab3c",
}


def _chi_square(counts: np.ndarray) -> tuple[float, float]:
    """The statistic, and the value it stays below in all but one of some 10^5 honest trials."""
    expected = counts.sum() / counts.size
    freedom = counts.size - 1
    return float(((counts - expected) ** 2 / expected).sum()), freedom + 4.5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("n", [2, 3, 5, 7, 10, 23])
def test_sample_indices_places_are_uniform(n):
    epochs = 6000
    order = sample_indices(11, np.arange(epochs * n), n).reshape(epochs, n)
    counts = np.stack([np.bincount(order[:, place], minlength=n) for place in range(n)])
    statistic, bound = _chi_square(counts)
    assert statistic < bound


@pytest.mark.parametrize("kind", ["global", "blocks"])
@pytest.mark.parametrize("n", [3, 4, 5, 6])
def test_orders_of_few_samples_are_uniform(n, kind):
    epochs = 20000
    order = Order(5, n, kind).indices(np.arange(epochs * n)).reshape(epochs, n)
    number = {p: i for i, p in enumerate(permutations(range(n)))}
    statistic, bound = _chi_square(np.bincount([number[tuple(o)] for o in order.tolist()], minlength=len(number)))
    assert statistic < bound


@pytest.mark.parametrize("n", [7, 8, 9])
def test_orders_of_up_to_nine_samples_are_even_half_of_the_time(n):
    epochs = 20000
    order = sample_indices(5, np.arange(epochs * n), n).reshape(epochs, n)
    inversions = sum(order[:, i] > order[:, j] for i, j in combinations(range(n), 2))
    assert abs((inversions % 2).mean() - 0.5) < 4.5 * 0.5 / math.sqrt(epochs)


@pytest.mark.parametrize("kind", ["global", "blocks"])
def test_order_above_nine_samples_is_unchanged_since_earlier_versions(kind):
    """A run that is resumed must see the same images."""
    found = [
        Order(7, n, kind, 8, 3).indices(np.arange(0, 10**6, 3331)).astype("<i8").tobytes() for n in (10, 11, 23, 1000)
    ]
    assert hashlib.sha256(b"".join(found)).hexdigest() == EARLIER[kind]


@pytest.mark.parametrize(("first", "second"), [(0, 1), (0, 11), (4, 8)])
def test_sample_indices_pairs_of_places_are_independent(first, second):
    n, epochs = 12, 20000
    places = np.arange(epochs)[:, None] * n + [first, second]
    pairs = sample_indices(2, places.ravel(), n).reshape(epochs, 2)
    counts = np.bincount(pairs[:, 0] * n + pairs[:, 1], minlength=n * n).reshape(n, n)
    assert (np.diag(counts) == 0).all()
    statistic, bound = _chi_square(counts[~np.eye(n, dtype=bool)])
    assert statistic < bound


def test_sample_indices_of_a_batch_are_spread_evenly():
    n, batch = 14_146_391, 4096
    thirds = np.concatenate([sample_indices(0, np.arange(batch) + s, n) * 16 // n for s in (0, 10**6, 13 * 10**6)])
    statistic, bound = _chi_square(np.bincount(thirds, minlength=16))
    assert statistic < bound
    steps = np.diff(sample_indices(0, np.arange(batch), n))
    assert abs(np.corrcoef(steps[:-1], steps[1:])[0, 1] + 0.5) < 0.05  # -1/2 for independent places


def test_sample_indices_refuses_invalid_arguments():
    with pytest.raises(ValueError, match="at least one"):
        sample_indices(0, [0], 0)
    with pytest.raises(ValueError, match="start at 0"):
        sample_indices(0, [-1], 5)
    assert sample_indices(0, [], 5).shape == (0,)


BLOCKS = [(1, 4, 2), (7, 8, 2), (100, 8, 3), (1000, 10, 7), (1003, 10, 7), (12345, 256, 64), (50_000, 256, 64)]


@pytest.mark.parametrize(("n", "block", "window"), BLOCKS)
def test_blocks_agrees_with_reference(n, block, window):
    order = Order(5, n, "blocks", block, window)
    for epoch in (0, 3):
        found = order.indices(np.arange(epoch * n, (epoch + 1) * n))
        assert np.array_equal(np.sort(found), np.arange(n))
    positions = [0, 1, n // 2, n - 1, n, 5 * n + n // 3, 10**7 * n + n // 7, n * 2**33 + 1]
    assert order.indices(positions).tolist() == [blocks_index(5, p, n, block, window) for p in positions]


def test_blocks_window_is_mixed_and_in_few_places():
    n, block, window = 100_000, 100, 20
    order = Order(0, n, "blocks", block, window)
    found = order.indices(np.arange(3 * block * window, 4 * block * window))
    runs = np.flatnonzero(np.diff(np.sort(found)) > 1)
    assert len(runs) <= window + 1  # only the window's blocks; one may be divided by the end of the set
    # Mixed: neighbors in the sequence are in one block only as often as by chance.
    same = (np.abs(np.diff(found)) < block).mean()
    assert same < 3 * block / len(found)
    later = order.indices(np.arange(n + 3 * block * window, n + 4 * block * window))
    assert len(np.intersect1d(found, later)) < len(found) / 4


def test_blocks_balances_classes_within_windows():
    """The worst case is a set sorted by class: a batch has the classes of the blocks of its window."""
    n, classes = 60_000, 60
    labels = np.arange(n) * classes // n
    batch = Order(1, n, "blocks", 100, 60).indices(np.arange(256))
    assert len(np.unique(labels[batch])) > 25
    everywhere = Order(1, n).indices(np.arange(256))
    assert len(np.unique(labels[everywhere])) > 50


def _orders(n: int, seed: int) -> dict[str, Order]:
    return {"global": Order(seed, n), "blocks": Order(seed, n, "blocks", block=50, window=20)}


@pytest.mark.parametrize("kind", ["global", "blocks"])
def test_class_balance_of_batches_equals_a_true_shuffle(kind):
    """Chi-square of the classes in each batch, for a shuffled set, as `ijepa data pack` writes it."""
    n, classes, batch, epochs = 20_000, 100, 1000, 40
    rng = np.random.default_rng(0)
    labels = rng.permutation(n) % classes
    order = _orders(n, 7)[kind]
    ours = labels[order.indices(np.arange(epochs * n))].reshape(-1, batch)
    true = np.stack([labels[rng.permutation(n)] for _ in range(epochs)]).reshape(-1, batch)

    def statistics(drawn: np.ndarray) -> np.ndarray:
        counts = np.stack([np.bincount(row, minlength=classes) for row in drawn])
        return ((counts - batch / classes) ** 2 / (batch / classes)).sum(1)

    found, wanted = statistics(ours), statistics(true)
    error = math.hypot(found.std(), wanted.std()) / math.sqrt(len(found))
    assert abs(found.mean() - wanted.mean()) < 4.5 * error
    assert 0.85 < found.std() / wanted.std() < 1.18  # each known to 2.5 %


@pytest.mark.parametrize("window", [2, 6])  # several windows an epoch, and one
def test_blocks_places_are_uniform(window):
    n, epochs = 26, 6000  # two samples do not fill a block
    order = Order(11, n, "blocks", block=4, window=window).indices(np.arange(epochs * n)).reshape(epochs, n)
    for place in (0, 7, 13, 25):
        statistic, bound = _chi_square(np.bincount(order[:, place], minlength=n))
        assert statistic < bound, place


@pytest.mark.parametrize(("first", "second"), [(0, 1), (0, 11), (4, 8)])
def test_blocks_pairs_within_a_window_are_independent(first, second):
    n, epochs = 12, 20000
    order = Order(2, n, "blocks", block=3, window=4)
    pairs = order.indices((np.arange(epochs)[:, None] * n + [first, second]).ravel()).reshape(epochs, 2)
    counts = np.bincount(pairs[:, 0] * n + pairs[:, 1], minlength=n * n).reshape(n, n)
    assert (np.diag(counts) == 0).all()
    statistic, bound = _chi_square(counts[~np.eye(n, dtype=bool)])
    assert statistic < bound


WHOLE = 14_146_391
_LOOKUPS = """
import sys
from pathlib import Path
import numpy as np
from ijepa.data.sources.index import load
from ijepa.data.loading.shuffle import Order
from ijepa.data.sources.base import TarSource

source = TarSource(load(Path(sys.argv[1])))
for kind in ("global", "blocks"):
    order = Order(0, len(source), kind)
    for step in (0, 6907, 6908, 1_000_000, 3_177_000):
        assert (source.labels[order.indices(np.arange(step * 2048, step * 2048 + 2048))] >= 0).all()
(peak,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]  # rusage would include the parent
print(1024 * int(peak.split()[1]))
"""


def test_order_of_14_million_samples_fits_into_500_megabytes(tmp_path):
    write_index(tmp_path, WHOLE)
    done = subprocess.run([sys.executable, "-c", _LOOKUPS, str(tmp_path)], capture_output=True, text=True, check=True)
    assert 50e6 < int(done.stdout) < 500e6


@pytest.mark.parametrize(("kind", "most"), [("global", 9), ("blocks", 19)])
def test_order_of_14_million_samples_computes_only_the_requested_ones(kind, most, monkeypatch):
    """Eight rounds of Philox per sample, again for the few that cycle walk, and twice with an offset for `blocks`."""
    drawn: list[int] = []

    def counted(counter, seed):
        drawn.append(len(counter))
        return philox(counter, seed)

    monkeypatch.setattr("ijepa.data.loading.shuffle.philox", counted)
    for step in (0, 6907, 6908, 3_177_000):
        drawn.clear()
        Order(0, WHOLE, kind).indices(np.arange(step * 2048, step * 2048 + 2048))
        assert 8 * 2048 <= sum(drawn) <= most * 2048
        assert len(drawn) < 100  # in arrays


def test_order_of_14_million_samples_stores_no_array():
    order = Order(0, 14_146_391, "blocks")
    assert sys.getsizeof(order) + sum(map(sys.getsizeof, vars(order).values())) < 2000
    whole = order.indices(np.arange(6 * 10**9, 6 * 10**9 + 2048))
    parts = [order.indices(np.arange(6 * 10**9 + s, 6 * 10**9 + s + 256)) for s in range(0, 2048, 256)]
    assert np.array_equal(whole, np.concatenate(parts)) and len(np.unique(whole)) == 2048
