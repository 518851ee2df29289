"""Data with random access that is tokenised as it is drawn, so that training starts at once, even on very large data.

Small data is tokenised before the first step and kept (index.py). The tokens of large data can't be kept; its index
only has each sample's length, its number of trained tokens and its row. If every row is one sample (a conversation, a
text with a class) and a bad row stops the run, the samples and their order follow from the number of rows alone. So
lengths are needed only when steps are planned with them:

1. `survey` tokenises a few hundred evenly spaced rows, to estimate the number of tokens.
2. The index (`make_index`) begins with lengths of 0. When a stream of samples (`mix.Permuted`) reaches the next few
   hundred, the `Learner` finds their lengths.
3. Each rank does its share of these, in `data.num_workers` processes, and the ranks exchange the results.
4. Idle processes go through the remaining rows in order. So a bad row is found about as early as by tokenising
   everything first, and most lengths are known before they are needed.

Lengths and targets are in memory shared by the processes, which send the trainer only errors and notes about rows.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import mmap
import multiprocessing
import os
import time
import weakref
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tutti.config import Config
from tutti.config.nouns import counted
from tutti.core.dist import World
from tutti.data.index import CHUNK, Index, bad_row_error, build_index, encode_chunk, log_left_out
from tutti.data.media import MediaSummary
from tutti.data.source import Source
from tutti.data.worker import be_a_worker, quiet_fork

log = logging.getLogger(__name__)

AT_ONCE_TOKENS = 8_000_000
"""Data with more tokens than this is opened before all of it is tokenised."""

_SURVEYED = 512
"""The number of rows in the survey."""

_BAD = -1


@dataclass(frozen=True)
class Survey:
    """Estimates from a few rows: the number of tokens, and of trained tokens (targets). crc: of the surveyed rows."""

    rows: int
    tokens: int
    targets: int
    crc: int


def make_index(
    config: Config,
    sources: Sequence[Source],
    encoder: Any,
    world: World,
    argument: str,
    *,
    row_is_sample: bool = False,
    counts_without_lengths: Callable[[int], bool] = lambda tokens: False,
) -> Index:
    """The index of `sources`, made by tokenising all rows now, or as they are drawn. A collective call.

    argument: names the data, for messages. row_is_sample: each row is one sample or bad, and has no media.
    counts_without_lengths: tells if the steps of data with about this many tokens can be counted before lengths are
    known.
    """
    data, found, hint = config.data, None, "data.datasets_type iterable"
    if row_is_sample:
        found = world.run_on_all_ranks(lambda: survey(sources, encoder, silent=data.silent_exception))
    if found is not None:
        digests = world.gather(world.run_on_all_ranks(lambda: _digest_of(sources, found)))
        if len(set(digests)) > 1:
            raise ValueError(f"{argument} has other rows on some ranks than on others")
        if not data.silent_exception and counts_without_lengths(found.tokens):
            index = _index_as_drawn(Learner(sources, encoder, world, data.num_workers), found.rows, digests[0])
            log.info(
                "%s: %s rows, by %s of them about %s tokens, which are tokenised as they are drawn",
                argument, *(f"{count:,}" for count in (found.rows, _SURVEYED, _rounded(found.tokens))),
            )  # fmt: skip
            return index
        if not data.silent_exception:
            hint = f"data.train_size {_rounded(found.tokens)} (about all tokens), train.max_steps or {hint}"
    index = build_index(
        sources,
        encoder,
        world,
        num_workers=data.num_workers,
        silent=data.silent_exception,
        argument=argument,
        hint=hint if argument == "data.train_path" else "",
    )
    if found is not None and not index.dropped:
        index = replace(index, digest=digests[0])  # so that other batch sizes, or leaving out bad rows, can resume
    log.info(
        "%s: %s, %s, %s, %s of them trained%s",
        argument,
        *(counted(index.rows, "row"), counted(len(index), "sample"), counted(int(index.length.sum()), "token")),
        f"{index.targets.sum():,}",
        "; kept in memory, no workers needed"
        if index.tokens is not None and data.num_workers and not index.num_media.any()
        else "",
    )
    if world.is_main:
        log_left_out(argument, index.rows, index.dropped)
        for note, count in index.notes.items():
            log.warning("%s: %s: %s", argument, counted(count, "row"), note)
    return index


def _rounded(count: int) -> int:
    """`count` rounded to two digits."""
    return round(count, 2 - len(str(count)))


def survey(sources: Sequence[Source], encoder: Any, *, silent: bool) -> Survey | None:
    """Tokenise rows from all parts of `sources`; None if all rows can be tokenised instead. ValueError: one of them
    is bad, unless `silent`."""
    size = sum(os.path.getsize(file.path) for source in sources for file in source.files)
    starts = _starts(sources)
    if size < AT_ONCE_TOKENS or starts[-1] <= _SURVEYED:  # a token is at least a byte
        return None
    ids = np.linspace(0, starts[-1] - 1, _SURVEYED).astype(np.int64)
    facts, crc, _ = _facts_of(sources, encoder, starts, ids)
    if len(bad := ids[facts == _BAD]) and not silent:
        raise _error_of(sources, encoder, starts, bad[0])
    facts[facts == _BAD] = 0
    tokens, targets = (round(column.mean() * starts[-1]) for column in _columns(facts))
    return Survey(int(starts[-1]), tokens, targets, crc) if tokens > AT_ONCE_TOKENS else None


def _index_as_drawn(learner: Learner, rows: int, digest: str) -> Index:
    """The index of rows that are one sample each, with lengths found as samples are drawn."""
    sizes = np.diff(learner.starts).tolist()
    nothing = np.broadcast_to(np.int64(0), rows)
    return Index(
        source=np.repeat(np.arange(len(sizes), dtype=np.min_scalar_type(len(sizes))), sizes),
        row=np.concatenate([np.arange(size, dtype=np.min_scalar_type(size)) for size in sizes]),
        piece=nothing,
        length=learner.length,
        targets=learner.targets,
        split=nothing,
        bucket=nothing,
        num_media=nothing,
        num_values=nothing,
        tokens=None,
        rows=rows,
        dropped={},
        notes=Counter(),
        digest=digest,
        media=MediaSummary(),
        learn=learner,
    )


def _digest_of(sources: Sequence[Source], found: Survey) -> str:
    """A checksum of data that was only surveyed: of all bytes of its files, and of the tokens of the surveyed rows."""
    parts = [[file.checksum() for file in source.files] for source in sources]
    return hashlib.sha256(repr((parts, found.rows, found.crc)).encode()).hexdigest()[:32]


class Learner:
    """Finds lengths and targets of rows that are one sample each. Called with the numbers of the samples needed now and
    of those needed soon: a collective call, with the same numbers on every rank.

    length, targets: int32 [samples], 0 where not known here. starts: the first sample number of each source, and the
    total number of samples.
    """

    def __init__(self, sources: Sequence[Source], encoder: Any, world: World, num_workers: int) -> None:
        self.sources, self.encoder, self.world, self.num_workers = sources, encoder, world, num_workers
        self.starts = _starts(sources)
        count = int(self.starts[-1])
        self.facts = np.frombuffer(mmap.mmap(-1, 8 * count), np.int64)
        self.length, self.targets = _columns(self.facts)
        self._known_to_all = np.zeros(count, bool)
        self._asked = np.zeros(count, bool)
        self._noted: set[str] = set()
        self._workers: list[tuple[Any, Any]] = []
        weakref.finalize(self, _end, self._workers, os.getpid())

    def __call__(self, now: np.ndarray, soon: np.ndarray) -> None:
        """ValueError, on all ranks: one of them has found a bad row."""
        rank, size = self.world.rank, self.world.size
        now = np.unique(now[~self._known_to_all[now]])
        if not len(now):
            return
        mine = now[rank::size]
        notes = self.world.run_on_all_ranks(lambda: self._find(mine, soon[rank::size]))
        for other, (facts, others_notes) in enumerate(self.world.gather((self.facts[mine], notes))):
            self.facts[now[other::size]] = facts
            self._note(others_notes)
        self._known_to_all[now] = True

    def close(self) -> None:
        """Stop the processes. Their unfinished requests will be made again."""
        _end(self._workers, os.getpid())
        self._asked[:] = False

    def _find(self, now: np.ndarray, soon: np.ndarray) -> list[str]:
        """Find the lengths of `now`, and have the processes start on `soon`; returns the notes about rows."""
        notes: list[str] = []
        if self.num_workers and not self._workers:
            self._start()
        self._ask(now)
        self._ask(soon)
        while len(unknown := now[self.facts[now] == 0]) and self._workers:
            notes += self._heard()
            if not all(process.is_alive() for process, _ in self._workers):
                log.warning("a process that tokenised rows has died; this one goes on with them")
                self.close()
                self.num_workers = 0
            time.sleep(0.001)
        for start in range(0, len(unknown), CHUNK):
            ids = unknown[start : start + CHUNK]
            self.facts[ids], _, found = _facts_of(self.sources, self.encoder, self.starts, ids)
            notes += found
        notes += self._heard()
        if len(bad := now[self.facts[now] == _BAD]):
            raise _error_of(self.sources, self.encoder, self.starts, bad[0])
        return notes

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        count = max(1, min(self.num_workers, len(os.sched_getaffinity(0))))
        log.info("tokenising rows as they are drawn, in %s", counted(count, "process", "processes"))
        with quiet_fork():
            for number in range(count):
                here, there = context.Pipe()
                share = self.world.rank + self.world.size * number, self.world.size * count
                process = context.Process(target=self._work, args=(there, *share), daemon=True)
                process.start()
                self._workers.append((process, here))

    def _ask(self, ids: np.ndarray) -> None:
        """Distribute the samples that have not been requested yet over the processes."""
        ids = ids[(self.facts[ids] == 0) & ~self._asked[ids]]
        if not self._workers:
            return
        self._asked[ids] = True
        for turn, start in enumerate(range(0, len(ids), CHUNK)):
            with contextlib.suppress(OSError):  # it has died, which is noticed when its work is awaited
                self._workers[turn % len(self._workers)][1].send(ids[start : start + CHUNK])

    def _heard(self) -> list[str]:
        """The notes that processes have sent. ValueError: one of them found a bad row."""
        notes = []
        for _, connection in self._workers:
            with contextlib.suppress(EOFError, OSError):
                while connection.poll():
                    message = connection.recv()
                    if isinstance(message, int):
                        raise _error_of(self.sources, self.encoder, self.starts, message)
                    notes.append(message)
        return notes

    def _note(self, notes: Sequence[str]) -> None:
        for note in notes:
            if note not in self._noted and self.world.is_main:
                log.warning("data.train_path: some rows: %s", note)
            self._noted.add(note)

    def _work(self, connection: Any, first: int, step: int) -> None:
        """The main loop of a process: requested rows and, when idle, every `step`-th chunk of all rows, from
        `first`."""
        be_a_worker()
        noted: set[str] = set()
        starts = iter(range(first * CHUNK, len(self.facts), step * CHUNK))
        while True:
            if connection.poll() or (start := next(starts, None)) is None:
                asked = connection.recv()
            else:
                asked = np.arange(start, min(start + CHUNK, len(self.facts)))
            ids = np.sort(asked[self.facts[asked] == 0])
            try:
                facts, _, notes = _facts_of(self.sources, self.encoder, self.starts, ids)
            except ValueError:
                facts, notes = np.full(len(ids), _BAD), []
            for note in set(notes) - noted:
                noted.add(note)
                connection.send(note)
            self.facts[ids] = facts
            if len(bad := ids[facts == _BAD]):
                connection.send(int(bad[0]))


def _end(workers: list[tuple[Any, Any]], owner: int) -> None:
    """Stop the processes that the process `owner` started; does nothing in a forked child of it."""
    if os.getpid() != owner:
        return
    for process, _ in workers:
        process.terminate()
    for process, connection in workers:
        process.join()
        connection.close()
    workers.clear()


def _error_of(sources: Sequence[Source], encoder: Any, starts: np.ndarray, number: int) -> ValueError:
    """The error about a bad row, found by encoding it again."""
    (source,), (row,) = (found.tolist() for found in _rows_of(starts, np.array([number])))
    chunk = encode_chunk(encoder, source, [row], sources[source].rows([row]))
    if chunk.bad:
        return bad_row_error(chunk.bad[0])
    return ValueError(f"row {row + 1} of source {sources[source].name} has changed during the run")


def _starts(sources: Sequence[Source]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum([len(source) for source in sources])]).astype(np.int64)


def _rows_of(starts: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The source of each sample, and its row in the source."""
    source = np.searchsorted(starts, ids, side="right") - 1
    return source, ids - starts[source]


def _facts_of(
    sources: Sequence[Source], encoder: Any, starts: np.ndarray, ids: np.ndarray
) -> tuple[np.ndarray, int, list[str]]:
    """Length and targets of samples in one int64 each (`_columns`), _BAD for bad rows; a checksum of their tokens;
    and the encoder's notes. ids: ascending, without duplicates."""
    facts, crc, notes = np.full(len(ids), _BAD, np.int64), 0, list[str]()
    source, row = _rows_of(starts, ids)
    for one in np.unique(source).tolist():
        places = np.flatnonzero(source == one)
        numbers = row[places].tolist()
        chunk = encode_chunk(encoder, one, numbers, sources[one].rows(numbers))
        assert not chunk.piece.any(), "a row is one sample"
        found = np.stack([chunk.length, chunk.targets], axis=1).astype(np.int32).view(np.int64)[:, 0]
        facts[places[np.searchsorted(row[places], chunk.row)]] = found
        crc = zlib.crc32(b"%d" % chunk.crc, crc)
        notes += chunk.notes
    return facts, crc, notes


def _columns(facts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Views of the lengths and the targets in `facts`."""
    pairs = facts.view(np.int32).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]
