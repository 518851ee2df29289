"""The global gradient norm and gradient clipping, for parameters that are sharded in different ways.

The squared norms of the local shards are summed on each rank, and then over just those mesh axes along which the
parameter is sharded, since replicas would count twice. One all-reduce per kind of placement, one norm for all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from tutti.core.tensors import local_part
from tutti.parallel.mesh import Mesh


def gradient_norm(parameters: Iterable[nn.Parameter], elsewhere: dist.ProcessGroup | None = None) -> Tensor:
    """The 2-norm over all gradients of all ranks, an fp32 scalar that is equal on every rank. A collective call.

    parameters: frozen ones do not count. elsewhere: ranks with other parameters, whose gradients count too; this rank's
    may then all be frozen.
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
        grouped[key].append(local_part(grad))
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
    grads = [local_part(parameter.grad) for parameter in parameters if parameter.grad is not None]
    if grads:
        torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))


def sum_replicated(parameters: Iterable[nn.Parameter], mesh: Mesh) -> None:
    """Sum over the tensor ranks the gradients of replicated parameters, in one message per dtype.

    A collective call. Parameters are DTensors on the tensor axis (`tutti.parallel.tensor`).
    """
    if mesh.size("tensor") == 1:
        return
    by_dtype: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        grad = parameter.grad
        if isinstance(grad, DTensor) and _is_replicated(grad, "tensor"):
            by_dtype[grad.dtype].append(local_part(grad))
    for grads in by_dtype.values():
        total = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(total, group=mesh.group("tensor"))
        for grad, part in zip(grads, total.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(part.view_as(grad))


def _is_replicated(tensor: DTensor, axis: str) -> bool:
    names = zip(tensor.device_mesh.mesh_dim_names or (), tensor.placements, strict=True)
    return any(name == axis and placement.is_replicate() for name, placement in names)
