"""The reference model of preference training: the model as it is before the first step.

Only the log-probabilities of every pair's two answers are needed, added to the batches before they are trained on. They
never change, so there are two ways to get them (train.dpo_reference):

- precompute: before training the model runs once over all pairs, training and evaluation data, without gradients. This
  costs a forward pass over the data, and two numbers of memory per pair. They are stored in output_dir, where a resumed
  run finds them; if they are missing or belong to other data, they are computed again with the model as it is before
  the checkpoint is loaded. So a resumed run uses the same numbers.
- on_the_fly: a frozen second model, sharded like the first and held in the compute dtype, computes them for each batch.
  This is for streamed data, which cannot be read in advance, and for runs that use only a small part of their data. For
  a model with new adapters no second model is needed: with the adapters off, it is its own reference.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tutti.core.batch import Batch, GlobalBatch
from tutti.core.dist import World
from tutti.core.files import make_once
from tutti.kinds import kind_of
from tutti.model.lora import adapters_off, modules_to_save
from tutti.model.structure import read_structure
from tutti.parallel.fsdp import fsdp_modules
from tutti.parallel.pipeline.executor import Executor
from tutti.train.objective import Objective
from tutti.train.placement import load_parameters, make_executor, place_model
from tutti.train.run_parts import Run
from tutti.train.tasks import Prepare, Split
from tutti.train.tasks.dpo import REFERENCE, answer_log_probs

log = logging.getLogger(__name__)

FILE = "reference.safetensors"


def make_reference(run: Run, executor: Executor) -> Prepare:
    """A function that adds the reference model's log-probabilities to batches. Call it after the model has its
    weights, and before a checkpoint is loaded. executor: runs the model of `run`. A collective call."""
    if run.config.train.dpo_reference == "precompute":
        return Precomputed(_tables(run, executor))
    return _on_the_fly(run, executor)


@dataclass(frozen=True)
class Precomputed:
    """Looks up log-probabilities by the index of the pair: fp32 [pairs, 2] for each data split."""

    tables: dict[str, Tensor]

    def __call__(self, batches: Iterable[GlobalBatch], split: Split) -> Iterator[GlobalBatch]:
        for batch in batches:
            known = [self.tables[split][list(names)] for names in batch.names]
            yield _with_reference(batch, known)


@dataclass(frozen=True)
class Scorer:
    """Computes answers' log-probabilities with `objective`, which is the reference model within the context
    `isolated`, and is run by `executor`."""

    objective: Objective
    executor: Executor
    isolated: Callable[[], AbstractContextManager[None]] = nullcontext

    def __call__(self, batches: Iterable[GlobalBatch], split: Split) -> Iterator[GlobalBatch]:
        for batch in batches:
            yield _with_reference(batch, self.score(batch))

    def score(self, batch: GlobalBatch) -> list[Tensor]:
        """fp32 [P, 2] for each of this rank's micro batches, on the device; [] on ranks without the last pipeline
        stage. A collective call."""
        training = self.objective.training
        self.objective.eval()
        with torch.no_grad(), self.isolated():
            found = list(self.executor.evaluate(batch.micro_batches, compute=answer_log_probs))
        self.objective.train(training)
        return found


def _with_reference(batch: GlobalBatch, known: list[Tensor]) -> GlobalBatch:
    if not known:  # this rank has no last stage
        return batch

    def complete(micro: Batch, reference: Tensor) -> Batch:
        if micro.input_ids.is_pinned() and reference.device.type == "cpu":
            reference = reference.pin_memory()
        return replace(micro, payload={**micro.payload, REFERENCE: reference})

    return replace(batch, micro_batches=tuple(map(complete, batch.micro_batches, known)))


def _on_the_fly(run: Run, executor: Executor) -> Scorer:
    """A scorer that uses the model itself with its adapters off if it started that way, else a second model."""
    train, placed, world = run.config.train, run.placed, run.world
    if train.architecture == "lora" and run.config.model.adapter_path is None and not modules_to_save(placed.model):
        return Scorer(placed.objective, executor, lambda: adapters_off(placed.model))
    low = train.enable_mixed_precision and train.compute_dtype == "float32"
    train = replace(train, enable_mixed_precision=low, enable_gradient_checkpointing=False)
    config = replace(run.config, train=train)
    _, model = world.run_on_all_ranks(lambda: kind_of(config).build(config, world.device))
    structure = read_structure(model, config.model.basic_modules)
    second = place_model(config, model, structure, placed.objective.task, run.layout, run.mesh)
    load_parameters(config, second, run.mesh, world)
    second.objective.eval().requires_grad_(False)
    log.info("reference model: a second copy, in %s", train.compute_dtype)
    return Scorer(second.objective, make_executor(train, second, run.mesh, world.device))


def _tables(run: Run, executor: Executor) -> dict[str, Tensor]:
    """The log-probabilities of all pairs, from the run's own file if it resumes, else computed. Collective."""
    config, world = run.config, run.world
    path = Path(config.train.output_dir or "") / FILE
    key = _key(run)
    goes_on = config.train.load_checkpoint_path is not None
    tables = world.broadcast(_read(path, key) if goes_on and world.is_main else None)
    if tables is not None:
        log.info("reference log-probabilities: taken from %s", path)
        return tables
    score = Scorer(run.placed.objective, executor).score
    tables = {"train": _table(run.data.scan(), score, world)}
    if config.data.eval_path:
        tables["eval"] = _table(run.data.evaluate(), score, world)
    for module in fsdp_modules(run.placed.objective):
        module.reshard()  # parameters gathered now must not outlive the loading of a checkpoint
    log.info("reference log-probabilities: computed for %s pairs", f"{sum(map(len, tables.values())):,}")
    if world.is_main:
        path.unlink(missing_ok=True)  # belongs to another key
        make_once(path, lambda draft: save_file(tables, draft, metadata={"key": key}))
    return tables


def _table(batches: Iterable[GlobalBatch], score: Callable[[GlobalBatch], list[Tensor]], world: World) -> Tensor:
    """The log-probabilities of every pair in one pass over the data, by the pair's index: fp32 [pairs, 2]."""
    names: list[int] = []
    values: list[Tensor] = []
    for batch in batches:
        scores = score(batch)
        names += [name for one in batch.names for name in one] if scores else []
        values += [one.cpu() for one in scores]
    shares = world.gather((names, torch.cat([torch.empty(0, 2), *values])))
    found = torch.tensor([name for share, _ in shares for name in share])
    assert len(found.unique()) == found.max() + 1, "a pair was passed over"
    table = torch.empty(int(found.max()) + 1, 2)
    table[found] = torch.cat([share for _, share in shares])
    return table


def _key(run: Run) -> str:
    """A digest of the data and of the model at the start of the run."""
    what = (run.data.digest, run.config.model, run.config.train.compute_dtype, run.config.train.seed)
    return hashlib.sha256(repr(what).encode()).hexdigest()


def _read(path: Path, key: str) -> dict[str, Tensor] | None:
    """The tables in the file; None unless it is complete and belongs to `key`."""
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("key") != key:
                return None
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
