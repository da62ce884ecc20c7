"""The order of samples: fixed for ever, a permutation of every epoch, mixed, and read nearly in sequence."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megassm.data.order import MixtureOrder, OrderPhase, SampleOrder, block_order, epoch_samples, hash_order, splitmix64

U64 = np.uint64


def test_splitmix64_is_the_published_one() -> None:
    # The first outputs of the reference implementation seeded with 1234567.
    golden_gamma = 0x9E3779B97F4A7C15
    states = np.array([(1234567 + n * golden_gamma) % 2**64 for n in range(3)], dtype=U64)
    assert splitmix64(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_golden_order() -> None:
    """A run resumes on these numbers: this hash must never change."""
    order = SampleOrder(samples=10_007, seed=1234, lanes=48, window=64)
    places = [order.locate(sample) for sample in range(0, 30_021, 3)]
    blocks = [block_order(1001, seed, epoch).tolist() for seed, epoch in ((0, 0), (1234, 7), (-1, 3))]
    digest = hashlib.sha256(repr((places, blocks)).encode()).hexdigest()
    assert digest == "28cce2efffdb941156db054b30899bc3b7a114f58b8844668530429eebf71e9f"


def test_golden_order_of_a_mixture() -> None:
    """As the one above."""
    orders = [SampleOrder(samples, seed=1234, lanes=48, window=64) for samples in (10_007, 503, 2_000)]
    phases = [OrderPhase(0, (0.7, 0.2, 0.1)), OrderPhase(7_777, (1.0, 0.0, 3.0)), OrderPhase(20_000, (1.0, 1.0, 1.0))]
    mixture = MixtureOrder(orders, phases)
    places = [tuple(mixture.locate(sample)) for sample in range(0, 30_021, 3)]
    digest = hashlib.sha256(repr(places).encode()).hexdigest()
    assert digest == "ec516e1cbfd1f36728514cca818cc2e382636bed8ad0e35ce5cf956099a9a12e"


@settings(deadline=None, max_examples=80)
@given(
    samples=st.integers(1, 400),
    seed=st.integers(-(2**40), 2**70),
    lanes=st.integers(1, 60),
    window=st.integers(1, 70),
    epoch=st.integers(0, 3),
)
def test_every_epoch_is_a_permutation(samples: int, seed: int, lanes: int, window: int, epoch: int) -> None:
    order = SampleOrder(samples, seed, lanes, window)
    located = [order.locate(epoch * samples + g) for g in range(samples)]
    assert {found for found, _ in located} == {epoch}
    assert sorted(index for _, index in located) == list(range(samples))


def test_a_lane_is_read_in_windows() -> None:
    """What bounds memory: within `window` turns a lane stays within `window` samples."""
    order = SampleOrder(samples=9600, seed=5, lanes=48, window=64)
    for lane in (0, 17, 47):
        indices = [order.locate(lane + 48 * place)[1] - 200 * lane for place in range(200)]
        for start in range(0, 200, 64):
            window = indices[start : start + 64]
            assert sorted(window) == list(range(start, min(start + 64, 200)))
            assert window != sorted(window)


def test_neighbours_in_a_batch_come_from_far_apart() -> None:
    order = SampleOrder(samples=9600, seed=5, lanes=48, window=64)
    indices = np.array([order.locate(sample)[1] for sample in range(48)])
    assert np.diff(np.sort(indices)).min() > 100


def test_epochs_and_seeds_differ() -> None:
    orders = [block_order(100, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert hash_order(0, 1).tolist() == []


@pytest.mark.parametrize(
    ("tokens", "seq_len", "samples"), [(2, 1, 1), (2, 9, 1), (10, 9, 1), (11, 9, 2), (101, 10, 10)]
)
def test_samples_an_epoch(tokens: int, seq_len: int, samples: int) -> None:
    assert epoch_samples(tokens, seq_len) == samples
