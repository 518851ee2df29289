"""Predicting a step's memory and communicated bytes, for any number of ranks, without having them.

No formulas are involved. In one process, which torch's `fake` backend lets act as any rank of any number, the model is
sharded and stepped by the same functions as in a run, as a rehearsal: tensors have shapes but no values (see
`tutti.check.rehearsal`). So this rank's own shards are measured, and everything that it sends:

1. Parameters, gradients and optimizer state are the sizes of this rank's shards after a step.
2. The peak is the maximum over all storages while the step runs; what it holds besides these three and gathered
   parameters counts as activations (including buffers of collectives, and gradients before they are reduced).
3. Every collective is counted by the axis it runs along (`tutti.check.comm_volume`).

The micro batches are as full as the configuration allows, each token is a target, and experts are chosen evenly.
Kernels are an accelerator's, whose attention stores no probabilities, or a CPU's. Compilation is left out, and so is a
reference model. If data has media, the micro batch is the one in the first epoch with the most of them, filled up with
text. All micro batches of a step are alike, so a long step follows from short ones: traffic grows by the same amount
with each, and memory stops growing once the maximum number is in flight. If nothing is sent, the longer of two short
steps is enough.

Ranks differ only along the pipeline, or by the remainder of uneven sharding, which the first ranks have: the first rank
of each pipeline stage is rehearsed, and the fullest is reported.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from tutti.check.comm_volume import Sent, count_traffic
from tutti.check.rehearsal import Memory, rehearse
from tutti.config import Config, TrainConfig
from tutti.config.layout import Layout, fit
from tutti.core.batch import IGNORE, Batch, GlobalBatch, Sample, pack
from tutti.core.compat import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeStore,
    UnsupportedOperatorException,
    clear_sharding_cache,
)
from tutti.core.compute_dtype import compute_dtype
from tutti.core.dist import World
from tutti.core.tensors import local_part
from tutti.data.media_processor import MediaProcessor
from tutti.model.fuse_modules import fuse_modules
from tutti.model.initialize import give_storage
from tutti.model.multimodal import make_media_positions
from tutti.model.structure import is_classifier, read_structure
from tutti.parallel.apply import parallelize
from tutti.parallel.fsdp import postpones
from tutti.parallel.mesh import build_mesh
from tutti.parallel.pipeline.schedule import rank_schedule
from tutti.train.objective import Objective
from tutti.train.optim import build_optimizer
from tutti.train.placement import make_executor, place_model
from tutti.train.step import Totals, TrainStep
from tutti.train.tasks import make_task


@dataclass(frozen=True)
class Prediction:
    """Bytes on one rank. parameters, gradients, optimizer: of its shards, after a step's backward passes.

    peak: the maximum of everything at once. At that time: gathered: parameters gathered for computing; activations: all
    the rest. sent: in a step, by axis.
    """

    rank: int
    parameters: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    peak: int
    sent: dict[str, Sent]


class Unpredictable(ValueError):
    """A step of this model depends on the values in its tensors."""


def predict(
    config: Config, model: PreTrainedModel, world: int, full: Batch | None = None, *, on_cpu: bool = False
) -> Prediction:
    """Predict a training step of `model`, unsharded and on the meta device, on the fullest of `world` ranks.

    full: the largest micro batch, if not that of `full_batch`. on_cpu: memory as on a CPU instead of an accelerator;
    the bytes sent, which are the same, are then left out. There must be no process group. ConfigError, ValueError:
    sizes that do not fit. Unpredictable: with the reason.
    """
    if not config.data.task.has_tokens:
        raise Unpredictable(f"not predicted for data.data_type {config.data.data_type}")
    layout = fit(config, world)
    firsts = range(0, world, world // layout.pipeline)
    found = (predict_rank(config, model, world, rank, full=full, on_cpu=on_cpu) for rank in firsts)
    return max(found, key=lambda one: one.peak)


def predict_rank(
    config: Config,
    model: PreTrainedModel,
    world: int,
    rank: int,
    batches: Sequence[Batch] = (),
    full: Batch | None = None,
    *,
    on_cpu: bool = False,
) -> Prediction:
    """Predict a step on one rank. batches: its micro batches, if they are not to be full ones. full, on_cpu: as in
    `predict`."""
    layout = fit(config, world)
    fuses = not (on_cpu or config.train.enable_compile)
    train = replace(config.train, enable_compile=False)
    config = replace(config, train=train)
    with _pretend(rank, world) as ranks, _answering_for(model):
        mesh = build_mesh(layout, ranks, ddp=train.data_parallel_mode == "ddp", ep_outside=train.ep_outside)
        copied = copy.deepcopy(model)
        structure = read_structure(copied, config.model.basic_modules)
        placed = place_model(config, copied, structure, make_task(config), layout, mesh)
        objective = placed.objective
        if fuses:
            fuse_modules(placed.model, None, compute_dtype(train))
        parallelize(objective, placed.structure, mesh, train, placed.plan)
        # A family makes positions of media on the host, from numbers that a rehearsal has no values of.
        place = make_media_positions(placed.structure)
        given = [_without_values(place(batch)) for batch in batches or [full or full_batch(config, model)]]
        with count_traffic(mesh) as traffic, rehearse(on_cpu=on_cpu) as memory:
            give_storage(objective.model, ranks.device)
            objective.train()
            optimizer = build_optimizer(objective.model, config, is_complete=placed.is_complete)
            executor = make_executor(train, placed, mesh, ranks.device)
            sizes = _Sizes(objective, optimizer, memory)
            trainer = TrainStep(
                objective, optimizer, executor, mesh, train.max_grad_norm, inspect_gradients=sizes.after_backward
            )

            def sent_by(micro_batches: Sequence[Batch]) -> dict[str, Sent]:
                before = traffic.sent
                trainer.step(_global_batch(micro_batches), Totals.zero(objective.sizes, ranks.device))
                return _combined(traffic.sent, before, lambda after, so_far: after - so_far)

            if batches:
                return sizes.prediction(rank, sent_by(given))
            (full,), count = given, layout.accumulation
            few, many = _short_steps(count, layout, train, mesh.rank("pipeline"))
            sent = sent_by([full] * many)
            found = sizes.prediction(rank, sent)
            if on_cpu:
                return replace(found, sent={})
            if many == count or not sent:
                return found
            less = sent_by([full] * few)
            left, apart = count - many, many - few
            return replace(found, sent=_combined(sent, less, lambda more, some: more + (more - some) * left // apart))


def _combined(
    left: Mapping[str, Sent], right: Mapping[str, Sent], combine: Callable[[int, int], int]
) -> dict[str, Sent]:
    """Bytes and messages of each axis, combined from both."""
    return {
        axis: Sent(*(combine(mine, other) for mine, other in zip(sent, right.get(axis, Sent()), strict=True)))
        for axis, sent in left.items()
    }


@contextmanager
def _pretend(rank: int, world: int) -> Iterator[World]:
    """Act as `rank` of `world` ranks that do not exist, without output."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    clear_sharding_cache()  # it has meshes of closed groups, which would be taken for new ones
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield World(rank=rank, size=world, local_rank=0, device=torch.device("cpu"))
    finally:
        dist.destroy_process_group()
        clear_sharding_cache()
        logging.disable(level)


@contextmanager
def _answering_for(model: PreTrainedModel) -> Iterator[None]:
    """Raise our own error if something reads values."""
    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException) as error:
        name = type(model).__name__
        raise Unpredictable(f"not known before a run: a step of {name} goes by values ({error.func})") from error


class _Sizes:
    """Measures what a rank holds in its first step."""

    def __init__(self, objective: Objective, optimizer: Optimizer, memory: Memory) -> None:
        self._parameters, self._optimizer, self._memory = list(objective.parameters()), optimizer, memory
        self._gradients = self._gradients_at_peak = self._gathered = self._peak = 0

    def after_backward(self) -> None:
        grads = [local_part(parameter.grad) for parameter in self._parameters if parameter.grad is not None]
        self._gradients, self._gradients_at_peak = _num_bytes(grads), self._memory.at_peak(grads)
        self._peak, self._gathered = self._memory.peak, self._memory.gathered_at_peak
        self._memory.restart()

    def prediction(self, rank: int, sent: dict[str, Sent]) -> Prediction:
        """The measured sizes, after the step. The optimizer's state is allocated in the update and then stays."""
        parameters = _num_bytes(map(local_part, self._parameters))
        states = (value for state in self._optimizer.state.values() for value in state.values())
        optimizer = _num_bytes(local_part(value) for value in states if isinstance(value, Tensor))
        peak, gathered, gradients = self._peak + optimizer, self._gathered, self._gradients_at_peak
        if self._memory.peak > peak:
            peak, gathered, gradients = self._memory.peak, self._memory.gathered_at_peak, self._gradients
        return Prediction(
            rank=rank,
            parameters=parameters,
            gradients=self._gradients,
            optimizer=optimizer,
            gathered=gathered,
            activations=peak - parameters - optimizer - gathered - gradients,
            peak=peak,
            sent=sent,
        )


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _without_values(batch: Batch) -> Batch:
    """The batch with only the shapes of its media's values, in a rehearsal."""
    shapes = {
        key: torch.empty(value.shape, dtype=value.dtype) if value.is_floating_point() else value
        for key, value in batch.extras.items()
    }
    return replace(batch, extras=shapes)


def full_batch_of(config: Config, samples: Sequence[Sample], media: MediaProcessor) -> Batch:
    """A micro batch of these samples with their media, filled up with trained tokens.

    BrokenMediaError: a medium cannot be decoded.
    """
    left = config.train.micro_batch_size * config.data.max_seq_len - sum(map(len, samples))
    longest = config.data.max_seq_len
    rest = [min(longest, left - start) for start in range(0, left, longest)]
    fillers = [Sample(np.zeros(length, np.int32), np.zeros(length, np.int32)) for length in rest]
    for filler in fillers:
        filler.labels[-1] = IGNORE
    batch = pack([*samples, *fillers])
    return replace(batch, extras=media.values([*samples, *fillers], len(batch.input_ids)))


def full_batch(config: Config, model: PreTrainedModel) -> Batch:
    """The largest possible micro batch, each token trained on; of pairs or classes, if the data is."""
    length = config.data.max_seq_len
    ids = np.zeros(length, np.int32)
    labels = np.zeros(length, np.int32)
    labels[-1] = IGNORE
    if is_classifier(model):
        labels = np.where(np.arange(length) == length - 1, 0, IGNORE).astype(np.int32)
    split = length // 2 if config.data.task.rows == "pairs" else 0
    if split:
        labels[split - 1] = IGNORE
    return pack([Sample(ids, labels, split=split)] * config.train.micro_batch_size)


def _global_batch(batches: Sequence[Batch]) -> GlobalBatch:
    """A step of these micro batches; values used only for logging are 1."""
    return GlobalBatch(
        micro_batches=tuple(batches),
        num_targets=1,
        trained_tokens=1,
        num_tokens=1,
        num_samples=1,
        num_slots=1,
        source_targets={},
        source_tokens={},
        names=(),
        step=1,
        epoch=0,
        epoch_end=False,
    )


def _short_steps(count: int, layout: Layout, train: TrainConfig, rank: int) -> tuple[int, int]:
    """Two numbers of micro batches from which a step of `count` on a pipeline's `rank` follows: the larger takes as
    much memory, and the difference between them shows how traffic grows. Both are `count` if that is no larger.

    Interleaved stages take micro batches in groups of the number of ranks, so traffic grows by groups.
    """
    ranks, per_rank = layout.pipeline, train.pipeline_stages_per_rank if layout.pipeline > 1 else 1

    def most_alive(batches: int) -> int:
        order = rank_schedule(rank, ranks, per_rank, batches, split=postpones(train))
        alive = accumulate({"F": 1, "B": -1, "I": 0, "W": -1}[action.kind] for action in order)
        return max(alive)

    most = most_alive(count)
    many = next(number for number in range(min(count, 2), count + 1) if most_alive(number) == most)
    many += ranks > 1  # one more is received before one is finished
    few = 1
    if per_rank > 1:
        few = many + (count - many) % ranks
        many = few + ranks
    return (few, many) if many < count else (count, count)
