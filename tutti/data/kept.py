"""Cached files derived from data files: unpacked copies, and results of a pass over a file.

They are in `$TUTTI_CACHE` (default `~/.cache/tutti`), under names made from the path, size and modification time of the
file. If several processes need the same one, one writes it and the others wait.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np

from tutti.core.files import cache_folder, make_once


def unpacked(path: str, write: Callable[[str], None]) -> str:
    """The path of an unpacked copy of `path`, made by `write(target)` if missing."""
    try:
        copy = _cache_place(path)
    except OSError as error:
        raise ValueError(
            f"{path} must be unpacked for random access, and {cache_folder()} can't be made ({error.strerror}): let "
            "the environment variable TUTTI_CACHE name a folder that can, or set data.datasets_type: iterable"
        ) from None
    make_once(copy, write)
    return str(copy)


def _cache_place(path: str, of: str = "") -> Path:
    """The path in the cache folder of an unpacked copy of the file `path`, or of the result `of` a pass over it.
    OSError: the folder can't be made."""
    status = os.stat(path)
    key = f"{os.path.realpath(path)}:{status.st_size}:{status.st_mtime_ns}{of}"
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    return folder / hashlib.sha256(key.encode()).hexdigest()[:32]


def kept(path: str, of: str, write: Callable[[IO[bytes]], None]) -> np.ndarray:
    """The bytes that `write(file)` writes, cached as the result `of` a pass over the file `path`; in memory if the
    disk has no space."""

    def write_to(target: str) -> None:
        with open(target, "wb") as file:
            write(file)

    try:
        place = _cache_place(path, of)
        make_once(place, write_to)
        return np.memmap(place, np.uint8, "r")
    except OSError:
        return np.frombuffer(in_memory(write), np.uint8)


def in_memory(write: Callable[[IO[bytes]], None]) -> bytes:
    file = io.BytesIO()
    write(file)
    return file.getvalue()
