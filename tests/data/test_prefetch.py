"""Prefetching: how far workers prepare ahead, and how batches reach the trainer."""

from __future__ import annotations

import multiprocessing
import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.data.fakes import ALONE, sample
from tutti.config.load import from_dict
from tutti.core.batch import Batch, Sample, pack
from tutti.data import index
from tutti.data import prefetch as fetch
from tutti.data.index import build_index
from tutti.data.stream import StreamSample
from tutti.data.worker import NICE


class Echo(torch.utils.data.Dataset):
    """Returns its input."""

    def __getitems__(self, ids):
        return ids


@pytest.mark.parametrize(("num_workers", "factor"), [(0, 1), (1, 3), (2, 1), (2, 3)])
def test_each_worker_prepares_as_many_batches_ahead_as_asked(num_workers, factor):
    config = from_dict({"data": {"prefetch_factor": factor}})
    before, asked = set(multiprocessing.active_children()), []
    batches = fetch.fetch_indexed(Echo(), fetch.loader_options(config, num_workers))(
        asked.append(n) or [n] for n in range(50)
    )
    assert next(batches) == [0]
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == num_workers
    # The worker that answered leaves the cores to the threads of the step.
    assert not workers or max(os.getpriority(os.PRIO_PROCESS, one.pid) for one in workers) == min(19, os.nice(0) + NICE)
    assert len(asked) == 1 + num_workers * factor


class Large(torch.utils.data.Dataset):
    """Micro batches of these numbers of tokens, with values of which one kind is large."""

    def __getitems__(self, lengths):
        batch = pack([sample(0, length, 0) for length in lengths])
        values = {"pixel_values": torch.arange(90_000.0), "grid": torch.tensor([[1, 2, 3]])}
        return replace(batch, extras=values, payload={"half": torch.ones(3, dtype=torch.bfloat16)})


def test_a_worker_sends_small_tensors_as_arrays():
    """Unless they have a dtype that numpy lacks; the trainer gets the batch that it was."""
    want = Large().__getitems__([3, 5])
    sent = fetch._to_send(want).batch
    assert all(isinstance(value, np.ndarray) for value in (sent.input_ids, sent.cu_seqlens, sent.extras["grid"]))
    assert sent.extras["pixel_values"] is want.extras["pixel_values"] and sent.payload["half"] is want.payload["half"]
    got = next(fetch.fetch_indexed(Large(), fetch.loader_options(from_dict({}), 1))(iter([[3, 5]])))
    assert got.input_ids.equal(want.input_ids) and got.labels.equal(want.labels)
    assert all(got.extras[name].equal(want.extras[name]) for name in ("grid", "pixel_values"))
    assert got.payload["half"].equal(want.payload["half"])


@pytest.mark.parametrize("pins", [True, False])
def test_batches_go_to_page_locked_memory_where_there_is_an_accelerator(monkeypatch, pins):
    config = from_dict({"data": {"pin_memory": pins}})
    assert not fetch.loader_options(config, 0)["pin_memory"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert fetch.loader_options(config, 0)["pin_memory"] == pins
    monkeypatch.setattr(Batch, "pin_memory", lambda batch: ("pinned", batch))
    one = Sample(np.ones(3, np.int32), np.ones(3, np.int32), 0)
    (batch,) = fetch.fetch_streamed(config, fetch.Collator(None, None, 0))(iter([[StreamSample(0, 0, 0, 3, one)]]))
    assert isinstance(batch, tuple) == pins


class Rows:
    """A source of rows of (id, samples); counts how often each is encoded, by any process."""

    name = "rows"

    def __init__(self, folder, rows):
        self.folder, self._rows = folder, rows

    def __len__(self):
        return len(self._rows)

    def rows(self, numbers):
        return [(number, *self._rows[number]) for number in numbers]

    def encode(self, rows, source):
        for number, *_ in rows:
            with (self.folder / str(number)).open("a") as file:
                file.write("x")
        return [[sample(start + piece, 3 + piece % 5, source) for piece in range(count)] for _, start, count in rows]

    def counts(self):
        return {path.name: len(path.read_text()) for path in self.folder.iterdir()}


@pytest.fixture
def long_and_short(tmp_path, monkeypatch):
    """Rows of 20, 1 and 9 samples, and their index without tokens."""
    monkeypatch.setattr(index, "KEEP_TOKENS", 0)
    monkeypatch.setenv("TUTTI_CACHE", str(tmp_path / "cache"))
    (tmp_path / "counts").mkdir()
    rows = Rows(tmp_path / "counts", [(100, 20), (200, 1), (300, 9)])
    found = build_index([rows], rows.encode, ALONE, num_workers=0, silent=False, argument="data.train_path")
    return rows, found


def fetched(rows, found, num_workers, passes=1):
    samples = fetch.PackedSamples(found, [rows], fetch.Collator(rows.encode, None, 0))
    options = fetch.loader_options(from_dict({}), num_workers)
    order = [[int(n)] for seed in range(passes) for n in np.random.default_rng(seed).permutation(len(found))]
    return [
        (batch.input_ids.tolist(), batch.labels.tolist())
        for batch in fetch.fetch_indexed(samples, options)(iter(order))
    ]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_long_row_is_encoded_once_and_not_for_each_of_its_samples(long_and_short, monkeypatch, num_workers):
    rows, found = long_and_short
    assert rows.counts() == {"0": 1, "1": 1, "2": 1}, "by the index"
    kept = fetched(rows, found, num_workers, passes=3)
    counts = {row: count - 1 for row, count in rows.counts().items()}
    assert 1 <= counts["0"] <= max(1, num_workers) and 1 <= counts["2"] <= max(1, num_workers)
    assert counts["1"] == 3, "a short one is encoded each time"
    assert list((rows.folder.parent / "cache").iterdir()) == [], "the file has no name"
    monkeypatch.setattr(fetch, "KEEP_ON_DISK", 0)
    assert fetched(rows, found, 0, passes=3) == kept


def test_long_rows_beyond_the_room_on_disk_are_encoded_again(long_and_short, monkeypatch):
    rows, found = long_and_short
    monkeypatch.setattr(fetch, "KEEP_ON_DISK", int(found.length[:20].sum()))
    fetched(rows, found, 0)
    assert rows.counts() == {"0": 2, "1": 2, "2": 10}


@pytest.mark.parametrize("folder", ["a file", "a full disk"])
def test_where_nothing_can_be_kept_long_rows_are_encoded_again(long_and_short, monkeypatch, folder):
    rows, found = long_and_short
    if folder == "a file":
        (rows.folder.parent / "file").touch()
        monkeypatch.setenv("TUTTI_CACHE", str(rows.folder.parent / "file"))
    else:
        monkeypatch.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert len(fetched(rows, found, 0)) == 30
    assert rows.counts() == {"0": 21, "1": 2, "2": 10}


def test_a_long_row_that_changes_is_refused(long_and_short):
    rows, found = long_and_short
    rows._rows[0] = (100, 21)
    with pytest.raises(ValueError, match="row 1 of source rows has changed during the run"):
        fetched(rows, found, 0)
