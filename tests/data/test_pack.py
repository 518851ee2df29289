"""Packers: nothing lost, nothing over budget, nobody starves, and the samples held back are the whole state."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tutti.data.pack import BestFit, Fixed, budget_at

LENGTHS = st.lists(st.integers(1, 40), max_size=120)


def source(lengths):
    stream = iter([(length, number) for number, length in enumerate(lengths)])
    return lambda: next(stream, None)


def packed(packer, draw, budget):
    while batch := packer.take(draw, budget):
        yield batch


@given(LENGTHS, st.integers(1, 30), st.integers(5, 100))
@settings(max_examples=60, deadline=None)
def test_best_fit_packs_every_sample_once_within_the_budget(lengths, capacity, budget):
    batches = list(packed(BestFit(capacity), source(lengths), budget))
    assert sorted(number for batch in batches for _, number in batch) == list(range(len(lengths)))
    for batch in batches:
        total = sum(length for length, _ in batch)
        assert total <= budget or len(batch) == 1


@given(LENGTHS, st.integers(1, 30), st.integers(5, 100))
@settings(max_examples=60, deadline=None)
def test_no_sample_waits_longer_than_the_buffer_is_long(lengths, capacity, budget):
    packer, draw, waited = BestFit(capacity), source(lengths), {}
    while batch := packer.take(draw, budget):
        held = [number for _, number in packer.held()]
        assert len(held) <= capacity
        assert held == sorted(held), "samples held back are listed oldest first"
        waited = {number: waited.get(number, 0) + 1 for number in held}
        assert max(waited.values(), default=0) <= capacity
        assert batch[0][1] < min(held, default=len(lengths)), "the oldest goes first"


@given(LENGTHS, st.integers(1, 20), st.integers(0, 30))
@settings(max_examples=60, deadline=None)
def test_best_fit_goes_on_from_the_samples_it_held(lengths, capacity, stop):
    draw = source(lengths)
    packer = BestFit(capacity)
    list(itertools.islice(packed(packer, draw, 50), stop))
    other = BestFit(capacity)
    other.hold(packer.held())
    rest = list(iter(draw, None))
    assert list(packed(packer, source_of(rest), 50)) == list(packed(other, source_of(rest), 50))


def source_of(drawn):
    stream = iter(drawn)
    return lambda: next(stream, None)


def test_best_fit_takes_the_oldest_then_the_largest_that_fits():
    packer = BestFit(10)
    assert packer.take(source([5, 9, 3, 9, 2, 6]), 16) == [(5, 0), (9, 1), (2, 4)]
    assert packer.held() == [(3, 2), (9, 3), (6, 5)]


def test_best_fit_fills_ragged_batches():
    lengths = np.clip(np.random.default_rng(0).lognormal(4.5, 0.8, 20_000), 8, 1024).astype(int).tolist()
    batches = list(packed(BestFit(200), source(lengths), 2048))
    assert sum(lengths) / (2048 * len(batches)) > 0.99
    in_order = sum(lengths) / (2048 * len(list(packed(BestFit(1), source(lengths), 2048))))
    assert in_order < 0.97, "the buffer is what fills them"


def test_best_fit_empties_a_buffer_larger_than_its_capacity():
    packer = BestFit(2)
    packer.hold([(4, number) for number in range(6)])
    assert [number for batch in packed(packer, source([4, 4]), 8) for _, number in batch] == [0, 1, 2, 3, 4, 5, 0, 1]


def test_fixed_keeps_the_order_and_begins_with_what_it_holds():
    packer = Fixed(2)
    packer.hold([(7, "a"), (7, "b"), (7, "c")])
    batches = list(packed(packer, source([1, 2]), 0))
    assert [[item for _, item in batch] for batch in batches] == [["a", "b"], ["c", 0], [1]]


@pytest.mark.parametrize("step, expected", [(0, 200), (5, 600), (9, 920), (10, 1000), (11, 1000)])
def test_budget_grows_linearly(step, expected):
    assert budget_at(step, budget=1000, initial=200, warmup_steps=10) == expected


def test_budget_never_exceeds_its_end():
    assert budget_at(0, budget=100, initial=200, warmup_steps=10) == 100
    assert budget_at(0, budget=100, initial=20, warmup_steps=0) == 100
