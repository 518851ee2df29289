"""Watchdog for hung ranks: finds, reports and ends them, so that a job does not occupy its machines for hours doing
nothing.

A rank that stops (a dead disk, a lost worker, a lock) keeps all others waiting in their next collective, and from
outside one cannot see which rank it is. So every rank reports where it is (`Watchdog.enter`), and a thread on each rank
monitors this:

1. A rank that has not entered a new phase for a given number of seconds raises the alarm, in the store of torch's
   process group. Time during which the process itself was stopped does not count.
2. On the alarm every rank reports where it is: its phase, its stack, and the collectives that it waits in (from torch's
   flight recorder, which also knows those on a device).
3. The rank that raised the alarm first collects the reports and says which ranks hang: those that do not answer; else
   those that wait in no collective; else those that are farthest behind.
4. All ranks end. One that cannot reach the store (its machine was cut off) ends on its own.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from tutti.core import compat
from tutti.core.dist import World
from tutti.core.launch import ERROR_FILE

Item = TypeVar("Item")

_POLL_SECONDS, _ANSWER_SECONDS, _ALONE_SECONDS = 0.5, 2.5, 4.0
_FRAMES, _STACKS = 8, 3
"""The number of innermost stack frames to show, and the number of ranks to show them for."""


@dataclass(frozen=True)
class Place:
    """The phase of a run that a rank is in. count: number of phases entered. seconds: since the last one. stack: of its
    main thread, one line per frame, the innermost last. waits: the collectives that it waits in."""

    rank: int
    host: str
    phase: str
    count: int
    seconds: float
    stack: list[str]
    waits: list[str]


class Watchdog:
    """Ends all ranks with a report when this one has entered no phase for `seconds` (0: never). A context manager
    that all ranks enter together; an error that leaves it is logged with the phase."""

    def __init__(self, world: World, seconds: float) -> None:
        self._world, self._seconds = world, seconds
        self._phase, self._before, self._count, self._idle = "the start", "nothing", 0, 0.0
        self._over, self._alarm = threading.Event(), ""
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Watchdog:
        if self._seconds:
            # The store may outlive the ranks, and contain the alarm from before a restart.
            self._alarm = f"hang/{self._world.broadcast(secrets.token_hex(8))}"
            main = threading.get_ident()
            watch = threading.Thread(target=self._watch, args=(main,), name="watchdog", daemon=True)
            answer = threading.Thread(
                target=self._answer, args=(compat.default_store().clone(), main), name="watchdog-store", daemon=True
            )
            self._threads = [watch, answer]
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if isinstance(error, Exception):
            error.add_note(f"(in {self._phase}, after {self._before})")
        self._over.set()
        for thread in self._threads[:1]:  # the other thread may be waiting for a store that is gone
            thread.join()

    def enter(self, phase: str) -> None:
        """Report that this rank begins `phase` (a noun), and so makes progress."""
        self._phase, self._before, self._count, self._idle = phase, self._phase, self._count + 1, 0.0

    def during(self, items: Iterable[Item], phase: str) -> Iterator[Item]:
        """Yield `items`; waiting for each of them is a phase."""
        iterator = iter(items)
        while True:
            self.enter(phase)
            try:
                item = next(iterator)
            except StopIteration:
                return
            yield item

    def _watch(self, main: int) -> None:
        """Count the time without progress, and end this process if the store does not answer in time."""
        last = time.monotonic()
        while not self._over.wait(_POLL_SECONDS):
            now = time.monotonic()
            self._idle += min(now - last, 2 * _POLL_SECONDS)
            last = now
            if self._idle >= self._seconds + _ALONE_SECONDS:
                told = describe([self._place(main)], self._world.size, silent_known=False)
                _write(f"{told}; nor does the store of the process group answer\n")
                os._exit(1)

    def _answer(self, store: Any, main: int) -> None:
        """Raise the alarm when this rank is late, answer another rank's alarm, and then end this process."""
        while not self._over.wait(_POLL_SECONDS):
            late = self._idle >= self._seconds
            try:
                if late or store.check([self._alarm]):
                    first = late and store.add(self._alarm, 1) == 1
                    store.set(f"{self._alarm}/{self._world.rank}", json.dumps(asdict(self._place(main))))
                    if first:
                        _write(self._report(store))
                        store.set(f"{self._alarm}/told", "1")
                    _wait_for(store, [f"{self._alarm}/told"])
                    os._exit(1)
            except (
                RuntimeError
            ):  # the store is gone, and with it a rank or a machine: the next collective will report it
                continue

    def _place(self, main: int) -> Place:
        frames = traceback.extract_stack(sys._current_frames()[main])
        stack = [f"{frame.filename}:{frame.lineno} in {frame.name}" for frame in frames[-_FRAMES:]]
        host = socket.gethostname()
        return Place(self._world.rank, host, self._phase, self._count, self._idle, stack, pending_collectives())

    def _report(self, store: Any) -> str:
        """Collect the reports of all ranks, for as long as live ranks need to answer; returns the report."""
        keys = [f"{self._alarm}/{rank}" for rank in range(self._world.size)]
        _wait_for(store, keys)
        places = [Place(**json.loads(store.get(key))) for key in keys if store.check([key])]
        return describe(places, self._world.size) + "\n"


def _wait_for(store: Any, keys: list[str]) -> None:
    """Wait until `keys` are in the store, for as long as live ranks need."""
    deadline = time.monotonic() + _ANSWER_SECONDS
    while not store.check(keys) and time.monotonic() < deadline:
        time.sleep(0.1)


def _write(report: str) -> None:
    """Pass `report` to the launcher, or print it."""
    if ERROR_FILE in os.environ:
        Path(os.environ[ERROR_FILE]).write_text(report, encoding="utf-8")
    else:
        sys.stderr.write(report)
        sys.stderr.flush()


def pending_collectives() -> list[str]:
    """The collectives that this process has started and that have not ended, from torch's flight recorder."""
    dumps = (compat.dump_flight_recorder(), compat.dump_nccl_flight_recorder())
    entries = [entry for dump in dumps for entry in json.loads(dump).get("entries", ())]
    return [
        f"{entry['profiling_name']} {entry.get('input_sizes')} in {entry['process_group'][-1]}"
        for entry in entries
        if not entry.get("retired") and entry.get("state") != "completed"
    ]


def describe(places: list[Place], size: int, *, silent_known: bool = True) -> str:
    """The report on `size` ranks of which `places` are known: stacks first, and in its last line which ranks hang.

    silent_known: a rank that is missing in `places` did not answer.
    """
    answered = {place.rank for place in places}
    silent = [rank for rank in range(size) if rank not in answered] if silent_known else []
    running = [place for place in places if not place.waits and not _in_collective(place.stack)]
    behind = [place for place in places if place.count == min(other.count for other in places)]
    suspects = [] if silent else running or behind
    lines = []
    for place in sorted(places, key=lambda place: place not in suspects)[:_STACKS]:
        lines.append(f"  {_named(place)}, in {place.phase} for {place.seconds:.0f} s:")
        lines += [f"    {frame}" for frame in place.stack]
        lines += [f"    waits in {name}" for name in place.waits[-2:]]
    told = [f"rank {rank} does not answer" for rank in silent[:_STACKS]]
    told += [f"{_named(place)} hangs in {place.phase}, at {place.stack[-1]}" for place in suspects[:_STACKS]]
    more = len(silent) + len(suspects) - len(told)
    text = "; ".join(told) + (f"; and {more} more" if more > 0 else "")
    longest = max(place.seconds for place in places)
    lines.append(f"tutti: error: no progress for {longest:.0f} s (train.hang_timeout): {text}")
    return "\n".join(lines)


def _named(place: Place) -> str:
    return f"rank {place.rank} ({place.host})"


def _in_collective(stack: list[str]) -> bool:
    return any(f"{os.sep}torch{os.sep}distributed{os.sep}" in frame for frame in stack[-3:])
