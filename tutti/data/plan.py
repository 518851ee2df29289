"""Planning: from an order of samples to optimizer steps, their number, and the position to resume from.

Planning is global: each rank plans the same micro batches for all ranks, from lengths alone, and runs its own. A step's
micro batches are the same for any number of ranks. They are distributed by their work, the same number to each rank
(`pack.deal_work`): so any number of ranks trains on the same samples at the same step, and totals over all ranks are
known without communication.

A step takes M = train.global_batch_size / train.micro_batch_size micro batches. The length of an epoch is given

- by the data: one pass, each sample once. Samples at its end that do not fill a step go into the first step of the next
  epoch. The number of steps is found by planning every epoch once, in advance.
- by a formula (data.train_size or data.train_sample). Data that ends earlier starts again, reshuffled; data that is
  longer continues in the next epoch.

Only a run whose epochs are given by the data ends with a rest. The rest is left out (data.drop_last) or trained on: as
a step of its own if it has at least half of what other steps have, otherwise distributed over the last steps so that
each of them has at least half.

The budget of a micro batch may grow over the first W steps, W = int(bsz_warmup_ratio * total steps). If epochs are
given by the data, the number of steps depends on W and W on the number of steps: W starts from the number of steps
without a warm-up and is recomputed until it repeats. If it cycles, the first repeated W is used; the number of steps is
always the true one for that W.

The position is taken after every step: the mix, the samples held back, and the counters. Continuing with another batch
size starts from that same position, so that the rest of the epoch is trained on, starting with the samples held back.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any, NamedTuple, Protocol

import numpy as np

from tutti.config import Config
from tutti.config.nouns import counted
from tutti.core.batch import EMPTY_LENGTH
from tutti.data.mix import Mix, SampleRef
from tutti.data.pack import BestFit, Bucketed, Fixed, Packer, budget_at, deal_buckets, deal_samples, deal_tokens

log = logging.getLogger(__name__)

MicroBatches = list[list[SampleRef]]

_REST_STEPS = 8
"""Maximum number of steps over which the rest of a run is distributed."""

_LOG_SECONDS = 5.0

_LEAST = 0.5
"""The smallest allowed size of a step, as a fraction of a full one."""


class SampleSource(Protocol):
    """A source of samples: an index with random access, or a stream."""

    size: int | None
    """The number of samples in a pass; None if unknown."""

    @property
    def knows_lengths(self) -> bool:
        """True if lengths are known before samples are drawn."""

    @property
    def names(self) -> Sequence[str]:
        """Names of the data sources; each is a stream of the mix if the mix has several."""

    def mix(self) -> Mix:
        """The mix before its first pass."""

    def facts(self, items: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
        """The number of trained tokens, and the source, of each item."""

    def num_values(self, items: Sequence[Any]) -> int:
        """The number of values of all media of these items."""

    def bucket(self, item: Any) -> int:
        """The bucket of an item: items of different buckets never share a micro batch."""

    def name(self, item: Any) -> Any:
        """Plain data that identifies the item."""

    def find(self, names: Sequence[Any]) -> list[SampleRef]:
        """The items with these names."""


@dataclass(frozen=True)
class BatchingPlan:
    """The rules by which samples become steps.

    micro_batches: M, over all ranks. budget: B tokens. seed: for the random order of micro batches that are packed
    together; None keeps the order of the samples. even_end: distribute the rest of a run over its last steps.
    epoch_steps: set if given by a formula. bucketed: the samples are in several buckets.
    """

    micro_batches: int
    micro_batch_size: int
    budget: int
    dynamic: bool
    pad: bool
    buffer_size: int
    seed: int | None
    drop_last: bool
    even_end: bool
    warmup_ratio: float
    warmup_from: int
    epochs: int
    epoch_steps: int | None
    max_steps: int | None
    bucketed: bool = False

    @property
    def pad_to(self) -> int | None:
        return self.budget if self.pad else None

    @property
    def global_batch_size(self) -> int:
        return self.micro_batches * self.micro_batch_size

    def packer(self, bucket: Callable[[Any], int]) -> Packer:
        """A packer of items. bucket: returns an item's bucket."""
        if self.bucketed:
            return Bucketed(self.micro_batch_size, bucket)
        return BestFit(self.buffer_size, self.budget, self.seed) if self.dynamic else Fixed(self.micro_batch_size)

    def slots(self, budget: int, batch: Sequence[SampleRef]) -> int:
        """Slots (places for tokens) of a micro batch planned with `budget`."""
        if self.pad:
            return self.budget
        if not batch:
            return EMPTY_LENGTH
        if self.dynamic and len(batch) > 1:
            return budget
        return max(budget if self.dynamic else 0, sum([length for length, _ in batch]))

    def fullness(self, budget: int, batches: MicroBatches) -> float:
        """The fraction of a full step's tokens (without dyn_bsz: samples) in a step of these micro batches."""
        if self.dynamic:
            return _tokens(batches) / (self.micro_batches * budget)
        return sum(map(len, batches)) / self.global_batch_size

    def room(self, budget: int, batches: MicroBatches) -> int:
        """Slots of several micro batches in total."""
        return sum([self.slots(budget, batch) for batch in batches])

    def deal(
        self, budget: int, batches: MicroBatches, steps: int, bucket: Callable[[Any], int] | None = None
    ) -> MicroBatches:
        """The samples of `batches`, the last of a run, as M micro batches for each of `steps` steps.

        bucket: returns a sample's bucket, if buckets matter. Returns nothing if it is impossible, which it never is for
        one step of at most M micro batches.
        """
        samples = [drawn for batch in batches for drawn in batch]
        if self.bucketed and bucket is not None:
            return deal_buckets(samples, steps, self.micro_batches, self.micro_batch_size, bucket)
        if not self.dynamic:
            return deal_samples(samples, steps, self.micro_batches)
        dealt = deal_tokens(samples, steps, self.micro_batches, budget)
        if not dealt and steps == 1:
            return batches + [[] for _ in range(self.micro_batches - len(batches))]
        return dealt

    def counts_without_lengths(self, tokens: int) -> bool:
        """True if the number of steps of epochs with about this many `tokens` is known before all lengths are: steps
        have equal numbers of samples, follow from a formula, or are limited by train.max_steps."""
        if not self.dynamic or self.epoch_steps is not None:
            return not self.bucketed
        return self.max_steps is not None and 2 * self.max_steps * self.micro_batches * self.budget <= tokens

    def capped(self, steps: int) -> int:
        return steps if self.max_steps is None else min(steps, self.max_steps)


def make_batching_plan(config: Config, *, dp_size: int, by_formula: bool) -> BatchingPlan:
    """The plan of a configuration on `dp_size` data-parallel ranks; ValueError if the batch sizes don't divide."""
    data, train = config.data, config.train
    step = train.micro_batch_size * dp_size
    global_batch_size = train.global_batch_size or step
    if global_batch_size % step:
        raise ValueError(
            f"train.global_batch_size {global_batch_size} must be a multiple of train.micro_batch_size "
            f"{train.micro_batch_size} times {dp_size} data-parallel ranks = {step}"
        )
    steps = None
    if by_formula and train.dyn_bsz:
        grown = data.train_size * (1 + train.bsz_warmup_ratio / 2)
        steps = math.ceil(grown / (global_batch_size * data.sample_tokens))
    elif by_formula:
        steps = math.ceil(data.train_sample / global_batch_size)
    return BatchingPlan(
        micro_batches=global_batch_size // train.micro_batch_size,
        micro_batch_size=train.micro_batch_size,
        budget=train.micro_batch_size * data.sample_tokens,
        dynamic=train.dyn_bsz,
        pad=train.pad_to_length,
        buffer_size=data.dyn_bsz_buffer_size,
        seed=train.seed if data.shuffle else None,
        drop_last=data.drop_last,
        even_end=True,
        warmup_ratio=train.bsz_warmup_ratio if train.dyn_bsz else 0.0,
        warmup_from=train.bsz_warmup_init_mbtoken,
        epochs=train.num_train_epochs,
        epoch_steps=steps,
        max_steps=train.max_steps,
        bucketed=data.task.rows == "captions",
    )


@dataclass(frozen=True)
class StepPlan:
    """One step over all ranks: its micro batches in global order, their slots, and the position after it."""

    micro_batches: MicroBatches
    slots: int
    step: int
    epoch: int
    epoch_end: bool
    position: dict[str, Any]


@dataclass(frozen=True)
class Count:
    """Counts from planning ahead: the steps of every epoch (0 before the position), and sums over these steps.

    rest_steps: over how many of the last steps the rest of the run is distributed. left_out: the samples left out
    instead.
    """

    epoch_steps: tuple[int, ...]
    rest_steps: int = 0
    left_out: int = 0
    tokens: int = 0
    slots: int = 0


class _Planned(NamedTuple):
    """A step planned ahead."""

    epoch: int
    batches: MicroBatches
    slots: int


class Planner:
    """Plans steps from a position on. `count()` must set the number of steps before `steps()` runs.

    passes: the number of passes over the data that have begun. While the last samples of a pass are part of the next
    epoch's first step, this is one ahead of the number of epochs.
    """

    def __init__(self, source: SampleSource, batching: BatchingPlan) -> None:
        self.source, self.batching = source, batching
        self.mix, self.packer = source.mix(), batching.packer(source.bucket)
        self.step = self.epoch = self.step_in_epoch = self.passes = 0
        self._cut_at = 0  # steps of the last epoch if train.max_steps ended it and no new one has begun
        self.warmup_steps = 0
        self._set_counted(Count(()))
        self._formula_steps = batching.epoch_steps
        self._batching = asdict(batching)

    def _set_counted(self, counted: Count) -> None:
        self.counted, self._counted = counted, asdict(counted)

    @property
    def total_steps(self) -> int:
        """Steps of the entire run, including those before the position."""
        done_before = self.step - self.step_in_epoch
        return done_before + sum(self.counted.epoch_steps[self.epoch :])

    def steps(self) -> Iterator[StepPlan]:
        """The steps from the position to the end of the last epoch."""
        ends = self.counted.epoch_steps
        while self.epoch < self.batching.epochs:
            if self.step_in_epoch >= ends[self.epoch]:
                self._end_epoch()
                continue
            passes = self.mix.passes()
            if self.counted.rest_steps and self.total_steps - self.step == self.counted.rest_steps:
                self._deal_rest()
            batches, slots = self._take()
            self._say_restarts(passes)
            epoch, epoch_end = self.epoch, self.step_in_epoch == ends[self.epoch]
            if epoch_end:
                self._end_epoch()
            yield StepPlan(batches, slots, self.step, epoch, epoch_end, self.position())

    def _take(self) -> tuple[MicroBatches, int]:
        """The next step's micro batches and their slots. Fewer than M, at the end of the run, are not a step."""
        budget = self._budget_at(self.step)
        batches = list(islice(self._micro_batches(budget), self.batching.micro_batches))
        if len(batches) == self.batching.micro_batches:
            self.step += 1
            self.step_in_epoch += 1
        return batches, self.batching.room(budget, batches)

    def _budget_at(self, step: int) -> int:
        full, initial = self.batching.budget, self.batching.warmup_from
        return budget_at(step, budget=full, initial=initial, warmup_steps=self.warmup_steps)

    def _micro_batches(self, budget: int) -> Iterator[list[SampleRef]]:
        """Micro batches from the current step on, pass after pass (the last one ends if the data gives epochs)."""
        before = None if self.passes else 0
        if not self.passes:
            self._begin_pass()
        draw = self.mix.drawer(self.step)
        while True:
            if (batch := self.packer.take(draw, budget, self.step)) is not None:
                before = None
                yield batch
            elif self.batching.epoch_steps is None and self.passes == self.batching.epochs:
                return
            elif before == len(self.packer.open):
                raise ValueError("data.train_path has no sample to train on")
            else:
                before = len(self.packer.open)
                self._begin_pass()
                draw = self.mix.drawer(self.step)

    def _begin_pass(self) -> None:
        self.mix.restart()
        self.passes += 1

    def _deal_rest(self) -> None:
        """Distribute all remaining samples over the remaining steps."""
        budget = self._budget_at(self.step)
        batches = [*self._micro_batches(budget), self.packer.open]
        dealt = self.batching.deal(budget, batches, self.counted.rest_steps, self.source.bucket)
        self.packer.hold([drawn for batch in dealt for drawn in batch], [*map(len, dealt), 0])

    def _say_restarts(self, before: Sequence[int]) -> None:
        """Log which sources have restarted since they were in the passes `before`."""
        if self.batching.epoch_steps is None and len(before) == 1:
            return
        names = self.source.names if len(before) > 1 else ["data.train_path"]
        for name, old, new in zip(names, before, self.mix.passes(), strict=True):
            if new > old >= 0 and (new < 10 or new & (new - 1) == 0):
                log.info("step %d: %s is read through and begins again, for pass %d", self.step, name, new + 1)

    def _end_epoch(self) -> None:
        """Go to the next epoch. An epoch that train.max_steps cut short leaves it no samples."""
        cut, limit = self._is_cut(), self.batching.max_steps
        self._cut_at = self.step_in_epoch if limit is not None and self.step_in_epoch >= limit else 0
        self.epoch, self.step_in_epoch = self.epoch + 1, 0
        self._formula_steps = self.batching.epoch_steps
        if cut and self.epoch < self.batching.epochs:
            self._begin_epoch_anew()

    def _begin_epoch_anew(self) -> None:
        self.packer.hold(())
        self.passes, self._cut_at = self.epoch, 0
        self._begin_pass()

    def _is_cut(self) -> bool:
        limit = self.batching.max_steps
        return self.batching.epoch_steps is None and limit is not None and self.step_in_epoch >= limit

    def count(self) -> None:
        """Find the number of steps from the position on, and the matching warm-up, unless known already."""
        if self.counted.epoch_steps:
            return
        ratio = self.batching.warmup_ratio
        seen: set[int] = set()
        self.warmup_steps = 0
        self._set_counted(self._count())
        if self.step == 0 and not any(self.counted.epoch_steps):
            size, batching = self.source.size, self.batching
            needs = str(batching.global_batch_size)
            if batching.dynamic:
                needs = counted(batching.micro_batches, "full micro batch", "full micro batches")
            raise ValueError(
                f"data.train_path gives {counted(size or 0, 'sample')}, less than one global batch of {needs}: lower "
                "train.global_batch_size or train.micro_batch_size, or set data.drop_last false"
            )
        while (warmup := int(ratio * self.total_steps)) != self.warmup_steps:
            circled = warmup in seen
            seen.add(warmup)
            self.warmup_steps = warmup
            self._set_counted(self._count())
            if circled:
                break

    def _count(self) -> Count:
        batching = self.batching
        if batching.epoch_steps is None:
            if self.source.knows_lengths:
                return self._count_passes()
            return (self._count_cut() or self._count_passes()) if batching.dynamic else self._count_by_samples()
        old = self._formula_steps or batching.epoch_steps
        left = math.ceil(batching.epoch_steps * max(0, old - self.step_in_epoch) / old)
        current, later = batching.capped(self.step_in_epoch + left), batching.capped(batching.epoch_steps)
        steps = [0] * self.epoch + [current] + [later] * (batching.epochs - self.epoch - 1)
        return Count(tuple(steps[: batching.epochs]))

    def _count_passes(self) -> Count:
        batching = self.batching
        ahead = Planner(self.source, batching)
        ahead.load_position(self.position())
        ahead._set_counted(Count(()))
        steps = [0] * self.epoch + [self.step_in_epoch] + [0] * batching.epochs
        tokens = slots = 0
        last: deque[_Planned] = deque(maxlen=_REST_STEPS - 1)
        shown = time.monotonic()
        while ahead.epoch < batching.epochs:
            if ahead._is_cut():
                ahead._end_epoch()
                last.clear()
                continue
            if not self.source.knows_lengths and time.monotonic() - shown > _LOG_SECONDS:
                shown = time.monotonic()
                log.info("tokenising what the steps hold, to count them: %s so far", f"{sum(steps):,}")
            batches, room = ahead._take()
            if len(batches) < batching.micro_batches:
                so_far = Count(tuple(steps[: batching.epochs]), 0, 0, tokens, slots)
                return ahead._count_rest([*batches, ahead.packer.open], list(last), so_far)
            if ahead.passes - 1 > ahead.epoch:
                ahead.epoch, ahead.step_in_epoch = ahead.passes - 1, 1
            steps[ahead.epoch] += 1
            tokens, slots = tokens + _tokens(batches), slots + room
            last.append(_Planned(ahead.epoch, batches, room))
        return Count(tuple(steps[: batching.epochs]), 0, 0, tokens, slots)

    def _count_by_samples(self) -> Count:
        """`_count_passes` for steps with equal numbers of samples, regardless of their lengths. Tokens and slots: 0."""
        batching, each, size = self.batching, self.batching.global_batch_size, self.source.size or 0
        epoch, passes, limit = self.epoch, self.passes, batching.max_steps
        steps = [0] * epoch + [self.step_in_epoch] + [0] * batching.epochs
        left = len(self.packer.held()[0]) + ((self.mix.left or 0) if passes else 0)
        last: list[int] = []
        while epoch < batching.epochs:
            if limit is not None and steps[epoch] >= limit:
                epoch, left, last = epoch + 1, size, []
                passes = epoch + 1
            elif left >= each:
                epoch = max(epoch, passes - 1)
                full = left // each if limit is None else min(left // each, limit - steps[epoch])
                steps[epoch], left = steps[epoch] + full, left - full * each
                last = [*last, *[epoch] * min(full, _REST_STEPS)][1 - _REST_STEPS :]
            elif passes < batching.epochs:
                passes, left = passes + 1, left + size
            else:
                break
        counted = Count(tuple(steps[: batching.epochs]))
        if epoch == batching.epochs:
            return counted
        ahead = Planner(self.source, batching)
        ahead.step = self.step + sum(steps) - self.step_in_epoch
        some, full_one = [(0, None)] * left, [(0, None)] * batching.micro_batch_size
        rest = [some[start : start + len(full_one)] for start in range(0, left, len(full_one))]
        planned = [_Planned(of, [full_one] * batching.micro_batches, 0) for of in last]
        return replace(ahead._count_rest(rest, planned, counted), tokens=0, slots=0)

    def _count_cut(self) -> Count | None:
        """`_count_passes` if train.max_steps ends every epoch even if each sample is a single token, else None.
        Tokens and slots: 0."""
        batching, limit, size = self.batching, self.batching.max_steps, self.source.size or 0
        if limit is None:
            return None
        left = len(self.packer.held()[0]) + (self.mix.left or 0) if self.passes else size
        needs = [(max(0, limit - self.step_in_epoch), left), *[(limit, size)] * (batching.epochs - self.epoch - 1)]
        # All micro batches of a pass but the last are full, and none has more tokens than the budget.
        if any(count < (steps * batching.micro_batches + 1) * batching.budget for steps, count in needs):
            return None
        steps = [0] * self.epoch + [self.step_in_epoch + needs[0][0]] + [limit] * (len(needs) - 1)
        return Count(tuple(steps[: batching.epochs]))

    def _count_rest(self, rest: MicroBatches, last: Sequence[_Planned], so_far: Count) -> Count:
        """The count of all steps. so_far: of the full steps; last: the last of these; rest: the remaining batches."""
        batching, each = self.batching, self.batching.micro_batches
        rest = [batch for batch in rest if batch]
        if not rest:
            return so_far
        least, steps, dealt = 0.0, 0, []
        for number in range(1, 2 + (len(last) if batching.even_end and not batching.drop_last else 0)):
            budget = self._budget_at(self.step + 1 - number)
            pool = [batch for planned in last[len(last) + 1 - number :] for batch in planned.batches] + rest
            found = batching.deal(budget, pool, number, self.source.bucket)
            smallest = min((batching.fullness(budget, step) for step in _chunks(found, each)), default=0.0)
            if smallest > least:
                least, steps, dealt = smallest, number, found
            if least >= _LEAST:
                break
        if not steps and batching.bucketed and not batching.drop_last:
            return self._count_buckets(rest, so_far)
        dropped = not batching.dynamic or len(rest) < each or (least < _LEAST and self.step > 0)
        if not steps or (batching.drop_last and dropped):
            return replace(so_far, left_out=sum(map(len, rest)))
        again = last[len(last) + 1 - steps :]
        counts = list(so_far.epoch_steps)
        for planned in again:
            counts[planned.epoch] -= 1
        counts[-1] += steps
        begin, slots = self.step + 1 - steps, so_far.slots - sum(planned.slots for planned in again)
        for number, batches in enumerate(_chunks(dealt, each)):
            slots += batching.room(self._budget_at(begin + number), batches)
        return Count(tuple(counts), steps, 0, so_far.tokens + _tokens(rest), slots)

    def _count_buckets(self, rest: MicroBatches, so_far: Count) -> Count:
        """The count of all steps if the `rest` has more buckets than a step has micro batches: it takes as many
        steps as needed."""
        batching, steps, dealt = self.batching, 0, MicroBatches()
        while not dealt:
            steps += 1
            dealt = batching.deal(batching.budget, rest, steps, self.source.bucket)
        counts = (*so_far.epoch_steps[:-1], so_far.epoch_steps[-1] + steps)
        slots = so_far.slots + batching.room(batching.budget, dealt)
        return Count(counts, steps, 0, so_far.tokens + _tokens(rest), slots)

    def position(self) -> dict[str, Any]:
        """Plain data from which planning continues: exactly with the same plan, with the rest under another one."""
        held, sizes = self.packer.held()
        return {
            "batching": self._batching,
            "warmup_steps": self.warmup_steps,
            "counted": self._counted,
            "step": self.step,
            "epoch": self.epoch,
            "step_in_epoch": self.step_in_epoch,
            "passes": self.passes,
            "formula_steps": self._formula_steps,
            "mix": self.mix.state_dict(),
            "held": [self.source.name(item) for _, item in held],
            "held_sizes": sizes,
            "cut_at": self._cut_at,
        }

    def load_position(self, position: dict[str, Any]) -> None:
        self.step, self.epoch = position["step"], position["epoch"]
        self.step_in_epoch, self.passes = position["step_in_epoch"], position["passes"]
        self._formula_steps = position["formula_steps"]
        self.mix.load_state_dict(position["mix"])
        same = position["batching"] == self._batching
        self.packer.hold(self.source.find(position["held"]), position["held_sizes"] if same else ())
        self._reopen(position.get("cut_at", 0))
        self.warmup_steps = position["warmup_steps"] if same else 0
        self._set_counted(Count(**position["counted"]) if same else Count(()))

    def _reopen(self, cut_at: int) -> None:
        """Continue the last epoch, which train.max_steps ended after `cut_at` steps, if it may now be longer; or
        begin the next epoch, if there now is one. cut_at: 0 if it did not end that way."""
        limit, self._cut_at = self.batching.max_steps, cut_at
        if cut_at and (limit is None or limit > cut_at):
            self.epoch, self.step_in_epoch, self._cut_at = self.epoch - 1, cut_at, 0
        elif cut_at and self.batching.epoch_steps is None and self.epoch < self.batching.epochs:
            self._begin_epoch_anew()


def _tokens(batches: MicroBatches) -> int:
    return sum([length for batch in batches for length, _ in batch])


def _chunks(batches: MicroBatches, size: int) -> list[MicroBatches]:
    return [batches[start : start + size] for start in range(0, len(batches), size)]


def one_pass(batching: BatchingPlan) -> BatchingPlan:
    """The plan for evaluation: packed in the same way, one epoch of all data in order, no warm-up."""
    return replace(
        batching,
        seed=None,
        drop_last=False,
        even_end=False,
        warmup_ratio=0.0,
        epochs=1,
        epoch_steps=None,
        max_steps=None,
    )


def describe_steps(planner: Planner) -> str:
    """The number of steps of the run, with the reason: one line."""
    batching, found = planner.batching, planner.counted
    steps = found.epoch_steps[planner.epoch :] or found.epoch_steps[-1:]
    each = f"{min(steps):,}" if min(steps) == max(steps) else f"{min(steps):,} to {max(steps):,}"
    size = batching.global_batch_size
    batch = counted(size, "sample")
    if batching.dynamic:
        batch = f"{counted(batching.micro_batches, 'micro batch', 'micro batches')} of {batching.budget:,} tokens"
    if batching.epoch_steps is None:
        why = f"one pass over {counted(planner.source.size or 0, 'sample')}, {batch} a step"
        if found.left_out:
            why += f", {found.left_out:,} left out at the end that fill no last step (data.drop_last)"
        if found.rest_steps > 1:
            why += f", the last {found.rest_steps} smaller"
    elif batching.dynamic:
        why = f"ceil(data.train_size * (1 + {batching.warmup_ratio:g} / 2) / ({size} * data.max_seq_len))"
    else:
        why = f"ceil(data.train_sample / {size})"
    if batching.max_steps is not None and max(steps) == batching.max_steps:
        why += f", no more than train.max_steps {batching.max_steps:,}"
    grows = f", the budget growing over the first {planner.warmup_steps:,}" if planner.warmup_steps else ""
    epochs = counted(batching.epochs, "epoch")
    return f"{counted(planner.total_steps, 'step')}: {epochs} of {each} ({why}){grows}"
