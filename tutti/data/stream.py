"""Streaming: samples of data that is read in order and never fully loaded.

Every source is read in chunks of rows. Workers encode the chunks ahead: each reads the entire stream but encodes only
the chunks requested from it, which return in the order of the requests, so the samples and their order do not depend on
the number of workers. (Datasets of users often give each worker only a part. They are read in this process, and their
rows are sent with the request.) A shuffle buffer of `data.shuffle_buffer_size` samples lies between a stream and the
mix: a random one is drawn and replaced by the next of the stream; at the end of the stream the buffer is emptied.

Every rank streams everything, because packing is planned from the lengths of all samples. The position contains no
tokens: it names the samples in the buffers by row and piece, and resuming reads these rows again, from the oldest. A
checksum of their tokens detects changed data.
"""

from __future__ import annotations

import logging
import zlib
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Dataset

from tutti.config.nouns import counted
from tutti.core.batch import Sample
from tutti.data.index import CHUNK, Chunk, bad_row_error, encode_chunk, left_out
from tutti.data.mix import Mix, SampleRef, Weights, random_words
from tutti.data.worker import quiet_fork

log = logging.getLogger(__name__)

_BLOCK = 4096


class StreamSample(NamedTuple):
    """A sample of a stream, with what identifies it. place: the file and line of its row, if it has media."""

    row: int
    piece: int
    crc: int
    targets: int
    sample: Sample
    place: str = ""

    @property
    def drawn(self) -> SampleRef:
        return len(self.sample), self


def streamed(chunk: Chunk) -> Iterator[StreamSample]:
    """The samples of a chunk, in order."""
    columns = (column.tolist() for column in (chunk.row, chunk.piece, chunk.targets))
    places = chunk.places or [""] * len(chunk.row)
    for row, piece, targets, sample, place in zip(*columns, chunk.samples(), places, strict=True):
        crc = zlib.crc32(sample.labels.data, zlib.crc32(sample.input_ids.data))
        yield StreamSample(row, piece, crc, targets, sample, place)


class RowCounts:
    """Counts the rows of one source and, by reason, those left out: each once, however often it is read.

    silent: leave bad rows out; otherwise the first one is an error. Other content that does not reach the model
    (`Chunk.notes`) is logged when first seen.
    """

    def __init__(self, silent: bool) -> None:
        self.silent, self.rows = silent, 0
        self.dropped: Counter[str] = Counter()
        self._noted: set[str] = set()

    def add(self, chunk: Chunk) -> None:
        for note in chunk.notes.keys() - self._noted:
            self._noted.add(note)
            log.warning("data.train_path: from row %d on: %s", chunk.first, note)
        if chunk.bad and not self.silent:
            raise bad_row_error(chunk.bad[0])
        for number, row in zip(chunk.bad_numbers, chunk.bad, strict=True):
            if number >= self.rows:
                self.dropped[row.reason] += 1
                count = self.dropped[row.reason]
                if str(count).strip("0") == "1":
                    rows = counted(count, "row")
                    log.info("left out %s so far, the last %s:%d: %s", rows, row.file, row.line, row.reason)
        self.rows = max(self.rows, chunk.first + chunk.rows)

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "dropped": dict(self.dropped)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows, self.dropped = state["rows"], Counter(state["dropped"])


class Request(NamedTuple):
    """A request for the rows [start, start + CHUNK) of a source. run: how often `begin` was called before; answers
    to older runs are ignored. rows: set if already read."""

    source: int
    run: int
    start: int
    rows: list[Any] | None = None


class RowReader:
    """Reads the rows of requests. Keeps a stream of each source open and moves it forward."""

    def __init__(self, sources: Sequence[Any]) -> None:
        self.sources = sources
        self._open: dict[int, tuple[int, int, Iterator[Any]]] = {}

    def read(self, request: Request) -> list[Any]:
        run, at, rows = self._open.get(request.source, (-1, 0, iter(())))
        if run != request.run or at > request.start:
            at, rows = request.start, self.sources[request.source].stream(request.start)
        found = list(islice(rows, request.start - at, request.start - at + CHUNK))
        self._open[request.source] = (request.run, request.start + CHUNK, rows)
        return found


class ChunkReader(Dataset):
    """Reads and encodes the rows of a request, in a worker. A ValueError is returned as its message."""

    def __init__(self, sources: Sequence[Any], encoder: Any) -> None:
        self.sources, self.encoder = sources, encoder
        self._reader = RowReader(sources)

    def __getitems__(self, request: Request) -> tuple[Request, Chunk | str]:
        try:
            rows = self._reader.read(request) if request.rows is None else request.rows
            numbers = range(request.start, request.start + len(rows))
            chunk = encode_chunk(self.encoder, request.source, numbers, rows)
        except ValueError as error:
            return request._replace(rows=None), str(error)
        return request._replace(rows=None), chunk


class ReadQueue:
    """An endless iterator of requests: for the source being waited for if it has no request, else for the source with
    the fewest requested chunks.

    upcoming: each source's next request. asked: each source's chunks that are requested and not yet used. wanted: the
    source being waited for.
    """

    def __init__(self, count: int) -> None:
        self.upcoming = [Request(source, 0, 0) for source in range(count)]
        self.asked = [0] * count
        self.wanted = 0

    def __iter__(self) -> Iterator[Any]:
        while True:
            source = min(range(len(self.asked)), key=lambda one: (self.asked[one], one != self.wanted))
            request = self.upcoming[source]
            self.upcoming[source] = request._replace(start=request.start + CHUNK)
            self.asked[source] += 1
            yield request

    def begin(self, source: int, start: int, asked: int = 0) -> None:
        """Read `source` again from `start`; earlier requests are ignored."""
        self.upcoming[source] = Request(source, self.upcoming[source].run + 1, start)
        self.asked[source] = asked


class ChunkPrefetcher:
    """The chunks of every source in order, repeated forever, prepared by workers."""

    def __init__(self, sources: Sequence[Any], encoder: Any, loader_options: dict[str, Any]) -> None:
        self.count = len(sources)
        self.reader = ChunkReader(sources, encoder)
        self._options = loader_options
        self._agenda = ReadQueue(self.count)
        self._ready: list[deque[Chunk]] = [deque() for _ in range(self.count)]
        self._own = RowReader(sources)
        self._results: Iterator[tuple[Request, Chunk | str]] | None = None

    def seek(self, source: int, start: int) -> None:
        """Read `source` from row `start` on."""
        self._agenda.begin(source, start)
        self._ready[source].clear()

    def next(self, source: int) -> Chunk:
        """The next chunk of `source`; one with fewer than CHUNK rows is the last of a pass."""
        if self._results is None:
            with quiet_fork():
                self._results = iter(DataLoader(self.reader, batch_sampler=self._requests(), **self._options))
        self._agenda.wanted = source
        while not self._ready[source]:
            request, chunk = next(self._results)
            ready = self._ready[request.source]
            if request.run == self._agenda.upcoming[request.source].run:
                if isinstance(chunk, str):
                    raise ValueError(chunk)
                ready.append(chunk)
                if chunk.rows < CHUNK:
                    self._agenda.begin(request.source, 0, asked=len(ready))
        self._agenda.asked[source] -= 1
        return self._ready[source].popleft()

    def _requests(self) -> Iterator[Any]:
        for request in self._agenda:
            own = self.reader.sources[request.source].own
            yield request._replace(rows=self._own.read(request)) if own else request

    def close(self) -> None:
        """Stop the workers. Their prepared chunks are lost: call `seek` before continuing."""
        self._results = None


class ShuffleBuffer:
    """One source, through a shuffle buffer of `capacity` samples.

    needed: raise an error if the source has no usable row.
    """

    def __init__(
        self, chunks: ChunkPrefetcher, source: int, *, seed: int, capacity: int, silent: bool, needed: bool
    ) -> None:
        self.chunks, self.source, self.seed, self.capacity, self.needed = chunks, source, seed, capacity, needed
        self.counts = RowCounts(silent)
        self.number, self._draws = -1, 0
        self._row, self._piece, self._ended = 0, 0, True
        self._buffer: list[StreamSample] = []
        self._names = np.zeros((capacity, 3), np.int64)
        self._incoming: Iterator[StreamSample] = iter(())
        self._words: list[int] = []

    def draw(self) -> SampleRef | None:
        buffer = self._buffer
        while len(buffer) < self.capacity and (one := self._read()) is not None:
            self._put(len(buffer), one)
        if not buffer:
            if self.needed and not self._draws:
                raise self._no_row()
            return None
        place = self._word() % len(buffer)
        drawn, last = buffer[place], buffer.pop()
        if place < len(buffer):
            self._put(place, last)
        return drawn.drawn

    def _put(self, place: int, one: StreamSample) -> None:
        if place == len(self._buffer):
            self._buffer.append(one)
        else:
            self._buffer[place] = one
        self._names[place] = one.row, one.piece, one.crc

    def _word(self) -> int:
        block, place = divmod(self._draws, _BLOCK)
        if place == 0 or not self._words:
            self._words = random_words(_BLOCK, self.seed, self.source, self.number, block).tolist()
        self._draws += 1
        return self._words[place]

    def _read(self) -> StreamSample | None:
        """The next sample of the stream; None at its end."""
        while True:
            if (one := next(self._incoming, None)) is not None:
                self._row, self._piece = one.row, one.piece + 1
                return one
            if self._ended:
                return None
            chunk = self.chunks.next(self.source)
            self._ended = chunk.rows < CHUNK
            self.counts.add(chunk)
            position = self._row, self._piece
            self._incoming = (one for one in streamed(chunk) if (one.row, one.piece) >= position)

    def _no_row(self) -> ValueError:
        which = " has"
        if self.chunks.count > 1:
            which = f": source {self.chunks.reader.sources[self.source].name} has a weight but"
        reasons = left_out(self.counts.rows, self.counts.dropped)
        return ValueError(f"data.train_path{which} no usable row{reasons}")

    def restart(self) -> None:
        if not self._ended:
            self.chunks.seek(self.source, 0)
        self.number, self._draws = self.number + 1, 0
        self._row, self._piece, self._ended = 0, 0, False
        self._buffer, self._words, self._incoming = [], [], iter(())

    def state_dict(self) -> dict[str, Any]:
        return {
            "pass": self.number,
            "draws": self._draws,
            "row": self._row,
            "piece": self._piece,
            "buffer": self._names[: len(self._buffer)].copy(),
            "counts": self.counts.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.number, self._draws = state["pass"], state["draws"]
        self._row, self._piece, self._ended = state["row"], state["piece"], self.number < 0
        self._buffer, self._words, self._incoming = [], [], iter(())
        self.counts.load_state_dict(state["counts"])
        self.chunks.seek(self.source, self._row)
        names = np.asarray(state["buffer"], np.int64).reshape(-1, 3).tolist()
        self._names = np.zeros((max(self.capacity, len(names)), 3), np.int64)
        for one in find_rows(self.chunks.reader, self.source, names):
            self._put(len(self._buffer), one)


def row_counts(mix: Mix) -> tuple[int, dict[str, int]]:
    """The number of rows read by the streams of `mix`, and the number left out, by reason."""
    counts = [stream.counts for stream in mix.streams if isinstance(stream, ShuffleBuffer)]
    return sum(one.rows for one in counts), dict(sum((one.dropped for one in counts), Counter()))


def find_rows(reader: ChunkReader, source: int, names: Sequence[Sequence[int]]) -> list[StreamSample]:
    """The samples of `source` with these (row, piece, crc), read again; ValueError if they have changed."""
    if not names:
        return []
    wanted = {row for row, _, _ in names}
    first, last = min(wanted), max(wanted)
    rows = enumerate(islice(reader.sources[source].stream(first), last + 1 - first), first)
    picked = ((number, row) for number, row in rows if number in wanted)
    found: dict[tuple[int, int], StreamSample] = {}
    while batch := list(islice(picked, CHUNK)):
        numbers, read = zip(*batch, strict=True)
        found |= {(one.row, one.piece): one for one in streamed(encode_chunk(reader.encoder, source, numbers, read))}
    samples = [found.get((row, piece)) for row, piece, _ in names]
    if any(one is None or one.crc != name[2] for one, name in zip(samples, names, strict=True)):
        raise data_changed()
    return [one for one in samples if one is not None]


def data_changed() -> ValueError:
    return ValueError(
        "data.train_path does not hold the data that the checkpoint was made with (files, tokenizer, template or "
        "data.max_seq_len have changed): bring it back, or start a run of its own from an exported model "
        "(model.model_path: .../hf/final, another train.output_dir)"
    )


class StreamSource:
    """The samples of streams as a `SampleSource`: items are the samples themselves."""

    size: int | None = None
    knows_lengths = False

    def __init__(
        self, chunks: ChunkPrefetcher, weights: Weights | None, *, seed: int, capacity: int, silent: bool
    ) -> None:
        self.chunks, self.weights, self.seed, self.capacity, self.silent = chunks, weights, seed, capacity, silent
        self.names = [source.name for source in chunks.reader.sources]

    def mix(self) -> Mix:
        needed = self.weights is not None or self.chunks.count == 1
        options: dict[str, Any] = {"seed": self.seed, "capacity": self.capacity, "silent": self.silent}
        streams = [ShuffleBuffer(self.chunks, source, needed=needed, **options) for source in range(self.chunks.count)]
        return Mix(streams, self.weights)

    def facts(self, items: Sequence[StreamSample]) -> tuple[np.ndarray, np.ndarray]:
        targets = np.array([item.targets for item in items], np.int64)
        return targets, np.array([item.sample.source for item in items], np.int64)

    def num_values(self, items: Sequence[StreamSample]) -> int:
        return sum(item.sample.num_values for item in items)

    def bucket(self, item: StreamSample) -> int:
        return item.sample.bucket

    def name(self, item: StreamSample) -> list[int]:
        return [item.sample.source, item.row, item.piece, item.crc]

    def find(self, names: Sequence[Sequence[int]]) -> list[SampleRef]:
        found: dict[tuple[int, int, int], StreamSample] = {}
        for source in {name[0] for name in names}:
            for one in find_rows(self.chunks.reader, source, [name[1:] for name in names if name[0] == source]):
                found[source, one.row, one.piece] = one
        return [found[source, row, piece].drawn for source, row, piece, _ in names]
