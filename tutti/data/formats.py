"""Files of rows: one small reader per format, all with the same three operations.

A file answers `len()`, `read(ids)` for random access and `stream(start)` in order. Text formats (jsonl, json, csv)
share one idea: the file is mapped into memory, an index of byte spans says where each row lies, and a row is parsed
when it is asked for. The index of a jsonl file is one numpy pass over its newlines; streaming never builds it.
Columnar formats (parquet, arrow) are read through pyarrow, which is imported only for them: importing it, or
`datasets`, costs more than everything else here together.

What can't be addressed at random (gzip, zstandard, parquet) is unpacked once into a cache folder for `read`, so that a
batch of random rows costs the same in every format; `stream` reads the original.

Objects hold nothing but the path until they are used, drop what they opened when pickled, and share it when forked.
"""

from __future__ import annotations

import csv
import fcntl
import gzip
import hashlib
import io
import json
import mmap
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

_BLOCK = 1 << 22
_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{},]', re.DOTALL)
_GAP, _GAP_BYTES = re.compile(r"[\s,]*"), re.compile(rb"[\s,]*")
_QUOTED_OR_NEWLINE = re.compile(rb'"[^"]*"?|\n')
_COMPRESSED = {".gz": "gzip", ".zst": "zstd"}


@dataclass(frozen=True, slots=True)
class Row:
    """One row of data and where it came from; `line` is the line or row number, from 1."""

    value: dict[str, Any]
    file: str
    line: int


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that can't be used and why; the consumer decides whether that stops the run."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


class DataFile:
    """One file of rows. Subclasses say how many there are, and how to read some of them or all of them in order."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in _opened(type(self))}

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, ids: Sequence[int]) -> list[Row | BadRow]:
        """Rows by their position in the file, in the order asked for."""
        raise NotImplementedError

    def stream(self, start: int = 0) -> Iterator[Row | BadRow]:
        """All rows from position `start` on, in order, holding only a few of them at a time."""
        raise NotImplementedError

    def row(self, value: Any, line: int) -> Row | BadRow:
        """`value` as a row, or what is wrong with it."""
        if isinstance(value, dict):
            return Row(value, self.path, line)
        return BadRow(self.path, line, f"a row must be an object with named columns, not {type(value).__name__}")


def _opened(cls: type) -> frozenset[str]:
    """The attributes that hold something opened or computed from the file."""
    return frozenset(name for base in cls.__mro__ for name, v in vars(base).items() if isinstance(v, cached_property))


class _SpanFile(DataFile):
    """Text whose rows are byte spans. Subclasses find the spans and parse one."""

    @cached_property
    def _bytes(self) -> mmap.mmap | bytes:
        path = self.path
        if Path(path).suffix in _COMPRESSED:
            path = _unpacked(path, lambda target: _copy(_blocks(self.path), target))
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if os.path.getsize(path) else b""

    @cached_property
    def _index(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Begin, end and line number of every row, int64 [rows] each."""
        spans = np.fromiter(self._spans(), dtype=np.dtype((np.int64, 3)))
        return spans[:, 0].copy(), spans[:, 1].copy(), spans[:, 2].copy()

    def _spans(self) -> Iterator[tuple[int, int, int]]:
        raise NotImplementedError

    def _parse(self, text: bytes, line: int) -> Row | BadRow:
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self._index[0])

    def read(self, ids: Sequence[int]) -> list[Row | BadRow]:
        data = self._bytes
        spans = zip(*(column[list(ids)].tolist() for column in self._index), strict=True)
        return [self._parse(data[begin:end], line) for begin, end, line in spans]

    def stream(self, start: int = 0) -> Iterator[Row | BadRow]:
        data = self._bytes
        for position, (begin, end, line) in enumerate(self._spans()):
            if position >= start:
                yield self._parse(data[begin:end], line)

    def _parse_json(self, text: bytes, line: int) -> Row | BadRow:
        try:
            return self.row(json.loads(text.decode("utf-8-sig")), line)
        except json.JSONDecodeError as error:
            return BadRow(self.path, line, f"not valid JSON: {error.msg} at column {error.colno}")
        except (UnicodeDecodeError, RecursionError) as error:
            return BadRow(self.path, line, f"not valid JSON: {error}")


class JsonLines(_SpanFile):
    """A JSON object a line; blank lines are passed over."""

    def _parse(self, text: bytes, line: int) -> Row | BadRow:
        return self._parse_json(text, line)

    @cached_property
    def _index(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        data = self._bytes
        newlines = [
            np.flatnonzero(np.frombuffer(data[at : at + _BLOCK], np.uint8) == 10) + at
            for at in range(0, len(data), _BLOCK)
        ]
        end = np.concatenate([*newlines, [len(data)]]).astype(np.int64)
        begin = np.concatenate([[0], end[:-1] + 1])
        keep = end > begin
        for i in np.flatnonzero(keep & (end - begin < 64)):
            keep[i] = bool(data[begin[i] : end[i]].strip())
        return begin[keep], end[keep], np.flatnonzero(keep) + 1

    def stream(self, start: int = 0) -> Iterator[Row | BadRow]:
        position, line = 0, 0
        for text in _lines(_blocks(self.path)):
            line += 1
            if not text.strip():
                continue
            if position >= start:
                yield self._parse(text, line)
            position += 1


class JsonArray(_SpanFile):
    """A JSON array of objects, or an object that holds one under "data"."""

    def _parse(self, text: bytes, line: int) -> Row | BadRow:
        return self._parse_json(text, line)

    def _spans(self) -> Iterator[tuple[int, int, int]]:
        data = self._bytes
        opening = re.compile(rb"(?:\xef\xbb\xbf)?\s*\[").match(data)
        at = opening.end() if opening else self._find_data()
        line = data[:at].count(b"\n") + 1
        while True:
            window, done = data[at : at + _BLOCK].decode("utf-8", "surrogateescape"), 0
            for begin, end in _whole_values(window):
                line += window.count("\n", done, begin)
                first = at + _num_bytes(window[done:begin])
                at = first + _num_bytes(window[begin:end])
                yield first, at, line
                line += window.count("\n", begin, end)
                done = end
            # What follows is the end, or a row that the window cuts off, or one that is malformed.
            first = _GAP_BYTES.match(data, at).end()  # type: ignore[union-attr]
            if data[first : first + 1] == b"]":
                return
            line += data[at:first].count(b"\n")
            at = self._end_by_brackets(first, line)
            yield first, at, line
            line += data[first:at].count(b"\n")

    def _end_by_brackets(self, begin: int, line: int) -> int:
        """Where the row that begins there ends, without understanding it."""
        depth = 0
        for token in _TOKEN.finditer(self._bytes, begin):
            kind = token[0][:1]
            if not depth and kind in b",]":
                return token.start()
            depth += (kind in b"[{") - (kind in b"]}")
        raise ValueError(
            f"{self.path}:{line}: not valid JSON: the array of rows, or a row that begins here, never ends"
        )

    def _find_data(self) -> int:
        """Where the array under the top-level key "data" begins."""
        depth = 0
        for token in _TOKEN.finditer(self._bytes):
            kind = token[0][:1]
            depth += (kind in b"[{") - (kind in b"]}")
            if depth == 1 and token[0] == b'"data"':
                opening = re.compile(rb"\s*:\s*\[").match(self._bytes, token.end())
                if opening:
                    return opening.end()
        raise ValueError(f'{self.path} must hold an array of rows, {{"data": [rows]}}, or one row a line')


class Csv(_SpanFile):
    """Comma or tab separated values with a header; every value is text, and quoted values may hold line breaks."""

    @cached_property
    def _header(self) -> list[str]:
        begin, end, _ = next(self._records(), (0, 0, 1))
        return self._fields(self._bytes[begin:end].decode("utf-8-sig"))

    def _fields(self, text: str) -> list[str]:
        delimiter = "\t" if ".tsv" in Path(self.path).suffixes else ","
        return next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), [])

    def _records(self) -> Iterator[tuple[int, int, int]]:
        data, begin, line, next_line = self._bytes, 0, 1, 1
        for token in _QUOTED_OR_NEWLINE.finditer(data):
            if token[0] != b"\n":
                next_line += token[0].count(b"\n")
                continue
            if data[begin : token.start()].strip():
                yield begin, token.start(), line
            next_line += 1
            begin, line = token.end(), next_line
        if data[begin:].strip():
            yield begin, len(data), line

    def _spans(self) -> Iterator[tuple[int, int, int]]:
        records = self._records()
        next(records, None)
        return records

    def _parse(self, text: bytes, line: int) -> Row | BadRow:
        try:
            fields = self._fields(text.decode("utf-8").rstrip("\r"))
        except (UnicodeDecodeError, csv.Error) as error:
            return BadRow(self.path, line, f"not valid CSV: {error}")
        if len(fields) != len(self._header):
            return BadRow(self.path, line, f"has {len(fields)} fields where the header names {len(self._header)}")
        return Row(dict(zip(self._header, fields, strict=True)), self.path, line)


class Text(DataFile):
    """A text file, which is one document; `column` is the name the row carries it under."""

    def __init__(self, path: str, column: str) -> None:
        super().__init__(path)
        self.column = column

    def __len__(self) -> int:
        return 1

    def read(self, ids: Sequence[int]) -> list[Row | BadRow]:
        try:
            return [Row({self.column: b"".join(_blocks(self.path)).decode("utf-8-sig")}, self.path, 1) for _ in ids]
        except UnicodeDecodeError as error:
            return [BadRow(self.path, 1, f"not UTF-8 text: {error}") for _ in ids]

    def stream(self, start: int = 0) -> Iterator[Row | BadRow]:
        return iter(self.read(range(start, 1)))


class Arrow(DataFile):
    """An Arrow IPC file or stream, such as `datasets.save_to_disk` writes; mapped into memory, never copied whole."""

    @cached_property
    def _batches(self) -> list[Any]:
        return list(_arrow_batches(self.path))

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum([batch.num_rows for batch in self._batches], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, ids: Sequence[int]) -> list[Row | BadRow]:
        wanted = np.asarray(ids, np.int64)
        owner = np.searchsorted(self._ends, wanted, side="right")
        rows: list[Any] = [None] * len(wanted)
        for number in np.unique(owner):
            batch = self._batches[number]
            places = np.flatnonzero(owner == number)
            local = wanted[places] - (self._ends[number] - batch.num_rows)
            for place, value in zip(places, batch.take(local).to_pylist(), strict=True):
                rows[place] = self.row(value, int(wanted[place]) + 1)
        return rows

    def stream(self, start: int = 0) -> Iterator[Row | BadRow]:
        return self._rows_of(_arrow_batches(self.path), start)

    def _rows_of(self, batches: Iterable[Any], start: int) -> Iterator[Row | BadRow]:
        position = 0
        for batch in batches:
            for at in range(max(0, start - position), batch.num_rows, 1024):
                for row, value in enumerate(batch.slice(at, 1024).to_pylist(), position + at + 1):
                    yield self.row(value, row)
            position += batch.num_rows


class Parquet(Arrow):
    """A parquet file: streamed row group by row group; random access goes through an unpacked Arrow copy."""

    @cached_property
    def _batches(self) -> list[Any]:
        return list(_arrow_batches(_unpacked(self.path, self._unpack)))

    def _unpack(self, target: str) -> None:
        import pyarrow

        file = self._open()
        with pyarrow.OSFile(target, "wb") as sink, pyarrow.ipc.new_file(sink, file.schema_arrow) as writer:
            for batch in file.iter_batches(batch_size=4096):
                writer.write_batch(batch)

    def _open(self) -> Any:
        import pyarrow.parquet

        try:
            return pyarrow.parquet.ParquetFile(self.path)
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{self.path} is not a readable parquet file: {error}") from None

    def __len__(self) -> int:
        return int(self._open().metadata.num_rows)

    def stream(self, start: int = 0) -> Iterator[Row | BadRow]:
        return self._rows_of(self._open().iter_batches(batch_size=1024), start)


def _arrow_batches(path: str) -> Iterator[Any]:
    import pyarrow
    import pyarrow.ipc

    source = pyarrow.memory_map(path)
    try:
        reader = pyarrow.ipc.open_file(source)
    except pyarrow.ArrowInvalid:
        source.seek(0)
        try:
            yield from pyarrow.ipc.open_stream(source)
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{path} is not a readable Arrow file: {error}") from None
        return
    for number in range(reader.num_record_batches):
        yield reader.get_batch(number)


def _whole_values(text: str) -> Iterator[tuple[int, int]]:
    """Begin and end of the JSON values that stand, with commas between, at the start of `text`."""
    decode, end = json.JSONDecoder().raw_decode, 0
    while True:
        begin = _GAP.match(text, end).end()  # type: ignore[union-attr]
        try:
            _, end = decode(text, begin)
        except (json.JSONDecodeError, RecursionError):
            return
        if end == len(text):
            return
        yield begin, end


def _num_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogateescape"))


def _blocks(path: str) -> Iterator[bytes]:
    """The file's contents, decompressed, a few MiB at a time."""
    compression = _COMPRESSED.get(Path(path).suffix)
    try:
        if compression == "zstd":
            import pyarrow

            with pyarrow.input_stream(path, compression=compression) as stream:
                while block := stream.read(_BLOCK):
                    yield block
            return
        with gzip.open(path, "rb") if compression else open(path, "rb") as file:
            while block := file.read(_BLOCK):
                yield block
    except (gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path} can't be decompressed: {error}") from None


def _lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    rest = b""
    for block in blocks:
        *whole, rest = (rest + block).split(b"\n")
        yield from whole
    yield rest


def _copy(blocks: Iterable[bytes], target: str) -> None:
    with open(target, "wb") as file:
        file.writelines(blocks)


def _unpacked(path: str, write: Callable[[str], None]) -> str:
    """The path of an unpacked copy of `path`, made by `write(target)` unless one is there already.

    Copies lie in `$TUTTI_CACHE` (default `~/.cache/tutti`) under a name made from path, size and time of change. Of
    several processes one writes and the others wait for it.
    """
    status = os.stat(path)
    key = f"{os.path.realpath(path)}:{status.st_size}:{status.st_mtime_ns}"
    folder = Path(os.environ.get("TUTTI_CACHE") or "~/.cache/tutti").expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"{path} must be unpacked for random access, and {folder} can't be made ({error.strerror}): let the "
            "environment variable TUTTI_CACHE name a folder that can, or set data.datasets_type: iterable"
        ) from None
    copy = folder / hashlib.sha256(key.encode()).hexdigest()[:32]
    with open(f"{copy}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not copy.exists():
            write(f"{copy}.part")
            os.replace(f"{copy}.part", copy)
    return str(copy)
