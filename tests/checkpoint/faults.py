"""Make a chosen file operation fail, or end the process.

Everything that changes a file goes through `os` or `io.open`. Within the `with` block of a `Faults` these count the
operations on paths under a folder, and the one with the number `at` does not happen: it raises an OSError, or the
process "dies" in it. A dead process stays dead: every later operation fails too, so that no handler can clean up. A
write that fails has written half of its bytes.
"""

from __future__ import annotations

import builtins
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

OPERATIONS = ("fsync", "mkdir", "rename", "replace", "unlink", "remove", "rmdir", "truncate")


class Died(BaseException):
    """Simulates the end of the process; no handler may swallow it."""


class Faults:
    """at: number of the operation, from 0, that fails; None counts only. error: its errno, None for the process's end.
    die: what that end is, raising `Died` by default. done: the operations seen so far, as (kind, file name)."""

    def __init__(
        self, root: Path, at: int | None = None, error: int | None = None, die: Callable[[], Any] | None = None
    ) -> None:
        self.root, self.at, self.error, self.die = str(root), at, error, die
        self.done: list[tuple[str, str]] = []
        self.dead = False
        self._patches: list[Any] = []

    def __enter__(self) -> Faults:
        self._patches = [patch.object(os, name, self._watched(name, getattr(os, name))) for name in OPERATIONS]
        opened = self._opened(io.open)
        self._patches += [patch.object(io, "open", opened), patch.object(builtins, "open", opened)]
        for one in self._patches:
            one.start()
        return self

    def __exit__(self, *_: object) -> None:
        for one in self._patches:
            one.stop()

    def happen(self, kind: str, path: Any, before: Callable[[], None] = lambda: None) -> None:
        """Count one operation; if it is the one that fails, run `before`, its partial effect, first."""
        if self.dead:
            raise Died
        self.done.append((kind, Path(str(path)).name))
        if self.at != len(self.done) - 1:
            return
        before()
        if self.error is None:
            self.dead = True
            if self.die is not None:
                self.die()
            raise Died
        named = () if isinstance(path, int) else (str(path),)
        raise OSError(self.error, os.strerror(self.error), *named)

    def _concerns(self, path: Any, options: dict[str, Any]) -> bool:
        if options.get("dir_fd") is not None:
            path = f"/proc/self/fd/{options['dir_fd']}"
        if isinstance(path, int):
            path = f"/proc/self/fd/{path}"
        path = os.fspath(path)
        if str(path).startswith("/proc/self/fd/"):
            path = os.readlink(path)
        return str(path).startswith(self.root)

    def _watched(self, kind: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def operation(path: Any, *args: Any, **options: Any) -> Any:
            if self._concerns(path, options):
                self.happen(kind, path)
            return original(path, *args, **options)

        return operation

    def _opened(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def opened(
            file: Any,
            mode: str = "r",
            buffering: int = -1,
            encoding: str | None = None,
            errors: str | None = None,
            newline: str | None = None,
            *args: Any,
        ) -> Any:
            writes = set(mode) & set("wax+")
            if not writes or isinstance(file, int) or not self._concerns(file, {}):
                return original(file, mode, buffering, encoding, errors, newline, *args)
            self.happen("open", file)
            raw = _Raw(self, os.fspath(file), mode.replace("b", "").replace("t", ""))
            stream = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            return stream if "b" in mode else io.TextIOWrapper(stream, encoding or "utf-8", errors, newline)

        return opened


class _Raw(io.FileIO):
    def __init__(self, faults: Faults, path: str, mode: str) -> None:
        self._faults = faults
        super().__init__(path, mode)

    def write(self, data: Any) -> int:
        data = bytes(data)
        self._faults.happen("write", self.name, lambda: super(_Raw, self).write(data[: len(data) // 2]) and None)
        return super().write(data)
