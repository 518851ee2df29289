"""The index of data with random access: the length of each sample, and its number of trained tokens.

Steps and packing are planned from lengths, so all rows are tokenised once before training begins:

1. The rows of all sources are split into chunks, and the chunks are distributed over the ranks.
2. Each rank encodes its chunks: in this process, or in `data.num_workers` processes if the first chunks show that it
   will take seconds.
3. All ranks gather all results, in the order of the chunks, so that every rank has the same index.

The tokens themselves are kept if there are at most `KEEP_TOKENS`: small data is then never tokenised again, and needs
no worker processes. The rows of larger data are read and encoded again when they are needed (prefetch.py).

A row that cannot be used stops the run, on all ranks, with its file, line and reason; with `data.silent_exception` it
is left out and counted. `digest` is a checksum of all tokens and labels, by which a resumed run recognises the data.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import multiprocessing
import os
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import reduce
from itertools import chain
from typing import Any

import numpy as np

from tutti.config.nouns import counted
from tutti.core.batch import IGNORE, Media, Sample
from tutti.core.dist import World
from tutti.data.formats import BadRow, Row
from tutti.data.media import MediaSummary, identity
from tutti.data.mix import LearnsLengths, Mix, Permuted, SampleRef, Weights
from tutti.data.worker import be_a_worker, quiet_fork

log = logging.getLogger(__name__)

CHUNK = 64
"""Rows encoded at a time."""

KEEP_TOKENS = 32_000_000
"""The tokens of data are kept in memory up to this number (8 bytes each, with their labels)."""

_POOL_SECONDS = 2.0
"""Seconds of encoding that are not worth starting processes for."""

_LONG_SECONDS = 120.0
_LOG_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive encoded rows of one source: n samples with T tokens in total.

    row, piece, length, targets, split, num_values, bucket: int64 [n]; targets counts the trained tokens; the last three
    are as in Sample. media, places: [n]; media as in Sample; places are each sample's file and line, or empty if no
    sample has media. tokens: int32 [2, T], ids above labels, or None if only the numbers are wanted. crc: of the
    tokens. bad: the rows left out. bad_numbers: their row numbers. rows: the number of rows. first: the number of the
    first one. notes: counts of rows with content that does not reach the model, by its description. summary: of the
    media.
    """

    source: int
    row: np.ndarray
    piece: np.ndarray
    length: np.ndarray
    targets: np.ndarray
    split: np.ndarray
    num_values: np.ndarray
    bucket: np.ndarray
    media: list[tuple[Media, ...]]
    places: list[str]
    tokens: np.ndarray | None
    bad: tuple[Any, ...]
    bad_numbers: tuple[int, ...]
    rows: int
    first: int
    crc: int
    notes: Counter[str]
    summary: MediaSummary

    def samples(self) -> Iterator[Sample]:
        """The samples, each with its own memory."""
        assert self.tokens is not None
        end = 0
        media = self.media or [()] * len(self.length)
        columns = (column.tolist() for column in (self.length, self.split, self.num_values, self.bucket))
        for length, split, values, bucket, found in zip(*columns, media, strict=True):
            start, end = end, end + length
            ids, labels = self.tokens[:, start:end].copy()
            yield Sample(ids, labels, self.source, split, found, values, bucket)


def encode_chunk(encoder: Any, source: int, numbers: Sequence[int], rows: Sequence[Any]) -> Chunk:
    """Encode `rows` of `source`, whose row numbers are `numbers`. Takes the `notes` of `encoder`, if it has any."""
    found = []
    bad, bad_numbers = [], []
    empty: Counter[str] = Counter()
    notes = getattr(encoder, "notes", empty)
    notes.clear()
    for number, encoded in zip(numbers, encoder(rows, source), strict=True):
        if isinstance(encoded, list):
            found += [(number, piece, sample) for piece, sample in enumerate(encoded)]
        else:
            bad.append(encoded)
            bad_numbers.append(number)
    tokens = np.empty((2, sum(len(sample) for _, _, sample in found)), np.int32)
    if found:
        np.concatenate([sample.input_ids for _, _, sample in found], out=tokens[0], casting="same_kind")
        np.concatenate([sample.labels for _, _, sample in found], out=tokens[1], casting="same_kind")
    length = np.array([len(sample) for _, _, sample in found], np.int64)
    media = [sample.media for _, _, sample in found]
    of_row = dict(zip(numbers, rows, strict=True)) if any(media) else {}
    return Chunk(
        source=source,
        row=np.array([number for number, _, _ in found], np.int64),
        piece=np.array([piece for _, piece, _ in found], np.int64),
        length=length,
        targets=_sums(tokens[1] != IGNORE, length),
        split=np.array([sample.split for _, _, sample in found], np.int64),
        num_values=np.array([sample.num_values for _, _, sample in found], np.int64),
        bucket=np.array([sample.bucket for _, _, sample in found], np.int64),
        media=media if any(media) else [],
        places=[place_of(of_row[number]) for number, _, _ in found] if any(media) else [],
        tokens=tokens,
        bad=tuple(bad),
        bad_numbers=tuple(bad_numbers),
        rows=len(numbers),
        first=numbers[0] if numbers else 0,
        crc=reduce(lambda crc, medium: zlib.crc32(identity(medium), crc), chain(*media), zlib.crc32(tokens.data)),
        notes=Counter(notes),
        summary=encoder.summarize_media([sample for _, _, sample in found]) if any(media) else MediaSummary(),
    )


def _sums(values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Sums of `values` over consecutive segments of `lengths`."""
    totals = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    ends = np.cumsum(lengths)
    return totals[ends] - totals[ends - lengths]


@dataclass(frozen=True)
class Index:
    """All samples of the data, by source and row: n samples. tokens, notes: as in Chunk; no tokens if there are too
    many.

    num_media: the number of media of each sample (its row is read again for training). num_values: the number of their
    values. media: a summary of all media. learn: finds lengths and targets, which are 0 before, if rows are tokenised
    as they are drawn (learn.py).
    """

    source: np.ndarray
    row: np.ndarray
    piece: np.ndarray
    length: np.ndarray
    targets: np.ndarray
    split: np.ndarray
    bucket: np.ndarray
    num_media: np.ndarray
    num_values: np.ndarray
    tokens: np.ndarray | None
    rows: int
    dropped: dict[str, int]
    notes: Counter[str]
    digest: str
    media: MediaSummary
    learn: LearnsLengths | None = None

    def __len__(self) -> int:
        return len(self.length)


class MapSource:
    """The samples of an index as a `SampleSource`: items are sample numbers."""

    def __init__(self, index: Index, weights: Weights | None, names: Sequence[str], seed: int, shuffle: bool) -> None:
        self.index, self.weights, self.names, self.seed, self.shuffle = index, weights, names, seed, shuffle
        self.size: int | None = len(index)

    @property
    def knows_lengths(self) -> bool:
        """False if lengths are found as samples are drawn."""
        return self.index.learn is None

    def mix(self) -> Mix:
        """One stream over all samples; with weights, one stream per source."""
        index = self.index
        groups: list[np.ndarray | int]
        if self.weights is None:
            groups = [len(index) if self.shuffle else _interleaved(index.source)]
        else:
            groups = [np.flatnonzero(index.source == source) for source in range(len(self.names))]
            if empty := [name for name, ids in zip(self.names, groups, strict=True) if not np.size(ids)]:
                raise ValueError(f"data.train_path: source {empty[0]} has a weight but no usable row")
        streams = [
            Permuted(ids, index.length, key=(self.seed, number), shuffle=self.shuffle, learn=index.learn)
            for number, ids in enumerate(groups)
        ]
        return Mix(streams, self.weights, self.size)

    def facts(self, items: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        ids = np.asarray(items, np.int64)
        return self.index.targets[ids], self.index.source[ids]

    def num_values(self, items: Sequence[int]) -> int:
        return int(self.index.num_values[np.asarray(items, np.int64)].sum())

    def bucket(self, item: int) -> int:
        return int(self.index.bucket[item])

    def name(self, item: int) -> int:
        return item

    def find(self, names: Sequence[int]) -> list[SampleRef]:
        if self.index.learn is not None:
            self.index.learn(np.array(names, np.int64), np.array([], np.int64))
        return [(int(self.index.length[name]), name) for name in names]


def _interleaved(source: np.ndarray) -> np.ndarray:
    """The samples in order, with the sources spread evenly."""
    place = np.empty(len(source))
    for one in np.unique(source):
        ids = np.flatnonzero(source == one)
        place[ids] = (np.arange(len(ids)) + 0.5) / len(ids)
    return np.argsort(place, kind="stable")


def build_index(
    sources: Sequence[Any], encoder: Any, world: World, *, num_workers: int, silent: bool, argument: str, hint: str = ""
) -> Index:
    """Encode all rows of `sources` once, distributed over the ranks; returns the same index on every rank.

    argument: the dotted argument that names the data, for messages. hint: the way to start at once, for the log.
    ValueError on all ranks: a bad row (unless `silent`), or no samples.
    """
    lengths = world.run_on_all_ranks(lambda: [len(source) for source in sources])
    for rank, others in enumerate(world.gather(lengths)):
        if others != lengths:
            raise ValueError(f"{argument} has other rows on rank {rank} than on others: {others}, not {lengths}")
    spans = [
        (number, start, min(start + CHUNK, length))
        for number, length in enumerate(lengths)
        for start in range(0, length, CHUNK)
    ]
    if not spans:
        raise ValueError(f"{argument} is empty: it has no rows")
    mine = world.run_on_all_ranks(
        lambda: _encode_spans(sources, encoder, spans[world.rank :: world.size], num_workers, hint)
    )
    if sum(world.gather(sum(int(chunk.length.sum()) for chunk in mine))) > KEEP_TOKENS:
        mine = [replace(chunk, tokens=None) for chunk in mine]
    shares = world.gather(mine)
    chunks = [shares[place % world.size][place // world.size] for place in range(len(spans))]
    bad = [row for chunk in chunks for row in chunk.bad]
    if bad and not silent:
        raise bad_row_error(bad[0], len(bad) - 1)
    dropped = dict(Counter(row.reason for row in bad))
    if not any(len(chunk.row) for chunk in chunks):
        raise ValueError(f"{argument} has no usable row{left_out(len(bad), dropped)}")
    return _join(chunks, dropped)


def place_of(row: Row | BadRow) -> str:
    """The file and line of a row, for messages."""
    return f"{row.file}, line {row.line}"


def bad_row_error(row: Any, more: int = 0) -> ValueError:
    """The error about a bad row, with advice."""
    follow = "follows" if more == 1 else "follow"
    others = f" ({counted(more, 'more bad row')} {follow})" if more else ""
    return ValueError(f"{place_of(row)}: {row.reason}{others}; data.silent_exception: true skips bad rows")


def log_left_out(argument: str, rows: int, dropped: Mapping[str, int]) -> None:
    """Log how many of `rows` rows were left out, by reason."""
    for reason, count in dropped.items():
        log.warning("%s: left out %s of %s rows: %s", argument, f"{count:,}", f"{rows:,}", reason)


def left_out(rows: int, dropped: Mapping[str, int]) -> str:
    """The end of a message about `rows` rows that are all bad: the count for each reason."""
    reasons = "; ".join(f"{count} x {reason}" for reason, count in dropped.items())
    all_rows = f"all {rows:,} were" if rows > 1 else "the only one was"
    return f": {all_rows} left out ({reasons})" if reasons else ""


def _num_media(chunk: Chunk) -> np.ndarray:
    return np.array([len(media) for media in chunk.media or [()] * len(chunk.row)], np.int64)


def _join(chunks: list[Chunk], dropped: dict[str, int]) -> Index:
    length = np.concatenate([chunk.length for chunk in chunks])
    kept = [chunk.tokens for chunk in chunks if chunk.tokens is not None]
    columns: dict[str, Any] = {
        "source": np.concatenate([np.full(len(chunk.row), chunk.source, np.int64) for chunk in chunks]),
        "row": np.concatenate([chunk.row for chunk in chunks]),
        "piece": np.concatenate([chunk.piece for chunk in chunks]),
        "length": length,
        "targets": np.concatenate([chunk.targets for chunk in chunks]),
        "split": np.concatenate([chunk.split for chunk in chunks]),
        "bucket": np.concatenate([chunk.bucket for chunk in chunks]),
        "num_media": np.concatenate([_num_media(chunk) for chunk in chunks]),
        "num_values": np.concatenate([chunk.num_values for chunk in chunks]),
    }
    digest = hashlib.sha256(np.array([chunk.crc for chunk in chunks], np.int64).tobytes())
    for column in (columns[name] for name in columns if name != "bucket"):  # it follows from the others
        digest.update(column.tobytes())
    return Index(
        **columns,
        tokens=np.concatenate(kept, axis=1) if kept else None,
        rows=sum(chunk.rows for chunk in chunks),
        dropped=dropped,
        notes=sum((chunk.notes for chunk in chunks), Counter()),
        digest=digest.hexdigest()[:32],
        media=sum((chunk.summary for chunk in chunks), MediaSummary()),
    )


def _encode_spans(
    sources: Sequence[Any], encoder: Any, spans: list[tuple[int, int, int]], num_workers: int, hint: str
) -> list[Chunk]:
    chunks: list[Chunk] = []
    tokens, rows = 0, sum(stop - start for _, start, stop in spans)
    begun = shown = time.monotonic()
    with contextlib.ExitStack() as stack:
        stream: Iterator[Chunk] = (encode_span(sources, encoder, span) for span in spans)
        pooled = num_workers == 0
        while len(chunks) < len(spans):
            chunk = next(stream)
            tokens += int(chunk.length.sum())
            chunks.append(chunk if tokens <= KEEP_TOKENS else replace(chunk, tokens=None))
            now = time.monotonic()
            left = (now - begun) / len(chunks) * (len(spans) - len(chunks))
            if not pooled and now - begun > _POOL_SECONDS / 4 and left > _POOL_SECONDS:
                pooled = True
                pool = stack.enter_context(_pool(sources, encoder, num_workers))
                stream = pool.map(_encode_in_pool, spans[len(chunks) :], chunksize=4)
            if now - shown > _LOG_SECONDS:
                shown, done = now, sum(stop - start for _, start, stop in spans[: len(chunks)])
                advice = f"; {hint} would begin at once" if hint and left > _LONG_SECONDS else ""
                log.info("tokenising: %d of %d rows, about %.0f s left%s", done, rows, left, advice)
    return chunks


def encode_span(sources: Sequence[Any], encoder: Any, span: tuple[int, int, int]) -> Chunk:
    """The encoded rows [start, stop) of a source, without the bytes of media. span: (source, start, stop)."""
    source, start, stop = span
    numbers = range(start, stop)
    chunk = encode_chunk(encoder, source, numbers, sources[source].rows(numbers))
    # An index only counts media, which are read again when needed: their bytes would be the entire data.
    return replace(chunk, media=[tuple(one._replace(source=b"") for one in found) for found in chunk.media], places=[])


_inherited: tuple[Sequence[Any], Any] | None = None
"""Sources and encoder in a pool process, inherited by forking."""


@contextlib.contextmanager
def _pool(sources: Sequence[Any], encoder: Any, num_workers: int) -> Iterator[ProcessPoolExecutor]:
    processes = max(1, min(num_workers, len(os.sched_getaffinity(0))))
    context = multiprocessing.get_context("fork")
    log.info("tokenising in %s", counted(processes, "process", "processes"))
    with quiet_fork(), ProcessPoolExecutor(processes, context, _start_in_pool, (sources, encoder)) as pool:
        yield pool


def _start_in_pool(sources: Sequence[Any], encoder: Any) -> None:
    global _inherited
    _inherited = (sources, encoder)
    be_a_worker()


def _encode_in_pool(span: tuple[int, int, int]) -> Chunk:
    assert _inherited is not None
    return encode_span(*_inherited, span)
