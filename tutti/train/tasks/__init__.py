"""Tasks: what a run optimizes. Each module here is one objective: its loss, what it counts and the figures it reports.

A step sums what a task's `loss` returns over micro batches and ranks, by name, and divides by counts that are known
beforehand; nothing else of the program knows what the names mean. `data.data_type` picks the task from the table in
`tutti.config.tasks`, which also says how its rows are read and what head the model gets.

To add a task: write a module with `make_task(config)`, give it a row in the table, and test it.
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
"""Sums over a micro batch, by name: a rank's share of each sum. `loss` is the one to differentiate; the others
are detached, scalars or vectors of the sizes in `Task.sums`."""

Split = Literal["train", "eval"]

Prepare = Callable[[Iterable[GlobalBatch], Split], Iterator[GlobalBatch]]
"""Gives global batches what the task's loss needs beside the tokens."""


Work = Callable[[Batch], float]
"""Counts floating-point operations of training on a micro batch, forward and backward, recomputation not counted."""


class SampleDisplay(Protocol):
    """Shows what the model does by now, in the log and the report."""

    def show(self, step: int, metrics: Metrics, executor: Executor) -> None:
        """Show it after `step` (0: before training), once. A collective call."""
        ...


@dataclass(frozen=True)
class Task(ABC):
    """An objective.

    sums: the names and sizes of what `loss` returns beside `loss` and the sums by source. may_drop: whether the model
    trains with the dropout of its config. num_sources: of the data; with several, losses are summed by source as well.
    """

    sums: ClassVar[Mapping[str, int]] = {}
    may_drop: ClassVar[bool] = True
    num_sources: int = 1

    @abstractmethod
    def loss(self, hidden: Tensor, head: Head) -> Sums:
        """The sums of the micro batch `head.batch`, from its hidden states at the N targets [N, H]."""

    def mean_loss(self, sums: Mapping[str, Any], num_targets: int) -> float:
        """The loss of all evaluation data, from sums over all ranks and batches."""
        return sums["loss"] / num_targets

    def metrics(self, sums: Mapping[str, Any], num_targets: int) -> dict[str, float]:
        """Further figures of a line of metrics, from sums over all ranks (numbers, or lists of them)."""
        return {}

    def flop_counter(self, model: Any) -> Work:
        """A function that counts the operations of training `model` on a micro batch, which `prepare` has completed."""
        flops = count_flops(model)
        return lambda micro: flops.batch(micro.lengths(), micro.num_values())

    def check(self, config: Config, data: Data) -> None:
        """ValueError for data that this task cannot be trained on as it is configured."""
        return

    def prepare(self, run: Run, executor: Executor) -> Prepare:
        """A function that gives global batches what the loss needs beside the tokens. Called once the model of `run`
        has its weights, and before a checkpoint is loaded. A collective call."""
        return lambda batches, split: iter(batches)

    def after_step(self, model: Any, batch: GlobalBatch, world: World) -> None:
        """Change `model` beyond what the optimizer did in the step of `batch`, before anything is saved. Collective."""
        return

    def make_samples(self, run: Run) -> SampleDisplay:
        """The display of the model as it is trained: how it answers the prompts of the configuration. ValueError:
        one of them cannot be used."""
        from tutti.train.samples import Samples  # which looks at runs, and so imports the tasks

        return Samples(run)

    def by_source(self, losses: Tensor, sources: Tensor) -> Sums:
        """Detached losses [n] summed by their data sources [n]; nothing where all are of one source."""
        if self.num_sources == 1:
            return {}
        return {"source_loss": losses.new_zeros(self.num_sources).index_add_(0, sources, losses)}

    def sizes(self) -> dict[str, int]:
        """The number of values under each name that `loss` returns."""
        by_source = {"source_loss": self.num_sources} if self.num_sources > 1 else {}
        return {"loss": 1, **self.sums, **by_source}


class WholeModelTask(Task):
    """An objective of a model that is no language model: it is given the model itself, and no hidden states."""

    @abstractmethod
    def run(self, model: Any, batch: Batch) -> Sums:
        """The sums of a micro batch."""

    @abstractmethod
    def flop_counter(self, model: Any) -> Work: ...

    def loss(self, hidden: Tensor, head: Head) -> Sums:
        raise AssertionError("a model without a head has no hidden states")


def make_task(config: Config, num_sources: int = 1) -> Task:
    """The task that data.data_type names."""
    task: Task = import_module(config.data.task.module).make_task(config)
    return replace(task, num_sources=num_sources)
