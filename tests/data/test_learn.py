"""Data that is tokenized as it is drawn: batches and their order equal those of data that is tokenized first."""

import json
import os
import time
from dataclasses import replace
from itertools import islice

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.data.fakes import (
    KINDS,
    build,
    configure,
    fake_encoder,
    make_rows,
    record,
    sources_yaml,
    use_fake_encoder,
    write,
)
from tests.data.test_plan import PLAN, lognormal, map_source
from tests.harness import run_ranks
from tutti.core.dist import init_world
from tutti.data import learn, mix
from tutti.data.index import MapSource
from tutti.data.plan import Planner

__all__ = ["fake_encoder"]  # a fixture that every test here uses

LEARN = {"AT_ONCE_TOKENS": 0, "_SURVEYED": 8, "CHUNK": 4}
INDEXED = [kind for kind in KINDS if "streamed" not in kind]


@pytest.fixture
def at_once(monkeypatch, tmp_path):
    """Gives a function that makes `build` open data at once, small as it is."""
    monkeypatch.setenv("TUTTI_CACHE", str(tmp_path / "cache"))
    return lambda: open_at_once(monkeypatch.setattr)


def open_at_once(setattr_):
    for module, values in {learn: LEARN, mix: {"LEARNT": 16, "SOON": 32}}.items():
        for name, value in values.items():
            setattr_(module, name, value)


def is_open_at_once(data):
    return not data._train.planner.source.knows_lengths


@pytest.mark.parametrize("kind", INDEXED)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_and_their_order_are_those_of_data_tokenised_first(tmp_path, at_once, kind, num_workers):
    path = write(tmp_path / "a.jsonl", make_rows(300))
    data, train = KINDS[kind]
    explicit = ["data.train_size"] if "packed" in kind else []
    data = data | {"num_workers": num_workers, "train_size": 4000}
    config = configure(path, explicit, data=data, num_train_epochs=2, **train)
    first = build(config)
    expected = record(first.train())
    assert not is_open_at_once(first)
    at_once()
    drawn = build(config)
    assert is_open_at_once(drawn) and drawn.total_steps == first.total_steps == len(expected)
    assert record(drawn.train()) == expected
    assert drawn.report.samples == first.report.samples == 300
    if num_workers:
        assert not drawn._train.planner.source.index.learn._workers, "no process is left"


@pytest.mark.parametrize("weights", [None, [1, 2]])
@pytest.mark.parametrize("kind", INDEXED)
def test_sources_and_resuming_are_as_if_all_had_been_tokenised_first(tmp_path, at_once, kind, weights):
    path = sources_yaml(tmp_path, weights=weights)
    data, train = KINDS[kind]
    explicit = ["data.train_size"] if "packed" in kind else []
    config = configure(path, explicit, data=data | {"train_size": 700}, num_train_epochs=2, **train)
    expected = record(build(config).train())
    at_once()
    running = build(config)
    states, batches = [running.state_dict()], []
    for batch in running.train():
        batches += record([batch])
        states.append(running.state_dict())
    assert batches == expected
    for step in range(0, len(states), 3):
        resumed = build(config)
        resumed.load_state_dict(json.loads(json.dumps(states[step])))
        assert is_open_at_once(resumed) and resumed.total_steps == running.total_steps
        assert record(resumed.train()) == batches[step:], f"resumed after step {step}"


def test_evaluation_order_and_a_scan_in_order_are_the_same(tmp_path, at_once):
    path = sources_yaml(tmp_path)
    config = configure(path, data={"shuffle": False, "eval_path": path}, **KINDS["fixed"][1])
    first = build(config)
    expected = [record(part) for part in (first.train(), first.scan(), first.evaluate())]
    at_once()
    drawn = build(config)
    assert [record(part) for part in (drawn.train(), drawn.scan(), drawn.evaluate())] == expected


@pytest.mark.parametrize("max_steps", [2, 6])
def test_packed_epochs_that_max_steps_ends_are_counted_with_the_lengths_they_need(tmp_path, at_once, max_steps):
    config = configure(
        write(tmp_path / "a.jsonl", make_rows(600)),
        micro_batch_size=1, global_batch_size=2, dyn_bsz=True, max_steps=max_steps, num_train_epochs=2,
    )  # fmt: skip
    expected = record(build(config).train())
    at_once()
    drawn = build(config)
    known = int((drawn._train.planner.source.index.length > 0).sum())
    assert is_open_at_once(drawn) and drawn.total_steps == len(expected) == 2 * max_steps
    assert known == 0 if max_steps == 2 else 0 < known < 200, "two steps need no look at a length, six some"
    assert record(drawn.train()) == expected


def test_lengths_of_all_are_found_first_where_the_number_of_steps_depends_on_them(tmp_path, at_once, caplog):
    path = write(tmp_path / "a.jsonl", make_rows(100))
    at_once()
    train = KINDS["packed"][1]
    assert not is_open_at_once(build(configure(path, **train)))
    assert not is_open_at_once(build(configure(path, data={"data_type": "plaintext"}, **KINDS["fixed"][1])))
    assert not is_open_at_once(build(configure(path, data={"silent_exception": True}, **KINDS["fixed"][1])))
    assert not is_open_at_once(build(configure(path, **train, max_steps=100)))
    assert is_open_at_once(build(configure(path, ["data.train_size"], **train)))


def test_a_checkpoint_goes_on_with_other_batches_that_need_all_lengths(tmp_path, at_once):
    path = write(tmp_path / "a.jsonl", make_rows(100))
    at_once()
    running = build(configure(path, **KINDS["fixed"][1]))
    next(running.train())
    packed = build(configure(path, **KINDS["packed"][1]))
    packed.load_state_dict(json.loads(json.dumps(running.state_dict())))
    silent = build(configure(path, data={"silent_exception": True}, **KINDS["fixed"][1]))
    silent.load_state_dict(json.loads(json.dumps(running.state_dict())))
    assert record(silent.train()) == record(running.train())


@pytest.mark.parametrize("change", ["another row", "another length"])
def test_changed_data_is_told_on_resuming(tmp_path, at_once, change):
    rows = make_rows(100)
    path = write(tmp_path / "a.jsonl", rows)
    at_once()
    running = build(configure(path, **KINDS["fixed"][1]))
    state = running.state_dict()
    rows[33] |= {"id": 7} if change == "another row" else {"n": rows[33]["n"] % 9 + 3}
    write(tmp_path / "a.jsonl", rows)
    with pytest.raises(ValueError, match="does not hold the data that the checkpoint was made with"):
        build(configure(path, **KINDS["fixed"][1])).load_state_dict(state)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_row_stops_the_run_with_its_line(tmp_path, at_once, num_workers):
    rows = make_rows(400)
    rows[201]["bad"] = "is no row"
    path = write(tmp_path / "a.jsonl", rows)
    at_once()
    data = build(configure(path, data={"num_workers": num_workers}, **KINDS["fixed"][1]))
    with pytest.raises(ValueError, match=r"a\.jsonl, line 202: is no row; data\.silent_exception: true skips bad rows"):
        list(data.train())


def test_a_bad_row_is_found_before_it_is_drawn(tmp_path, at_once):
    rows = make_rows(2000)
    rows[1900]["bad"] = "is no row"
    path = write(tmp_path / "a.jsonl", rows)
    at_once()
    data = build(configure(path, data={"num_workers": 2, "shuffle": False}, **KINDS["fixed"][1]))
    lengths, taken, deadline = data._train.planner.source.index.length, 0, time.monotonic() + 60
    with pytest.raises(ValueError, match="line 1901: is no row"):
        for _ in data.train():
            taken += 1
            while not (lengths < 0).any() and time.monotonic() < deadline:
                time.sleep(0.01)
    assert taken < 100, "there are 237 steps before it is drawn"


def test_a_process_that_dies_costs_time_alone(tmp_path, at_once, monkeypatch, caplog):
    config = configure(write(tmp_path / "a.jsonl", make_rows(200)), data={"num_workers": 1}, **KINDS["fixed"][1])
    expected = record(build(config).train())
    at_once()
    monkeypatch.setattr(learn, "be_a_worker", lambda: os._exit(1))
    assert record(build(config).train()) == expected
    assert "a process that tokenised rows has died" in caplog.text


def on_two_ranks(path, bad_path):
    use_fake_encoder(setattr)
    open_at_once(setattr)
    world = init_world(torch.device("cpu"))
    data = build(configure(path, **KINDS["fixed"][1]), world.rank, world.size, world)
    assert is_open_at_once(data)
    batches = record(data.train())
    learner = data._train.planner.source.index.learn
    try:
        list(build(configure(bad_path, **KINDS["fixed"][1]), world.rank, world.size, world).train())
    except ValueError as error:
        return batches, learner.length.tolist(), str(error)


def test_ranks_find_lengths_out_together(tmp_path, at_once):
    rows = make_rows(300)
    path = write(tmp_path / "a.jsonl", rows)
    rows[150]["bad"] = "no good"
    bad_path = write(tmp_path / "bad.jsonl", rows)
    expected = record(build(configure(path, **KINDS["fixed"][1])).train())
    ranks = run_ranks(2, on_two_ranks, path, bad_path)
    for one, other, whole in zip(ranks[0][0], ranks[1][0], expected, strict=True):
        assert one[:4] == other[:4] == whole[:4]
        assert sorted(one[4] + other[4]) == sorted(whole[4])
    for _, lengths, error in ranks:
        assert lengths == [row["n"] for row in rows]
        assert "line 151: no good" in error


class Unknown(MapSource):
    knows_lengths = False


@given(
    count=st.integers(1, 90),
    micro_batches=st.integers(1, 3),
    size=st.integers(1, 4),
    epochs=st.integers(1, 3),
    max_steps=st.one_of(st.none(), st.integers(1, 9)),
    drop_last=st.booleans(),
    weights=st.booleans(),
    steps=st.integers(0, 12),
)
@settings(max_examples=150, deadline=None)
def test_steps_of_as_many_samples_are_counted_as_planning_them_would(
    count, micro_batches, size, epochs, max_steps, drop_last, weights, steps
):
    batching = replace(
        PLAN, micro_batches=micro_batches, micro_batch_size=size, dynamic=False,
        epochs=epochs, max_steps=max_steps, drop_last=drop_last,
    )  # fmt: skip
    weights = [2, 1] if weights and count > 1 else None
    source = map_source(lognormal(count), weights=weights)
    planner = Planner(source, batching)
    try:
        planner.count()
    except ValueError:
        assume(False)
    position = planner.position()
    for plan in islice(planner.steps(), steps):
        position = plan.position
    # A plan that continues unchanged keeps its count.
    for changed in (replace(batching, epochs=epochs + 1), replace(batching, micro_batches=2, micro_batch_size=5)):
        counts = []
        for one in (source, Unknown(source.index, source.weights, source.names, source.seed, shuffle=True)):
            resumed = Planner(one, changed)
            resumed.load_position(position)
            counts.append(replace(resumed._count(), tokens=0, slots=0))
        assert counts[0] == counts[1]
