"""One optimizer step: forward and backward over the micro batches, the global gradient norm, clipping, the update.

The loss of each micro batch is a sum divided by the number of targets of the whole global batch, on all ranks, which is
known beforehand; gradients are summed over micro batches and ranks. So the gradient is exactly that of the mean over
all trained tokens, however they were packed and spread. Nothing here waits for the device: what is worth knowing is
left there in `Totals` and read when a line of metrics is due.

A step whose gradient is not finite changes nothing (neither parameters nor optimizer state) and is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from tutti.core.batch import Batch, GlobalBatch
from tutti.core.dist import World
from tutti.parallel.grads import clip_gradients
from tutti.parallel.mesh import Mesh
from tutti.parallel.pipeline.executor import Executor
from tutti.train.objective import Objective, Output, source_sums


class TrainStep:
    """Runs steps; holds what stays the same from one to the next, made once before the loop."""

    def __init__(
        self,
        objective: Objective,
        optimizer: Optimizer,
        executor: Executor,
        mesh: Mesh,
        max_grad_norm: float,
        *,
        inspect_gradients: Callable[[], None] | None = None,
    ) -> None:
        """inspect_gradients: called once, after the first step's backward pass."""
        self._optimizer = optimizer
        self._executor = executor
        self._num_sharing = mesh.grid.size() // mesh.dp_size
        self._max_grad_norm = max_grad_norm
        self._inspect_gradients = inspect_gradients
        self._flops = objective.flops
        self._parameters: list[nn.Parameter] = list(objective.parameters())

    def step(self, batch: GlobalBatch, totals: Totals) -> None:
        """Train on `batch` and add what happened to `totals`. A collective call."""

        def loss_of(micro: Batch, out: Output) -> Tensor:
            loss = out.loss / batch.num_targets
            if out.router_loss is not None:
                loss = loss + out.router_loss / batch.num_tokens
            totals.add(micro, out)
            return loss

        self._executor.train(batch.micro_batches, loss_of)
        flops = sum(self._flops.batch(micro.lengths(), micro.num_values()) for micro in batch.micro_batches)
        totals.flops += flops / self._num_sharing
        if self._inspect_gradients is not None:
            self._inspect_gradients()
            self._inspect_gradients = None
        norm = self._executor.gradient_norm(self._parameters)
        clip_gradients(self._parameters, norm, self._max_grad_norm)
        finite = norm.isfinite()
        _update(self._optimizer, finite)
        self._optimizer.zero_grad(set_to_none=True)
        totals.grad_norm = norm
        totals.skipped += ~finite
        totals.consecutive_skips = (totals.consecutive_skips + 1) * ~finite
        totals.count(batch)


def _update(optimizer: Optimizer, finite: Tensor) -> None:
    """Take the optimizer's step, if `finite`; fused optimizers decide that on the device."""
    if optimizer.defaults.get("fused"):
        optimizer.grad_scale, optimizer.found_inf = None, (~finite).float()  # type: ignore[attr-defined]
        optimizer.step()
    elif finite:
        optimizer.step()


@dataclass
class Totals:
    """Sums since the last line of metrics. The tensors are this rank's, on the device; the counts are global.

    loss: over targets. router_loss: times tokens. source_loss: by source. rewards [3]: over pairs, the chosen answers'
    rewards, the rejected ones', and how many pairs are in the right order. grad_norm: the last step's. flops: of the
    model, this rank's share. skipped: steps whose gradient was not finite; consecutive_skips: how many of the last
    ones in a row, over the whole run.
    """

    loss: Tensor
    router_loss: Tensor
    source_loss: Tensor
    rewards: Tensor
    grad_norm: Tensor
    skipped: Tensor
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
    def zero(cls, num_sources: int, device: torch.device) -> Totals:
        def scalar(dtype: torch.dtype) -> Tensor:
            return torch.zeros((), dtype=dtype, device=device)

        fp64 = torch.float64 if device.type != "npu" else torch.float32
        return cls(
            loss=scalar(fp64),
            router_loss=scalar(fp64),
            source_loss=torch.zeros(num_sources, dtype=torch.float32, device=device),
            rewards=torch.zeros(3, dtype=torch.float32, device=device),
            grad_norm=scalar(torch.float32),
            skipped=scalar(torch.int64),
            consecutive_skips=scalar(torch.int64),
        )

    def add(self, micro: Batch, out: Output) -> None:
        """Add what came out for a micro batch, which is on the device."""
        self.loss += out.loss.detach()
        if out.router_loss is not None:
            self.router_loss += out.router_loss.detach()
        if out.rewards is not None and out.num_correct is not None:
            self.rewards += torch.cat([out.rewards, out.num_correct[None]])
        if len(self.source_loss) > 1:
            self.source_loss += source_sums(micro, out.losses, len(self.source_loss))

    def count(self, batch: GlobalBatch) -> None:
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

        Sums are kept by rank: added up in another order they would differ in their last bits after a resume.
        """
        sums = [self.loss, self.router_loss, self.loss.new_tensor(self.flops), *self.rewards, *self.source_loss]
        counts = {name: getattr(self, name) for name in _COUNTS}
        return {
            "sums": world.gather(torch.stack([value.double() for value in sums]).tolist()),
            "counts": {name: dict(value) if isinstance(value, Counter) else value for name, value in counts.items()},
            "skipped": int(self.skipped),
            "consecutive_skips": int(self.consecutive_skips),
        }

    def load_state_dict(self, state: Mapping[str, Any], world: World) -> None:
        """Go on from `state`; the first rank takes the sums of all where there were other ranks."""
        sums = torch.tensor(state["sums"], dtype=torch.float64)
        if len(sums) != world.size:
            sums = torch.cat([sums.sum(0, keepdim=True), sums.new_zeros(world.size - 1, sums.shape[1])])
        loss, router_loss, flops, *rest = sums[world.rank]
        self.loss += loss
        self.router_loss += router_loss
        self.flops += float(flops)
        self.rewards += torch.stack(rest[:3]).to(self.rewards)
        self.source_loss += torch.stack(rest[3:]).to(self.source_loss)
        self.skipped += state["skipped"]
        self.consecutive_skips += state["consecutive_skips"]
        for name, value in state["counts"].items():
            if isinstance(value, dict):
                getattr(self, name).update(value)
            else:
                setattr(self, name, value)

    def reduce(self, world: World) -> Means:
        """What the totals come to over all ranks, on the host; waits for the device. A collective call."""
        local = self.loss.new_tensor([self.flops])
        vectors = [vector.to(self.loss.dtype) for vector in (self.rewards, self.source_loss)]
        sums = torch.cat([self.loss[None], self.router_loss[None], local, *vectors])
        if world.size > 1:
            dist.all_reduce(sums)
        loss, router_loss, flops, *rest = sums.tolist()
        return Means(
            loss=loss / self.num_targets,
            router_loss=router_loss / self.num_tokens,
            flops=flops,
            source_loss=rest[3:],
            rewards=rest[:3],
            grad_norm=self.grad_norm.item(),
            skipped=int(self.skipped),
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


class Means(NamedTuple):
    """Totals over all ranks: means over targets or tokens, sums of flops, source_loss and rewards, the last step's
    grad_norm."""

    loss: float
    router_loss: float
    flops: float
    source_loss: list[float]
    rewards: list[float]
    grad_norm: float
    skipped: int
    consecutive_skips: int
