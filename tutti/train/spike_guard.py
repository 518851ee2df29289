"""Loss spikes: steps whose loss or gradient norm is far above that of the preceding steps.

A spike is often caused by a bad batch, whose update is better skipped (as in OLMo-core's skip-step optimizers). A step
is a spike if its loss or gradient norm is more than `train.spike_sigma` standard deviations above the mean of the last
`train.spike_window` steps. This is decided on the device from numbers that are equal on all ranks, so all ranks decide
the same and nothing waits for the host.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tutti.config import TrainConfig
from tutti.core.dist import World


class SpikeGuard:
    """Remembers the last steps and decides whether another one is a spike.

    is_on: spikes are detected. skips: their updates are skipped.

    Spikes enter the history like other steps, so that a loss that stays high soon counts as normal.
    """

    def __init__(self, train: TrainConfig, world: World) -> None:
        self.is_on, self.skips = train.spike_sigma > 0, train.skip_spikes
        self._sigma, self._world = train.spike_sigma, world
        # One row per step: loss and gradient norm. Unused rows are NaN.
        self._history = torch.full((train.spike_window, 2), torch.nan, device=world.device)
        self._num_steps = 0

    def is_spike(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Returns True, as a tensor on the device, if a step is a spike, and adds the step to the history. A collective
        call.

        loss: this rank's part of the step's mean loss. norm: of the gradient, the same on every rank.
        """
        loss = loss.detach().float().clone()
        if self._world.size > 1:
            dist.all_reduce(loss)
        values = torch.stack([loss, norm.float()])
        known = self._history.isfinite().all(dim=1, keepdim=True)
        count = known.sum()
        rows = self._history.where(known, 0.0)
        mean = rows.sum(0) / count
        spread = ((rows - mean).square() * known).sum(0).div(count - 1).sqrt()
        # Values that are not finite do not count as normal ones.
        usable = values.isfinite().all()
        enough = count >= max(2, len(self._history) // 2)
        row = self._history[self._num_steps % len(self._history)]
        row.copy_(torch.where(usable, values, row))
        self._num_steps += 1
        return usable & enough & (values > mean + self._sigma * spread).any()

    def state_dict(self) -> dict[str, Any]:
        """The history as plain data, from the oldest step to the newest, the same on every rank."""
        place = self._num_steps % len(self._history)
        rows = self._history.roll(-place, 0).tolist()
        return {"history": [row for row in rows if row[0] == row[0]]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state`; with a shorter window, from the newest of its steps."""
        rows = state["history"][-len(self._history) :]
        self._history.fill_(torch.nan)
        self._history[: len(rows)] = self._history.new_tensor(rows).view(-1, 2)
        self._num_steps = len(rows)
