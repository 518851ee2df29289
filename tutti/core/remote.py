"""Fetching remote files once for all ranks.

A name or URL is first *pinned*: rank 0 finds out which files it currently stands for, down to a commit or a version of
each file, and downloads them into a cache. All ranks use these, so that a branch that moves meanwhile cannot give two
ranks different models. The ranks take turns:

1. Rank 0 pins and downloads.
2. The first rank of every other node looks into its cache, which may be shared, and downloads what is missing.
3. Every rank looks up the local paths, without network.

A download may take hours, but a collective may not, so the waiting ranks exchange a heartbeat every few seconds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from threading import Thread
from typing import Any, Protocol, TypeVar

from tutti.core.dist import World

BEAT_SECONDS = 10.0
"""Seconds between heartbeats of a busy rank."""


class NotCachedError(ValueError):
    """A pinned file is not in this machine's cache."""


class Pinned(Protocol):
    """Remote files at exact versions; picklable."""

    def local(self, *, download: bool) -> list[str]:
        """The paths of the local copies. NotCachedError: one is missing, and `download` is false."""


Key = TypeVar("Key")
Found = TypeVar("Found", bound=Pinned)


def fetch(pin: Callable[[], Mapping[Key, Found]], world: World) -> dict[Key, Found]:
    """The files that `pin` finds on rank 0 and downloads, by name, once every node has them. Collective.

    ValueError, on all ranks: from `pin`, or from a node's download.
    """
    found = world.broadcast(_run_patiently(world, lambda: dict(pin()) if world.is_main else None))
    if found:
        first_of_node = world.local_rank == 0 and not world.is_main
        _run_patiently(world, lambda: _bring(found) if first_of_node else None)
        world.run_on_all_ranks(lambda: [each.local(download=False) for each in found.values()])
    return found


def _bring(found: Mapping[Any, Pinned]) -> None:
    for each in found.values():
        try:
            each.local(download=False)
        except NotCachedError:
            each.local(download=True)


def _run_patiently(world: World, action: Callable[[], Any]) -> Any:
    """As `world.run_on_all_ranks`, for an action that may take very long on some ranks."""
    if world.size == 1:
        return action()
    results: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(action())
        except BaseException as error:
            errors.append(error)

    def outcome() -> Any:
        if errors:
            raise errors[0]
        return results[0]

    thread = Thread(target=run, daemon=True)
    thread.start()
    running = True
    while running:
        thread.join(BEAT_SECONDS)
        running = any(world.gather(thread.is_alive()))
    return world.run_on_all_ranks(outcome)


@contextmanager
def progress_bars() -> Iterator[bool]:
    """Show huggingface_hub's progress bars only on a terminal; yields True there."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    hidden, shown = are_progress_bars_disabled(), sys.stderr.isatty()
    (enable_progress_bars if shown else disable_progress_bars)()
    try:
        yield shown
    finally:
        (disable_progress_bars if hidden else enable_progress_bars)()
