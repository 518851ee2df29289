"""Fetching: planned micro batches are read, encoded and packed, ahead of training.

Small data lies in memory already (index.py) and is packed in this process, which takes microseconds a sample. Larger
data is read and encoded again, by the worker processes of a torch DataLoader. Nothing here uses random numbers, and
the loader draws its seed from a generator of its own, so that the state of torch's generator stays the trainer's.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from tutti.config import Config
from tutti.core.batch import Batch, Sample, pack
from tutti.data.index import Index, encode_chunk
from tutti.data.rows import RowError
from tutti.data.source import Source
from tutti.data.stream import StreamSample
from tutti.data.worker import be_a_worker, quiet_fork

Fetch = Callable[[Iterator[list[Any]]], Iterator[Batch]]
"""Turns lists of items into packed micro batches, one each, in order; may run ahead."""


def pack_samples(samples: Sequence[Sample], encoder: Any, pad_to: int | None, pad_id: int) -> Batch:
    """A micro batch of samples, with what the model takes beside their tokens. ValueError: a medium is broken."""
    batch = pack(samples, pad_to=pad_to, pad_id=pad_id)
    if not any(sample.media for sample in samples):
        return batch
    try:
        return replace(batch, extras=encoder.extras(samples, len(batch.input_ids)))
    except RowError as error:
        raise ValueError(f"a row that was good when the data was opened is no longer: {error}") from None


class PackedSamples(Dataset):
    """Packs the samples of an index by their numbers: from memory, or reading and encoding their rows."""

    def __init__(self, index: Index, sources: Sequence[Source], encoder: Any, pad_to: int | None, pad_id: int) -> None:
        self.index, self.sources, self.encoder = index, sources, encoder
        self.pad_to, self.pad_id = pad_to, pad_id
        self._ends = np.cumsum(index.length)

    def __getitems__(self, ids: list[int]) -> Batch:
        tokens = self.index.tokens
        has_media = self.index.num_media[ids].any()
        samples = self._read(ids) if tokens is None or has_media else self._kept(tokens, ids)
        return pack_samples(samples, self.encoder, self.pad_to, self.pad_id)

    def _kept(self, tokens: np.ndarray, ids: list[int]) -> list[Sample]:
        index = self.index
        columns = (column[ids].tolist() for column in (self._ends, index.length, index.source, index.split))
        return [
            Sample(tokens[0, end - length : end], tokens[1, end - length : end], source, split)
            for end, length, source, split in zip(*columns, strict=True)
        ]

    def _read(self, ids: list[int]) -> list[Sample]:
        index = self.index
        names = list(zip(*(column[ids].tolist() for column in (index.source, index.row, index.piece)), strict=True))
        found: dict[tuple[int, int, int], Sample] = {}
        for source in sorted({source for source, _, _ in names}):
            rows = sorted({row for owner, row, _ in names if owner == source})
            chunk = encode_chunk(self.encoder, source, rows, self.sources[source].rows(rows))
            places = zip(chunk.row.tolist(), chunk.piece.tolist(), chunk.samples(), strict=True)
            found |= {(source, row, piece): sample for row, piece, sample in places}
        for name, length in zip(names, index.length[ids].tolist(), strict=True):
            if name not in found or len(found[name]) != length:
                raise ValueError(f"row {name[1] + 1} of source {self.sources[name[0]].name} has changed during the run")
        return [found[name] for name in names]


def loader_options(config: Config, num_workers: int) -> dict[str, Any]:
    """What every DataLoader here is made with."""
    options: dict[str, Any] = {
        "num_workers": num_workers,
        "collate_fn": _as_it_is,
        "pin_memory": pins_memory(config),
        "generator": torch.Generator().manual_seed(config.train.seed),
    }
    if num_workers:
        options |= {
            "prefetch_factor": config.data.prefetch_factor,
            "multiprocessing_context": multiprocessing.get_context("fork"),
            "worker_init_fn": be_a_worker,
        }
    return options


def pins_memory(config: Config) -> bool:
    """Whether batches go to page-locked memory: only an accelerator has any use for that."""
    return config.data.pin_memory and torch.cuda.is_available()


def _as_it_is(batch: Any) -> Any:
    return batch


def fetch_indexed(samples: PackedSamples, options: dict[str, Any]) -> Fetch:
    """Micro batches of an index, by sample numbers."""

    def fetch(batches: Iterator[list[int]]) -> Iterator[Batch]:
        with quiet_fork():
            return iter(DataLoader(samples, batch_sampler=batches, **options))

    return fetch


def fetch_streamed(config: Config, encoder: Any, pad_to: int | None, pad_id: int) -> Fetch:
    """Micro batches of samples that are here already."""
    pins = pins_memory(config)

    def fetch(batches: Iterator[list[StreamSample]]) -> Iterator[Batch]:
        for items in batches:
            batch = pack_samples([item.sample for item in items], encoder, pad_to, pad_id)
            yield batch.pin_memory() if pins else batch

    return fetch
