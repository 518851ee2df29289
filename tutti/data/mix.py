"""Mixing: the order in which samples are drawn, from one source or several.

A *stream* yields the samples of one source, one pass at a time, each pass in its own order; `Permuted` is the stream
for data with random access. A *mix* draws from several streams.

Without weights, every sample comes exactly once per pass. With weights, a pass is as many draws as there are samples
(if known), and a source that runs out starts again, reshuffled. The choice of the source is not random: each draw adds
every source's weight to its credit and takes one from the source with the most, so that after any number of draws every
source is within one sample of its exact share. The order within each source is random. Weights count samples, not
tokens; only their ratios matter; they may change with the optimizer step being planned.

Random numbers come from Philox, keyed by (seed, source, pass): the only state is the pass and the position in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

SampleRef = tuple[int, Any]
"""A sample's length in tokens and what identifies it: an index, or the sample itself."""

Draw = Callable[[], SampleRef | None]
"""Returns the next sample of a pass; None at its end."""

Weights = Callable[[int], Sequence[float]]
"""The sources' weights at an optimizer step, from 0."""

_BLOCK = 8192

LEARNT = 512
"""The number of samples whose lengths are found at a time, if not known yet."""

SOON = 4096
"""The number of samples after these that are looked at next."""


def random_words(count: int, *key: int) -> np.ndarray:
    """`count` random uint64 that depend only on `key`, on every machine and in every version."""
    return np.random.Philox(np.random.SeedSequence(key)).random_raw(count)


def permutation(count: int, *key: int) -> np.ndarray:
    """A random order of `range(count)` that depends only on `key`."""
    return np.argsort(random_words(count, *key), kind="stable")


class Stream(Protocol):
    """The samples of one source, pass after pass."""

    number: int
    """The number of the pass, from 0; -1 before the first."""

    def draw(self) -> SampleRef | None:
        """The next sample of this pass; None at its end."""

    def restart(self) -> None:
        """Begin the next pass, even if this one has not ended."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class LearnsLengths(Protocol):
    """Finds lengths of samples that are not known from the start."""

    def __call__(self, now: np.ndarray, soon: np.ndarray) -> None:
        """Find the lengths of the samples with the numbers `now`, and start on those that will be needed `soon`."""

    def close(self) -> None:
        """Stop the background processes."""


class Permuted:
    """Samples with random access, in a new order each pass or in their own order.

    ids: their numbers; an int stands for all numbers below it. lengths: by number. learn: finds lengths not known yet;
    it is told which are needed now and which soon.
    """

    def __init__(
        self,
        ids: np.ndarray | int,
        lengths: np.ndarray,
        *,
        key: tuple[int, ...],
        shuffle: bool,
        learn: LearnsLengths | None = None,
    ) -> None:
        self.ids, self.lengths, self.key, self.shuffle, self.learn = ids, lengths, key, shuffle, learn
        self.count = ids if isinstance(ids, int) else len(ids)
        self._begin(-1, self.count)

    @property
    def left(self) -> int:
        """The number of samples left in this pass."""
        return self.count - self._start - self._next

    def _begin(self, number: int, at: int) -> None:
        self.number, self._start, self._next = number, at, 0
        self._block: list[SampleRef] = []
        self._order: np.ndarray | None = None

    def draw(self) -> SampleRef | None:
        if self._next == len(self._block) and not self._fill():
            return None
        drawn = self._block[self._next]
        self._next += 1
        return drawn

    def _fill(self) -> bool:
        self._start, self._next = self._start + self._next, 0
        if self._order is None and self.shuffle and self._start < self.count:
            self._order = permutation(self.count, *self.key, self.number).astype(np.min_scalar_type(self.count))
        end = self._start + (_BLOCK if self.learn is None else LEARNT)
        ids = self._ids(self._start, end)
        if self.learn is not None and len(ids):
            self.learn(ids, self._ids(end, end + SOON))
        self._block = list(zip(self.lengths[ids].tolist(), ids.tolist(), strict=True))
        return bool(self._block)

    def _ids(self, start: int, end: int) -> np.ndarray:
        """The numbers of the samples at the positions [start, end) of this pass, which may end earlier."""
        places = np.arange(start, min(end, self.count))
        if self._order is not None:
            places = self._order[places].astype(np.int64)
        return places if isinstance(self.ids, int) else self.ids[places]

    def restart(self) -> None:
        self._begin(self.number + 1, 0)

    def state_dict(self) -> dict[str, Any]:
        return {"pass": self.number, "at": self._start + self._next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._begin(state["pass"], state["at"])


class Mix:
    """Draws from several streams, by weights or (without) each sample once per pass.

    weights: the sources' relative weights at a step. size: draws in a pass with weights; None: such a pass has no end.
    """

    def __init__(self, streams: Sequence[Stream], weights: Weights | None = None, size: int | None = None) -> None:
        self.streams = list(streams)
        self.weights = weights if len(self.streams) > 1 else None
        self.size = size
        self._begun, self._draws = False, 0
        self._credit = [0.0] * len(self.streams)
        self._running = list(range(len(self.streams)))
        self._shares = [1 / len(self.streams)] * len(self.streams)

    def drawer(self, step: int) -> Draw:
        """A function that returns the next sample, with the weights of `step`; None at the end of the pass."""
        if len(self.streams) == 1:
            return self.streams[0].draw
        if self.weights is None:
            return self._draw_once
        weights = self.weights(step)
        self._shares = [weight / sum(weights) for weight in weights]
        return self._draw_weighted

    def _draw_weighted(self) -> SampleRef | None:
        if self._draws == self.size:
            return None
        self._draws += 1
        stream = self.streams[self._pick()]
        if (drawn := stream.draw()) is None:
            stream.restart()
            drawn = stream.draw()
        return drawn

    def _draw_once(self) -> SampleRef | None:
        while self._running:
            source = self._pick()
            if (drawn := self.streams[source].draw()) is not None:
                return drawn
            self._running.remove(source)
        return None

    def _pick(self) -> int:
        credit, most, total = self._credit, self._running[0], 0.0
        for source in self._running:
            share = self._shares[source]
            total += share
            credit[source] += share
            if credit[source] > credit[most]:
                most = source
        credit[most] -= total
        return most

    def restart(self) -> None:
        """Begin the next pass. With weights the sources continue where they are; without, they start again."""
        self._draws = 0
        if self.weights is not None and self._begun:
            return
        self._begun = True
        self._credit = [0.0] * len(self.streams)
        self._running = list(range(len(self.streams)))
        for stream in self.streams:
            stream.restart()

    @property
    def left(self) -> int | None:
        """The number of samples left in this pass; None if a stream doesn't know."""
        if self.weights is not None:
            return None if self.size is None else self.size - self._draws
        known = [stream.left for stream in self.streams if isinstance(stream, Permuted)]
        return sum(known) if len(known) == len(self.streams) else None

    def passes(self) -> list[int]:
        """The number of the pass that each stream is in."""
        return [stream.number for stream in self.streams]

    def state_dict(self) -> dict[str, Any]:
        return {
            "begun": self._begun,
            "draws": self._draws,
            "credit": list(self._credit),
            "running": list(self._running),
            "streams": [stream.state_dict() for stream in self.streams],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._begun, self._draws = state["begun"], state["draws"]
        self._credit, self._running = list(state["credit"]), list(state["running"])
        for stream, one in zip(self.streams, state["streams"], strict=True):
            stream.load_state_dict(one)
