"""Ten thousand samples on changing numbers of ranks: each is trained on exactly once per epoch.

Here only the data is iterated; `make soak` uses runs that train, are told to stop, and resume.
"""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import pytest

from tests.data.fakes import build, configure, fake_encoder, make_rows, samples_of, use_fake_encoder, write
from tests.harness import run_ranks
from tests.train.runs import tiny_config, train_quietly, write_model_config
from tutti.config import Config

__all__ = ["fake_encoder"]  # a fixture that every test here uses
COUNT, EPOCHS, WORLDS = 10_000, 2, (1, 2, 4, 2)
KINDS = pytest.mark.parametrize(("streamed", "dynamic"), [(False, True), (True, False)], ids=["packed", "streamed"])


def settings(folder: Path, streamed: bool, dynamic: bool) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The path of the rows, and arguments of the groups data and train."""
    rows = make_rows(COUNT)
    path = write(folder / "rows.jsonl", rows)
    data: dict[str, Any] = {"drop_last": False, "shuffle_buffer_size": 64}
    if streamed:
        tokens = sum(row["n"] for row in rows)
        data |= {"datasets_type": "iterable", "train_sample": COUNT, "train_size": tokens}
    train = {"micro_batch_size": 2, "global_batch_size": 40, "dyn_bsz": dynamic, "num_train_epochs": EPOCHS}
    return path, data, train


@KINDS
def test_every_sample_once_an_epoch_however_many_ranks(tmp_path: Path, *, streamed: bool, dynamic: bool) -> None:
    """A quarter of the steps on each number of ranks, each resuming from the state of the previous one."""
    path, data, train = settings(tmp_path, streamed, dynamic)
    config = configure(path, data=data, **train)
    steps = build(config).total_steps
    state, done = None, 0
    ledger: list[list[int]] = []
    for number, world in enumerate(WORLDS, start=1):
        until = steps * number // len(WORLDS)
        ranks = [build(config, rank, world) for rank in range(world)]
        for rank in ranks:
            if state is not None:
                rank.load_state_dict(state)
        dealt = [rank.train() for rank in ranks]
        for step in range(done + 1, until + 1):
            batches = [next(one) for one in dealt]
            assert {batch.step for batch in batches} == {step}
            assert len({batch.num_samples for batch in batches}) == 1
            found = [sample for batch in batches for micro in batch.micro_batches for sample in samples_of(micro)]
            assert len(found) == batches[0].num_samples
            ledger.append(found)
        state, done = json.loads(json.dumps(ranks[0].state_dict())), until
    assert_every_sample_once_an_epoch(ledger)


def assert_every_sample_once_an_epoch(ledger: list[list[int]]) -> None:
    """Check that the samples of all steps, in order, are `EPOCHS` passes over the rows, one after the other."""
    assert Counter(chain(*ledger)) == dict.fromkeys(range(COUNT), EPOCHS)
    # One step may hold the end of an epoch and the beginning of the next.
    ends = list(accumulate(map(len, ledger)))
    first = sum(end <= COUNT for end in ends)
    for name, part in {"first": ledger[:first], "second": ledger[first + (ends[first - 1] < COUNT) :]}.items():
        assert max(Counter(chain(*part)).values()) == 1, f"a sample is twice in the {name} epoch"


def train_until(config: Config, last: int | None) -> dict[int, list[int]]:
    """Train, and be told to stop in step `last`; the samples that this rank was given, by step."""
    from tutti.train.step import TrainStep

    original = TrainStep.step
    given: dict[int, list[int]] = {}

    def step(self: Any, batch: Any, totals: Any) -> None:
        given[batch.step] = [sample for micro in batch.micro_batches for sample in samples_of(micro)]
        if batch.step == last and os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, batch, totals)

    TrainStep.step = step  # type: ignore[method-assign]
    use_fake_encoder(setattr)
    train_quietly(config)
    return given


@pytest.mark.skipif(not os.environ.get("SOAK"), reason="runs with make soak")
@KINDS
def test_every_sample_once_an_epoch_of_runs_that_go_on_on_other_numbers_of_ranks(
    tmp_path: Path, *, streamed: bool, dynamic: bool
) -> None:
    path, data, train = settings(tmp_path, streamed, dynamic)
    train |= {"micro_batch_size": 10, "global_batch_size": 80}  # fewer and longer steps, in a minute of both cores
    small = {"vocab_size": COUNT, "hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8}
    named = {f"data.{name}": value for name, value in data.items()}
    named |= {f"train.{name}": value for name, value in train.items()}
    named |= {
        "model.config_path": write_model_config(tmp_path / "small", **small),
        "data.train_path": path,
        "data.max_seq_len": 64,
        "train.max_steps": None,
        "train.data_parallel_mode": "fsdp2",
        "train.load_checkpoint_path": "auto",
    }
    steps = build(configure(path, data={**data, "max_seq_len": 64}, **train)).total_steps
    ledger: list[list[int]] = []
    for number, world in enumerate(WORLDS, start=1):
        last = steps * number // len(WORLDS) if number < len(WORLDS) else None
        ranks = run_ranks(world, train_until, tiny_config(tmp_path, world=world, **named), last)
        taken = [sorted(given) for given in ranks]
        assert taken == [list(range(len(ledger) + 1, (last or steps) + 1))] * world
        ledger += [[sample for given in ranks for sample in given[step]] for step in taken[0]]
    assert_every_sample_once_an_epoch(ledger)
