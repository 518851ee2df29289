"""Expert parallelism: each rank of a group holds some of the experts, and tokens are sent to them and back.

Every rank of an expert group has its own tokens (tensor ranks, which share a batch, each have a part of its tokens),
and E / G of the E experts of each layer:

1. Rows, one for each token and each expert that it chose, are sorted by expert, and so by the rank that holds it.
2. Ranks exchange how many rows go to each expert, and then the rows, in an all-to-all with parts of any size, including
   none.
3. The received rows are sorted by expert over all senders, and go through the local experts in one grouped product.
4. The results return in the same way, into the order of step 1, and are weighted and summed where the tokens came from.

With train.enable_batch_invariant_mode, step 3 is a separate product for each sender, so that none depends on the
others.

Both exchanges are differentiable, with the gradient going the other way. A rank's experts see the whole group's tokens,
forward and backward, so their gradients are complete within the group; FSDP sums them only over `expert_shard` and the
replicas. Parameters are DTensors divided by experts over `mesh.expert`, and further over `mesh.expert_fsdp`, so that
loading, initialization, checkpoints, the gradient norm and exports know which part of the whole a rank holds.

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

from tutti.core.collectives import all_to_all
from tutti.core.modules import attach, attached
from tutti.core.tensors import local_part
from tutti.parallel.mesh import Mesh

LocalExperts = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Function of (rows [R, H] sorted by expert, experts [R] from 0 to E / G, counts [E / G]) that returns [R, H]."""


@dataclass(frozen=True)
class Exchange:
    """The exchange of tokens within a group of ranks, to experts and back, for one layer.

    isolated: compute a separate product for the rows of each rank, so that other ranks' rows make no difference.
    """

    group: dist.ProcessGroup
    isolated: bool = False

    @torch.compiler.disable
    def __call__(self, rows: Tensor, counts: Tensor, compute: LocalExperts) -> Tensor:
        """The experts' outputs [S, H] for `rows` [S, H] sorted by expert, with `counts` [E] rows for each expert.

        A collective call of the group, forward and backward. It synchronizes with the device to learn how many rows
        arrive.
        """
        name = self.group.group_name
        sending = counts.view(self.group.size(), -1)
        arriving = all_to_all(sending, [], [], name)
        sent, received = torch.stack([sending.sum(1), arriving.sum(1)]).tolist()
        rows = all_to_all(rows, sent, received, name)
        if self.isolated:
            # Copied, because kernels may depend on alignment.
            parts = zip(rows.split(received), arriving, strict=True)
            out = torch.cat([compute(part.clone(), _experts(counts, len(part)), counts) for part, counts in parts])
            return all_to_all(out, received, sent, name)
        experts, order = _experts(arriving, len(rows)).sort(stable=True)
        back = inverse(order)
        out = compute(_Permute.apply(rows, order, back), experts, arriving.sum(0))
        return all_to_all(_Permute.apply(out, back, order), received, sent, name)


def _experts(counts: Tensor, num_rows: int) -> Tensor:
    """The expert of each row, int64 [R], if `counts` [G, E / G] or [E / G] rows are ordered by sender and expert."""
    local = torch.arange(counts.shape[-1], device=counts.device)
    return local.expand_as(counts).flatten().repeat_interleave(counts.flatten(), output_size=num_rows)


class _Permute(torch.autograd.Function):
    """Put rows [R, H] in `order` [R]. back [R]: the inverse of it, in which the gradient is gathered. Autograd's own
    gradient of indexing sorts the indices, in case some occur twice."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return grad.index_select(0, back), None, None


def inverse(order: Tensor) -> Tensor:
    """The inverse of the permutation `order`."""
    position = torch.empty_like(order)
    position[order] = torch.arange(len(order), device=order.device)
    return position


def divide_experts(experts: Iterable[nn.Module], mesh: Mesh, *, isolated: bool = False) -> None:
    """Keep this rank's share of each layer of `experts`, as DTensors, with an `Exchange` to reach the other shares.

    isolated: see `Exchange`. Parameters may be on the meta device. A layer's `num_experts` remains the total number.
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
        attach(module, exchange=Exchange(mesh.expert.get_group(), isolated))


def divided_experts(root: nn.Module) -> list[nn.Module]:
    """The layers of experts below `root` that `divide_experts` has divided."""
    return [module for module in root.modules() if attached(module).exchange is not None]


def undivided_parts(divided: Iterable[nn.Module]) -> list[nn.Module]:
    """The submodules with parameters of divided experts layers: norms, which all ranks hold in full."""
    return [child for layer in divided for child in layer.children() if any(True for _ in child.parameters())]


def shard_dim(parameter: nn.Parameter, num_shards: int) -> int:
    """The dimension along which FSDP splits an experts' parameter over `num_shards` ranks.

    Whole experts if they can be divided evenly; otherwise the first other dimension that divides evenly, since with
    more ranks than experts some ranks would hold nothing.
    """
    return next((dim for dim, size in enumerate(local_part(parameter).shape) if size % num_shards == 0), 0)
