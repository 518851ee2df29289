"""Fetching: how far workers prepare ahead, and where batches go."""

from __future__ import annotations

import multiprocessing

import numpy as np
import pytest
import torch

from tutti.config.load import from_dict
from tutti.core.batch import Batch, Sample
from tutti.data import prefetch as fetch
from tutti.data.stream import StreamSample


class Echo(torch.utils.data.Dataset):
    """Gives back what it is asked for."""

    def __getitems__(self, ids):
        return ids


@pytest.mark.parametrize(("num_workers", "factor"), [(0, 1), (1, 3), (2, 1), (2, 3)])
def test_each_worker_prepares_as_many_batches_ahead_as_asked(num_workers, factor):
    config = from_dict({"data": {"prefetch_factor": factor}})
    before, asked = len(multiprocessing.active_children()), []
    batches = fetch.fetch_indexed(Echo(), fetch.loader_options(config, num_workers))(
        asked.append(n) or [n] for n in range(50)
    )
    assert next(batches) == [0]
    assert len(multiprocessing.active_children()) - before == num_workers
    assert len(asked) == 1 + num_workers * factor


@pytest.mark.parametrize("pins", [True, False])
def test_batches_go_to_page_locked_memory_where_there_is_an_accelerator(monkeypatch, pins):
    config = from_dict({"data": {"pin_memory": pins}})
    assert not fetch.loader_options(config, 0)["pin_memory"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert fetch.loader_options(config, 0)["pin_memory"] == pins
    monkeypatch.setattr(Batch, "pin_memory", lambda batch: ("pinned", batch))
    one = Sample(np.ones(3, np.int32), np.ones(3, np.int32), 0)
    (batch,) = fetch.fetch_streamed(config, None, 0)(iter([[StreamSample(0, 0, 0, 3, one)]]))
    assert isinstance(batch, tuple) == pins
