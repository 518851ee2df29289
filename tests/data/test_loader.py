"""Global batches: the same for any number of ranks and workers, counted in advance, resumed exactly from any step."""

import dataclasses
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch

from tests.data.fakes import (
    KINDS,
    STREAMED,
    L,
    build,
    configure,
    fake_encoder,
    ids,
    make_rows,
    record,
    samples_of,
    sources_yaml,
    use_fake_encoder,
    write,
)
from tests.harness import run_ranks
from tutti.core.dist import init_world
from tutti.data import index

__all__ = ["fake_encoder"]  # a fixture that every test here uses


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "train.jsonl", make_rows(150))


kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
@pytest.mark.parametrize("drop_last", [True, False])
def test_any_number_of_ranks_gets_the_same_global_batches(path, kind, drop_last):
    data, train = KINDS[kind]
    config = configure(path, data=data | {"drop_last": drop_last}, **train)
    whole = record(build(config).train())
    for dp_size in (2, 4):
        ranks = [record(build(config, rank, dp_size).train()) for rank in range(dp_size)]
        for step, (*same, batches) in enumerate(whole):
            for rank in ranks:
                assert list(rank[step][:4]) == same
                assert len(rank[step][4]) == 4 // dp_size
            assert sorted(one for rank in ranks for one in rank[step][4]) == sorted(batches)
        assert all(len(rank) == len(whole) for rank in ranks)


def test_totals_are_those_of_the_micro_batches(path):
    for batch in build(configure(path, micro_batch_size=4, global_batch_size=8, dyn_bsz=True)).train():
        assert batch.num_targets == sum(len(one.target_index) for one in batch.micro_batches)
        assert batch.num_tokens == sum(one.num_tokens for one in batch.micro_batches)
        assert batch.num_samples == sum(len(samples_of(one)) for one in batch.micro_batches)
        assert batch.num_slots == 4 * L * 2
        assert all(one.num_tokens <= 4 * L for one in batch.micro_batches)
        assert sum(batch.source_tokens.values()) == batch.num_targets


@kinds
@pytest.mark.parametrize("sources", [1, 2])
def test_resuming_at_every_step_equals_going_on(tmp_path, kind, sources):
    data, train = KINDS[kind]
    path = sources_yaml(tmp_path, weights=[1, 2]) if sources == 2 else write(tmp_path / "a.jsonl", make_rows(60))
    data = data | {"drop_last": sources == 2}
    config = configure(path, data=data, num_train_epochs=2, bsz_warmup_ratio=0.3, bsz_warmup_init_mbtoken=70, **train)
    running = build(config)
    states, batches = [running.state_dict()], []
    for batch in running.train():
        batches += record([batch])
        states.append(running.state_dict())
    assert batches[-1][0] == len(batches) == running.total_steps
    assert [one[2] for one in batches].count(True) == 2
    for step, state in enumerate(states):
        state = json.loads(json.dumps(state))
        resumed = build(config)
        resumed.load_state_dict(state)
        assert resumed.total_steps == running.total_steps
        assert record(resumed.train()) == batches[step:], f"resumed after step {step}"
        assert json.loads(json.dumps(resumed.state_dict())) == json.loads(json.dumps(states[-1]))


@kinds
@pytest.mark.parametrize("drop_last", [True, False])
def test_a_finished_run_that_is_made_longer_goes_on_as_the_longer_one(path, kind, drop_last):
    data, train = KINDS[kind]
    short, longer = (
        build(configure(path, data=data | {"drop_last": drop_last}, num_train_epochs=epochs, **train))
        for epochs in (2, 3)
    )
    done = record(short.train())
    state = json.loads(json.dumps(short.state_dict()))
    finished = build(configure(path, data=data | {"drop_last": drop_last}, num_train_epochs=2, **train))
    finished.load_state_dict(state)
    assert record(finished.train()) == []
    resumed = build(configure(path, data=data | {"drop_last": drop_last}, num_train_epochs=3, **train))
    resumed.load_state_dict(state)
    expected = record(longer.train())
    rest = record(resumed.train())
    assert len(done) + len(rest) in (len(expected), len(expected) + 1), "the end of a run may fill up a step"
    assert rest[0][0] == len(done) + 1 and len(rest) > 3
    given = Counter(ids_of(done + rest))
    if "streamed" not in kind and not drop_last:
        assert set(given.values()) == {3} and len(given) == 150, "every sample once an epoch"


@kinds
@pytest.mark.parametrize("change", [{"max_steps": 6}, {"max_steps": None}, {"num_train_epochs": 3}])
def test_a_run_that_max_steps_ended_goes_on_as_one_with_more(path, kind, change):
    data, train = KINDS[kind]
    train = {**train, "max_steps": 3, "num_train_epochs": 1}
    short = build(configure(path, data=data, **train))
    done = record(short.train())
    assert len(done) == 3
    state = json.loads(json.dumps(short.state_dict()))
    same, resumed, straight = (build(configure(path, data=data, **train | changes)) for changes in ({}, change, change))
    same.load_state_dict(state)
    assert record(same.train()) == []
    resumed.load_state_dict(state)
    rest, expected = record(resumed.train()), record(straight.train())
    assert resumed.total_steps == straight.total_steps == len(expected) > 3
    assert [one[3:] for one in done + rest] == [one[3:] for one in expected]


def ids_of(batches):
    return [one for *_, micro_batches in batches for micro_batch in micro_batches for one in micro_batch]


@kinds
def test_workers_change_nothing(path, kind, monkeypatch):
    monkeypatch.setattr(index, "KEEP_TOKENS", 0)
    data, train = KINDS[kind]
    inline = build(configure(path, data=data, num_train_epochs=2, **train))
    expected = record(inline.train())
    config = configure(path, data=data | {"num_workers": 2}, num_train_epochs=2, **train)
    working = build(config)
    given = []
    for batch in working.train():
        given += record([batch])
        if batch.step == 3:
            state = working.state_dict()
    assert given == expected
    working.load_state_dict(state)
    assert record(working.train()) == expected[3:]
    inline.load_state_dict(state)
    assert record(inline.train()) == expected[3:]


@kinds
def test_another_number_of_ranks_goes_on_with_the_same_global_batches(path, kind):
    data, train = KINDS[kind]
    config = configure(path, data=data, **train)
    first = build(config)
    batches = first.train()
    for _ in range(3):
        next(batches)
    state, rest = first.state_dict(), record(batches)
    given = []
    for rank in range(4):
        resumed = build(config, rank, 4)
        resumed.load_state_dict(state)
        given.append(record(resumed.train()))
        assert [one[:4] for one in given[-1]] == [one[:4] for one in rest]
    for *of_ranks, whole in zip(*given, rest, strict=True):
        assert sorted(batch for one in of_ranks for batch in one[4]) == sorted(whole[4])


@pytest.mark.parametrize("kind", ["fixed", "streamed"])
def test_workers_survive_signals_meant_for_the_trainer(path, kind, monkeypatch):
    monkeypatch.setattr(index, "KEEP_TOKENS", 0)
    data, train = KINDS[kind]
    batches = build(configure(path, data=data | {"num_workers": 2}, **train)).train()
    given = [next(batches)]
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, signal.SIGINT)
        subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    given += batches
    assert len(given) == given[-1].step and given[-1].epoch_end
    assert all(not worker.is_alive() for worker in workers), "they end with the data"


def test_workers_end_when_the_trainer_exits_in_the_middle(path):
    code = f"""
import sys
sys.path[:0] = [{os.getcwd()!r}]
from tests.data.fakes import *
from tutti.data import index
use_fake_encoder(setattr)
index.KEEP_TOKENS = 0
kept = build(configure({path!r}, data=STREAMED | {{"num_workers": 2}})).train()
next(kept)
other = build(configure({path!r}, data={{"num_workers": 2}})).train()
next(other)
print("leaving", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "leaving\n", "")


def test_workers_leave_the_random_state_alone(path, monkeypatch):
    monkeypatch.setattr(index, "KEEP_TOKENS", 0)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    next(build(configure(path, data={"num_workers": 1})).train())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_pool_of_processes_indexes_the_same(tmp_path, monkeypatch):
    config = configure(write(tmp_path / "a.jsonl", make_rows(1000)), data={"num_workers": 2})
    expected = build(config)
    monkeypatch.setattr(index, "_POOL_SECONDS", 0)
    pooled = build(config)
    assert pooled.state_dict() == expected.state_dict()
    assert pooled.report == expected.report


@pytest.mark.parametrize("kind", ["fixed", "packed"])
@pytest.mark.parametrize("batch_size, micro_batch_size", [(4, 1), (4, 4), (16, 2)])
def test_another_batch_size_goes_on_with_what_is_left(path, kind, batch_size, micro_batch_size):
    _, train = KINDS[kind]
    config = configure(path, data={"drop_last": False}, num_train_epochs=2, **train)
    first = build(config)
    batches = first.train()
    seen = ids(next(batches) for _ in range(3))
    other = {**train, "global_batch_size": batch_size, "micro_batch_size": micro_batch_size}
    resumed = build(dataclasses.replace(config, train=dataclasses.replace(config.train, **other)))
    resumed.load_state_dict(first.state_dict())
    rest = list(resumed.train())
    assert rest[-1].step == resumed.total_steps
    assert sorted(seen + ids(rest)) == sorted([*range(150)] * 2)
    assert Counter(seen + ids(one for one in rest if one.epoch == 0)).most_common(1)[0][1] == 1


def test_a_stream_goes_on_with_another_batch_size(path):
    data = STREAMED | {"train_sample": 150}
    first = build(configure(path, data=data, micro_batch_size=2, global_batch_size=10))
    batches = first.train()
    seen = ids(next(batches) for _ in range(6))
    resumed = build(configure(path, data=data, micro_batch_size=3, global_batch_size=30))
    resumed.load_state_dict(first.state_dict())
    rest = list(resumed.train())
    assert len(rest) == 3
    assert sorted(seen + ids(rest)) == list(range(150))


def test_an_epoch_is_one_pass_in_an_order_of_its_own(path):
    data = build(configure(path, micro_batch_size=5, num_train_epochs=2))
    batches = list(data.train())
    first, second = ids(batches[:30]), ids(batches[30:])
    assert data.total_steps == 60
    assert sorted(first) == sorted(second) == list(range(150))
    assert first != second != sorted(first)
    assert ids(build(configure(path, micro_batch_size=5, data={"shuffle": False})).train()) == list(range(150))


@pytest.mark.parametrize("kind", ["fixed", "packed"])
@pytest.mark.parametrize("drop_last", [True, False])
def test_drop_last(path, kind, drop_last):
    train = KINDS[kind][1] | {"global_batch_size": 32}
    data = build(configure(path, data={"drop_last": drop_last}, **train), 1, 2)
    batches = list(data.train())
    assert len(batches) == data.total_steps
    assert {len(one.micro_batches) for one in batches} == {8}
    assert batches[-1].epoch_end and not any(one.epoch_end for one in batches[:-1])
    assert all(one.num_tokens for batch in batches for one in batch.micro_batches)
    total = sum(one.num_samples for one in batches)
    assert total == 150 if not drop_last else total < 150
    assert (f"{150 - total} left out at the end" in data.steps_reason) == drop_last


def test_less_than_one_global_batch(tmp_path):
    path = write(tmp_path / "few.jsonl", make_rows(3))
    with pytest.raises(ValueError, match=r"3 samples.*global batch of 8.*data\.drop_last false"):
        build(configure(path, global_batch_size=8))
    data = build(configure(path, data={"drop_last": False}, global_batch_size=8))
    assert [one.num_samples for one in data.train()] == [3]


def test_pad_to_length_gives_static_shapes(path):
    train = {"micro_batch_size": 2, "global_batch_size": 8, "dyn_bsz": True, "pad_to_length": True}
    train |= {"bsz_warmup_ratio": 0.5, "bsz_warmup_init_mbtoken": 70}
    for batch in build(configure(path, data={"drop_last": False}, **train)).train():
        assert {len(one.input_ids) for one in batch.micro_batches} == {2 * L}
        assert batch.num_slots == 4 * 2 * L


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.9, 1.0])
def test_the_budget_grows_over_the_first_part_of_all_steps(path, ratio):
    train = {"micro_batch_size": 4, "global_batch_size": 8, "dyn_bsz": True, "num_train_epochs": 3}
    data = build(configure(path, bsz_warmup_ratio=ratio, bsz_warmup_init_mbtoken=80, **train))
    batches = list(data.train())
    assert len(batches) == data.total_steps >= build(configure(path, **train)).total_steps + (ratio >= 0.3)
    warmup = int(ratio * data.total_steps)
    for step, batch in enumerate(batches):
        budget = 80 + (4 * L - 80) * min(step, warmup) // warmup
        assert all(one.num_tokens <= budget for one in batch.micro_batches), f"step {step}"
        assert batch.num_slots == 2 * budget
    assert f"growing over the first {warmup}" in data.steps_reason


def test_a_sample_longer_than_the_budget_goes_alone(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"id": number, "n": 50} for number in range(40)])
    train = {"dyn_bsz": True, "bsz_warmup_ratio": 1.0, "bsz_warmup_init_mbtoken": 10}
    data = build(configure(path, **train))
    assert sorted(ids(data.train())) == list(range(40))


@pytest.mark.parametrize("warmup", [0.0, 0.5])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("streamed", [False, True])
def test_steps_by_formula(path, warmup, dynamic, streamed):
    values = {"train_size": 10_000, "train_sample": 333}
    explicit = () if streamed else ("data.train_size" if dynamic else "data.train_sample",)
    data = values | ({"datasets_type": "iterable"} if streamed else {})
    train = {"dyn_bsz": dynamic, "global_batch_size": 4, "num_train_epochs": 2, "bsz_warmup_ratio": warmup}
    built = build(configure(path, explicit, data, **train))
    steps = math.ceil(10_000 * (1 + warmup / 2) / (4 * L)) if dynamic else math.ceil(333 / 4)
    batches = list(built.train())
    assert built.total_steps == len(batches) == 2 * steps
    assert [one.step for one in batches if one.epoch_end] == [steps, 2 * steps]
    assert f"{steps:,} " in built.steps_reason
    counts = Counter(ids(one for one in batches if one.epoch == 0))
    if not dynamic:
        assert set(counts.values()) == {2, 3}, "data that is too short starts over"


def test_data_longer_than_the_formula_is_cut(path):
    data = build(configure(path, ["data.train_sample"], {"train_sample": 40}, global_batch_size=4, num_train_epochs=2))
    seen = ids(data.train())
    assert len(seen) == 80 and len(set(seen[:40])) == len(set(seen[40:])) == 40
    assert seen[:40] != seen[40:]


def test_a_formula_rules_only_when_set(path):
    assert build(configure(path, data={"train_sample": 40})).total_steps == 150
    assert build(configure(path, ["data.train_size"], {"train_size": 64})).total_steps == 150, "needs train.dyn_bsz"


@kinds
def test_max_steps_caps_each_epoch(path, kind):
    data, train = KINDS[kind]
    built = build(configure(path, data=data, max_steps=2, num_train_epochs=3, **train))
    assert built.total_steps == 6 and built.steps_reason.startswith("6 steps: 3 epochs of 2 ")
    assert [(one.epoch, one.epoch_end) for one in built.train()] == [
        (e, end) for e in range(3) for end in (False, True)
    ]
    assert "train.max_steps 2" in built.steps_reason


def test_a_batch_size_that_does_not_divide(path):
    with pytest.raises(ValueError, match=r"train\.global_batch_size 6 .* 2 times 2 .* = 4"):
        build(configure(path, micro_batch_size=2, global_batch_size=6), 0, 2)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"train": {"seed": 43}}, "train.seed is 43 but was 42"),
        ({"data": {"max_seq_len": 65}}, "data.max_seq_len is 65"),
        ({"data": {"shuffle": False}}, "data.shuffle is False"),
        ({"rows": 149}, "files, tokenizer, template"),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_resuming_on_other_data_is_refused(tmp_path, change, named, streamed):
    path = write(tmp_path / "a.jsonl", make_rows(150))
    config = configure(path, data=STREAMED if streamed else {})
    first = build(config)
    next(first.train())
    if "rows" in change:
        write(tmp_path / "a.jsonl", make_rows(149, first=500))
    groups = {
        group: dataclasses.replace(getattr(config, group), **change.get(group, {})) for group in ("data", "train")
    }
    other = build(dataclasses.replace(config, **groups))
    with pytest.raises(ValueError, match=named):
        other.load_state_dict(first.state_dict())


def test_evaluation_is_one_pass_in_order_over_all_ranks(path, tmp_path):
    held_out = write(tmp_path / "eval.jsonl", make_rows(13, first=5000))
    for data, train in KINDS.values():
        config = configure(path, data=data | {"eval_path": held_out}, **train)
        ranks = [build(config, rank, 4) for rank in range(4)]
        for _ in range(2):
            parts = [list(rank.evaluate()) for rank in ranks]
            assert len({len(part) for part in parts}) == 1
            assert sorted(ids(one for part in parts for one in part)) == list(range(5000, 5013))
            assert sum(one.num_samples for one in parts[0]) == 13
            assert {len(one.micro_batches) for part in parts for one in part} == {1}
    with pytest.raises(ValueError, match=r"data\.eval_path"):
        next(build(configure(path)).evaluate())


def test_evaluation_has_sources_of_its_own(path, tmp_path):
    for name in ("x", "y", "z"):
        write(tmp_path / f"{name}.jsonl", make_rows(4, first=5000))
    (tmp_path / "eval.yaml").write_text("sources: [x.jsonl, y.jsonl, z.jsonl]")
    data = build(configure(path, data={"eval_path": str(tmp_path / "eval.yaml")}, global_batch_size=12))
    (batch,) = data.evaluate()
    assert data.evaluation_sources == tuple(batch.source_tokens) == ("x", "y", "z")
    assert len(set(batch.source_tokens.values())) == 1 and sum(batch.source_tokens.values()) == batch.num_targets
    assert data.sources == tuple(next(data.train()).source_tokens) == ("train",)


def test_evaluation_does_not_disturb_training(path):
    config = configure(path, data={"eval_path": path}, dyn_bsz=True)
    expected = record(build(config).train())
    data = build(config)
    given = []
    for batch in data.train():
        given += record([batch])
        list(data.evaluate())
    assert given == expected


BAD = [{"id": 0, "n": 9}, {"bad": "no good"}, {"id": 2, "n": 9}, {"bad": "worse"}, {"bad": "no good"}]


@pytest.mark.parametrize("streamed", [False, True])
def test_bad_rows_stop_the_run_or_are_counted(tmp_path, streamed):
    path = write(tmp_path / "a.jsonl", BAD)
    data = STREAMED | {"train_sample": 4} if streamed else {}
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: no good.*data\.silent_exception") as error:
        list(build(configure(path, data=data)).train())
    assert streamed or "2 more bad rows" in str(error.value)
    silent = build(configure(path, data=data | {"silent_exception": True}))
    assert set(ids(silent.train())) == {0, 2}
    assert silent.report.dropped == {"no good": 2, "worse": 1}


@pytest.mark.parametrize("streamed", [False, True])
def test_nothing_but_bad_rows(tmp_path, streamed):
    path = write(tmp_path / "a.jsonl", [{"bad": "no good"}] * 3)
    data = (STREAMED if streamed else {}) | {"silent_exception": True}
    with pytest.raises(ValueError, match=r"data\.train_path has no"):
        list(build(configure(path, data=data)).train())


def test_rows_of_several_pieces(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", [{"id": 10 * number, "n": 5, "pieces": 3} for number in range(6)])
    expected = {10 * number + piece for number in range(6) for piece in range(3)}
    data = build(configure(path, global_batch_size=2))
    assert (data.report.rows, data.report.samples, data.total_steps) == (6, 18, 9)
    assert set(ids(data.train())) == expected
    monkeypatch.setattr(index, "KEEP_TOKENS", 0)
    assert set(ids(build(configure(path)).train())) == expected


def test_a_row_that_changes_during_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "KEEP_TOKENS", 0)
    path = tmp_path / "a.jsonl"
    data = build(configure(write(path, make_rows(5)), data={"shuffle": False}))
    monkeypatch.setattr(
        data._train.fetch.__closure__[1].cell_contents, "encoder", lambda rows, source: [[] for _ in rows]
    )
    with pytest.raises(ValueError, match="row 1 of source a has changed"):
        next(data.train())


def test_the_report(path):
    rows = make_rows(150)
    data = build(configure(path, micro_batch_size=4, dyn_bsz=True))
    tokens = sum(row["n"] for row in rows)
    report = data.report
    assert (report.rows, report.samples, report.tokens, report.trained_tokens) == (150, 150, tokens, tokens - 150)
    batches = list(data.train())
    efficiency = sum(one.num_tokens for one in batches) / sum(one.num_slots for one in batches)
    assert report.packing_efficiency == pytest.approx(efficiency)
    assert efficiency > 0.9


@pytest.mark.parametrize("streamed", [False, True])
def test_sources_are_counted_by_name(tmp_path, streamed):
    data = STREAMED | {"train_sample": 70} if streamed else {}
    built = build(configure(sources_yaml(tmp_path), data=data, global_batch_size=10))
    assert built.sources == ("few", "many")
    batches = list(built.train())
    for batch in batches:
        counts = Counter()
        for one in batch.micro_batches:
            few = int((one.labels[one.target_index] < 1000).sum())
            counts += Counter(few=few, many=len(one.target_index) - few)
        assert {name: counts[name] for name in ("few", "many")} == batch.source_tokens
    assert sorted(ids(batches)) == [*range(20), *range(1000, 1050)], "without weights each sample comes once"


@pytest.mark.parametrize("streamed", [False, True])
def test_weights_set_the_share_of_samples(tmp_path, streamed):
    path = sources_yaml(tmp_path, weights=[3, 1])
    data = STREAMED | {"train_sample": 80} if streamed else {}
    counts = [one >= 1000 for one in ids(build(configure(path, data=data, global_batch_size=10)).train())]
    assert sum(counts) / len(counts) == pytest.approx(1 / 4, abs=1 / len(counts))


def test_equal_weights_are_weights(tmp_path):
    counts = [one >= 1000 for one in ids(build(configure(sources_yaml(tmp_path, weights=[1, 1]))).train())]
    assert sum(counts) == 35


def test_weights_can_follow_a_schedule(tmp_path):
    schedule = [{"step": 0, "weights": [1, 0]}, {"step": 4, "weights": [0, 1]}]
    path = sources_yaml(tmp_path, weights={"schedule": schedule})
    batches = list(build(configure(path, global_batch_size=10)).train())
    shares = [np.mean([one >= 1000 for one in ids([batch])]) for batch in batches]
    assert shares == [0, 0, 0, 0, 1, 1, 1]


def two_ranks(path, bad_path):
    use_fake_encoder(setattr)
    dist = init_world(torch.device("cpu"))
    config = configure(path, micro_batch_size=2, global_batch_size=8, dyn_bsz=True)
    data = build(config, dist.rank, dist.size, dist)
    errors = []
    for silent in (False, True):
        try:
            build(configure(bad_path, data={"silent_exception": silent}), dist.rank, dist.size, dist)
        except ValueError as error:
            errors.append(str(error))
    return data.state_dict(), data.total_steps, record(data.train()), errors


def test_two_ranks_share_the_index(tmp_path):
    path = write(tmp_path / "a.jsonl", make_rows(300))
    rows = make_rows(200)
    rows[150] = {"bad": "no good"}
    bad_path = write(tmp_path / "bad.jsonl", rows)
    first, second = run_ranks(2, two_ranks, path, bad_path)
    alone = build(configure(path, micro_batch_size=2, global_batch_size=8, dyn_bsz=True))
    assert first[0] == second[0] == alone.state_dict()
    assert first[1] == second[1] == alone.total_steps
    for one, other, whole in zip(first[2], second[2], record(alone.train()), strict=True):
        assert one[3] == other[3] == whole[3]
        assert sorted(one[4] + other[4]) == sorted(whole[4])
    assert first[3] == second[3] and len(first[3]) == 1 and "line 151: no good" in first[3][0]


def test_too_little_for_packed_batches(tmp_path):
    path = write(tmp_path / "few.jsonl", make_rows(30))
    with pytest.raises(ValueError, match="30 samples, less than one global batch of 64 full micro batches"):
        build(configure(path, global_batch_size=64, dyn_bsz=True))
