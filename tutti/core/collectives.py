"""Differentiable collectives: all exchanges of tensors that forward passes make.

A collective is a linear map A from the tensors of all ranks of a group to the tensors of all of them. Its backward pass
is the adjoint A^T, for which <A x, y> = <x, A^T y> with both products summed over the ranks:

    gather_rows    [n, ...] of each rank, concatenated on every rank     <->  scatter_rows
    scatter_rows   [G * n, ...] of each rank, summed; its own n rows     <->  gather_rows
    all_to_all     consecutive rows to each rank, and from each          <->  all_to_all back
    sum_over       one sum, which all ranks hold                         <->  the sum's gradient, which all ranks hold

Groups are given by their names in torch, which compiled code and custom operators accept. Sizes are arguments too, so
that a compiled graph that was cached for one number of ranks is not used for another. Each operator has a fake
implementation that returns only shapes.

`start_all_to_all` and `finish_all_to_all` are the two halves of an `all_to_all`, with computation in between while rows
travel; the gradient's rows travel between the two halves of the backward pass.

Shapes: G ranks in the group.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from tutti.core.compat import GroupName, resolve_process_group


class RankGroup(NamedTuple):
    """A group of ranks as plain data: this rank's index in it, its size, and its name."""

    rank: int
    size: int
    group: str

    def own(self, tensor: Tensor, dim: int) -> Tensor:
        """This rank's chunk, along `dim`, of a tensor that all ranks hold."""
        return tensor.chunk(self.size, dim)[self.rank]

    def start(self, total: int) -> int:
        """The first of this rank's rows, if `total` rows are divided as torch.chunk does."""
        return min(total, -(-total // self.size) * self.rank)


def process_group(name: str) -> dist.ProcessGroup:
    """The process group with this name."""
    return resolve_process_group(GroupName(name))


# torch 2.14 renames these, and warns about the old names.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


@torch.library.custom_op("tutti::gather_rows", mutates_args=())
def gather_rows(part: Tensor, group: str, size: int) -> Tensor:
    """Gather [n, ...] of each rank to [G * n, ...], in rank order. The gradient is `scatter_rows`."""
    whole = part.new_empty(part.shape[0] * size, *part.shape[1:])
    _all_gather(whole, part.contiguous(), group=process_group(group))
    return whole


@torch.library.custom_op("tutti::scatter_rows", mutates_args=())
def scatter_rows(whole: Tensor, group: str, size: int) -> Tensor:
    """Sum [G * n, ...] over the ranks and return this rank's rows [n, ...]. The gradient is `gather_rows`."""
    part = whole.new_empty(whole.shape[0] // size, *whole.shape[1:])
    _reduce_scatter(part, whole.contiguous(), group=process_group(group))
    return part


@gather_rows.register_fake
def _(part: Tensor, group: str, size: int) -> Tensor:
    return part.new_empty(part.shape[0] * size, *part.shape[1:])


@scatter_rows.register_fake
def _(whole: Tensor, group: str, size: int) -> Tensor:
    return whole.new_empty(whole.shape[0] // size, *whole.shape[1:])


def _keep_group(ctx: Any, inputs: tuple[Tensor, str, int], output: Tensor) -> None:
    _, ctx.group, ctx.size = inputs


gather_rows.register_autograd(
    lambda ctx, grad: (scatter_rows(grad, ctx.group, ctx.size), None, None), setup_context=_keep_group
)
scatter_rows.register_autograd(
    lambda ctx, grad: (gather_rows(grad, ctx.group, ctx.size), None, None), setup_context=_keep_group
)


def gather_tensor(tensor: Tensor, ranks: RankGroup, dim: int) -> Tensor:
    """Gather the ranks' parts of a tensor, concatenated along `dim`."""
    return gather_rows(tensor.movedim(dim, 0), ranks.group, ranks.size).movedim(0, dim)


def scatter_tensor(tensor: Tensor, ranks: RankGroup, dim: int) -> Tensor:
    """Sum `tensor` over the ranks and return this rank's part along `dim`."""
    return scatter_rows(tensor.movedim(dim, 0), ranks.group, ranks.size).movedim(0, dim)


def gather_over(part: Tensor, groups: Iterable[str]) -> Tensor:
    """Gather [n, ...] over several nested groups, end to end; the ranks of the first group are adjacent."""
    for name in groups:
        size = process_group(name).size()
        part = gather_rows(part, name, size) if size > 1 else part
    return part


@torch.library.custom_op("tutti::all_to_all", mutates_args=())
def all_to_all(rows: Tensor, sent: list[int], received: list[int], group: str) -> Tensor:
    """Exchange rows [S, ...] -> [R, ...]: `sent[r]` consecutive rows go to rank r, and `received[r]` come from it, in
    rank order.

    If both lists are empty, the shares are equal. The gradient is the call with both lists exchanged.
    """
    arrived = rows.new_empty(sum(received) if received else rows.shape[0], *rows.shape[1:])
    dist.all_to_all_single(arrived, rows.contiguous(), received or None, sent or None, group=process_group(group))
    return arrived


@all_to_all.register_fake
def _(rows: Tensor, sent: list[int], received: list[int], group: str) -> Tensor:
    return rows.new_empty(sum(received) if received else rows.shape[0], *rows.shape[1:])


def _keep_lists(ctx: Any, inputs: tuple[Tensor, list[int], list[int], str], output: Tensor) -> None:
    _, ctx.sent, ctx.received, ctx.group = inputs


all_to_all.register_autograd(
    lambda ctx, grad: (all_to_all(grad, ctx.received, ctx.sent, ctx.group), None, None, None),
    setup_context=_keep_lists,
)


class _Flight:
    """An all-to-all of equal shares in progress. `buffer` is filled once `land` has been called."""

    def __init__(self, rows: Tensor, group: str) -> None:
        self._rows = rows.contiguous()  # kept alive until it is sent
        self.buffer = torch.empty_like(self._rows)
        self._work = dist.all_to_all_single(self.buffer, self._rows, group=process_group(group), async_op=True)

    def land(self) -> Tensor:
        assert self._work is not None, "this rank is not in the group"
        self._work.wait()
        return self.buffer


class Journey:
    """An asynchronous all-to-all: `out` in the forward pass, `back` of its gradient in the backward pass."""

    def __init__(self, group: str) -> None:
        self.group = group
        self.out: _Flight | None = None
        self.back: _Flight | None = None


class _Start(torch.autograd.Function):
    """Starts the exchange; in the backward pass waits for the gradient's."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, journey: Journey) -> Tensor:
        ctx.journey = journey
        journey.out = _Flight(rows, journey.group)
        return journey.out.buffer

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        assert ctx.journey.back is not None, "the gradient never set out"
        return ctx.journey.back.land(), None


class _Finish(torch.autograd.Function):
    """Waits for the exchange; in the backward pass starts the gradient's."""

    @staticmethod
    def forward(ctx: Any, buffer: Tensor, journey: Journey) -> Tensor:
        assert journey.out is not None, "the rows never set out"
        ctx.journey = journey
        return journey.out.land().view_as(buffer)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.journey.back = _Flight(grad, ctx.journey.group)
        return ctx.journey.back.buffer, None


def start_all_to_all(rows: Tensor, group: str) -> tuple[Tensor, Journey]:
    """Start sending equal shares of `rows`; pass the result to `finish_all_to_all` and nothing else."""
    journey = Journey(group)
    return _Start.apply(rows, journey), journey


def finish_all_to_all(started: tuple[Tensor, Journey]) -> Tensor:
    """Wait for the result of `start_all_to_all`, which is that of `all_to_all` with equal shares."""
    return _Finish.apply(*started)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, groups: tuple[str, ...]) -> Tensor:
        total = tensor.clone()
        for name in groups:
            dist.all_reduce(total, group=process_group(name))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def sum_over(tensor: Tensor, groups: Iterable[str]) -> Tensor:
    """Sum `tensor` over all ranks of some nested groups. All ranks hold the result and compute the same from it, so
    its gradient, the same on all ranks, is also that of each summand."""
    return _Sum.apply(tensor, tuple(groups))
