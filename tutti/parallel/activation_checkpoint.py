"""Activation checkpointing: run a block's forward again in the backward pass instead of keeping its activations.

The block's `forward` is wrapped rather than the block itself, so that FSDP's hooks stay outside (parameters are
gathered once for both the recomputation and the backward pass), and module and parameter names do not change.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tutti.core.modules import Forward, wrap_forward


def checkpoint_activations(blocks: Iterable[nn.Module], *, reentrant: bool) -> None:
    """Checkpoint each block's forward in training; evaluation is unchanged.

    reentrant: use torch's older mechanism, which needs an input that requires a gradient and recomputes a whole block
    at once; otherwise saved-tensor hooks.
    """
    for block in blocks:
        wrap_forward(block, "checkpoint", partial(_checkpointed, block=block, reentrant=reentrant))


def _checkpointed(forward: Forward, block: nn.Module, reentrant: bool) -> Forward:
    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not block.training:
            return forward(*args, **kwargs)
        # The reentrant mechanism only takes positional arguments; no keyword argument needs a gradient.
        if reentrant and not any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            # Everything before the block is frozen; without such an input, the block's own parameters would get no
            # gradient.
            args = tuple(_requiring_grad(arg) for arg in args)
        return checkpoint(partial(forward, **kwargs), *args, use_reentrant=reentrant)

    return run


def _requiring_grad(arg: Any) -> Any:
    if isinstance(arg, Tensor) and arg.is_floating_point() and torch.is_grad_enabled():
        return arg.detach().requires_grad_()
    return arg
