"""The output head and the cross-entropy in one pass, in chunks, so that the logits of a long batch never exist at once.

For N trained positions and a vocabulary of V the logits are N x V, by far the largest tensor of a training step. The
loss needs each row only once. So the head is applied to a chunk of rows at a time, and the chunk's logits are turned in
place into their own gradient (softmax minus one-hot), multiplied into the gradients of the hidden states and of the
head, and dropped. The forward pass thus also does the work of the backward pass, and nothing is computed twice. This is
the idea of Cut Cross-Entropy (arXiv 2411.09009) and Liger (arXiv 2410.10989). In batch-invariant mode
(`tutti.parallel.batch_invariant`) no chunk contains rows of two samples.

This requires that every row has the same weight. If a row's weight in the loss depends on the losses of other rows, as
when answers are compared by sums over their tokens, it is not known before the last chunk. `target_losses` then
computes each chunk's logits again in the backward pass. (The forward pass could prepare the gradient of the hidden
states, row by row, but the head's gradient is a sum over rows, which cannot be weighted afterwards; if the head is
frozen, the forward pass does prepare it.)

If the head is split by the vocabulary over ranks (`VocabularyShard`), each rank has only its columns of the logits. The
ranks' log-sum-exps are merged, and the target's logit comes from the rank that has it (one number per row each); then
each rank computes the gradients of its own columns.

The softmax is computed in fp32 from logits in the compute dtype, as in Hugging Face's own loss. On the CPU this
elementwise part runs over a few rows at a time that stay in the cache, on a GPU in one compiled kernel.

Shapes: N positions, H hidden size, V vocabulary (or classes).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from tutti.core.collectives import process_group
from tutti.core.compat import BackendCompilerFailed, graph_is_kept, has_triton
from tutti.core.device import on_accelerator
from tutti.model.structure import LogitTransform

CHUNK_BYTES_ON_DEVICE, CHUNK_BYTES_ON_CPU = 512 * 2**20, 64 * 2**20
"""Maximum bytes of a chunk's logits; a CPU's products are fast with fewer rows."""

CACHED_ELEMENTS = 2**20
"""Number of logits that the CPU's elementwise part processes at a time, so that its fp32 copies stay in the cache.
"""


log = logging.getLogger(__name__)

_AS_IS = LogitTransform()


class VocabularyShard(NamedTuple):
    """This rank's part of the vocabulary, whose first row is `start`. group: the name of the ranks' process group."""

    start: int
    group: str
    size: int


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    transform: LogitTransform = _AS_IS,
    shard: VocabularyShard | None = None,
    pieces: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of `hidden @ weight.T` against `targets`.

    hidden [N, H], weight [V, H], targets [N] int64, bias [V]. Returns the sum over the N positions (fp32 scalar,
    differentiable) and each position's loss (fp32 [N], detached).

    shard: weight and bias are this rank's rows; hidden and targets are the same on all ranks. Each rank's results are
    an equal share of the loss, to be summed, and its gradient of hidden is a part of a sum. A collective call.

    pieces: lengths of consecutive groups of positions, N in all, that are computed separately.
    """
    total, losses = _LinearCrossEntropy.apply(hidden, weight, bias, targets, transform, shard, pieces)
    return total, losses


def target_losses(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    transform: LogitTransform = _AS_IS,
    shard: VocabularyShard | None = None,
    pieces: Sequence[int] | None = None,
) -> Tensor:
    """Each position's cross-entropy, fp32 [N], differentiable with any weights; arguments as in `linear_cross_entropy`.

    shard: each rank returns the full losses, not a share, and must pass the same gradient for them; the gradient of
    hidden is a part of a sum. Both passes are collective calls.
    """
    return _TargetLosses.apply(hidden, weight, bias, targets, transform, shard, pieces)


def _rows_a_chunk(weight: Tensor) -> int:
    most = CHUNK_BYTES_ON_DEVICE if on_accelerator(weight) else CHUNK_BYTES_ON_CPU
    return max(1, most // (weight.shape[0] * weight.element_size()))


class _Head(NamedTuple):
    """The output head, from hidden states to logits."""

    weight: Tensor
    bias: Tensor | None
    transform: LogitTransform
    shard: VocabularyShard | None
    pieces: Sequence[int] | None

    def chunks(self, num_rows: int) -> list[slice]:
        """The chunks of rows that go through the head together."""
        most = _rows_a_chunk(self.weight)
        found, begin = [], 0
        for length in (num_rows,) if self.pieces is None else self.pieces:
            end = begin + length
            found += [slice(start, min(start + most, end)) for start in range(begin, end, most)]
            begin = end
        assert begin == num_rows, "pieces of another batch"
        return found


def _chunk_by_chunk(
    hidden: Tensor, head: _Head, targets: Tensor, needs: tuple[bool, ...], weights: Tensor | None = None
) -> tuple[Tensor, list[Tensor | None]]:
    """Each position's loss, fp32 [N], and the gradients of their sum, weighted by `weights` [N], by hidden, weight and
    bias, or None for those that `needs` does not ask for."""
    weight, bias, transform, shard, pieces = head
    need_hidden, need_weight, need_bias = needs
    losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    chunks = head.chunks(len(hidden))
    several = len(chunks) > 1
    grad_hidden = torch.empty_like(hidden) if need_hidden else None
    grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight and several else None
    grad_bias = torch.zeros_like(bias, dtype=torch.float32) if need_bias and bias is not None else None
    for chunk in chunks:
        # Copied, because kernels may depend on alignment, and a piece must not depend on its position.
        own = hidden[chunk] if pieces is None else hidden[chunk].clone()
        scale = None if weights is None else weights[chunk]
        logits = own @ weight.T
        if bias is not None:
            logits += bias
        if shard is not None:
            _shard_loss_and_gradient(logits, targets[chunk], losses[chunk], transform, shard, scale)
        elif pieces is None and on_accelerator(logits):
            packed = [*transform[:2], *(transform.masked or (0, 0))]
            _fused_loss_and_gradient(logits, targets[chunk], losses[chunk], packed, any(needs), scale)
        else:
            _loss_and_gradient(logits, targets[chunk], losses[chunk], transform, any(needs), scale)
        if grad_hidden is not None:
            torch.mm(logits, weight, out=grad_hidden[chunk])
        if grad_weight is not None and grad_weight.dtype == logits.dtype:
            grad_weight.addmm_(logits.T, own)  # adds in place, without another tensor as large as the head
        elif grad_weight is not None and logits.is_cuda and torch.version.hip is None:
            torch.addmm(grad_weight, logits.T, own, out_dtype=torch.float32, out=grad_weight)
        elif need_weight:
            product = logits.T @ own
            grad_weight = grad_weight.add_(product) if grad_weight is not None else product
        if grad_bias is not None:
            grad_bias += logits.sum(0, dtype=torch.float32)
    if need_weight and grad_weight is None:
        grad_weight = torch.zeros_like(weight)
    return losses, [
        grad_hidden,
        grad_weight.to(weight.dtype) if grad_weight is not None else None,
        grad_bias.to(bias.dtype) if grad_bias is not None and bias is not None else None,
    ]


class _LinearCrossEntropy(torch.autograd.Function):
    """The sum of losses; gradients are computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        transform: LogitTransform,
        shard: VocabularyShard | None,
        pieces: Sequence[int] | None,
    ) -> tuple[Tensor, Tensor]:
        head = _Head(weight, bias, transform, shard, pieces)
        losses, grads = _chunk_by_chunk(hidden, head, targets, ctx.needs_input_grad[:3])
        ctx.save_for_backward(*grads)
        if shard is not None:
            losses /= shard.size
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # In place, unless backward will run again (when a pipeline postpones gradients of parameters).
        again = graph_is_kept()
        scale = Tensor.mul if again else Tensor.mul_
        grads = (None if item is None else scale(item, grad.to(item.dtype)) for item in ctx.saved_tensors)
        return (*grads, None, None, None, None)


class _TargetLosses(torch.autograd.Function):
    """The losses themselves; gradients are computed in the backward pass, when their weights are known."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        transform: LogitTransform,
        shard: VocabularyShard | None,
        pieces: Sequence[int] | None,
    ) -> Tensor:
        need_hidden, *need_head = ctx.needs_input_grad[:3]
        ready = need_hidden and not any(need_head)
        losses, (grad_hidden, _, _) = _chunk_by_chunk(
            hidden, _Head(weight, bias, transform, shard, pieces), targets, (ready, False, False)
        )
        ctx.save_for_backward(hidden, weight, bias, targets, grad_hidden)
        ctx.transform, ctx.shard, ctx.pieces = transform, shard, pieces
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, grad_hidden = ctx.saved_tensors
        if grad_hidden is not None:
            return (grad_hidden * grad.to(grad_hidden.dtype)[:, None], None, None, None, None, None, None)
        head = _Head(weight, bias, ctx.transform, ctx.shard, ctx.pieces)
        _, grads = _chunk_by_chunk(hidden, head, targets, ctx.needs_input_grad[:3], grad)
        return (*grads, None, None, None, None)


def _loss_and_gradient(
    logits: Tensor,
    targets: Tensor,
    losses: Tensor,
    transform: LogitTransform,
    differentiate: bool,
    weights: Tensor | None = None,
) -> None:
    """Write each row's loss to `losses` and turn `logits` in place into the gradient of their (weighted) sum."""
    for part in _parts(logits):
        raw, target = logits[part], targets[part, None]
        shaped = transform(raw.float())
        log_softmax = torch.log_softmax(shaped, dim=-1)
        losses[part] = log_softmax.gather(1, target).neg_().squeeze(1)
        if not differentiate:
            continue
        grad = log_softmax.exp_()
        grad.scatter_add_(1, target, torch.full_like(target, -1, dtype=grad.dtype))
        raw.copy_(_before_transform(grad, shaped, transform, None if weights is None else weights[part]))


@torch.library.custom_op("tutti::loss_and_gradient", mutates_args=("logits", "losses"))
def _fused_loss_and_gradient(
    logits: Tensor,
    targets: Tensor,
    losses: Tensor,
    transform: list[float],
    differentiate: bool,
    weights: Tensor | None = None,
) -> None:
    """`_loss_and_gradient` on an accelerator: with Triton, in one kernel compiled by torch, which reads the logits
    twice and writes them once."""
    scale, softcap, *masked = transform
    rule = LogitTransform(scale, softcap, (int(masked[0]), int(masked[1])) if any(masked) else None)
    if _compiles(logits):
        for rows in (logits, targets, losses, *(() if weights is None else (weights,))):
            torch._dynamo.maybe_mark_dynamic(rows, 0)
        try:
            _kernel(rule, differentiate)(logits, targets, losses, weights)
            return
        except BackendCompilerFailed as error:  # for example without a C compiler; nothing has been written yet
            _failures.append(error)
            log.warning("the loss is computed in several passes, since its kernel cannot be compiled: %s", error)
    _loss_and_gradient(logits, targets, losses, rule, differentiate, weights)


@_fused_loss_and_gradient.register_fake
def _(logits, targets, losses, transform, differentiate, weights=None):  # type: ignore[no-untyped-def]
    return None


_failures: list[Exception] = []
"""The compiler's error, if there was one."""


def _compiles(logits: Tensor) -> bool:
    return logits.is_cuda and not _failures and has_triton()


@cache
def _kernel(transform: LogitTransform, differentiate: bool) -> Callable[..., None]:
    """The compiled form of `_loss_and_gradient` for many rows at once."""

    def run(logits: Tensor, targets: Tensor, losses: Tensor, weights: Tensor | None) -> None:
        shaped = transform(logits.float())
        log_sum = shaped.logsumexp(dim=-1, keepdim=True)
        losses.copy_((log_sum - shaped.gather(1, targets[:, None]))[:, 0])
        if differentiate:
            is_target = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
            grad = torch.exp(shaped - log_sum) - is_target.float()
            logits.copy_(_before_transform(grad, shaped, transform, weights))

    return torch.compile(run)


def _shard_loss_and_gradient(
    logits: Tensor,
    targets: Tensor,
    losses: Tensor,
    transform: LogitTransform,
    shard: VocabularyShard,
    weights: Tensor | None = None,
) -> None:
    """`_loss_and_gradient` for a rank's columns of the logits."""
    group = process_group(shard.group)
    columns = targets - shard.start
    held = (columns >= 0) & (columns < logits.shape[1])
    columns = columns.masked_fill(~held, 0)[:, None]
    own, at_target = torch.empty_like(losses), torch.empty_like(losses)
    for part in _parts(logits):
        shaped = transform(logits[part].float())
        own[part] = shaped.logsumexp(dim=-1)
        at_target[part] = shaped.gather(1, columns[part]).squeeze(1)
    peak = own.clone()
    dist.all_reduce(peak, dist.ReduceOp.MAX, group=group)
    sums = torch.stack([(own - peak).exp_(), at_target * held])
    dist.all_reduce(sums, group=group)
    log_sum = sums[0].log_().add_(peak)
    torch.sub(log_sum, sums[1], out=losses)
    for part in _parts(logits):
        shaped = transform(logits[part].float())
        grad = torch.exp(shaped - log_sum[part, None])
        grad.scatter_add_(1, columns[part], -held[part, None].to(grad.dtype))
        logits[part].copy_(_before_transform(grad, shaped, transform, None if weights is None else weights[part]))


def _parts(logits: Tensor) -> Iterator[slice]:
    """The chunks of rows for the elementwise part."""
    rows = len(logits) if on_accelerator(logits) else max(1, CACHED_ELEMENTS // logits.shape[1])
    return (slice(start, start + rows) for start in range(0, len(logits), max(1, rows)))


def _before_transform(grad: Tensor, shaped: Tensor, transform: LogitTransform, weights: Tensor | None) -> Tensor:
    """The gradient of the head's output, from the gradient `grad` (overwritten) of the transformed logits `shaped`;
    each row times its weight."""
    if weights is not None:
        grad *= weights[:, None]
    if transform.softcap:
        grad *= 1 - (shaped / transform.softcap).clamp(min=-1).square()  # masked logits are far below
    if transform.scale != 1.0:
        grad *= transform.scale
    return grad
