"""A weighted sum of several losses: text together with codes, features or noise of images.

The loss of a step is the sum over kinds of weight * (sum of losses / number of targets) over the global batch. The
numbers are counted before the step, and come with each micro batch as factors for its sums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tutti.config import Config
from tutti.core.batch import GlobalBatch
from tutti.core.dist import World
from tutti.train.tasks import Sums, Task

SCALES = "loss_scales"
"""The name, in a batch's payload, of fp64 [K]: the factor for each kind's sum such that all of them together,
divided by the number of all targets, give the step's loss."""


@dataclass(frozen=True)
class WeightedLosses(Task):
    """Sums over targets, and numbers of targets, by kind. kinds: their names. weights: of each."""

    kinds: tuple[str, ...] = ("text",)
    weights: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def weights_of(cls, config: Config, kinds: tuple[str, ...]) -> dict[str, float]:
        """The weights of the kinds: train.loss_weights, or defaults. ValueError: it names other kinds."""
        if others := sorted(config.train.loss_weights.keys() - set(kinds)):
            raise ValueError(
                f"train.loss_weights: this model has losses of {' and '.join(kinds)}, and none of {others[0]}"
            )
        return {kind: {**config.data.task.losses, **config.train.loss_weights}[kind] for kind in kinds}

    def sizes(self) -> dict[str, int]:
        return super().sizes() | {name: 1 for kind in self.kinds for name in (kind, f"{kind}_targets")}

    def total(self, found: Mapping[str, tuple[Tensor, Tensor]], payload: Mapping[str, Tensor]) -> Sums:
        """The sums of a micro batch. found: by kind, the sum of losses (differentiable) and the number of targets."""
        losses = [found[kind][0] for kind in self.kinds]
        scales = payload[SCALES].to(losses[0].dtype)
        sums: Sums = {"loss": (torch.stack(losses) * scales).sum()}
        for kind in self.kinds:
            sums |= {kind: found[kind][0].detach(), f"{kind}_targets": found[kind][1]}
        return sums

    def mean_loss(self, sums: Mapping[str, Any], num_targets: int) -> float:
        return float(sum(self.weights[kind] * sums[kind] / max(1, sums[f"{kind}_targets"]) for kind in self.kinds))

    def metrics(self, sums: Mapping[str, Any], num_targets: int) -> dict[str, float]:
        found: dict[str, float] = {}
        for kind in self.kinds:
            count = sums[f"{kind}_targets"]
            found |= {f"targets/{kind}": count} | ({f"loss/{kind}": sums[kind] / count} if count else {})
        return found

    def with_scales(self, batch: GlobalBatch, counts: Sequence[int], world: World, sharing: int) -> GlobalBatch:
        """The batch with the factors of all kinds in its payload. counts: this rank's numbers of targets, by kind.
        sharing: the number of ranks that have the same batch. Collective."""
        numbers = [sum(each) // sharing for each in zip(*world.gather(tuple(counts)), strict=True)]
        pairs = zip(self.kinds, numbers, strict=True)
        factors = [self.weights[kind] * batch.num_targets / max(1, number) for kind, number in pairs]
        scales = {SCALES: torch.tensor(factors, dtype=torch.float64)}
        micros = tuple(replace(micro, payload={**micro.payload, **scales}) for micro in batch.micro_batches)
        return replace(batch, micro_batches=micros)
