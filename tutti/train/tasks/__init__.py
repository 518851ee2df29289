"""Tasks: what a run optimizes. Each module here is one objective: its loss, its counts and its metrics.

A step sums what a task's `loss` returns over micro batches and ranks, by name, and divides by counts that are known
beforehand; nothing else in the program knows what the names mean. `data.data_type` selects the task from the table in
`tutti.config.tasks`, which also says how its rows are read and which head the model gets.

To add a task: write a module with `make_task(config)`, add its row to the table, and test it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from torch import Tensor

from tutti.config import Config
from tutti.core.batch import Batch, GlobalBatch
from tutti.core.dist import World
from tutti.data.loader import Data
from tutti.model.structure import count_flops
from tutti.train.head import Head

if TYPE_CHECKING:
    from tutti.parallel.pipeline.executor import Executor
    from tutti.train.logging.metrics import Metrics
    from tutti.train.run_parts import Run

Sums = dict[str, Tensor]
"""Sums over a micro batch, by name: this rank's share of each. `loss` is differentiable; the others are detached,
scalars or vectors of the sizes in `Task.sizes`."""

Split = Literal["train", "eval"]

Prepare = Callable[[Iterable[GlobalBatch], Split], Iterator[GlobalBatch]]
"""Adds to global batches what the task's loss needs in addition to the tokens."""


Work = Callable[[Batch], float]
"""Counts the floating-point operations of training on a micro batch, forward and backward, without recomputation."""


class SampleDisplay(Protocol):
    """Shows samples of the model in the log and the report."""

    def show(self, step: int, metrics: Metrics, executor: Executor) -> None:
        """Show samples after `step` (0: before training), at most once per step. A collective call."""
        ...


@dataclass(frozen=True)
class Task(ABC):
    """An objective.

    sums: the names and sizes of what `loss` returns in addition to `loss` and the sums by source. may_drop: True if the
    model trains with the dropout of its config. num_sources: of the data; if several, losses are also summed by source.
    """

    sums: ClassVar[Mapping[str, int]] = {}
    may_drop: ClassVar[bool] = True
    num_sources: int = 1

    @abstractmethod
    def loss(self, hidden: Tensor, head: Head) -> Sums:
        """The sums of the micro batch `head.batch`, from the hidden states at its N targets [N, H]."""

    def mean_loss(self, sums: Mapping[str, Any], num_targets: int) -> float:
        """The mean loss of all evaluation data, from sums over all ranks and batches."""
        return sums["loss"] / num_targets

    def metrics(self, sums: Mapping[str, Any], num_targets: int) -> dict[str, float]:
        """Additional metrics, from sums over all ranks (numbers, or lists)."""
        return {}

    def flop_counter(self, model: Any) -> Work:
        """A function that counts the operations of training `model` on a micro batch that `prepare` has completed."""
        flops = count_flops(model)
        return lambda micro: flops.batch(micro.lengths(), micro.num_values())

    def check(self, config: Config, data: Data) -> None:
        """Raise ValueError if this task, as configured, cannot be trained on `data`."""
        return

    def prepare(self, run: Run, executor: Executor) -> Prepare:
        """A function that adds to global batches what the loss needs in addition to the tokens. Called after the
        model of `run` has its weights, and before a checkpoint is loaded. A collective call."""
        return lambda batches, split: iter(batches)

    def after_step(self, model: Any, batch: GlobalBatch, world: World) -> None:
        """Change `model` after the optimizer's step on `batch`, before anything is saved. Collective."""
        return

    def make_samples(self, run: Run) -> SampleDisplay:
        """The display of the model's samples during training. ValueError: a prompt of the configuration cannot be
        used."""
        from tutti.train.samples import Samples  # imports runs, which import the tasks

        return Samples(run)

    def by_source(self, losses: Tensor, sources: Tensor) -> Sums:
        """Sum detached losses [n] by their data sources [n]; empty if there is only one source."""
        if self.num_sources == 1:
            return {}
        return {"source_loss": losses.new_zeros(self.num_sources).index_add_(0, sources, losses)}

    def sizes(self) -> dict[str, int]:
        """The number of values of each sum that `loss` returns."""
        by_source = {"source_loss": self.num_sources} if self.num_sources > 1 else {}
        return {"loss": 1, **self.sums, **by_source}


class WholeModelTask(Task):
    """An objective for a model other than a language model: it gets the model itself instead of hidden states."""

    @abstractmethod
    def run(self, model: Any, batch: Batch) -> Sums:
        """The sums of a micro batch."""

    @abstractmethod
    def flop_counter(self, model: Any) -> Work: ...

    def loss(self, hidden: Tensor, head: Head) -> Sums:
        raise AssertionError("a model without a head has no hidden states")


def make_task(config: Config, num_sources: int = 1) -> Task:
    """The task that data.data_type selects."""
    task: Task = import_module(config.data.task.module).make_task(config)
    return replace(task, num_sources=num_sources)
