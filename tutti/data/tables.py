"""Columnar files (Arrow, parquet) as rows, read with pyarrow.

pyarrow is imported only when such a file is read: importing it costs more than reading a small file in another format.

All rows of a table have all its columns, at every depth; what a row does not have is null. These nulls are removed, so
that a row looks as in a JSON file with one object per row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, cached_property
from typing import Any

import numpy as np

from tutti.data.formats import BadRow, DataFile, Row, Rows, open_binary, refuse_duplicates
from tutti.data.kept import unpacked


class Arrow(DataFile):
    """An Arrow IPC file or stream, such as from `datasets.save_to_disk`; memory-mapped, never copied as a whole."""

    @cached_property
    def _batches(self) -> list[Any]:
        return list(_arrow_batches(self.path))

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum([batch.num_rows for batch in self._batches], dtype=np.int64)

    @cached_property
    def _sound(self) -> dict[int, bool]:
        """The result of validating a batch, by index."""
        return {}

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, ids: Sequence[int]) -> list[Row | BadRow]:
        wanted = np.asarray(ids, np.int64)
        owner = np.searchsorted(self._ends, wanted, side="right")
        rows: list[Any] = [None] * len(wanted)
        for number in np.unique(owner).tolist():
            batch = self._batches[number]
            if number not in self._sound:
                self._sound[number] = _is_sound(batch)
            places = np.flatnonzero(owner == number)
            first = int(self._ends[number]) - batch.num_rows
            lines = (wanted[places] + 1).tolist()
            if self._sound[number]:
                found = self._rows(batch.take(wanted[places] - first), lines)
            else:
                found = [self._row_alone(batch, line - 1 - first, line) for line in lines]
            for place, row in zip(places, found, strict=True):
                rows[place] = row
        return rows

    def stream(self, start: int = 0) -> Rows:
        return (yield from self._stream_batches(_arrow_batches(self.path), start))

    def _stream_batches(self, batches: Iterable[Any], start: int, position: int = 0) -> Rows:
        """The rows of `batches`, whose first is at `position` in the file, from `start` on."""
        for batch in batches:
            for at in range(max(0, start - position), batch.num_rows, 1024):
                piece = batch.slice(at, 1024)
                lines = range(position + at + 1, position + at + piece.num_rows + 1)
                if _is_sound(piece):
                    yield from self._rows(piece, lines)
                else:
                    yield from (self._row_alone(piece, place, line) for place, line in enumerate(lines))
            position += batch.num_rows
        return min(start, position)

    def _rows(self, batch: Any, lines: Sequence[int]) -> list[Row | BadRow]:
        """The rows of a valid batch."""
        try:
            values = _to_python(batch)
        except Exception:  # for example a date outside of Python's range: find the row
            return [self._row_alone(batch, place, line) for place, line in enumerate(lines)]
        return [self.row(value, line) for value, line in zip(values, lines, strict=True)]

    def _row_alone(self, batch: Any, place: int, line: int) -> Row | BadRow:
        """One row of a batch in which some row cannot be read."""
        try:
            one = batch.slice(place, 1)
            one.validate(full=True)
            return self.row(_to_python(one)[0], line)
        except Exception as error:
            return BadRow(self.path, line, f"can't be read: {error}")


class Parquet(Arrow):
    """A parquet file: streamed by row group; random access uses an unpacked Arrow copy."""

    @cached_property
    def _batches(self) -> list[Any]:
        return list(_arrow_batches(unpacked(self.path, self._unpack), name=self.path))

    def _unpack(self, target: str) -> None:
        import pyarrow

        file = self._open()
        options = pyarrow.ipc.IpcWriteOptions(unify_dictionaries=True)
        with (
            _naming(self.path, "parquet"),
            pyarrow.OSFile(target, "wb") as sink,
            pyarrow.ipc.new_file(sink, file.schema_arrow, options=options) as writer,
        ):
            for batch in file.iter_batches(batch_size=4096):
                writer.write_batch(batch)

    def _open(self) -> Any:
        import pyarrow.parquet

        with _naming(self.path, "parquet"):
            file = pyarrow.parquet.ParquetFile(open_binary(self.path))
        refuse_duplicates(self.path, file.schema_arrow.names)
        return file

    def __len__(self) -> int:
        return int(self._open().metadata.num_rows)

    def stream(self, start: int = 0) -> Rows:
        file, position, group = self._open(), 0, 0
        sizes = [file.metadata.row_group(number).num_rows for number in range(file.metadata.num_row_groups)]
        while group < len(sizes) and position + sizes[group] <= start:
            position, group = position + sizes[group], group + 1
        with _naming(self.path, "parquet"):
            batches = file.iter_batches(batch_size=1024, row_groups=range(group, len(sizes)))
            return (yield from self._stream_batches(batches, start, position))


def _arrow_batches(path: str, name: str = "") -> Iterator[Any]:
    """The record batches of an Arrow file or stream; `name` is its name in errors, if not the path."""
    import pyarrow
    import pyarrow.ipc

    with _naming(name or path, "Arrow"):
        source = pyarrow.memory_map(path)
        try:
            reader = pyarrow.ipc.open_file(source)
        except pyarrow.ArrowInvalid:
            source.seek(0)
            stream = pyarrow.ipc.open_stream(source)
            refuse_duplicates(name or path, stream.schema.names)
            yield from stream
        else:
            refuse_duplicates(name or path, reader.schema.names)
            for number in range(reader.num_record_batches):
                yield reader.get_batch(number)


@contextmanager
def _naming(path: str, kind: str) -> Iterator[None]:
    """Convert pyarrow's exceptions to errors that name the file."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:  # the last one from a column's name
        raise ValueError(f"{path} is not a readable {kind} file: {error}") from None


def _is_sound(batch: Any) -> bool:
    """True if a batch is valid throughout, so that it cannot crash the reader."""
    import pyarrow

    try:
        batch.validate(full=True)
    except pyarrow.ArrowInvalid:
        return False
    return True


def _to_python(batch: Any) -> list[dict[str, Any]]:
    """The rows of a batch, without the null fields of structs."""
    import pyarrow

    prune = _pruner(pyarrow.struct(list(batch.schema)))
    assert prune is not None
    return [prune(value) for value in batch.to_pylist()]


@cache
def _pruner(kind: Any) -> Callable[[Any], Any] | None:
    """A function that drops the null fields of structs in values of this Arrow type; None if it has no structs."""
    from pyarrow import types

    if types.is_struct(kind):
        fields = {field.name: _pruner(field.type) or _unchanged for field in kind}
        return lambda struct: {name: fields[name](item) for name, item in struct.items() if item is not None}
    if types.is_map(kind):
        item_of = _pruner(kind.item_type) or _unchanged
        return lambda pairs: {key: None if item is None else item_of(item) for key, item in pairs}
    if types.is_dictionary(kind):
        return _pruner(kind.value_type)
    if hasattr(kind, "storage_type"):
        return _pruner(kind.storage_type)
    inner = _pruner(kind.value_type) if hasattr(kind, "value_type") else None
    return inner and (lambda items: [None if item is None else inner(item) for item in items])


def _unchanged(value: Any) -> Any:
    return value
