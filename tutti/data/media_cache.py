"""Decoded media that are kept, so that small data is decoded once and not in every epoch.

The worker processes of a rank share one piece of memory, data.media_cache_mb large: which worker a micro batch goes to
differs from epoch to epoch, and so each finds what any of them has decoded. It is made before they are forked.

What comes first stays. A pass over data that is larger than the memory would, if the oldest made room for the newest,
throw each medium out shortly before its next turn, and find nothing; so it finds what fits.

Media are kept as decoded and resized (8 bits a channel), before their processor makes floats of them, which are 4 to 8
times as large and quickly made.
"""

from __future__ import annotations

import hashlib
import mmap
import multiprocessing
from typing import Any

import numpy as np

_SLOT = np.dtype([("name", "u8", (2,)), ("start", "i8"), ("shape", "i4", (4,)), ("dtype", "u1"), ("dims", "u1")])
_BYTES_A_SLOT = 4096
"""Memory for each array whose place can be noted."""
_TRIED = 8
"""Slots that may note an array's place, one after the other from where its name points."""
_DTYPES = (np.dtype(np.uint8), np.dtype(np.float32))
_ALIGNED = 16


class MediaCache:
    """Arrays by name, in memory of `size` bytes that processes forked from this one share; empty where it is unpickled.

    Arrays are of 8 bits or fp32 and of at most 4 dimensions.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._lock = multiprocessing.get_context("fork").Lock()
        number = max(_TRIED, size // _BYTES_A_SLOT)
        self._memory = np.frombuffer(mmap.mmap(-1, size), np.uint8)
        self._slots = np.frombuffer(mmap.mmap(-1, number * _SLOT.itemsize), _SLOT)
        self._end = np.frombuffer(mmap.mmap(-1, 8), np.int64)  # of what is taken of the memory

    def __reduce__(self) -> Any:
        return MediaCache, (self.size,)

    def get(self, name: bytes) -> np.ndarray | None:
        """A copy of the array with this name; None: it is not kept."""
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
        """Keep an array, if there is room for it, and none of its name yet."""
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
        """A name's digest, and the slots that its array may be noted in."""
        words = np.frombuffer(hashlib.blake2b(name, digest_size=16).digest(), np.uint64)
        first = int(words[0]) % len(self._slots)
        return words, [(first + step) % len(self._slots) for step in range(_TRIED)]
