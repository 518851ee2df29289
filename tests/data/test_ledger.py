"""Ten thousand samples over changing numbers of ranks: every one is trained on exactly once an epoch."""

from __future__ import annotations

import json
from collections import Counter
from itertools import accumulate, chain
from pathlib import Path

import pytest

from tests.data.fakes import build, configure, fake_encoder, make_rows, samples_of, write

__all__ = ["fake_encoder"]  # a fixture that every test here uses
COUNT, EPOCHS, WORLDS = 10_000, 2, (1, 2, 4, 2)


@pytest.mark.parametrize(("streamed", "dynamic"), [(False, True), (True, False)], ids=["packed", "streamed"])
def test_every_sample_once_an_epoch_however_many_ranks(tmp_path: Path, *, streamed: bool, dynamic: bool) -> None:
    """A quarter of the steps on each number of ranks, each going on from the state that the one before it left."""
    rows = make_rows(COUNT)
    path = write(tmp_path / "rows.jsonl", rows)
    data = {"drop_last": False, "shuffle_buffer_size": 64}
    train = {"micro_batch_size": 2, "global_batch_size": 40, "dyn_bsz": dynamic, "num_train_epochs": EPOCHS}
    if streamed:
        tokens = sum(row["n"] for row in rows)
        data |= {"datasets_type": "iterable", "train_sample": COUNT, "train_size": tokens}
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
    assert Counter(chain(*ledger)) == dict.fromkeys(range(COUNT), EPOCHS)
    # One step may hold the end of an epoch and the beginning of the next.
    ends = list(accumulate(map(len, ledger)))
    first = sum(end <= COUNT for end in ends)
    for name, part in {"first": ledger[:first], "second": ledger[first + (ends[first - 1] < COUNT) :]}.items():
        assert max(Counter(chain(*part)).values()) == 1, f"a sample is twice in the {name} epoch"
