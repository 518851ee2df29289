"""An exponential moving average of the weights (train.ema_decay), used for samples and exports instead of the last
weights.

The average is stored as optimizer state of each parameter, like momentum: it is sharded, saved and resumed with it, and
no layout needs to know about it. After each step it becomes decay * average + (1 - decay) * weight. At step n the decay
is at most (1 + n) / (10 + n), so that the random initial weights are soon forgotten.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tutti.checkpoint.state import AVERAGE
from tutti.core.tensors import local_part
from tutti.parallel.fsdp import fsdp_modules

COUNT = "average_count"
"""The name, among a parameter's optimizer state, of the number of updates of its average."""


def keep_average(optimizer: Optimizer, decay: float) -> None:
    """Make `optimizer` keep an average of each of its parameters from now on; a decay of 0 keeps none."""
    if decay > 0:
        optimizer.register_step_post_hook(lambda optimizer, args, kwargs: _update(optimizer, decay))


@torch.no_grad()
def _update(optimizer: Optimizer, decay: float) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter)
            if not state:
                continue
            if AVERAGE not in state:
                state[AVERAGE], state[COUNT] = parameter.detach().clone(), torch.zeros(())
                continue
            state[COUNT] += 1
            step = float(state[COUNT])
            rate = min(decay, (1 + step) / (10 + step))
            local_part(state[AVERAGE]).lerp_(local_part(parameter), 1 - rate)


@contextmanager
def averaged(root: nn.Module, optimizer: Optimizer) -> Iterator[None]:
    """Within this context the parameters below `root` hold their averages, if the optimizer keeps them."""
    pairs = [
        (local_part(parameter), local_part(state[AVERAGE]))
        for parameter, state in optimizer.state.items()
        if AVERAGE in state
    ]
    if not pairs:
        yield
        return
    _swap(root, pairs)
    try:
        yield
    finally:
        _swap(root, pairs)


@torch.no_grad()
def _swap(root: nn.Module, pairs: list[tuple[Tensor, Any]]) -> None:
    for module in fsdp_modules(root):
        module.reshard()  # the gathered parameters are the other ones
    for weight, average in pairs:
        kept = weight.clone()
        weight.copy_(average)
        average.copy_(kept)
