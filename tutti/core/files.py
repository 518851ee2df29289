"""Files that are whole or not there: writing so that a crash leaves the old state or the new one, and reading lines.

A file system may keep a new name and lose the content, or the reverse, when the machine goes down. So content is
flushed to stable storage before it gets its name, and a folder after a name in it has changed. Replacing a file means:
write a draft beside it, flush, rename over it. A reader sees the old file or the new one, never a part.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def synced(path: Path, mode: str = "w") -> Iterator[IO[str]]:
    """A stream to write text to `path`, on stable storage once the block is left. OSError: with the path."""
    try:
        with path.open(mode, encoding="utf-8") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[IO[str]]:
    """A stream whose text takes the place of the file `path` once the block is left, on stable storage if `durable`."""
    draft = path.with_name(f".{path.name}.tmp")
    with synced(draft) if durable else draft.open("w", encoding="utf-8") as stream:
        yield stream
    os.replace(draft, path)
    if durable:
        sync_folder(path.parent)


def write_synced(path: Path, text: str) -> None:
    """Write `text` to `path`; it is on stable storage when this returns."""
    with synced(path) as stream:
        stream.write(text)


def replace_file(path: Path, text: str, *, durable: bool = True) -> None:
    """Put `text` in the place of the file `path`, on stable storage if `durable`."""
    with replacing(path, durable=durable) as stream:
        stream.write(text)


def cache_folder() -> Path:
    """The folder of copies that several runs share: `$TUTTI_CACHE`, by default `~/.cache/tutti`."""
    return Path(os.environ.get("TUTTI_CACHE") or "~/.cache/tutti").expanduser()


def make_once(path: str | Path, write: Callable[[str], None]) -> None:
    """Have `write(draft)` make the file `path` unless it is there; of several processes one does, and the others wait
    for it."""
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.path.exists(path):
            write(f"{path}.part")
            os.replace(f"{path}.part", path)


def sync_folder(folder: Path) -> None:
    """Wait until the names in `folder` are on stable storage. OSError: with the path."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    """Each line of a JSONL file, with its value; None for a line that is not JSON, as a killed writer leaves it."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                yield line, json.loads(line)
            except ValueError:
                yield line, None


def describe_error(error: Exception) -> str:
    """`error` in one line: of an OSError the path and the cause, without its number."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)
