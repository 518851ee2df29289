"""A moving average of the weights (train.ema_decay), which is sampled from and exported in place of the last ones.

The average is one more state of each parameter in its optimizer, as momentum is: it is sharded, saved and resumed as
that, and no layout needs to know of it. After each step it becomes decay * average + (1 - decay) * weight, with a
smaller decay at the beginning, (1 + n) / (10 + n) at step n, since random weights are no average of anything.
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
"""The name, beside that of the average, of how often it was updated."""


def keep_average(optimizer: Optimizer, decay: float) -> None:
    """Make `optimizer` keep an average of each of its parameters from now on; none with a decay of 0."""
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
    """Within it the weights below `root` are their averages, where the optimizer keeps such."""
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
        module.reshard()  # what was gathered is of the other weights
    for weight, average in pairs:
        kept = weight.clone()
        weight.copy_(average)
        average.copy_(kept)
