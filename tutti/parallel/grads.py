"""The global gradient norm and clipping by it, over parameters that are sharded in different ways.

The squared norms of the local shards are summed on each rank, then over the mesh axes along which the parameter is
sharded and over no others, since copies would count twice. One all-reduce per kind of placement, one norm for all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gradient_norm(parameters: Iterable[nn.Parameter], elsewhere: dist.ProcessGroup | None = None) -> Tensor:
    """The 2-norm over all gradients of all ranks, an fp32 scalar, equal on every rank. A collective call.

    parameters: frozen ones do not count. elsewhere: ranks that have other parameters, whose gradients count as well;
    this one's may then all be frozen.
    """
    parameters = list(parameters)
    grouped: dict[tuple[DeviceMesh, tuple[int, ...]] | None, list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        grad = parameter.grad
        if grad is None:
            continue
        key = None
        if isinstance(grad, DTensor):
            assert not any(placement.is_partial() for placement in grad.placements), "a gradient was not reduced"
            sharded = tuple(dim for dim, placement in enumerate(grad.placements) if not placement.is_replicate())
            key = (grad.device_mesh, sharded)
        grouped[key].append(local(grad))
    total: Tensor | None = None
    for key, grads in grouped.items():
        norms = torch._foreach_norm(
            [grad for grad in grads if grad.numel()] or [grads[0].new_zeros(1)], 2, torch.float32
        )
        square = torch.stack(norms).square().sum()
        if key is not None:
            mesh, sharded = key
            for dim in sharded:
                if mesh.size(dim) > 1:
                    dist.all_reduce(square, group=mesh.get_group(dim))
        total = square if total is None else total + square
    if total is None:
        assert elsewhere is not None, "no parameter has a gradient"
        total = torch.zeros((), device=parameters[0].device)
    if elsewhere is not None:
        dist.all_reduce(total, group=elsewhere)
    return total.sqrt()


def clip_gradients(parameters: Iterable[nn.Parameter], norm: Tensor, max_norm: float) -> None:
    """Scale all gradients so that their global `norm` is at most `max_norm` (0: leave them), on the device."""
    if max_norm <= 0:
        return
    grads = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    if grads:
        torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))
