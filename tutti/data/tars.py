"""Tar archives of samples (webdataset): consecutive members with equal names up to the first dot form a row.

`0001.json`, `0001.jpg` and `0001.txt` are one row: the object in the JSON file gives its columns, each other text is a
column named by its extension (`{txt}` in data.row_template), and media are the columns `images`, `videos` and `audios`,
in order. If the JSON object has such a column itself, file names in it refer to members of the row.

An archive is never unpacked: for random access its headers are read once, and members in place.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from tutti.data.formats import BadRow, DataFile, Row, Rows, open_binary
from tutti.data.rows import KINDS

_MEDIA = {
    "images": ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"),
    "videos": ("mp4", "webm", "mkv", "avi", "mov", "m4v"),
    "audios": ("wav", "mp3", "flac", "ogg", "opus", "m4a"),
}
_COLUMN = {extension: column for column, extensions in _MEDIA.items() for extension in extensions}


class _Member(NamedTuple):
    """A file in an archive: its name, position and size."""

    name: str
    begin: int
    size: int


class Tar(DataFile):
    """An uncompressed tar archive, whose members with one stem form a row."""

    @cached_property
    def _members(self) -> list[list[_Member]]:
        """The members of each row."""
        with self._readable(), tarfile.open(self.path, "r:") as archive:
            found = (_Member(one.name, one.offset_data, one.size) for one in archive if _is_member(one))
            return list(_of_rows((member.name, member) for member in found))

    @cached_property
    def _file(self) -> Any:
        return open_binary(self.path)

    def __len__(self) -> int:
        return len(self._members)

    def read(self, ids: Sequence[int]) -> list[Row | BadRow]:
        return [self._row(number, [(one.name, self._bytes(one)) for one in self._members[number]]) for number in ids]

    def _bytes(self, member: _Member) -> bytes:
        return os.pread(self._file.fileno(), member.size, member.begin)

    def stream(self, start: int = 0) -> Rows:
        passed = 0
        with self._readable(), open_binary(self.path) as file, tarfile.open(fileobj=file, mode="r|") as archive:
            found = ((one.name, (one.name, _contents(archive, one))) for one in archive if _is_member(one))
            rows = enumerate(_of_rows(found))
            passed = sum(1 for _ in islice(rows, start))
            for number, members in rows:
                yield self._row(number, members)
        return passed

    def _row(self, number: int, members: list[tuple[str, bytes]]) -> Row | BadRow:
        value: dict[str, Any] = {}
        media: dict[str, list[Any]] = {}
        by_name: dict[str, Any] = {}
        for name, data in members:
            extension = name.rpartition(".")[2].lower()
            if extension in _COLUMN:
                by_name[name] = by_name[PurePosixPath(name).name] = entry = {"bytes": data, "path": name}
                media.setdefault(_COLUMN[extension], []).append(entry)
                continue
            try:
                text = data.decode("utf-8-sig")
                columns = json.loads(text) if extension == "json" else {extension: text}
            except (ValueError, RecursionError) as error:
                return BadRow(
                    self.path, number + 1, f"{name} is not {'valid JSON' if extension == 'json' else 'text'}: {error}"
                )
            if not isinstance(columns, dict):
                return BadRow(self.path, number + 1, f"{name} must hold an object, not {type(columns).__name__}")
            value |= columns
        named = [name for kind in KINDS for name in (f"{kind}s", kind) if value.get(name) is not None]
        for name in named:
            entries = value[name] if isinstance(value[name], list) else [value[name]]
            value[name] = [by_name.get(entry, entry) if isinstance(entry, str) else entry for entry in entries]
            media.pop(name if name.endswith("s") else f"{name}s", None)
        return self.row(value | media, number + 1)

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except (tarfile.TarError, OSError, EOFError) as error:
            raise ValueError(f"{self.path} can't be read as a tar archive (not compressed): {error}") from None


def _is_member(one: tarfile.TarInfo) -> bool:
    """True for a regular file that is not hidden."""
    name = PurePosixPath(one.name).name
    return one.isfile() and "." in name and not name.startswith(".")


def _contents(archive: tarfile.TarFile, one: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(one)
    assert file is not None, "a regular file"
    return file.read()


def _of_rows(members: Iterator[tuple[str, Any]]) -> Iterator[list[Any]]:
    """Group consecutive members, by name, into lists that belong to one row."""
    held: list[Any] = []
    stem = None
    for name, member in members:
        folder, _, file = name.rpartition("/")
        if held and (folder, file.partition(".")[0]) != stem:
            yield held
            held = []
        stem = (folder, file.partition(".")[0])
        held.append(member)
    if held:
        yield held
