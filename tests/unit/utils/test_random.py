import numpy as np
import pytest

from ijepa.utils.random import Stream, name_position, philox, randint, random_bits, uniform
from tests.reference.philox import philox_slow


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, 0xFFFFFFFFFFFFFFFF, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0x299F31D0A4093822, "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_known_answers(counter, key, expected):
    """The three vectors that the authors of Philox publish."""
    found = philox(np.array([counter], dtype=np.uint32), key)[0]
    assert " ".join(f"{word:08x}" for word in found) == expected


def test_philox_agrees_with_the_slow_reference():
    counters = np.random.default_rng(0).integers(0, 2**32, (50, 4), dtype=np.uint32)
    for seed in (0, 1, 2**63 - 1):
        for counter, found in zip(counters, philox(counters, seed), strict=True):
            assert philox_slow(counter.tolist(), seed) == found.tolist()


def test_random_bits_of_a_position_do_not_depend_on_the_others():
    many = random_bits(3, Stream.CROP, np.arange(100), 10)
    assert np.array_equal(random_bits(3, Stream.CROP, [57], 10)[0], many[57])
    assert np.array_equal(random_bits(3, Stream.CROP, [57, 3], 7), many[[57, 3], :7])
    assert np.array_equal(random_bits(3, Stream.CROP, [57], 2, skip=8)[0], many[57, 8:])


def test_random_bits_depend_on_seed_stream_and_position():
    one = random_bits(0, Stream.MASK, [5], 8)
    for other in (
        random_bits(1, Stream.MASK, [5], 8),
        random_bits(0, Stream.CROP, [5], 8),
        random_bits(0, Stream.MASK, [6], 8),
    ):
        assert not (one == other).any()
    assert not (random_bits(0, Stream.MASK, [2**32 + 5], 8) == one).any()  # the high half of the position
    assert not (random_bits(2**32, Stream.MASK, [5], 8) == one).any()  # and of the seed


def test_random_bits_do_not_change():
    """A change here changes the run of every recipe: raise VERSION."""
    assert random_bits(42, Stream.ORDER, [0, 1], 3).tolist() == RECORDED


RECORDED = [[541301508, 2550652962, 1410988607], [1168770333, 1185912656, 2719628040]]


def test_randint_is_uniform_and_in_range():
    draw = random_bits(0, Stream.CROP, np.arange(7000), 1)[:, 0]
    found = randint(draw, 7)
    assert found.min() == 0 and found.max() == 6
    assert np.bincount(found, minlength=7) == pytest.approx(1000, abs=5 * 31)
    assert randint(np.array([0, 2**32 - 1], dtype=np.uint32), [10, 10]).tolist() == [0, 9]


def test_uniform_is_in_the_half_open_interval():
    edge = uniform(np.array([0, 2**32 - 1], dtype=np.uint32))
    assert edge[0] == 0 and edge[1] < 1
    draw = uniform(random_bits(1, Stream.DROP_PATH, np.arange(20000), 2))
    assert draw.mean() == pytest.approx(0.5, abs=0.01) and draw.var() == pytest.approx(1 / 12, abs=0.002)
    assert abs(np.corrcoef(draw.T)[0, 1]) < 0.02


def test_name_position_differs_between_names():
    names = [f"encoder.blocks.{i}.attn.qkv.weight" for i in range(1000)]
    places = {name_position(name) for name in names}
    assert len(places) == 1000 and all(0 <= p < 2**62 for p in places)
