"""Packing: which samples make up a micro batch.

With `train.dyn_bsz` a micro batch contains at most `budget` tokens. Simply concatenating samples in order leaves room
at the end whenever the next one is too long. `BestFit` holds samples back to fill that room, and keeps the order fair:
at any point of an epoch a step's samples are a random draw from the data, long and short alike.

1. Draw a window of `capacity` samples.
2. Begin a micro batch with the oldest sample and add the next ones, in order, as long as they fit. Take the last of
   them back, to look for a better one: add the largest sample that fits, the oldest among equals, until none does.
3. Repeat until RESERVE samples are left: with fewer to choose from, room would stay empty. At the end of the data,
   repeat until none is left.
4. Return the micro batches in random order, except that the one begun with the oldest sample comes first.

Choosing only by size in step 2 would fill micro batches as well, but would sort the data: long samples are used first,
and short ones remain. For the same reason the reserve is small (it lacks the samples that were chosen by size), and the
order in step 4 is random (the first micro batches of a window had more samples to choose from than the last).

While the budget grows, micro batches are made one at a time. A sample longer than the budget forms its own micro batch;
none is dropped or split.

Packers only see lengths, and buckets if a micro batch must contain pictures of one size. They are the same on every
rank, and their whole state is the samples they hold.
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from tutti.data.mix import Draw, SampleRef, permutation

RESERVE = 32
"""Number of samples that stay loose, so that the end of each micro batch finds one that fits."""

_WINDOW_WHILE_GROWING = 64

_AGE_BITS = 44
_AGE_MASK = (1 << _AGE_BITS) - 1


class Packer(ABC):
    """Makes micro batches from the samples it draws.

    ready: micro batches made in advance. open: one that the end of a pass left unfinished; the next pass completes it.
    Other held samples are loose.
    """

    def __init__(self) -> None:
        self.ready: deque[list[SampleRef]] = deque()
        self.open: list[SampleRef] = []

    def take(self, draw: Draw, budget: int, step: int) -> list[SampleRef] | None:
        """The next micro batch; None if the pass that `draw` reads gives no other. step: key of the random order."""
        if not self.ready:
            self.ready.extend(self._pack(draw, budget, step))
        return self.ready.popleft() if self.ready else None

    def held(self) -> tuple[list[SampleRef], list[int]]:
        """All held samples, and the sizes of the micro batches that they begin with: the ready ones, and the open
        one."""
        batches = [*self.ready, self.open]
        return [drawn for batch in batches for drawn in batch] + self._loose_samples(), [len(one) for one in batches]

    def hold(self, samples: Sequence[SampleRef], sizes: Sequence[int] = ()) -> None:
        """Hold exactly these samples, as returned by `held`; without `sizes` all are loose, oldest first."""
        end, batches = 0, []
        for size in sizes:
            batches.append(list(samples[end : end + size]))
            end += size
        self.open = batches.pop() if batches else []
        self.ready = deque(batches)
        self._hold_loose(samples[end:])

    @abstractmethod
    def _pack(self, draw: Draw, budget: int, step: int) -> list[list[SampleRef]]:
        """Some micro batches; none at the end of the pass, when samples that do not fill one are in `open`."""

    @abstractmethod
    def _loose_samples(self) -> list[SampleRef]: ...

    @abstractmethod
    def _hold_loose(self, samples: Sequence[SampleRef]) -> None: ...


class BestFit(Packer):
    """Micro batches of at most `budget` tokens, made from windows of `capacity` samples.

    budget: the final one; smaller ones may precede it. seed: of the micro batches' order; None keeps the order of their
    oldest samples.
    """

    def __init__(self, capacity: int, budget: int, seed: int | None) -> None:
        super().__init__()
        self.capacity, self.budget, self.seed = max(1, capacity), budget, seed
        self.reserve = min(self.capacity, RESERVE)
        # Samples by arrival number, ascending. Keys: one per sample, sorted, including some of samples that are gone.
        self._loose: dict[int, SampleRef] = {}
        self._keys: list[int] = []
        self._count = self._oldest = 0
        self._ended = False

    def _pack(self, draw: Draw, budget: int, step: int) -> list[list[SampleRef]]:
        self._ended, growing = False, budget < self.budget
        if len(self._keys) > 2 * len(self._loose) + 64:
            self._keys = sorted(_key(length, age) for age, (length, _) in self._loose.items())
        self._draw(draw, min(self.capacity, _WINDOW_WHILE_GROWING) if growing else self.capacity)
        batches: list[list[SampleRef]] = []
        more = True
        while self._loose and more:
            batch = self._fill(draw, budget)
            more = not growing and (self._ended or len(self._loose) > self.reserve)
            if not self._loose and sum([length for length, _ in batch]) < budget:
                self.open = batch
            else:
                batches.append(batch)
        if self.seed is not None and len(batches) > 2:
            order = permutation(len(batches) - 1, self.seed, step, 0, 0, 1)
            batches[1:] = [batches[1 + place] for place in order.tolist()]
        return batches

    def _fill(self, draw: Draw, budget: int) -> list[SampleRef]:
        """Make one micro batch: complete the open one, or a new one."""
        loose = self._loose
        batch, self.open = self.open or [loose.pop(self._oldest_from(0))], []
        room = budget - sum([length for length, _ in batch])
        last, age = None, self._oldest
        self._draw(draw, self.reserve)
        while (age := self._oldest_from(age)) < self._count and loose[age][0] <= room:
            if last is not None:
                batch.append(loose.pop(last))
            last, room, age = age, room - loose[age][0], age + 1
            self._draw(draw, self.reserve)
        room += 0 if last is None else loose[last][0]
        while room > 0:
            self._draw(draw, self.reserve)
            if (found := self._take_largest(room)) is None:
                break
            batch.append(found)
            room -= found[0]
        return batch

    def _draw(self, draw: Draw, count: int) -> None:
        """Draw until `count` samples are loose, or the pass ends."""
        while len(self._loose) < count and not self._ended:
            if (drawn := draw()) is None:
                self._ended = True
            else:
                self._add(drawn)

    def _add(self, drawn: SampleRef) -> None:
        insort(self._keys, _key(drawn[0], self._count))
        self._loose[self._count] = drawn
        self._count += 1

    def _oldest_from(self, age: int) -> int:
        """The arrival number of the first loose sample not older than `age`; `_count` if there is none."""
        begin = age = max(age, self._oldest)
        while age < self._count and age not in self._loose:
            age += 1
        if begin == self._oldest:
            self._oldest = age
        return age

    def _take_largest(self, room: int) -> SampleRef | None:
        """Take the largest sample of at most `room` tokens, the oldest among equals. Skips keys of samples that are
        gone."""
        at = bisect_right(self._keys, _key(room, 0)) - 1
        while at >= 0:
            age = _AGE_MASK - (self._keys.pop(at) & _AGE_MASK)
            if age in self._loose:
                return self._loose.pop(age)
            at -= 1
        return None

    def _loose_samples(self) -> list[SampleRef]:
        return list(self._loose.values())

    def _hold_loose(self, samples: Sequence[SampleRef]) -> None:
        self._loose, self._keys, self._count, self._oldest = {}, [], 0, 0
        for drawn in samples:
            self._add(drawn)


def _key(length: int, age: int) -> int:
    """A key that sorts by length, and among equals the oldest last, where a search for the largest finds it first."""
    return length << _AGE_BITS | (_AGE_MASK - age)


class Fixed(Packer):
    """Micro batches of `size` samples in order, whatever their length."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self._loose: deque[SampleRef] = deque()

    def _pack(self, draw: Draw, budget: int, step: int) -> list[list[SampleRef]]:
        batch = self.open
        while len(batch) < self.size:
            drawn = self._loose.popleft() if self._loose else draw()
            if drawn is None:
                return []
            batch.append(drawn)
        self.open = []
        return [batch]

    def _loose_samples(self) -> list[SampleRef]:
        return list(self._loose)

    def _hold_loose(self, samples: Sequence[SampleRef]) -> None:
        self._loose = deque(samples)


class Bucketed(Packer):
    """Micro batches of `size` samples of one bucket each, returned in the order in which they fill up.

    Samples left over at the end of a pass wait for the next pass, or are distributed by `deal_buckets`.
    """

    def __init__(self, size: int, bucket: Callable[[Any], int]) -> None:
        super().__init__()
        self.size, self.bucket = size, bucket
        self._waiting: dict[int, list[SampleRef]] = {}
        self._loose: deque[SampleRef] = deque()

    def _pack(self, draw: Draw, budget: int, step: int) -> list[list[SampleRef]]:
        self._loose.extendleft(reversed(self.open))
        self.open = []
        while (drawn := self._loose.popleft() if self._loose else draw()) is not None:
            batch = self._waiting.setdefault(self.bucket(drawn[1]), [])
            batch.append(drawn)
            if len(batch) == self.size:
                return [self._waiting.pop(self.bucket(drawn[1]))]
        self.open = [drawn for batch in self._waiting.values() for drawn in batch]
        self._waiting = {}
        return []

    def _loose_samples(self) -> list[SampleRef]:
        return [*(drawn for batch in self._waiting.values() for drawn in batch), *self._loose]

    def _hold_loose(self, samples: Sequence[SampleRef]) -> None:
        self._waiting, self._loose = {}, deque(samples)


def deal_buckets(
    samples: Sequence[SampleRef], steps: int, micro_batches: int, size: int, bucket: Callable[[Any], int]
) -> list[list[SampleRef]]:
    """Distribute all of `samples` over `steps` times `micro_batches` micro batches of at most `size` samples of one
    bucket each, some of them empty; returns none if these are too few."""
    groups: dict[int, list[SampleRef]] = {}
    for drawn in samples:
        groups.setdefault(bucket(drawn[1]), []).append(drawn)
    batches = [part for group in groups.values() for part in _cut(group, -(-len(group) // size))]
    room = steps * micro_batches
    if len(batches) > room:
        return []
    while len(batches) < room and len(largest := max(batches, key=len, default=[])) > 1:
        place = next(number for number, batch in enumerate(batches) if batch is largest)
        batches[place : place + 1] = _cut(largest, 2)
    batches += [[] for _ in range(room - len(batches))]
    # Every step gets about the same number of samples: its micro batches are every steps-th of all, largest first.
    order = sorted(batches, key=len, reverse=True)
    return [batch for step in range(steps) for batch in order[step::steps]]


def deal_tokens(samples: Sequence[SampleRef], steps: int, micro_batches: int, budget: int) -> list[list[SampleRef]]:
    """Distribute all of `samples` over `steps` times `micro_batches` micro batches with about equal numbers of tokens.

    Each has at most `budget` tokens, or a single sample. Returns an empty list if no distribution is found: largest
    first, each sample goes to the micro batch with the fewest tokens (R. L. Graham, Bounds on multiprocessing timing
    anomalies, 1969).
    """
    batches: list[list[SampleRef]] = [[] for _ in range(steps * micro_batches)]
    fewest = [(0, place) for place in range(len(batches))]
    for drawn in sorted(samples, key=lambda drawn: -drawn[0]):
        tokens, place = fewest[0]
        if tokens and tokens + drawn[0] > budget:
            return []
        heapq.heapreplace(fewest, (tokens + drawn[0], place))
        batches[place].append(drawn)
    batches = [batches[place] for _, place in sorted(fewest)]
    # Step i takes the i-th of the first `steps` of them, the i-th from the end of the next `steps`, and so on
    # alternating.
    turns = [batches[start : start + steps] for start in range(0, len(batches), steps)]
    return [turn[-1 - step if number % 2 else step] for step in range(steps) for number, turn in enumerate(turns)]


def deal_samples(samples: Sequence[SampleRef], steps: int, micro_batches: int) -> list[list[SampleRef]]:
    """Distribute all of `samples`, in order, over `steps` times `micro_batches` micro batches whose sizes differ by
    at most one."""
    return [batch for step in _cut(samples, steps) for batch in _cut(step, micro_batches)]


def _cut(samples: Sequence[SampleRef], count: int) -> list[list[SampleRef]]:
    borders = [-(-len(samples) * place // count) for place in range(count + 1)]
    return [list(samples[begin:end]) for begin, end in pairwise(borders)]


def budget_at(step: int, *, budget: int, initial: int, warmup_steps: int) -> int:
    """Maximum number of tokens of a micro batch at `step` (from 0): linear from `initial` to `budget` over
    `warmup_steps`."""
    if step >= warmup_steps or initial >= budget:
        return budget
    return initial + (budget - initial) * step // warmup_steps


def deal_work(works: Sequence[float], ranks: int) -> list[list[int]]:
    """The indices of the micro batches that each of `ranks` runs, in order, equally many for each; a single rank runs
    all in order.

    works: the cost of each micro batch. They are distributed in rounds, the most expensive first, and in each round the
    most expensive goes to the rank with the least work so far. So micro batches that run at the same time (ranks wait
    for each other when parameters are gathered) take about equally long, and so does each rank's total.
    """
    if ranks == 1:
        return [list(range(len(works)))]
    longest = sorted(range(len(works)), key=lambda number: -works[number])
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    for start in range(0, len(longest), ranks):
        least = sorted(range(ranks), key=loads.__getitem__)
        for rank, number in zip(least, longest[start : start + ranks], strict=True):
            dealt[rank].append(number)
            loads[rank] += works[number]
    return dealt
