"""Order and mixing: each sample once per pass, exact proportions, and a state that can resume anywhere."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tutti.data.mix import Mix, Permuted, permutation


def stream(count, number=0, shuffle=True):
    ids = np.arange(count) + 1000 * number
    return Permuted(ids, np.full(count + 1000 * number, 3), key=(7, number), shuffle=shuffle)


def drain(mix, step=0):
    drawn = []
    while (one := mix.drawer(step)()) is not None:
        drawn.append(one[1])
    return drawn


def started(streams, weights=None, size=None):
    mix = Mix(streams, weights, size)
    mix.restart()
    return mix


def constant(*weights):
    return lambda step: weights


def test_permutation_depends_on_its_key_alone():
    assert permutation(8, 42, 0, 0).tolist() == [0, 1, 4, 2, 6, 5, 7, 3]
    assert sorted(permutation(50, 1, 2)) == list(range(50))
    assert permutation(50, 1, 2).tolist() != permutation(50, 1, 3).tolist()


def test_every_pass_has_each_sample_once_in_a_new_order():
    mix = started([stream(100)])
    first = drain(mix)
    mix.restart()
    second = drain(mix)
    assert sorted(first) == sorted(second) == list(range(100))
    assert first != second and first != sorted(first)


def test_without_shuffling_a_pass_is_in_order():
    assert drain(started([stream(100, shuffle=False)])) == list(range(100))


def test_without_weights_every_sample_of_every_source_comes_once():
    drawn = drain(started([stream(5, 0), stream(40, 1), stream(0, 2)]))
    assert sorted(drawn) == [*range(5), *range(1000, 1040)]
    assert {one // 1000 for one in drawn[:6]} == {0, 1}, "sources alternate while both last"


@given(st.lists(st.integers(0, 9), min_size=2, max_size=4).filter(any))
@settings(max_examples=40, deadline=None)
def test_every_source_is_within_one_sample_of_its_share(weights):
    mix = started([stream(7, number) for number in range(len(weights))], constant(*weights))
    counts = np.zeros(len(weights))
    for draws in range(1, 200):
        counts[mix.drawer(0)()[1] // 1000] += 1
        assert np.abs(counts - draws * np.array(weights) / sum(weights)).max() <= len(weights) - 1


def test_two_sources_stay_within_one_sample():
    mix = started([stream(7, 0), stream(7, 1)], constant(0.3, 0.7))
    counts = np.zeros(2)
    for draws in range(1, 500):
        counts[mix.drawer(0)()[1] // 1000] += 1
        assert abs(counts[0] - 0.3 * draws) < 1


def test_a_source_that_runs_out_starts_over_reshuffled():
    mix = started([stream(10, 0), stream(30, 1)], constant(1, 1), size=40)
    small = [one for one in drain(mix) if one < 1000]
    assert len(small) == 20
    assert sorted(small[:10]) == sorted(small[10:]) == list(range(10))
    assert small[:10] != small[10:]


def test_a_weighted_pass_has_its_size_and_the_next_goes_on():
    mix = started([stream(10, 0), stream(30, 1)], constant(1, 3), size=20)
    first = drain(mix)
    mix.restart()
    second = drain(mix)
    assert len(first) == len(second) == 20
    assert sorted(one for one in first + second if one >= 1000) == list(range(1000, 1030))


def test_weights_follow_the_step():
    mix = started([stream(50, 0), stream(50, 1)], lambda step: (1 - step / 10, step / 10))
    shares = [np.mean([mix.drawer(step)()[1] >= 1000 for _ in range(100)]) for step in (0, 5, 10)]
    assert shares == pytest.approx([0, 0.5, 1], abs=0.011)


@pytest.mark.parametrize("weights, size", [(None, None), (constant(2, 1), 60), (constant(2, 1), None)])
@pytest.mark.parametrize("stop", [0, 1, 17, 40])
def test_the_state_goes_on_exactly(weights, size, stop):
    def make():
        return Mix([stream(13, 0), stream(40, 1)], weights, size)

    def take(mix, count):
        drawn = []
        for _ in range(count):
            one = mix.drawer(0)()
            if one is None:
                mix.restart()
                one = mix.drawer(0)()
            drawn.append(one)
        return drawn

    mix = make()
    mix.restart()
    take(mix, stop)
    other = make()
    other.load_state_dict(mix.state_dict())
    assert take(mix, 90) == take(other, 90)
