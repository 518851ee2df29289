"""Packing: which samples make up a micro batch.

With `train.dyn_bsz` a micro batch holds at most `budget` tokens. Laying samples end to end in the order they come
would leave the room at the end empty whenever the next one is too long, so a buffer of samples is held back and each
micro batch is filled from it:

1. keep the buffer full (until the data ends),
2. begin with the oldest sample, so that none waits for ever,
3. add the largest sample that still fits, the oldest among equals, until none fits.

A sample longer than the budget (while the budget is still growing) goes alone; none is dropped or split. The buffer is
one sorted list of integers (length in the high bits, age in the low ones), so that a sample costs two binary searches.

Both packers see only lengths: they are the same on every rank, and their whole state is the samples they hold, in the
order these came. `draw()` gives the next `(length, item)`, or None at the end of the data.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

SampleRef = tuple[int, Any]
"""A sample's length in tokens and whatever names it: an index, or the sample itself."""

Draw = Callable[[], SampleRef | None]

_AGE_BITS = 44
_AGE_MASK = (1 << _AGE_BITS) - 1


class Packer(Protocol):
    """Makes micro batches; `held()` and `hold()` are its state."""

    def take(self, draw: Draw, budget: int) -> list[SampleRef]:
        """The next micro batch; empty at the end of the data."""

    def held(self) -> list[SampleRef]:
        """The samples held back, oldest first."""

    def hold(self, drawn: Sequence[SampleRef]) -> None:
        """Hold exactly these, oldest first."""


class BestFit:
    """Micro batches of at most `budget` tokens, chosen among `capacity` samples held back."""

    def __init__(self, capacity: int) -> None:
        self.capacity = max(1, capacity)
        self._keys: list[int] = []
        self._items: dict[int, SampleRef] = {}
        self._count = 0

    def take(self, draw: Draw, budget: int) -> list[SampleRef]:
        keys, items, capacity = self._keys, self._items, self.capacity
        while len(keys) < capacity and (drawn := draw()) is not None:
            self._add(drawn)
        if not keys:
            return []
        oldest = next(iter(items))
        first = items.pop(oldest)
        del keys[bisect_left(keys, first[0] << _AGE_BITS | (_AGE_MASK - oldest))]
        batch, room = [first], budget - first[0]
        while room > 0:
            if len(keys) < capacity and (drawn := draw()) is not None:
                self._add(drawn)
            at = bisect_right(keys, room << _AGE_BITS | _AGE_MASK) - 1
            if at < 0:
                break
            drawn = items.pop(_AGE_MASK - (keys.pop(at) & _AGE_MASK))
            batch.append(drawn)
            room -= drawn[0]
        return batch

    def held(self) -> list[SampleRef]:
        return list(self._items.values())

    def hold(self, drawn: Sequence[SampleRef]) -> None:
        self._keys, self._items, self._count = [], {}, 0
        for one in drawn:
            self._add(one)

    def _add(self, drawn: SampleRef) -> None:
        # Age counts down in the low bits: of equal lengths the oldest has the largest key, which is found first.
        insort(self._keys, drawn[0] << _AGE_BITS | (_AGE_MASK - self._count))
        self._items[self._count] = drawn
        self._count += 1


class Fixed:
    """Micro batches of `size` samples in the order they come, whatever their length."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._held: deque[SampleRef] = deque()

    def take(self, draw: Draw, budget: int) -> list[SampleRef]:
        batch: list[SampleRef] = []
        while len(batch) < self.size:
            drawn = self._held.popleft() if self._held else draw()
            if drawn is None:
                break
            batch.append(drawn)
        return batch

    def held(self) -> list[SampleRef]:
        return list(self._held)

    def hold(self, drawn: Sequence[SampleRef]) -> None:
        self._held = deque(drawn)


def budget_at(step: int, *, budget: int, initial: int, warmup_steps: int) -> int:
    """Tokens a micro batch may hold at `step` (from 0): linear from `initial` to `budget` over `warmup_steps`."""
    if step >= warmup_steps or initial >= budget:
        return budget
    return initial + (budget - initial) * step // warmup_steps
