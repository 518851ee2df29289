"""Reading parts of files ahead, so that they are in the page cache when they are copied from memory maps.

The first access to a page that is not cached makes the process wait for a small read, and the disk is idle while the
process converts values. A thread that reads the same parts in the same order, in large pieces, keeps the disk busy and
takes the work of filling the cache off the process. It stays within a limit of what has been used, so that a checkpoint
larger than the memory does not push its own pages out.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

AHEAD_BYTES = 2**30
"""The thread reads no more bytes than this before they are used."""

PIECE_BYTES = 4 * 2**20


class Span(NamedTuple):
    """The bytes [begin, end) of a file."""

    file: Path
    begin: int
    end: int


class ReadAhead:
    """A thread that reads `spans`, in order, until the context is left. It ends at a file that it cannot read: whoever
    uses the span gets the error."""

    def __init__(self, spans: Iterable[Span]) -> None:
        self._spans = list(spans)
        self._room = AHEAD_BYTES
        self._ended = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="read ahead", daemon=True)

    def __enter__(self) -> ReadAhead:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify()
        self._thread.join()

    def used(self, span: Span) -> None:
        """Tell that one of the spans has been used, so that the thread may read as many bytes more."""
        with self._changed:
            self._room += span.end - span.begin
            self._changed.notify()

    def _run(self) -> None:
        buffer = memoryview(bytearray(PIECE_BYTES))
        for span in self._spans:
            try:
                with span.file.open("rb") as file:
                    for begin in range(span.begin, span.end, PIECE_BYTES):
                        if not self._may_read(size := min(PIECE_BYTES, span.end - begin)):
                            return
                        os.preadv(file.fileno(), [buffer[:size]], begin)
            except OSError:
                return

    def _may_read(self, size: int) -> bool:
        """Wait for room for so many bytes; False when the context is left."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._room >= size)
            self._room -= size
            return not self._ended
