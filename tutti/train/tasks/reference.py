"""The reference model of preference training: the model as it is before the first step, however it came to be.

What is needed of it are the log-probabilities of every pair's two answers, put into the batches before they are trained
on. They never change, so there are two ways (train.dpo_reference):

- precompute: before training the model goes once over all pairs, training and evaluation data alike, without gradients.
  That costs a forward pass over the data and no memory but two numbers a pair. They are kept in output_dir, from where
  a run that goes on takes them; where they are missing there or belong to other data, they are computed again by the
  model as it is before the checkpoint is loaded. So a run that goes on sees the numbers it began with.
- on_the_fly: a frozen second model, sharded as the first and held in the compute dtype, computes them for each batch
  anew. That is for streamed data, which nobody can go over beforehand, and for runs that see a small part of theirs.
  Of a model with adapters that began as its base, no second one is needed: adapters off, it is its own reference.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tutti.config import Config
from tutti.core.batch import Batch, GlobalBatch
from tutti.core.dist import World
from tutti.model.lora import adapters_off
from tutti.parallel.fsdp import fsdp_modules
from tutti.parallel.pipeline.executor import Executor
from tutti.train.objective import Objective
from tutti.train.setup import Parts, second_model
from tutti.train.stages import make_executor

log = logging.getLogger(__name__)

FILE = "reference.safetensors"

Part = Literal["train", "eval"]

WithReference = Callable[[Iterable[GlobalBatch], Part], Iterator[GlobalBatch]]
"""The same global batches with the reference model's log-probabilities in them."""


def make_reference(config: Config, parts: Parts, executor: Executor, world: World) -> WithReference:
    """How batches get their reference. Call it when `parts` has its weights, and before a checkpoint is loaded.

    executor: runs the model of `parts`. Where data is not pairs, batches stay as they are. A collective call.
    """
    if parts.objective.preference is None:
        return lambda batches, part: iter(batches)
    if config.train.dpo_reference == "precompute":
        return Precomputed(_tables(config, parts, executor, world))
    return _on_the_fly(config, parts, executor, world)


@dataclass(frozen=True)
class Precomputed:
    """Log-probabilities by the number of the pair: fp32 [pairs, 2] for each part of the data."""

    tables: dict[str, Tensor]

    def __call__(self, batches: Iterable[GlobalBatch], part: Part) -> Iterator[GlobalBatch]:
        for batch in batches:
            known = [self.tables[part][list(names)] for names in batch.names]
            yield _with_reference(batch, known)


@dataclass(frozen=True)
class Scorer:
    """Computes answers' log-probabilities by `objective`, which `executor` runs and which is the reference model, if
    need be within `apart`."""

    objective: Objective
    executor: Executor
    apart: Callable[[], AbstractContextManager[None]] = nullcontext

    def __call__(self, batches: Iterable[GlobalBatch], part: Part) -> Iterator[GlobalBatch]:
        for batch in batches:
            yield _with_reference(batch, self.score(batch))

    def score(self, batch: GlobalBatch) -> list[Tensor]:
        """fp32 [P, 2] for each of this rank's micro batches, on the host; [] where the rank does not have the model's
        end. A collective call."""
        training = self.objective.training
        self.objective.eval()
        with torch.no_grad(), self.apart():
            found = [out.log_probs for out in self.executor.evaluate(batch.micro_batches)]
        self.objective.train(training)
        return [torch.empty(0, 2) if one is None else one.cpu() for one in found]


def _with_reference(batch: GlobalBatch, known: list[Tensor]) -> GlobalBatch:
    if not known:  # nothing is compared on this rank
        return batch

    def complete(micro: Batch, reference: Tensor) -> Batch:
        if micro.pairs is None:  # padding alone
            return micro
        if micro.input_ids.is_pinned():
            reference = reference.pin_memory()
        return replace(micro, pairs=replace(micro.pairs, reference=reference))

    return replace(batch, micro_batches=tuple(map(complete, batch.micro_batches, known)))


def _on_the_fly(config: Config, parts: Parts, executor: Executor, world: World) -> Scorer:
    """A scorer by the model itself without its adapters, if that is what it began as, else by a second model."""
    train = config.train
    if train.architecture == "lora" and config.model.adapter_path is None and not train.lora_full_modules:
        return Scorer(parts.objective, executor, lambda: adapters_off(parts.model))
    low = train.enable_mixed_precision and train.compute_dtype == "float32"
    train = replace(train, enable_mixed_precision=low, enable_gradient_checkpointing=False)
    config = replace(config, train=train)
    second = second_model(config, parts, world)
    second.objective.eval().requires_grad_(False)
    log.info("reference model: a second copy, in %s", train.compute_dtype)
    return Scorer(second.objective, make_executor(train, second.objective, parts.mesh, second.pipeline, world.device))


def _tables(config: Config, parts: Parts, executor: Executor, world: World) -> dict[str, Tensor]:
    """The log-probabilities of all pairs, from the run's own file where it goes on, else computed. Collective."""
    path = Path(config.train.output_dir or "") / FILE
    key = _key(config, parts)
    goes_on = config.train.load_checkpoint_path is not None
    tables = world.broadcast(_read(path, key) if goes_on and world.is_main else None)
    if tables is not None:
        log.info("reference log-probabilities: taken from %s", path)
        return tables
    score = Scorer(parts.objective, executor).score
    tables = {"train": _table(parts.data.scan(), score, world)}
    if config.data.eval_path:
        tables["eval"] = _table(parts.data.evaluate(), score, world)
    for module in fsdp_modules(parts.objective):
        module.reshard()  # what is gathered now must not outlive the loading of a checkpoint
    log.info("reference log-probabilities: computed for %s pairs", f"{sum(map(len, tables.values())):,}")
    if world.is_main:
        partial = path.with_name(f".{FILE}.tmp")
        save_file(tables, partial, metadata={"key": key})
        os.replace(partial, path)
    return tables


def _table(batches: Iterable[GlobalBatch], score: Callable[[GlobalBatch], list[Tensor]], world: World) -> Tensor:
    """The log-probabilities of every pair in one pass over some data, by the pair's number: fp32 [pairs, 2]."""
    names: list[int] = []
    values: list[Tensor] = []
    for batch in batches:
        scores = score(batch)
        names += [name for one in batch.names for name in one] if scores else []
        values += scores
    shares = world.gather((names, torch.cat([torch.empty(0, 2), *values])))
    found = torch.tensor([name for share, _ in shares for name in share])
    assert len(found.unique()) == found.max() + 1, "a pair was passed over"
    table = torch.empty(int(found.max()) + 1, 2)
    table[found] = torch.cat([share for _, share in shares])
    return table


def _key(config: Config, parts: Parts) -> str:
    """Stands for the data and the model at the start of the run."""
    what = (parts.data.digest, config.model, config.train.compute_dtype, config.train.seed)
    return hashlib.sha256(repr(what).encode()).hexdigest()


def _read(path: Path, key: str) -> dict[str, Tensor] | None:
    """The tables in the file, if they are there and whole, and belong to `key`."""
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("key") != key:
                return None
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
