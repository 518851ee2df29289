"""Packers lose no sample, exceed no budget, delay none forever, and have only the waiting samples as state."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tutti.data.pack import RESERVE, BestFit, Fixed, budget_at, deal_samples, deal_tokens, deal_work

LENGTHS = st.lists(st.integers(1, 40), max_size=120)


def source(lengths):
    return source_of((length, number) for number, length in enumerate(lengths))


def source_of(drawn):
    stream = iter(drawn)
    return lambda: next(stream, None)


def packed(packer, draw, budget):
    """The micro batches of a pass; the last is the one that is still open."""
    for step in itertools.count():
        if (batch := packer.take(draw, budget, step)) is None:
            break
        yield batch
    if packer.open:
        yield packer.open


@given(LENGTHS, st.integers(1, 30), st.integers(5, 100), st.booleans())
@settings(max_examples=60, deadline=None)
def test_best_fit_packs_every_sample_once_within_the_budget(lengths, capacity, budget, growing):
    packer = BestFit(capacity, budget + growing, seed=3)
    batches = list(packed(packer, source(lengths), budget))
    assert sorted(number for batch in batches for _, number in batch) == list(range(len(lengths)))
    for batch in batches:
        total = sum(length for length, _ in batch)
        assert total <= budget or len(batch) == 1


@given(LENGTHS, st.integers(1, 60), st.integers(5, 100))
@settings(max_examples=60, deadline=None)
def test_samples_wait_for_no_more_than_two_windows(lengths, capacity, budget):
    packer, draw, waited = BestFit(capacity, budget, seed=3), source(lengths), {}
    while packer.take(draw, budget, 0) is not None:
        loose = [number for _, number in packer.held()[0][sum(packer.held()[1]) :]]
        assert len(loose) <= capacity
        assert loose == sorted(loose), "loose samples are listed oldest first"
        if not packer.ready:
            waited = {number: waited.get(number, 0) + 1 for number in loose}
            assert max(waited.values(), default=0) <= max(1, min(capacity, RESERVE))


@given(LENGTHS, st.integers(1, 60), st.integers(0, 30))
@settings(max_examples=60, deadline=None)
def test_best_fit_goes_on_from_the_samples_it_held(lengths, capacity, stop):
    draw = source(lengths)
    packer = BestFit(capacity, 50, seed=3)
    list(itertools.islice(packed(packer, draw, 50), stop))
    other = BestFit(capacity, 50, seed=3)
    other.hold(*json.loads(json.dumps(packer.held())))
    rest = list(iter(draw, None))
    going_on, gone_on = (list(packed(one, source_of(rest), 50)) for one in (packer, other))
    assert [[tuple(drawn) for drawn in batch] for batch in gone_on] == going_on


def test_best_fit_takes_the_oldest_in_order_then_the_largest_that_fits():
    packer = BestFit(10, 20, seed=None)
    batches = list(packed(packer, source([5, 9, 4, 7, 6, 2, 5]), 20))
    assert batches[0] == [(5, 0), (9, 1), (6, 4)], "5 and 9, then 4 goes back for 6"
    assert sorted(batches[1]) == [(2, 5), (4, 2), (5, 6), (7, 3)]


def test_micro_batches_of_a_window_come_in_random_order_but_the_oldest_first():
    def order(seed, step=0):
        packer = BestFit(40, 10, seed)
        return [packer.take(draw, 10, step)[0][1] for draw in [source([10] * 40)] for _ in range(40)]

    assert order(None) == sorted(order(3)) == list(range(40))
    assert order(3)[0] == 0 and order(3) != sorted(order(3))
    assert order(3) != order(4) and order(3) != order(3, step=1)


def test_the_next_pass_completes_what_a_pass_left_open():
    for packer in (BestFit(10, 20, seed=3), Fixed(3)):
        draw = source([9, 8, 9, 9])
        first = packer.take(draw, 20, 0)
        while packer.take(draw, 20, 0) is not None:
            pass
        left = list(packer.open)
        assert first and left
        again = packer.take(source([7, 2, 7, 7]), 20, 1)
        assert again[: len(left)] == left and len(again) > len(left)


@pytest.mark.parametrize(
    "median, sigma, longest, budget",
    [
        (4.5, 0.8, 1024, 2048),
        (4.5, 0.8, 1024, 1024),
        (5.5, 1.2, 2048, 2048),
        (6.5, 0.5, 2048, 2048),
        (7, 1, 2048, 2048),
    ],
)
@pytest.mark.parametrize("capacity", [50, 200, 5000])
def test_best_fit_fills_ragged_batches(median, sigma, longest, budget, capacity):
    lengths = np.clip(np.random.default_rng(0).lognormal(median, sigma, 5_000), 8, longest).astype(int).tolist()
    batches = list(packed(BestFit(capacity, budget, seed=3), source(lengths), budget))
    assert sum(lengths) / (budget * len(batches)) > 0.97
    in_order = sum(lengths) / (budget * len(list(packed(BestFit(1, budget, seed=3), source(lengths), budget))))
    assert in_order < 0.95, "the buffer is what fills them"


def test_best_fit_makes_micro_batches_one_at_a_time_while_the_budget_grows():
    packer, draw = BestFit(100, 64, seed=3), source([8] * 200)
    assert [len(packer.take(draw, budget, 0)) for budget in (16, 24, 32, 64)] == [2, 3, 4, 8]


def test_best_fit_empties_a_buffer_larger_than_its_capacity():
    packer = BestFit(2, 8, seed=3)
    packer.hold([(4, number) for number in range(6)])
    assert [number for batch in packed(packer, source([4, 4]), 8) for _, number in batch] == [0, 1, 2, 3, 4, 5, 0, 1]


def test_fixed_keeps_the_order_and_begins_with_what_it_holds():
    packer = Fixed(2)
    packer.hold([(7, "a"), (7, "b"), (7, "c")])
    batches = list(packed(packer, source([1, 2]), 0))
    assert [[item for _, item in batch] for batch in batches] == [["a", "b"], ["c", 0], [1]]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60), st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_dealing_gives_every_micro_batch_as_much(lengths, steps, micro_batches):
    drawn = [(length, number) for number, length in enumerate(lengths)]
    dealt = deal_tokens(drawn, steps, micro_batches, budget=1000)
    assert sorted(one for batch in dealt for one in batch) == sorted(drawn)
    tokens = np.array([sum(length for length, _ in batch) for batch in dealt]).reshape(steps, micro_batches)
    assert tokens.max() - tokens.min() <= max(lengths)
    assert np.ptp(tokens.sum(1)) <= max(lengths)
    dealt = deal_samples(drawn, steps, micro_batches)
    assert [one for batch in dealt for one in batch] == drawn
    counts = np.array([len(batch) for batch in dealt]).reshape(steps, micro_batches)
    assert np.ptp(counts) <= 1 and np.ptp(counts.sum(1)) <= 1


def test_dealing_keeps_within_the_budget():
    assert deal_tokens([(6, "a"), (5, "b"), (4, "c")], 1, 2, budget=9) == [[(6, "a")], [(5, "b"), (4, "c")]]
    assert deal_tokens([(6, "a"), (5, "b"), (4, "c")], 1, 2, budget=8) == []


@pytest.mark.parametrize("step, expected", [(0, 200), (5, 600), (9, 920), (10, 1000), (11, 1000)])
def test_budget_grows_linearly(step, expected):
    assert budget_at(step, budget=1000, initial=200, warmup_steps=10) == expected


def test_budget_never_exceeds_its_end():
    assert budget_at(0, budget=100, initial=200, warmup_steps=10) == 100
    assert budget_at(0, budget=100, initial=20, warmup_steps=0) == 100


@given(st.lists(st.floats(0, 100), min_size=8, max_size=8), st.sampled_from([1, 2, 4, 8]))
def test_each_rank_gets_as_many_micro_batches(works, ranks):
    dealt = deal_work(works, ranks)
    assert sorted(number for own in dealt for number in own) == list(range(8))
    assert {len(own) for own in dealt} == {8 // ranks}
    if ranks == 1:
        assert dealt == [list(range(8))]


def test_ranks_get_as_much_work_also_where_images_differ_widely_in_size():
    random, ranks, a_rank = np.random.default_rng(5), 8, 8
    values = random.lognormal(9.0, 1.0, 4_000)
    lengths = np.ceil(values / 256).astype(int) + random.integers(20, 200, len(values))
    of = BestFit(200, 4096, seed=1)
    batches = list(packed(of, source(lengths.tolist()), 4096))[:-1]

    def work(batch):
        numbers = [number for _, number in batch]
        return 6e6 * lengths[numbers].sum() + 5e3 * (lengths[numbers] ** 2).sum() + 2e6 * values[numbers].sum()

    by_turns, by_work, waits = [], [], []
    for start in range(0, len(batches) - ranks * a_rank, ranks * a_rank):
        works = np.array([work(batch) for batch in batches[start : start + ranks * a_rank]])
        dealt = works[deal_work(works.tolist(), ranks)]
        by_work.append(dealt.sum(1).max() / dealt.sum(1).mean())
        by_turns.append(works.reshape(a_rank, ranks).sum(0).max() / dealt.sum(1).mean())
        # Time of ranks that wait for each other at each micro batch, relative to equal micro batches.
        waits.append((dealt.max(0).sum() / works.mean(), works.reshape(a_rank, ranks).max(1).sum() / works.mean()))
    assert len(by_work) >= 2 and max(by_work) <= 1.15 < max(by_turns)
    assert all(now < before for now, before in waits)
