"""Planning: from an order of samples to optimizer steps, their number, and the position to resume from.

Everything here is global: each rank plans the same micro batches for all ranks, from lengths alone, and runs its share.
Micro batch k of a step belongs to data-parallel rank k % dp as its accumulation index k // dp, so that any number of
ranks trains on the same samples at the same step, and totals over all ranks are known without communication.

A step takes M = train.global_batch_size / train.micro_batch_size micro batches. How long an epoch is:

- by the data: one pass, each sample once. At its end the packer runs empty; the micro batches that do not fill a last
  step are dropped or trained on (data.drop_last). The number of steps comes from planning every epoch once, in advance.
- by a formula (data.train_size or data.train_sample): so many steps. Data that ends earlier starts over, reshuffled,
  and longer data is cut.

The budget of a micro batch may grow over the first W steps, W = int(bsz_warmup_ratio * total steps). How many steps an
epoch by the data has depends on W, and W on that number: W starts from the steps without a warm-up and is put in again
until it repeats. Should it go round in a circle, the first repeated W stands; the number of steps is always the true
one for that W.

The position is taken after every step: the mix, the samples held back, and the counters. Going on with another batch
size starts from the very same position, so that what is left of the epoch is trained on, the samples held back first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np

from tutti.config import Config
from tutti.data.mix import Mix
from tutti.data.pack import BestFit, Fixed, Packer, SampleRef, budget_at


class SampleSource(Protocol):
    """Where samples come from: an index of data with random access, or a stream."""

    size: int | None
    """Samples in a pass; None when unknown."""

    def mix(self) -> Mix:
        """The mix before its first pass."""

    def facts(self, items: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
        """Trained tokens and source of each item."""

    def name(self, item: Any) -> Any:
        """Plain data that finds the item again."""

    def find(self, names: Sequence[Any]) -> list[SampleRef]:
        """The items with these names."""


@dataclass(frozen=True)
class BatchingPlan:
    """How samples become steps. micro_batches: M, over all ranks. budget: B tokens. epoch_steps: if by formula."""

    micro_batches: int
    micro_batch_size: int
    budget: int
    dynamic: bool
    pad: bool
    buffer_size: int
    drop_last: bool
    warmup_ratio: float
    warmup_from: int
    epochs: int
    epoch_steps: int | None
    max_steps: int | None

    @property
    def pad_to(self) -> int | None:
        return self.budget if self.pad else None

    @property
    def global_batch_size(self) -> int:
        return self.micro_batches * self.micro_batch_size

    def packer(self) -> Packer:
        return BestFit(self.buffer_size) if self.dynamic else Fixed(self.micro_batch_size)

    def slots(self, budget: int, batch: Sequence[SampleRef]) -> int:
        """Room of a micro batch that was planned with `budget`; one without samples is a single token."""
        if self.pad:
            return self.budget
        if self.dynamic and len(batch) > 1:
            return budget
        tokens = sum([length for length, _ in batch])
        return max(budget, tokens) if self.dynamic and batch else max(1, tokens)

    def capped(self, steps: int) -> int:
        return steps if self.max_steps is None else min(steps, self.max_steps)


def make_batching_plan(config: Config, *, dp_size: int, by_formula: bool) -> BatchingPlan:
    """The recipe of a configuration on `dp_size` data-parallel ranks; ValueError if the batch sizes don't divide."""
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
        steps = math.ceil(grown / (global_batch_size * data.max_seq_len))
    elif by_formula:
        steps = math.ceil(data.train_sample / global_batch_size)
    return BatchingPlan(
        micro_batches=global_batch_size // train.micro_batch_size,
        micro_batch_size=train.micro_batch_size,
        budget=train.micro_batch_size * data.max_seq_len,
        dynamic=train.dyn_bsz,
        pad=train.pad_to_length,
        buffer_size=data.dyn_bsz_buffer_size,
        drop_last=data.drop_last,
        warmup_ratio=train.bsz_warmup_ratio if train.dyn_bsz else 0.0,
        warmup_from=train.bsz_warmup_init_mbtoken,
        epochs=train.num_train_epochs,
        epoch_steps=steps,
        max_steps=train.max_steps,
    )


@dataclass(frozen=True)
class StepPlan:
    """One step over all ranks: its micro batches in global order, `slots` of room in all, and the position after it."""

    micro_batches: list[list[SampleRef]]
    slots: int
    step: int
    epoch: int
    epoch_end: bool
    position: dict[str, Any]


@dataclass(frozen=True)
class Count:
    """What planning ahead found: steps of every epoch (those before the position: 0), and sums over these steps.

    left_out: samples that filled no last step of an epoch.
    """

    epoch_steps: tuple[int, ...]
    left_out: int = 0
    tokens: int = 0
    slots: int = 0


class Planner:
    """Plans step after step from a position. `count()` must have set the number of steps before `steps()` runs."""

    def __init__(self, supply: SampleSource, recipe: BatchingPlan) -> None:
        self.supply, self.recipe = supply, recipe
        self.mix, self.packer = supply.mix(), recipe.packer()
        self.step = self.epoch = self.step_in_epoch = 0
        self.warmup_steps = 0
        self._set_counted(Count(()))
        self._formula_steps = recipe.epoch_steps
        self._recipe = asdict(recipe)

    def _set_counted(self, counted: Count) -> None:
        self.counted, self._counted = counted, asdict(counted)

    @property
    def total_steps(self) -> int:
        """Steps of the whole run, those before the position included."""
        done_before = self.step - self.step_in_epoch
        return done_before + sum(self.counted.epoch_steps[self.epoch :])

    def steps(self) -> Iterator[StepPlan]:
        """From the position to the end of the last epoch."""
        ends = self.counted.epoch_steps
        while self.epoch < self.recipe.epochs:
            if self.step_in_epoch >= ends[self.epoch]:
                self._end_epoch()
                continue
            batches, slots = self._take()
            epoch, epoch_end = self.epoch, self.step_in_epoch == ends[self.epoch]
            if epoch_end:
                self._end_epoch()
            yield StepPlan(batches, slots, self.step, epoch, epoch_end, self.position())

    def _take(self) -> tuple[list[list[SampleRef]], int]:
        """The next step's micro batches and their room; fewer than M, or none, at the end of the data."""
        recipe = self.recipe
        if self.step_in_epoch == 0:
            self.mix.restart()
            self.packer.hold(())
        budget = budget_at(self.step, budget=recipe.budget, initial=recipe.warmup_from, warmup_steps=self.warmup_steps)
        draw = self._drawer()
        batches: list[list[SampleRef]] = []
        slots = 0
        while len(batches) < recipe.micro_batches and (batch := self.packer.take(draw, budget)):
            batches.append(batch)
            slots += recipe.slots(budget, batch)
        slots += (recipe.micro_batches - len(batches)) * recipe.slots(budget, ())
        self.step += 1
        self.step_in_epoch += 1
        return batches, slots

    def _drawer(self) -> Callable[[], SampleRef | None]:
        draw = self.mix.drawer(self.step)
        if self.recipe.epoch_steps is None:
            return draw

        def draw_for_ever() -> SampleRef | None:
            if (drawn := draw()) is None:
                self.mix.restart()
                if (drawn := draw()) is None:
                    raise ValueError("data.train_path has no sample to train on")
            return drawn

        return draw_for_ever

    def _end_epoch(self) -> None:
        self.epoch, self.step_in_epoch = self.epoch + 1, 0
        self._formula_steps = self.recipe.epoch_steps
        self.packer.hold(())

    def count(self) -> None:
        """Find the number of steps from the position on, and the warm-up that goes with it, unless known already."""
        if self.counted.epoch_steps:
            return
        ratio = self.recipe.warmup_ratio
        seen: set[int] = set()
        self.warmup_steps = 0
        self._set_counted(self._count())
        if self.step == 0 and not all(self.counted.epoch_steps):
            size, recipe = self.supply.size, self.recipe
            needs = f"{recipe.micro_batches} full micro batches" if recipe.dynamic else f"{recipe.global_batch_size}"
            raise ValueError(
                f"data.train_path gives {size:,} samples, less than one global batch of {needs}: lower "
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
        recipe = self.recipe
        if recipe.epoch_steps is not None:
            old = self._formula_steps or recipe.epoch_steps
            left = math.ceil(recipe.epoch_steps * max(0, old - self.step_in_epoch) / old)
            current, later = recipe.capped(self.step_in_epoch + left), recipe.capped(recipe.epoch_steps)
            steps = [0] * self.epoch + [current] + [later] * (recipe.epochs - self.epoch - 1)
            return Count(tuple(steps[: recipe.epochs]))
        ahead = Planner(self.supply, recipe)
        ahead.load_position(self.position())
        counts, left_out, tokens, slots = [0] * self.epoch, 0, 0, 0
        while ahead.epoch < recipe.epochs:
            while recipe.max_steps is None or ahead.step_in_epoch < recipe.max_steps:
                batches, room = ahead._take()
                if not batches or (recipe.drop_last and not self._is_full(batches)):
                    ahead.step, ahead.step_in_epoch = ahead.step - 1, ahead.step_in_epoch - 1
                    left_out += sum(map(len, batches))
                    break
                tokens += sum([length for batch in batches for length, _ in batch])
                slots += room
            counts.append(ahead.step_in_epoch)
            ahead._end_epoch()
        return Count(tuple(counts), left_out, tokens, slots)

    def _is_full(self, batches: list[list[SampleRef]]) -> bool:
        recipe = self.recipe
        full = len(batches) == recipe.micro_batches
        return full and (recipe.dynamic or len(batches[-1]) == recipe.micro_batch_size)

    def position(self) -> dict[str, Any]:
        """Plain data from which planning goes on: on the same recipe exactly, on another one with what is left."""
        return {
            "recipe": self._recipe,
            "warmup_steps": self.warmup_steps,
            "counted": self._counted,
            "step": self.step,
            "epoch": self.epoch,
            "step_in_epoch": self.step_in_epoch,
            "formula_steps": self._formula_steps,
            "mix": self.mix.state_dict(),
            "held": [self.supply.name(item) for _, item in self.packer.held()],
        }

    def load_position(self, position: dict[str, Any]) -> None:
        self.step, self.epoch = position["step"], position["epoch"]
        self.step_in_epoch = position["step_in_epoch"]
        self._formula_steps = position["formula_steps"]
        self.mix.load_state_dict(position["mix"])
        self.packer.hold(self.supply.find(position["held"]))
        same = position["recipe"] == self._recipe
        self.warmup_steps = position["warmup_steps"] if same else 0
        self._set_counted(Count(**position["counted"]) if same else Count(()))


def one_pass(recipe: BatchingPlan) -> BatchingPlan:
    """The recipe for evaluation: packed in the same way, one epoch of all the data, no warm-up."""
    return replace(recipe, drop_last=False, warmup_ratio=0.0, epochs=1, epoch_steps=None, max_steps=None)


def describe_steps(planner: Planner) -> str:
    """How many steps the run takes and why: one line."""
    recipe, counted = planner.recipe, planner.counted
    steps = counted.epoch_steps[planner.epoch :] or counted.epoch_steps[-1:]
    each = f"{min(steps):,}" if min(steps) == max(steps) else f"{min(steps):,} to {max(steps):,}"
    size = recipe.global_batch_size
    batch = f"{size} sample{'s' * (size > 1)}"
    if recipe.dynamic:
        count = recipe.micro_batches
        batch = f"{count} micro batch{'es' * (count > 1)} of {recipe.budget:,} tokens"
    if recipe.epoch_steps is None:
        why = f"one pass over {planner.supply.size:,} samples, {batch} a step"
        if counted.left_out:
            why += f", {counted.left_out:,} in all left out that fill no last step (data.drop_last)"
    elif recipe.dynamic:
        why = f"ceil(data.train_size * (1 + {recipe.warmup_ratio:g} / 2) / ({size} * data.max_seq_len))"
    else:
        why = f"ceil(data.train_sample / {size})"
    if recipe.max_steps is not None and max(steps) == recipe.max_steps:
        why += f", no more than train.max_steps {recipe.max_steps:,}"
    grows = f", the budget growing over the first {planner.warmup_steps:,}" if planner.warmup_steps else ""
    epochs = "1 epoch" if recipe.epochs == 1 else f"{recipe.epochs} epochs"
    return f"{planner.total_steps:,} steps: {epochs} of {each} ({why}){grows}"
