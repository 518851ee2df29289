"""One optimizer step: forward and backward over the micro batches, the global gradient norm, clipping, the update.

The loss of each micro batch is a sum divided by the number of targets of the whole global batch over all ranks, which
is known beforehand. Gradients are summed over micro batches and ranks. So the gradient is exactly that of the mean over
all trained tokens, however they are packed and distributed. Nothing here waits for the device: results stay there in
`Totals` and are read when a metrics line is due.

If the gradient is not finite, the step changes neither parameters nor optimizer state, and is counted. The same can be
requested for spikes (`tutti.train.spike_guard`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from tutti.core.batch import Batch, GlobalBatch
from tutti.core.device import on_accelerator
from tutti.core.dist import World
from tutti.parallel.grads import clip_gradients
from tutti.parallel.mesh import Mesh
from tutti.parallel.pipeline.executor import Executor
from tutti.train.objective import Objective
from tutti.train.spike_guard import SpikeGuard
from tutti.train.tasks import Sums


class TrainStep:
    """Runs steps; holds what is the same for all of them."""

    def __init__(
        self,
        objective: Objective,
        optimizer: Optimizer,
        executor: Executor,
        mesh: Mesh,
        max_grad_norm: float,
        *,
        guard: SpikeGuard | None = None,
        inspect_gradients: Callable[[], None] | None = None,
    ) -> None:
        """guard: detects spikes. inspect_gradients: called once, after the first step's backward pass."""
        self._optimizer = optimizer
        self._executor = executor
        self._num_sharing = mesh.grid.size() // mesh.dp_size
        self._max_grad_norm = max_grad_norm
        self._guard = guard
        self._inspect_gradients = inspect_gradients
        self._work = objective.work
        self._parameters: list[nn.Parameter] = list(objective.parameters())

    def step(self, batch: GlobalBatch, totals: Totals) -> None:
        """Train on `batch` and add what happened to `totals`. A collective call."""

        def loss_of(micro: Batch, sums: Sums) -> Tensor:
            add_sums(totals.sums, sums)
            losses = [sums[name] / count for name, count in batch.counts.items() if name in sums]
            return torch.stack(losses).sum() if len(losses) > 1 else losses[0]

        before = totals.sums["loss"].clone()
        self._executor.train(batch.micro_batches, loss_of)
        totals.flops += sum(map(self._work, batch.micro_batches)) / self._num_sharing
        if self._inspect_gradients is not None:
            self._inspect_gradients()
            self._inspect_gradients = None
        norm = self._executor.gradient_norm(self._parameters)
        clip_gradients(self._parameters, norm, self._max_grad_norm)
        admitted = finite = norm.isfinite()
        if self._guard is not None and self._guard.is_on:
            loss = (totals.sums["loss"] - before).sum() / batch.num_targets
            spike = self._guard.is_spike(loss, norm)
            totals.spikes += spike
            admitted = finite & ~spike if self._guard.skips else finite
        _update(self._optimizer, admitted)
        self._optimizer.zero_grad(set_to_none=True)
        totals.grad_norm = norm
        totals.skipped += ~admitted
        totals.consecutive_skips = (totals.consecutive_skips + 1) * ~finite
        totals.count(batch)


def _update(optimizer: Optimizer, admitted: Tensor) -> None:
    """Run the optimizer's step if `admitted`; on an accelerator, optimizers that take `found_inf`, which they mark as
    torch's GradScaler expects it, decide this on the device."""
    if getattr(optimizer, "_step_supports_amp_scaling", False) and on_accelerator(admitted):
        optimizer.grad_scale, optimizer.found_inf = None, (~admitted).float()  # type: ignore[attr-defined]
        optimizer.step()
    elif admitted:
        optimizer.step()


@dataclass
class Totals:
    """Sums since the last metrics line. Tensors are this rank's, on the device; counts are global.

    sums: the objective's sums by name, each a vector. grad_norm: of the last step. flops: this rank's share of the
    model's operations. skipped: steps without an update. spikes: steps far above the previous ones. consecutive_skips:
    number of steps in a row up to now, over the whole run, whose gradient was not finite.
    """

    sums: dict[str, Tensor]
    grad_norm: Tensor
    skipped: Tensor
    spikes: Tensor
    consecutive_skips: Tensor
    num_steps: int = 0
    num_targets: int = 0
    trained_tokens: int = 0
    num_tokens: int = 0
    num_samples: int = 0
    num_slots: int = 0
    flops: float = 0.0
    source_targets: Counter[str] = field(default_factory=Counter)
    source_tokens: Counter[str] = field(default_factory=Counter)

    @classmethod
    def zero(cls, sizes: Mapping[str, int], device: torch.device) -> Totals:
        """Empty totals. sizes: the number of values of each sum, by name."""
        return cls(
            sums=zero_sums(sizes, device),
            grad_norm=torch.zeros((), device=device),
            skipped=torch.zeros((), dtype=torch.int64, device=device),
            spikes=torch.zeros((), dtype=torch.int64, device=device),
            consecutive_skips=torch.zeros((), dtype=torch.int64, device=device),
        )

    def count(self, batch: GlobalBatch) -> None:
        """Add the counts of a step, which are known beforehand."""
        self.num_steps += 1
        self.num_targets += batch.num_targets
        self.trained_tokens += batch.trained_tokens
        self.num_tokens += batch.num_tokens
        self.num_samples += batch.num_samples
        self.num_slots += batch.num_slots
        self.source_targets.update(batch.source_targets)
        self.source_tokens.update(batch.source_tokens)

    def state_dict(self, world: World) -> dict[str, Any]:
        """The totals as plain data, the same on every rank. A collective call.

        Sums are stored by rank, because adding them in another order would change their last bits after a resume.
        """
        counts = {name: getattr(self, name) for name in _COUNTS}
        local = {name: vector.tolist() for name, vector in self.sums.items()} | {"flops": [self.flops]}
        return {
            "sums": world.gather(local),
            "counts": {name: dict(value) if isinstance(value, Counter) else value for name, value in counts.items()},
            "skipped": int(self.skipped),
            "spikes": int(self.spikes),
            "consecutive_skips": int(self.consecutive_skips),
        }

    def load_state_dict(self, state: Mapping[str, Any], world: World) -> None:
        """Restore `state`. If the number of ranks has changed, the first rank takes the sums of all."""
        by_rank = state["sums"]
        if len(by_rank) == world.size:
            by_rank = [by_rank[world.rank]]
        elif world.rank:
            by_rank = []
        for sums in by_rank:
            self.flops += sums["flops"][0]
            for name, vector in self.sums.items():
                vector += vector.new_tensor(sums[name])
        self.skipped += state["skipped"]
        self.spikes += state["spikes"]
        self.consecutive_skips += state["consecutive_skips"]
        for name, value in state["counts"].items():
            if isinstance(value, dict):
                getattr(self, name).update(value)
            else:
                setattr(self, name, value)

    def reduce(self, world: World) -> Reduced:
        """The totals over all ranks, on the host. Synchronizes with the device. A collective call."""
        local = {**self.sums, "flops": self.sums["loss"].new_tensor([self.flops])}
        sums = reduce_sums(local, world)
        return Reduced(
            flops=sums.pop("flops"),
            sums=sums,
            grad_norm=self.grad_norm.item(),
            skipped=int(self.skipped),
            spikes=int(self.spikes),
            consecutive_skips=int(self.consecutive_skips),
        )


_COUNTS = (
    "num_steps",
    "num_targets",
    "trained_tokens",
    "num_tokens",
    "num_samples",
    "num_slots",
    "source_targets",
    "source_tokens",
)
"""The fields of `Totals` that are the same on every rank."""


class Reduced(NamedTuple):
    """Totals over all ranks. sums: numbers, or lists for sums with several values."""

    sums: dict[str, Any]
    flops: float
    grad_norm: float
    skipped: int
    spikes: int
    consecutive_skips: int


def losses_by_source(sums: Sequence[float], targets: Mapping[str, int]) -> dict[str, float]:
    """The mean loss of each source that has targets, from the sums of losses in the order of `targets` (by source
    name). There may be more sums, because either training or evaluation can have fewer sources."""
    return {name: total / count for (name, count), total in zip(targets.items(), sums, strict=False) if count}


def zero_sums(sizes: Mapping[str, int], device: torch.device) -> dict[str, Tensor]:
    """Zero vectors to add sums to, in fp64 if the device supports it."""
    dtype = torch.float64 if device.type != "npu" else torch.float32
    return {name: torch.zeros(size, dtype=dtype, device=device) for name, size in sizes.items()}


def add_sums(total: Mapping[str, Tensor], sums: Mapping[str, Tensor]) -> None:
    """Add a micro batch's sums to `total`, in place."""
    for name, value in sums.items():
        total[name].add_(value.detach())


def reduce_sums(local: Mapping[str, Tensor], world: World) -> dict[str, Any]:
    """The vectors added up over all ranks, on the host: numbers, or lists. A collective call."""
    flat = torch.cat(list(local.values()))
    if world.size > 1:
        dist.all_reduce(flat)
    values = flat.split([len(vector) for vector in local.values()])
    found = {name: value.tolist() for name, value in zip(local, values, strict=True)}
    return {name: value[0] if len(value) == 1 else value for name, value in found.items()}
