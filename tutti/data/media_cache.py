"""A cache of decoded media, so that small data is decoded once and not in every epoch.

The worker processes of a rank share one memory region of data.media_cache_mb: a micro batch goes to different workers
in different epochs, and each finds what any of them has decoded. It is allocated before they are forked.

Entries are never evicted. In a pass over data that is larger than the cache, eviction of the oldest entries would
discard each medium shortly before its next use; without it, as many are found as fit.

Media are stored decoded and resized (8 bits per channel), before their processor turns them into floats, which are 4 to
8 times as large and quickly computed.
"""

from __future__ import annotations

import hashlib
import mmap
import multiprocessing
from typing import Any

import numpy as np

_SLOT = np.dtype([("name", "u8", (2,)), ("start", "i8"), ("shape", "i4", (4,)), ("dtype", "u1"), ("dims", "u1")])
_BYTES_A_SLOT = 4096
"""Bytes per slot that records an array's place."""
_TRIED = 8
"""Number of consecutive slots that may record an array's place, starting where its name points."""
_DTYPES = (np.dtype(np.uint8), np.dtype(np.float32))
_ALIGNED = 16


class MediaCache:
    """Arrays by name, in `size` bytes of memory that forked processes share; empty after unpickling.

    Arrays are of 8 bits or fp32 and have at most 4 dimensions.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._lock = multiprocessing.get_context("fork").Lock()
        number = max(_TRIED, size // _BYTES_A_SLOT)
        self._memory = np.frombuffer(mmap.mmap(-1, size), np.uint8)
        self._slots = np.frombuffer(mmap.mmap(-1, number * _SLOT.itemsize), _SLOT)
        self._end = np.frombuffer(mmap.mmap(-1, 8), np.int64)  # end of the used memory

    def __reduce__(self) -> Any:
        return MediaCache, (self.size,)

    def get(self, name: bytes) -> np.ndarray | None:
        """A copy of the array with this name; None if it is not cached."""
        words, places = self._places(name)
        with self._lock:
            for slot in self._slots[places]:
                if slot["dims"] and (slot["name"] == words).all():
                    break
            else:
                return None
        shape, dtype, start = slot["shape"][: slot["dims"]].tolist(), _DTYPES[slot["dtype"]], int(slot["start"])
        found = self._memory[start : start + int(np.prod(shape)) * dtype.itemsize]
        return found.view(dtype).reshape(shape).copy()

    def put(self, name: bytes, value: np.ndarray) -> None:
        """Store an array, if there is room and no array of this name yet."""
        assert value.dtype in _DTYPES and 0 < value.ndim <= 4
        words, places = self._places(name)
        with self._lock:
            start = int(self._end[0])
            free = [place for place in places if not self._slots[place]["dims"]]
            known = any((self._slots[place]["name"] == words).all() for place in places if place not in free)
            if known or not free or start + value.nbytes > self.size:
                return
            self._memory[start : start + value.nbytes] = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
            shape = (*value.shape, *(0,) * (4 - value.ndim))
            self._slots[free[0]] = (words, start, shape, _DTYPES.index(value.dtype), value.ndim)
            self._end[0] = start + -(-value.nbytes // _ALIGNED) * _ALIGNED

    def _places(self, name: bytes) -> tuple[np.ndarray, list[int]]:
        """A name's digest, and the slots that may record its array."""
        words = np.frombuffer(hashlib.blake2b(name, digest_size=16).digest(), np.uint64)
        first = int(words[0]) % len(self._slots)
        return words, [(first + step) % len(self._slots) for step in range(_TRIED)]
