"""Plans: each step is a fair sample of the data, epochs pass leftovers to the next, and all ranks end together."""

import json
import logging
from collections import Counter
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.fakes import ALONE, STREAMED, build, configure, fake_encoder, ids, sample, sources_yaml, write
from tutti.data.index import MapSource, build_index
from tutti.data.plan import BatchingPlan, Planner, one_pass

__all__ = ["fake_encoder"]  # a fixture that every test here uses

PLAN = BatchingPlan(
    micro_batches=1, micro_batch_size=4, budget=1024, dynamic=True, pad=False, buffer_size=200, seed=1,
    drop_last=False, even_end=True, warmup_ratio=0.0, warmup_from=200, epochs=1, epoch_steps=None, max_steps=None,
)  # fmt: skip
kinds = pytest.mark.parametrize("dynamic", [False, True])


class Lengths:
    """A source whose rows are the lengths of its samples."""

    def __init__(self, lengths):
        self.lengths = [int(length) for length in lengths]

    def __len__(self):
        return len(self.lengths)

    def rows(self, ids):
        return [self.lengths[one] for one in ids]


def map_source(lengths, *, seed=0, weights=None, shuffle=True):
    """Samples of these lengths; with weights, the shorter half and the longer half are sources of their own."""
    parts = np.array_split(np.sort(lengths), 2) if weights else [lengths]
    index = build_index(
        [Lengths(part) for part in parts],
        lambda rows, source: [[sample(0, length, source)] for length in rows],
        ALONE,
        num_workers=0,
        silent=False,
        argument="data.train_path",
    )
    return MapSource(index, weights and (lambda step: weights), ["short", "long"], seed, shuffle)


def lognormal(count, seed=0):
    return np.clip(np.random.default_rng(seed).lognormal(4.5, 0.8, count), 8, 1024).astype(int)


def planned(source, batching):
    planner = Planner(source, batching)
    planner.count()
    steps = list(planner.steps())
    assert [step.step for step in steps] == list(range(1, planner.total_steps + 1))
    assert [step.epoch for step in steps if step.epoch_end] == sorted({step.epoch for step in steps})
    return planner, steps


def samples(steps):
    return [drawn for step in steps for batch in step.micro_batches for drawn in batch]


def items(steps):
    return [item for _, item in samples(steps)]


def plain(steps):
    return json.loads(json.dumps([asdict(step) for step in steps]))


def fullness(batching, step):
    return batching.fullness(batching.budget, step.micro_batches)


def drift(steps, ends):
    """The correlation between a sample's place in its epoch and its length, in standard deviations of pure chance."""
    begins = np.concatenate([[0], np.cumsum(ends)])
    place, length = [], []
    for step in steps:
        here = [np.log(tokens) for tokens, _ in samples([step])]
        place += [(step.step - 1 - begins[step.epoch]) / ends[step.epoch]] * len(here)
        length += here
    return np.corrcoef(place, length)[0, 1] * np.sqrt(len(length))


@pytest.mark.parametrize("weights", [None, [1, 1], [3, 1]])
@pytest.mark.parametrize("buffer_size", [1, 20, 200, 1000, 10_000])
def test_no_place_of_an_epoch_has_longer_samples(buffer_size, weights):
    drifts = []
    for seed in range(4):
        batching = replace(PLAN, buffer_size=buffer_size, seed=seed, epochs=3)
        source = map_source(lognormal(700, seed), seed=seed, weights=weights)
        planner, steps = planned(source, batching)
        drifts.append(drift(steps, planner.counted.epoch_steps))
    assert abs(np.mean(drifts)) < 3 / np.sqrt(len(drifts)), drifts


@pytest.mark.parametrize("weights", [None, [2, 1]])
@pytest.mark.parametrize("buffer_size", [20, 1500])
def test_no_place_of_a_stream_has_longer_samples(tmp_path, buffer_size, weights):
    names = ["a.jsonl", "b.jsonl"] if weights else ["a.jsonl"]
    for seed, name in enumerate(names):
        write(tmp_path / name, [{"id": n, "n": int(length) // 16 + 1} for n, length in enumerate(lognormal(900, seed))])
    path = tmp_path / "mix.yaml"
    path.write_text(json.dumps({"sources": names, "names": names} | ({"weights": weights} if weights else {})))
    data = STREAMED | {"dyn_bsz_buffer_size": buffer_size, "shuffle_buffer_size": 300, "train_size": 4_000}
    config = configure(str(path), data=data, micro_batch_size=2, dyn_bsz=True, num_train_epochs=3)
    place, length = [], []
    for batch in build(config).train():
        lengths = [n for micro_batch in batch.micro_batches for n in micro_batch.lengths()]
        place += [batch.step] * len(lengths)
        length += np.log(lengths).tolist()
    assert abs(np.corrcoef(place, length)[0, 1]) * np.sqrt(len(length)) < 3


@pytest.mark.parametrize("buffer_size", [20, 200, 10_000])
def test_micro_batches_differ_as_much_as_without_choosing(buffer_size):
    """Each of them contains both short and long samples."""
    source = map_source(lognormal(4000))
    counts = []
    for size in (1, buffer_size):
        _, steps = planned(source, replace(PLAN, budget=2048, buffer_size=size))
        counts.append([len(samples([step])) for step in steps])
    assert np.std(counts[1]) == pytest.approx(np.std(counts[0]), rel=0.2)


@kinds
def test_what_an_epoch_leaves_is_in_the_next_ones_first_step(dynamic):
    batching = replace(PLAN, dynamic=dynamic, micro_batches=3, epochs=3, buffer_size=30)
    planner, steps = planned(map_source(lognormal(100)), batching)
    rest = planner.counted.rest_steps
    assert all(fullness(batching, step) > 0.93 for step in steps[:-rest])
    for epoch in range(2):
        so_far = Counter(items(step for step in steps if step.epoch <= epoch))
        first = Counter(items([next(step for step in steps if step.epoch == epoch + 1)]))
        assert set(so_far.values()) <= {epoch, epoch + 1}
        assert all(so_far[item] + first[item] > epoch for item in range(100))
        assert sum(so_far.values()) < 100 * (epoch + 1), "else nothing was left"
    assert set(Counter(items(steps)).values()) == {3}


@given(
    lengths=st.lists(st.integers(2, 60), min_size=1, max_size=80), micro_batches=st.integers(1, 4),
    epochs=st.integers(1, 3), dynamic=st.booleans(), buffer_size=st.sampled_from([1, 7, 100]),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_a_run_ends_without_a_step_of_less_than_half(lengths, micro_batches, epochs, dynamic, buffer_size):
    batching = replace(PLAN, micro_batches=micro_batches, budget=240, dynamic=dynamic, epochs=epochs)
    batching = replace(batching, buffer_size=buffer_size)
    _, steps = planned(map_source(lengths), batching)
    assert sorted(items(steps)) == sorted([*range(len(lengths))] * epochs)
    assert all(tokens <= 240 for tokens in map(_tokens, (b for step in steps for b in step.micro_batches)) if dynamic)
    if len(steps) > 1:
        # A run of two may have no more than one step's tokens, dealt to both.
        assert min(fullness(batching, step) for step in steps) >= (0.5 if len(steps) > 2 else 0.45)


def _tokens(batch):
    return sum(tokens for tokens, _ in batch)


@given(
    lengths=st.lists(st.integers(2, 60), min_size=20, max_size=80), micro_batches=st.integers(1, 3),
    epochs=st.integers(1, 3), dynamic=st.booleans(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_only_a_runs_end_drops_samples_and_less_than_a_step(lengths, micro_batches, epochs, dynamic):
    batching = replace(PLAN, micro_batches=micro_batches, budget=120, dynamic=dynamic, epochs=epochs, drop_last=True)
    planner, steps = planned(map_source(lengths), batching)
    left_out = Counter([*range(len(lengths))] * epochs) - Counter(items(steps))
    assert left_out.total() == planner.counted.left_out
    assert all(len(step.micro_batches) == micro_batches for step in steps)
    assert min(fullness(batching, step) for step in steps) >= 0.5
    if not dynamic:
        assert left_out.total() == len(lengths) * epochs % batching.global_batch_size


def test_epochs_of_less_than_a_step_add_up():
    _, steps = planned(map_source([9, 10, 11]), replace(PLAN, dynamic=False, micro_batches=2, epochs=6))
    assert [len(samples([step])) for step in steps] == [8, 5, 5]
    assert Counter(items(steps)) == {0: 6, 1: 6, 2: 6}


@kinds
@pytest.mark.parametrize("warmup_ratio", [0.0, 1.0])
def test_going_on_from_every_step_equals_never_stopping(dynamic, warmup_ratio):
    """With ready micro batches, one left open by an epoch, and the rest of the run among them."""
    batching = replace(PLAN, dynamic=dynamic, micro_batches=2, epochs=3, buffer_size=60)
    batching = replace(batching, warmup_ratio=warmup_ratio if dynamic else 0.0)
    source = map_source(lognormal(90))
    planner, steps = planned(source, batching)
    assert planner.counted.rest_steps
    for number, step in enumerate(steps, start=1):
        other = Planner(source, batching)
        other.load_position(json.loads(json.dumps(step.position)))
        other.count()
        assert plain(other.steps()) == plain(steps[number:]), f"after step {number}"


def test_an_epoch_that_is_cut_leaves_nothing_to_the_next():
    batching = replace(PLAN, dynamic=False, micro_batches=2, max_steps=3, epochs=2)
    _, steps = planned(map_source(lognormal(30)), batching)
    assert [step.epoch for step in steps] == [0] * 3 + [1] * 3
    for epoch in range(2):
        assert len(set(items(step for step in steps if step.epoch == epoch))) == 24


def test_evaluation_ends_with_a_step_of_what_is_left():
    source = map_source(lognormal(21), shuffle=False)
    _, steps = planned(source, one_pass(replace(PLAN, dynamic=False, micro_batches=2, drop_last=True, epochs=5)))
    assert items(steps) == list(range(21))
    assert [len(samples([step])) for step in steps] == [8, 8, 5]
    _, steps = planned(source, one_pass(replace(PLAN, micro_batches=2, drop_last=True, epochs=5)))
    assert sorted(items(steps)) == list(range(21))


@kinds
def test_data_that_is_longer_than_an_epoch_goes_on(dynamic):
    batching = replace(PLAN, dynamic=dynamic, micro_batch_size=10, budget=100, epoch_steps=20, epochs=5)
    _, steps = planned(map_source([10] * 1000), batching)
    assert sorted(items(steps)) == list(range(1000))


@pytest.mark.parametrize("streamed", [False, True])
def test_data_says_when_it_begins_again(tmp_path, caplog, streamed):
    path = write(tmp_path / "a.jsonl", [{"id": number, "n": 5} for number in range(100)])
    values = {"train_sample": 60} | ({"datasets_type": "iterable"} if streamed else {})
    data = build(configure(path, ["data.train_sample"], values, micro_batch_size=20, num_train_epochs=4))
    with caplog.at_level(logging.INFO, "tutti"):
        batches = list(data.train())
    assert sorted(ids(batches[:5])) == sorted(ids(batches[5:10])) == list(range(100))
    again = [line for line in caplog.messages if "begins again" in line]
    assert again == [
        f"step {step}: data.train_path is read through and begins again, for pass {number}"
        for step, number in ((6, 2), (11, 3))
    ]


def test_a_source_says_when_it_begins_again(tmp_path, caplog):
    data = build(configure(sources_yaml(tmp_path, weights=[1, 1]), micro_batch_size=10))
    with caplog.at_level(logging.INFO, "tutti"):
        list(data.train())
    again = [line for line in caplog.messages if "begins again" in line]
    assert again == ["step 5: few is read through and begins again, for pass 2"]


def test_one_of_a_thing_is_singular_in_what_is_said_of_the_steps(tmp_path):
    built = build(configure(write(tmp_path / "a.jsonl", [{"id": 1, "n": 8}]), micro_batch_size=1, global_batch_size=1))
    assert built.steps_reason == "1 step: 1 epoch of 1 (one pass over 1 sample, 1 sample a step)"
