"""Expert parallelism: each rank of a group holds some of the experts, and tokens travel to them and back.

Every rank of an expert group has tokens of its own (of tensor ranks, which share a batch, each has its part of them
here), and E / G of the E experts of each layer:

1. the rows (one for each token and each expert that it chose) lie sorted by expert, and so by the rank that holds it;
2. how many rows go to each expert is exchanged, then the rows: an all-to-all whose parts may be of any size, or empty;
3. what arrives is sorted by expert over all senders, and goes through the local experts in one grouped product;
4. the results go back the same way, and lie as the rows lay. Weighting and summing happen where the tokens live.

With train.enable_batch_invariant_mode step 3 is a product for each sender instead, so that none depends on the others.

Both exchanges are differentiable (the gradient goes the other way), so a rank's experts see the whole group's tokens,
forward and backward: their gradients are complete within the group and are summed by FSDP over `expert_shard` and the
replicas alone. Parameters are DTensors divided by experts over `mesh.expert`, and further over `mesh.expert_fsdp`, so
that loading, initialisation, checkpoints, the gradient norm and exports know which part of the whole a rank holds.

Shapes: G ranks in the group, E experts, S rows sent, R rows received, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from tutti.parallel.mesh import Mesh

LocalExperts = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(rows [R, H] sorted by expert, experts [R] from 0 to E / G, counts [E / G]) -> [R, H]"""


@dataclass(frozen=True)
class Exchange:
    """The way from tokens to experts within a group of ranks and back; kept on the experts layer that it is for.

    apart: compute on the rows of each rank apart from the others', which then make no difference to them.
    """

    group: dist.ProcessGroup
    apart: bool = False

    @torch.compiler.disable
    def __call__(self, rows: Tensor, counts: Tensor, compute: LocalExperts) -> Tensor:
        """rows [S, H] sorted by expert, counts [E] of them for each -> what the experts make of them, [S, H].

        A collective call of the group, forward and backward; waits for the device, to learn how many rows arrive.
        """
        size = self.group.size()
        sending = counts.view(size, -1)
        arriving = torch.empty_like(sending)
        dist.all_to_all_single(arriving, sending, group=self.group)
        sent, received = torch.stack([sending.sum(1), arriving.sum(1)]).tolist()
        rows = _AllToAll.apply(rows, sent, received, self.group)
        if self.apart:
            # In memory of their own, since kernels may go by alignment.
            parts = zip(rows.split(received), arriving, strict=True)
            out = torch.cat([compute(part.clone(), _experts(counts), counts) for part, counts in parts])
            return _AllToAll.apply(out, received, sent, self.group)
        experts, order = _experts(arriving).sort(stable=True)
        out = compute(rows[order], experts, arriving.sum(0))
        return _AllToAll.apply(out[inverse(order)], received, sent, self.group)


def _experts(counts: Tensor) -> Tensor:
    """Of rows that lie by sender and expert, [G, E / G] or [E / G] of them for each: which expert each is for."""
    local = torch.arange(counts.shape[-1], device=counts.device)
    return local.expand_as(counts).flatten().repeat_interleave(counts.flatten())


class _AllToAll(torch.autograd.Function):
    """Rows to the ranks of a group: `sent[r]` consecutive ones to rank r, and `received[r]` from it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _all_to_all(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _all_to_all(grad, ctx.received, ctx.sent, ctx.group), None, None, None


def _all_to_all(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    arrived = rows.new_empty((sum(received), *rows.shape[1:]))
    dist.all_to_all_single(arrived, rows.contiguous(), received, sent, group=group)
    return arrived


def inverse(order: Tensor) -> Tensor:
    """The permutation that undoes `order`."""
    position = torch.empty_like(order)
    position[order] = torch.arange(len(order), device=order.device)
    return position


def divide_experts(experts: Iterable[nn.Module], mesh: Mesh, *, apart: bool = False) -> None:
    """Leave each layer of `experts` with this rank's share of them, as DTensors, and an `exchange` to reach the others.

    apart: see `Exchange`. Parameters may be on the meta device. `num_experts` of the layer remains the number of all
    experts.
    """
    size, rank = mesh.expert.size(), mesh.expert.get_local_rank()
    if size == 1:
        return
    for module in experts:
        for name, parameter in list(module.named_parameters(recurse=False)):
            assert parameter.shape[0] == module.num_experts, f"{name} is not a stack of experts"
            own = parameter.detach().chunk(size)[rank].clone()
            divided = DTensor.from_local(own, mesh.expert, [Shard(0)], run_check=False)
            module.register_parameter(name, nn.Parameter(divided, requires_grad=parameter.requires_grad))
        module.exchange = Exchange(mesh.expert.get_group(), apart)  # type: ignore[assignment]  # a plain attribute


def divided_experts(root: nn.Module) -> list[nn.Module]:
    """The layers of experts below `root` that `divide_experts` has divided."""
    return [module for module in root.modules() if "exchange" in module.__dict__]


def undivided_parts(divided: Iterable[nn.Module]) -> list[nn.Module]:
    """What all ranks hold alike of layers of divided experts: submodules with parameters of their own (norms)."""
    return [child for layer in divided for child in layer.children() if any(True for _ in child.parameters())]


def shard_dim(parameter: nn.Parameter, num_shards: int) -> int:
    """Which dimension of an experts' parameter FSDP is to split further over `num_shards` ranks.

    Whole experts where they suffice for all ranks alike; else the first other dimension that divides evenly, since
    with more ranks than experts some would hold nothing.
    """
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return next((dim for dim, size in enumerate(local.shape) if size % num_shards == 0), 0)
