"""Fetching: planned micro batches are read, encoded and packed, ahead of training.

Small data is already in memory (index.py) and is packed in this process, which takes microseconds per sample. Larger
data is read and encoded again by the worker processes of a torch DataLoader. A long row makes many samples, in as many
micro batches: it is encoded for the first of them, and its tokens are kept on disk for the others (`LongRows`). Nothing
here uses torch's global random numbers: the loader has its own generator.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tutti.config import Config
from tutti.core.batch import IGNORE, Batch, LostSample, Sample, pack
from tutti.core.files import cache_folder
from tutti.data.index import Index, encode_chunk, place_of
from tutti.data.rows import BrokenMediaError
from tutti.data.source import Source
from tutti.data.stream import StreamSample
from tutti.data.worker import be_a_worker, quiet_fork

log = logging.getLogger(__name__)

MANY_SAMPLES = 8
"""Samples from which on a row counts as long."""

KEEP_ON_DISK = 250_000_000
"""Maximum number of tokens of long rows that a rank keeps on disk (8 bytes each, with their labels)."""

SENT_WHOLE = 2**18
"""Maximum size in bytes of a tensor that a worker sends inside the message instead of in shared memory."""

Fetch = Callable[[Iterator[list[Any]]], Iterator[Batch]]
"""Packs lists of items into micro batches, one each, in order; may run ahead."""


@dataclass(frozen=True)
class Collator:
    """Makes micro batches of samples, with the media's values. pad_to, pad_id: as in `pack`. silent:
    data.silent_exception."""

    encoder: Any
    pad_to: int | None
    pad_id: int
    silent: bool = False

    def __call__(self, samples: Sequence[Sample], find: Callable[[int], str]) -> Batch:
        """The micro batch of `samples`. find: returns the file and line of a sample by its index in `samples`.

        A sample whose media fail to decode is left out if `silent`: padding tokens, none of them trained on, replace
        it, so that the step is as planned. Otherwise ValueError.
        """
        samples, broken = list(samples), list[LostSample]()
        while True:
            batch = pack(samples, pad_to=self.pad_to, pad_id=self.pad_id)
            if not any(sample.media for sample in samples):
                return replace(batch, broken=tuple(broken))
            try:
                extras = self.encoder.extras(samples, len(batch.input_ids))
            except BrokenMediaError as error:
                reason = f"{find(error.number)}: {error}"
                if not self.silent:
                    raise ValueError(f"{reason}; data.silent_exception: true skips bad rows") from None
                lost = samples[error.number]
                broken.append(LostSample(reason, lost.source, int((lost.labels != IGNORE).sum())))
                nothing = np.full(len(lost), IGNORE, np.int32)
                samples[error.number] = Sample(np.full_like(nothing, self.pad_id), nothing, lost.source, lost.split)
            else:
                return replace(batch, extras=extras, broken=tuple(broken))


class LongRows:
    """The tokens of an index's long rows, kept in a file once a row has been encoded.

    The file has no name, so that it disappears with the processes that hold it; forked workers share it. A sample's
    offset follows from the index. One byte per row, after all samples, says that the row is there. Workers that encode
    the same row at the same time write the same bytes.
    """

    def __init__(self, index: Index) -> None:
        self.index = index
        first = np.arange(len(index)) - index.piece
        pieces = np.bincount(first, minlength=len(index))[first]
        long = (pieces >= MANY_SAMPLES) & (index.num_media == 0)
        ends = 8 * np.cumsum(np.where(long, index.length, 0))
        long &= ends[first + pieces - 1] <= 8 * KEEP_ON_DISK
        self._places = np.where(long, ends - 8 * index.length, -1)
        self._flags = int(ends[-1])
        self._file = _nameless_file(int(ends[-1]) + len(index)) if long.any() else None

    def get(self, number: int) -> Sample | None:
        """The sample of this number; None if its row is not long or not there yet."""
        index, place = self.index, int(self._places[number])
        if self._file is None or place < 0:
            return None
        descriptor, length = self._file.fileno(), int(index.length[number])
        if os.pread(descriptor, 1, self._flags + number - int(index.piece[number])) != b"\1":
            return None
        ids, labels = np.frombuffer(os.pread(descriptor, 8 * length, place), np.int32).reshape(2, length)
        return Sample(ids, labels, int(index.source[number]), int(index.split[number]))

    def put(self, first: int, samples: Sequence[Sample]) -> None:
        """Keep all samples of the row whose first sample has this number, if the row is long. If the disk is full,
        nothing is kept."""
        place = int(self._places[first])
        if self._file is None or place < 0:
            return
        data = b"".join(np.stack([one.input_ids, one.labels]).astype(np.int32).tobytes() for one in samples)
        try:
            if os.pwrite(self._file.fileno(), data, place) == len(data):
                os.pwrite(self._file.fileno(), b"\1", self._flags + first)
        except OSError as error:
            log.warning("a long row is encoded again for each of its samples: %s", error)
            self._file = None


def _nameless_file(size: int) -> Any:
    """A sparse file of `size` zeros; None if it cannot be made."""
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        file.truncate(size)
    except OSError as error:
        log.warning("long rows are encoded again for each of their samples: %s", error)
        return None
    return file


class PackedSamples(Dataset):
    """Packs the samples of an index by number: from memory, or by reading and encoding their rows."""

    def __init__(self, index: Index, sources: Sequence[Source], collate: Collator) -> None:
        self.index, self.sources, self.collate, self.encoder = index, sources, collate, collate.encoder
        self._ends = np.cumsum(index.length if index.tokens is not None else [])
        self._long = LongRows(index) if index.tokens is None and index.learn is None else None

    def __getitems__(self, ids: list[int]) -> Batch | ValueError:
        """The micro batch of these samples, or the error: if raised in a worker, its message would include the
        worker's traceback."""
        tokens = self.index.tokens
        has_media = self.index.num_media[ids].any()
        try:
            samples = self.read(ids) if tokens is None or has_media else self._kept(tokens, ids)
            return self.collate(samples, lambda number: self._place(ids[number]))
        except ValueError as error:
            return error

    def _place(self, number: int) -> str:
        (row,) = self.sources[int(self.index.source[number])].rows([int(self.index.row[number])])
        return place_of(row)

    def _kept(self, tokens: np.ndarray, ids: list[int]) -> list[Sample]:
        index = self.index
        columns = (column[ids].tolist() for column in (self._ends, index.length, index.source, index.split))
        return [
            Sample(tokens[0, end - length : end], tokens[1, end - length : end], source, split)
            for end, length, source, split in zip(*columns, strict=True)
        ]

    def read(self, ids: list[int]) -> list[Sample]:
        """Samples by their numbers, with their media."""
        kept = {number: self._long.get(number) if self._long else None for number in ids}
        encoded = self._encode([number for number, sample in kept.items() if sample is None])
        return [kept[number] or encoded[number] for number in ids]

    def _encode(self, ids: list[int]) -> dict[int, Sample]:
        """Samples by their numbers, from their rows. ValueError: a row has changed."""
        index = self.index
        found: dict[int, Sample] = {}
        firsts = {number: number - int(index.piece[number]) for number in ids}
        for source in np.unique(index.source[ids]).tolist():
            first_of = {int(index.row[first]): first for first in firsts.values() if index.source[first] == source}
            rows = sorted(first_of)
            chunk = encode_chunk(self.encoder, source, rows, self.sources[source].rows(rows))
            of_row: dict[int, list[Sample]] = {row: [] for row in rows}
            for row, sample in zip(chunk.row.tolist(), chunk.samples(), strict=True):
                of_row[row].append(sample)
            for row, samples in of_row.items():
                first = first_of[row]
                here = slice(first, first + len(samples))
                found |= dict(enumerate(samples, start=first))
                ends = here.stop >= len(index) or index.piece[here.stop] == 0
                before = list(zip(index.piece[here].tolist(), index.length[here].tolist(), strict=True))
                now = [(piece, len(one) if index.length[first] else 0) for piece, one in enumerate(samples)]
                if not samples or not ends or before != now:
                    name = self.sources[source].name
                    raise ValueError(f"row {row + 1} of source {name} has changed during the run")
                if self._long:
                    self._long.put(first, samples)
        return found


def loader_options(config: Config, num_workers: int) -> dict[str, Any]:
    """The arguments of every DataLoader here."""
    options: dict[str, Any] = {
        "num_workers": num_workers,
        "collate_fn": _to_send if num_workers else _as_it_is,
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
    """True if batches go to page-locked memory: only useful with an accelerator."""
    return config.data.pin_memory and torch.accelerator.is_available()


def _as_it_is(batch: Any) -> Any:
    return batch


class _Sent(NamedTuple):
    """A batch sent by a worker, with its small tensors as arrays."""

    batch: Batch

    def received(self) -> Batch:
        """The batch with its arrays as tensors again."""
        return self.batch.map(lambda value: torch.from_numpy(value) if isinstance(value, np.ndarray) else value)

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory (the hook that torch's DataLoader calls)."""
        return self.received().pin_memory()


def _to_send(item: Any) -> Any:
    """A worker's result, prepared for sending: each tensor would be a shared-memory file that the trainer must ask
    for, while arrays are part of the message."""
    return _Sent(item.map(_as_array_if_small)) if isinstance(item, Batch) else item


def _as_array_if_small(value: Tensor) -> Any:
    return value if value.nbytes > SENT_WHOLE or value.dtype == torch.bfloat16 else value.numpy()


def fetch_indexed(samples: Dataset, options: dict[str, Any]) -> Fetch:
    """The fetch function of `samples`, which returns a micro batch for a list of items."""

    def fetch(batches: Iterator[list[Any]]) -> Iterator[Batch]:
        with quiet_fork():
            return _raised(iter(DataLoader(samples, batch_sampler=batches, **options)))

    return fetch


def _raised(batches: Iterator[Batch | _Sent | ValueError]) -> Iterator[Batch]:
    """The batches; raises the first that is an error."""
    for batch in batches:
        if isinstance(batch, ValueError):
            raise batch
        yield batch.received() if isinstance(batch, _Sent) else batch


class PackedStream(Dataset):
    """Packs samples of a stream, decoding their media."""

    def __init__(self, collate: Collator) -> None:
        self.collate = collate

    def __getitems__(self, items: list[StreamSample]) -> Batch | ValueError:
        """The micro batch of these samples, or the error."""
        try:
            return self.collate([item.sample for item in items], lambda number: items[number].place)
        except ValueError as error:
            return error


def fetch_streamed(config: Config, collate: Collator, *, decodes: bool = False) -> Fetch:
    """The fetch function for samples already in memory: packed in this process, unless there are media to decode."""
    samples, pins = PackedStream(collate), pins_memory(config)
    if decodes and config.data.num_workers:
        return fetch_indexed(samples, loader_options(config, config.data.num_workers))

    def fetch(batches: Iterator[list[StreamSample]]) -> Iterator[Batch]:
        for batch in _raised(map(samples.__getitems__, batches)):
            yield batch.pin_memory() if pins else batch

    return fetch
