"""Data files: one small reader per format, all with the same three operations.

A file supports `len()`, `read(ids)` for random access and `stream(start)` in order, and both return the same rows. The
text formats here (jsonl, json, csv) work the same way: the file is cut into pieces of bytes, one per row, and a piece
is parsed when its row is requested. `stream` cuts while it reads; `read` has an index of the pieces, cached on disk for
large files, and reads single pieces (with a memory map, all pages that a process has read would stay resident).
Columnar formats are in tables.py.

Files without random access (gzip, zstandard, parquet) are unpacked once into a cache folder for `read`, so that a batch
of random rows costs the same in every format; `stream` reads the original.

Every row of a file is returned as a `Row`, or as a `BadRow` with the reason. An error that makes the rest of a file
unreadable (a damaged archive, an unterminated array) is a ValueError that names the file.

A file object only holds its path until it is used, drops what it opened when pickled, and shares it when forked.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import os
import re
import sys
import zlib
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

import numpy as np

from tutti.data.kept import in_memory, kept, unpacked

_BLOCK = 1 << 22

KEEP_PLACES = 1 << 26
"""The size of text in bytes from which on the offsets of its rows are cached on disk."""

_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|["\[\]{},]', re.DOTALL)
_GAP, _GAP_BYTES, _BLANK = re.compile(r"[\s,]*"), re.compile(rb"[\s,]*"), re.compile(rb"\s*")
_COLON = re.compile(rb"\s*:\s*")
_BLANK_BYTES = (9, 11, 12, 13, 32)
_COMPRESSED = {".gz": "gzip", ".zst": "zstd"}


@dataclass(frozen=True, slots=True)
class Row:
    """One row of data and its origin; `line` is the line or row number, from 1."""

    value: dict[str, Any]
    file: str
    line: int


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used, and why; the caller decides whether that stops the run."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


Rows = Generator[Row | BadRow, None, int]
"""Rows in order. The generator returns how many rows it skipped to start where requested."""


class DataFile(ABC):
    """One data file. Subclasses define the number of rows, and how to read some of them or all in order."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in _opened(type(self))}

    def checksum(self) -> int:
        """The CRC-32 of the file on disk (before unpacking), cached on disk. ValueError: it can't be read."""

        def write(file: IO[bytes]) -> None:
            crc = 0
            with open_binary(self.path) as source:
                while block := source.read(_BLOCK):
                    crc = zlib.crc32(block, crc)
            file.write(b"%d" % crc)

        return int(kept(self.path, "checksum", write).tobytes())

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, ids: Sequence[int]) -> list[Row | BadRow]:
        """Read rows by their index in the file, in the given order."""

    @abstractmethod
    def stream(self, start: int = 0) -> Rows:
        """Read all rows from index `start` on, in order, holding only a few of them at a time."""

    def row(self, value: Any, line: int) -> Row | BadRow:
        """Make a row from `value`, or a BadRow that says what is wrong."""
        if isinstance(value, dict):
            return Row(value, self.path, line)
        return BadRow(self.path, line, f"a row must be an object with named columns, not {type(value).__name__}")


def _opened(cls: type) -> frozenset[str]:
    """The attributes that cache something opened or computed from the file."""
    return frozenset(name for base in cls.__mro__ for name, v in vars(base).items() if isinstance(v, cached_property))


class _Piece(NamedTuple):
    """The bytes of one row, where they begin in the (unpacked) file, and their line number."""

    begin: int
    text: bytes
    line: int


class _Places(NamedTuple):
    """The offsets of the rows of a text: for each row its end, its begin and its line, int64 [rows] each.

    begins, lines: None if every line is a row, so that they follow from `ends`.
    """

    ends: np.ndarray
    begins: np.ndarray | None = None
    lines: np.ndarray | None = None

    def of(self, ids: np.ndarray) -> Iterator[tuple[int, int, int]]:
        """Begin, end and line of the rows with these numbers."""
        if self.begins is None or self.lines is None:
            begins, lines = np.where(ids > 0, self.ends[ids - 1] + 1, 0), ids + 1
        else:
            begins, lines = self.begins[ids], self.lines[ids]
        return zip(begins.tolist(), self.ends[ids].tolist(), lines.tolist(), strict=True)


class _TextFile(DataFile):
    """A text file whose rows are pieces of bytes. Subclasses cut the text into pieces and parse one."""

    @cached_property
    def _file(self) -> BinaryIO:
        return open_binary(self._plain_path)

    @property
    def _plain_path(self) -> str:
        if Path(self.path).suffix not in _COMPRESSED:
            return self.path
        return unpacked(self.path, lambda target: _copy(read_blocks(self.path), target))

    @cached_property
    def _places(self) -> _Places:
        path = self._plain_path
        if os.path.getsize(path) < KEEP_PLACES:
            table = np.frombuffer(in_memory(self._write_places), np.int64)
        else:
            table = kept(path, "places of rows", self._write_places).view(np.int64)
        width, columns = int(table[0]), table[1:]
        return _Places(*(columns[column::width] for column in range(width)))

    def _write_places(self, file: IO[bytes]) -> None:
        """Write the table of `_Places`, one row after another, after the number of its columns."""
        pieces = self._pieces(_text_blocks(self._plain_path, name=self.path))
        spans = ((piece.begin + len(piece.text), piece.begin, piece.line) for piece in pieces)
        file.write(np.int64(3).tobytes() + np.fromiter(spans, dtype=np.dtype((np.int64, 3))).tobytes())

    @abstractmethod
    def _pieces(self, blocks: Iterator[bytes]) -> Iterator[_Piece]: ...

    @abstractmethod
    def _parse(self, text: bytes, line: int) -> Row | BadRow: ...

    def __len__(self) -> int:
        return len(self._places.ends)

    def read(self, ids: Sequence[int]) -> list[Row | BadRow]:
        descriptor = self._file.fileno()
        spans = self._places.of(np.asarray(ids, np.int64))
        return [self._parse(os.pread(descriptor, end - begin, begin), line) for begin, end, line in spans]

    def stream(self, start: int = 0) -> Rows:
        passed = 0
        for _, text, line in self._pieces(_text_blocks(self.path)):
            if passed < start:
                passed += 1
            else:
                yield self._parse(text, line)
        return passed

    def _parse_json(self, text: bytes, line: int) -> Row | BadRow:
        try:
            return self.row(json.loads(text.decode("utf-8-sig")), line)
        except json.JSONDecodeError as error:
            reason = error.msg.removesuffix(" at")  # json says "Unterminated string starting at"
            return BadRow(self.path, line, f"not valid JSON: {reason} at column {error.colno}")
        except (ValueError, RecursionError) as error:  # not UTF-8, a number with too many digits, nested too deeply
            return BadRow(self.path, line, f"not valid JSON: {error}")


class JsonLines(_TextFile):
    """One JSON object per line; blank lines are skipped."""

    def _parse(self, text: bytes, line: int) -> Row | BadRow:
        return self._parse_json(text, line)

    def _write_places(self, file: IO[bytes]) -> None:
        """Write only the ends, unless some line may be blank."""
        file.write(np.int64(1).tobytes())
        for _, ends, first in self._lines():
            if np.isin(first, (10, *_BLANK_BYTES)).any():
                file.seek(0)
                file.truncate()
                return self._write_places_of_some(file)
            file.write(ends.tobytes())
        return None

    def _write_places_of_some(self, file: IO[bytes]) -> None:
        file.write(np.int64(3).tobytes())
        descriptor, line = self._file.fileno(), 1
        for begins, ends, first in self._lines():
            keep = ends > begins
            for i in np.flatnonzero(keep & np.isin(first, _BLANK_BYTES)):
                keep[i] = bool(os.pread(descriptor, int(ends[i] - begins[i]), int(begins[i])).strip())
            lines = np.arange(line, line + len(ends))
            line += len(ends)
            file.write(np.stack([ends, begins, lines], axis=1)[keep].tobytes())

    def _lines(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Begins, ends and first bytes of all lines, one block of text at a time."""
        at = begin = first = 0
        for block in _text_blocks(self._plain_path, name=self.path):
            text = np.frombuffer(block, np.uint8)
            first = int(text[0]) if begin == at else first
            ends = np.flatnonzero(text == 10)
            if len(ends):
                begins = np.concatenate([[begin - at], ends[:-1] + 1])
                firsts = np.concatenate([[first], text[begins[1:]]])
                yield begins + at, ends + at, firsts
                begin = at + int(ends[-1]) + 1
                first = int(text[begin - at]) if begin < at + len(text) else first
            at += len(text)
        if begin < at:
            yield np.array([begin]), np.array([at]), np.array([first])

    def _pieces(self, blocks: Iterator[bytes]) -> Iterator[_Piece]:
        begin = 0
        for line, text in enumerate(_lines(blocks), 1):
            if text.strip():
                yield _Piece(begin, text, line)
            begin += len(text) + 1


class JsonArray(_TextFile):
    """A JSON array of objects, or an object with such an array under "data".

    The text is decoded one window at a time with the JSON decoder, which is fast and finds where each row ends. A row
    that is larger than a window, or malformed, is delimited by counting brackets.
    """

    def _parse(self, text: bytes, line: int) -> Row | BadRow:
        return self._parse_json(text, line)

    def _pieces(self, blocks: Iterator[bytes]) -> Iterator[_Piece]:
        window = _Window(blocks)
        depth = self._open_array(window)
        size = _BLOCK
        while True:
            text, done = window.ahead(size).decode("utf-8", "surrogateescape"), 0
            for begin, end in _whole_values(text):
                window.skip(_num_bytes(text[done:begin]))
                yield window.take(_num_bytes(text[begin:end]))
                done = end
            if done:
                size = min(4 * size, _BLOCK)
                continue
            window.skip_blanks(_GAP_BYTES)
            if window.ahead(1) == b"]":
                break
            yield window.take(self._end_by_brackets(window))
            size = max(1, _BLOCK >> 8)
        window.skip(1)
        while depth and (token := window.token()):
            depth += _deeper(token)
            window.skip(window.cursor)
        window.skip_blanks(_BLANK)
        if window.ahead(1):
            raise ValueError(f"{self.path}:{window.line}: not valid JSON: something follows the array of rows")

    def _open_array(self, window: _Window) -> int:
        """Move to the first row; returns 0 if the file is an array, 1 if an object contains it under "data"."""
        if window.ahead(3) == codecs.BOM_UTF8:
            window.skip(3)
        window.skip_blanks(_BLANK)
        if window.ahead(1) == b"[":
            window.skip(1)
            return 0
        depth, is_key = 0, False
        while token := window.token():
            opens = is_key and token == b"[" and _COLON.fullmatch(window.between)
            window.skip(window.cursor)
            if opens:
                return 1
            depth += _deeper(token)
            is_key = depth == 1 and token == b'"data"'
        raise ValueError(f'{self.path} must hold an array of rows, {{"data": [rows]}}, or one row a line')

    def _end_by_brackets(self, window: _Window) -> int:
        """The length in bytes of the next row, found without parsing it."""
        depth = 0
        while token := window.token():
            if not depth and token in (b",", b"]"):
                return window.cursor - 1
            depth += _deeper(token)
        raise ValueError(
            f"{self.path}:{window.line}: not valid JSON: the array of rows, or a row that begins here, never ends"
        )


class _Window:
    """The current part of a text. It grows at its end by reading, and is cut off at its beginning.

    line: of the next byte. cursor: how far tokens have been read ahead. between: the bytes between the last two tokens.
    """

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self.line, self.cursor, self.between = 1, 0, b""
        self._blocks, self._held, self._first, self._next = blocks, b"", 0, 0

    def _grow(self) -> bool:
        """Read at least as many bytes as are held, so that a long row is copied only a few times; returns False at
        the end."""
        self._held, self._first, self._next = self._held[self._next :], self._first + self._next, 0
        parts, wanted = [self._held], max(1, len(self._held))
        while wanted > 0 and (block := next(self._blocks, b"")):
            parts.append(block)
            wanted -= len(block)
        self._held = b"".join(parts)
        return len(parts) > 1

    def ahead(self, size: int) -> bytes:
        """The next `size` bytes; fewer at the end of the text."""
        while len(self._held) - self._next < size and self._grow():
            pass
        return self._held[self._next : self._next + size]

    def skip(self, count: int) -> None:
        self.line += self._held.count(b"\n", self._next, self._next + count)
        self._next, self.cursor = self._next + count, 0

    def take(self, count: int) -> _Piece:
        """The next `count` bytes as a row."""
        text = self._held[self._next : self._next + count]
        piece = _Piece(self._first + self._next, text, self.line)
        self.skip(count)
        return piece

    def skip_blanks(self, pattern: re.Pattern[bytes]) -> None:
        while True:
            self.skip(pattern.match(self._held, self._next).end() - self._next)  # type: ignore[union-attr]
            if self._next < len(self._held) or not self._grow():
                return

    def token(self) -> bytes:
        """The next string, bracket or comma after the cursor; empty if there is no complete one."""
        while True:
            begin = self._next + self.cursor
            found = _TOKEN.search(self._held, begin)
            if found and found[0] != b'"':
                self.between, self.cursor = self._held[begin : found.start()], found.end() - self._next
                return found[0]
            if not self._grow():
                return b""


def _deeper(token: bytes) -> int:
    return (token in (b"[", b"{")) - (token in (b"]", b"}"))


class Csv(_TextFile):
    """Comma- or tab-separated values with a header, as Python's csv module reads them; every value is text.

    A quoted value may contain line breaks. A value that spans lines must end where its cell ends; otherwise a quotation
    mark is missing or left over, and the rows between would silently become one cell.
    """

    @cached_property
    def _header(self) -> list[str]:
        first = next(self._records(_text_blocks(self.path)), None)
        if first is None:
            return []
        try:
            names = self._fields(first.text.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path}:{first.line}: the header is not UTF-8 text: {error}") from None
        refuse_duplicates(self.path, names)
        return names

    def _reader(self, lines: Iterable[str], *, strict: bool = False) -> Iterator[list[str]]:
        csv.field_size_limit(sys.maxsize)
        delimiter = "\t" if ".tsv" in suffixes(self.path) else ","
        return csv.reader(lines, delimiter=delimiter, strict=strict)

    def _fields(self, text: str, *, strict: bool = False) -> list[str]:
        return next(self._reader(io.StringIO(text, newline=""), strict=strict), [])

    def _records(self, blocks: Iterator[bytes]) -> Iterator[_Piece]:
        """The records, the header first. A record consists of all lines that the csv module reads for it."""
        held: list[bytes] = []
        begin, line = 0, 1

        def lines() -> Iterator[str]:
            # All delimiters are ASCII, so any decoding that preserves ASCII finds the same records.
            for text in _universal_lines(blocks):
                held.append(text)
                first = begin == 0 and len(held) == 1
                yield (text.removeprefix(codecs.BOM_UTF8) if first else text).decode("latin-1")

        for fields in self._reader(lines()):
            text = b"".join(held)
            if fields:
                yield _Piece(begin, text, line)
            begin, line = begin + len(text), line + len(held)
            held.clear()

    def _pieces(self, blocks: Iterator[bytes]) -> Iterator[_Piece]:
        records = self._records(blocks)
        next(records, None)
        return records

    def _parse(self, text: bytes, line: int) -> Row | BadRow:
        try:
            decoded = text.decode("utf-8")
            fields = self._fields(decoded)
        except (UnicodeDecodeError, csv.Error) as error:
            return BadRow(self.path, line, f"not valid CSV: {error}")
        if (last := line + len(text.splitlines()) - 1) > line:
            try:
                self._fields(decoded, strict=True)
            except csv.Error as error:
                reason = f"a quotation mark is missing, or one too many, up to line {last}: {error}"
                return BadRow(self.path, line, reason)
        if len(fields) != len(self._header):
            return BadRow(self.path, line, f"has {len(fields)} fields where the header names {len(self._header)}")
        return Row(dict(zip(self._header, fields, strict=True)), self.path, line)


class Text(DataFile):
    """A text file, which is one document; `column` is the name of its column in the row."""

    def __init__(self, path: str, column: str) -> None:
        super().__init__(path)
        self.column = column

    def __len__(self) -> int:
        return 1

    def read(self, ids: Sequence[int]) -> list[Row | BadRow]:
        return [self._document() for _ in ids]

    def _document(self) -> Row | BadRow:
        try:
            return Row({self.column: b"".join(read_blocks(self.path)).decode("utf-8-sig")}, self.path, 1)
        except UnicodeDecodeError as error:
            return BadRow(self.path, 1, f"not UTF-8 text: {error}")

    def stream(self, start: int = 0) -> Rows:
        if not start:
            yield self._document()
        return min(start, 1)


def refuse_duplicates(path: str, names: Sequence[str]) -> None:
    if twice := [name for number, name in enumerate(names) if name and name in names[:number]]:
        raise ValueError(f"{path} has two columns named {twice[0]}: rename one of them")


def _whole_values(text: str) -> Iterator[tuple[int, int]]:
    """Yield begin and end of the JSON values, separated by commas, at the start of `text`."""
    decode, end = json.JSONDecoder().raw_decode, 0
    while True:
        begin = _GAP.match(text, end).end()  # type: ignore[union-attr]
        try:
            _, end = decode(text, begin)
        except (ValueError, RecursionError):
            return
        if end == len(text):
            return
        yield begin, end


def _num_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogateescape"))


def suffixes(path: str) -> list[str]:
    """The extensions of a path, in lower case."""
    return [suffix.lower() for suffix in Path(path).suffixes]


def open_binary(path: str) -> BinaryIO:
    """Open a data file for reading from its beginning: the one place where this is done."""
    return open(path, "rb")


def read_blocks(path: str) -> Iterator[bytes]:
    """The content of a file, decompressed, a few MiB at a time. ValueError, with the file's name: it cannot be read."""
    compression = _COMPRESSED.get((suffixes(path) or [""])[-1])
    try:
        with open_binary(path) as file:
            source: Any = file
            if compression == "gzip":
                source = gzip.GzipFile(fileobj=file)
            elif compression == "zstd":
                import pyarrow

                source = pyarrow.CompressedInputStream(pyarrow.PythonFile(file), "zstd")
            while block := source.read(_BLOCK):
                yield block
    except (OSError, EOFError, zlib.error) as error:
        what = "decompressed" if compression else "read"
        raise ValueError(f"{path} can't be {what}: {error}") from None


def _text_blocks(path: str, name: str = "") -> Iterator[bytes]:
    """`read_blocks` for a text; `name` is its name in errors, if not the path."""
    first = True
    for block in read_blocks(path):
        if first:
            _refuse_utf16(block, name or path)
        first = False
        yield block


def _refuse_utf16(start: bytes, path: str) -> None:
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f"{path} is UTF-16 or UTF-32 text: convert it to UTF-8 (iconv -t UTF-8 -f UTF-16)")


def _lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of a text, without newlines."""
    rest = b""
    for block in blocks:
        *whole, rest = (rest + block).split(b"\n")
        yield from whole
    yield rest


def _universal_lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of a text, each with its line ending \\n, \\r or \\r\\n."""
    rest = b""
    for block in blocks:
        *whole, rest = (rest + block).splitlines(keepends=True)
        yield from whole
    if rest:
        yield rest


def _copy(blocks: Iterable[bytes], target: str) -> None:
    with open(target, "wb") as file:
        file.writelines(blocks)
