"""Crash-safe files: a crash while writing leaves the old file or the new one. Also, reading JSON lines.

When the machine goes down, a file system may keep a new name and lose the content, or the reverse. So content is
flushed to stable storage before it gets its name, and a folder after a name in it has changed. To replace a file: write
a draft next to it, flush, rename. A reader sees the old file or the new one, never a part.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def synced(path: Path, mode: str = "w") -> Iterator[IO[str]]:
    """A stream to write text to `path`, on stable storage when the context ends. OSError: with the path."""
    try:
        with path.open(mode, encoding="utf-8") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[IO[str]]:
    """A stream whose text replaces the file `path` when the context ends, on stable storage if `durable`."""
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
    """Replace the file `path` by `text`, on stable storage if `durable`."""
    with replacing(path, durable=durable) as stream:
        stream.write(text)


def close_new_files_to_others() -> None:
    """Create this process's files with mode 0640 or tighter, and its folders with 0750."""
    os.umask(os.umask(0o027) | 0o027)


def cache_folder() -> Path:
    """The folder for copies that several runs share: `$TUTTI_CACHE`, by default `~/.cache/tutti`."""
    return Path(os.environ.get("TUTTI_CACHE") or "~/.cache/tutti").expanduser()


def make_once(path: str | Path, write: Callable[[str], None]) -> None:
    """Create the file `path` with `write(draft)`, unless it exists; if several processes call this, one does it and
    the others wait."""
    place = f"{path}.lock"
    while not os.path.exists(path):
        with open(place, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not is_named(lock.fileno(), place):
                continue  # the previous holder has removed the lock file, so this lock protects nothing
            try:
                if not os.path.exists(path):
                    write(f"{path}.part")
                    os.replace(f"{path}.part", path)
            finally:
                Path(place).unlink(missing_ok=True)


def is_named(descriptor: int, path: str | Path) -> bool:
    """True if the open file `descriptor` is still the file at `path`."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def put_folder(made: Path, folder: Path) -> None:
    """Move the complete folder `made` to `folder`, in one step even if it exists, in which case it is replaced.

    Linux exchanges two names atomically. On other systems there is a moment when the old folder has been moved away (to
    where `put_back_folder` finds it) and the new one is not in place yet.
    """
    sync_folder(made)
    old = made
    if not folder.exists():
        os.replace(made, folder)
    elif not _exchange(made, folder):
        old = _set_aside(folder)
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
        os.replace(made, folder)
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def put_back_folder(folder: Path) -> None:
    """Undo a `put_folder` that was interrupted after the old folder was moved away and before the new one was in
    place."""
    old = _set_aside(folder)
    if old.exists() and not folder.exists():
        os.replace(old, folder)


def _set_aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


_AT_WORKING_FOLDER, _RENAME_EXCHANGE = -100, 2  # of fcntl.h and stdio.h


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders; returns False, with nothing changed, if that is not possible."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    here = _AT_WORKING_FOLDER
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), _RENAME_EXCHANGE) == 0


def sync_folder(folder: Path) -> None:
    """Flush the names in `folder` to stable storage. OSError: with the path."""
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
    """Yield each line of a JSONL file with its value; None for a line that is not JSON, as a killed writer leaves
    it."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                yield line, json.loads(line)
            except ValueError:
                yield line, None


def describe_error(error: Exception) -> str:
    """Describe `error` in one line: for an OSError the path and the cause, without its number."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)
