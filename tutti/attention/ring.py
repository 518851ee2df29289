"""Ring attention (arXiv 2310.01889): ranks that hold different tokens pass keys and values around.

Each of the C ranks along the context axis holds the queries, keys and values of two chunks of the batch, an early and a
late one (`chunks`), so that causal work is balanced. In step s = 0 .. C - 1, rank r attends to the keys of rank r - s;
while it computes, the keys of the next step are already in transit. The results of the steps are merged exactly
(`tutti.attention.online_softmax`). The backward pass goes around once more: keys are sent again, and the gradients that
a rank has for another rank's keys are sent back while the next step computes.

Keys are sent from their owner directly to the rank that needs them, s places further, rather than from neighbor to
neighbor. The volume is the same, and this way only the keys that are needed have to be sent. All ranks know the borders
of the samples, and derive from them which keys the queries of any rank can see: keys of samples that both have a part
of, not later than the queries, within the sliding window. If samples are much shorter than a chunk, this is very
little; for one long causal sample it is three quarters of all keys.

Each rank plans by itself from the same borders, so both ends of a message agree on its length. Empty messages are not
sent.

Shapes: C ranks, T tokens per rank, H query heads, K key/value heads, D head dimension, E of values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tutti.attention import online_softmax as tiled
from tutti.attention import varlen as flash
from tutti.attention.online_softmax import Block, Gradients, Keys, Queries, Span, add_sinks, slice_of
from tutti.attention.spec import AttentionSpec
from tutti.core.collectives import process_group

_KEYS, _GRADIENTS = 0, 1
"""Tags of messages, which separate the two kinds between the same two ranks."""


def chunks(rank: int, size: int, length: int) -> list[tuple[int, int]]:
    """The (first, last + 1) tokens of a batch of `length` that context rank `rank` of `size` holds, ascending."""
    if size == 1:
        return [(0, length)]
    width = length // (2 * size)
    return [(place * width, (place + 1) * width) for place in (rank, 2 * size - 1 - rank)]


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    borders: Tensor,
    spec: AttentionSpec,
    sinks: Tensor | None,
    group: str,
) -> Tensor:
    """Attention of this rank's tokens to those of all ranks of `group`, within samples. A collective call.

    query [H, T, D], key [K, T, D], value [K, T, E] -> [T, H, E]. borders [S + 1] of the samples in the whole batch, on
    the host. sinks [H]: a learned score per head that takes part in the softmax and has no value.
    """
    return _forward(query, key, value, borders, sinks, [float(item) for item in spec], group)[0]


def plan_blocks(
    queries: Sequence[Span], keys: Sequence[Span], borders: Sequence[int], spec: AttentionSpec
) -> list[Block]:
    """The blocks of `queries` and `keys` (chunks) in which queries see keys; every query of a block sees at least one
    of its keys.

    Blocks in which queries see themselves come before other blocks of the same queries.
    """
    window, ahead = spec.window, 1 if spec.causal else spec.window
    found = []
    for chunk in queries:
        samples = [(begin, end) for begin, end in pairwise(borders) if begin < chunk[1] and end > chunk[0]]
        for other in sorted(keys, key=lambda other: other != chunk):
            for begin, end in samples:
                start, stop = max(begin, chunk[0]), min(end, chunk[1])
                first, last = max(begin, other[0]), min(end, other[1])
                if window:
                    first, stop = max(first, start - window + 1), min(stop, last + window - 1)
                if ahead:
                    start, last = max(start, first - ahead + 1), min(last, stop + ahead - 1)
                if start < stop and first < last:
                    found.append(Block((start, stop), (first, last)))
    return found


@dataclass(frozen=True)
class _Plan:
    """The blocks and messages of one batch for rank `rank` of `size`, whose tokens are `spans`.

    For each step s: the `blocks` in which this rank's queries see the keys of the rank s places before it, the spans of
    keys that come from there (`seen`), and the spans that go to the rank s places after it (`seeing`).
    """

    rank: int
    size: int
    spans: tuple[Span, ...]
    blocks: tuple[tuple[Block, ...], ...]
    seen: tuple[tuple[Span, ...], ...]
    seeing: tuple[tuple[Span, ...], ...]


@lru_cache(maxsize=16)
def _plan(borders: tuple[int, ...], spec: AttentionSpec, rank: int, size: int) -> _Plan:
    spans = [tuple(chunks(other, size, borders[-1])) for other in range(size)]
    steps = [((rank - step) % size, (rank + step) % size) for step in range(size)]
    blocks = [tuple(plan_blocks(spans[rank], spans[before], borders, spec)) for before, _ in steps]
    seeing = [plan_blocks(spans[after], spans[rank], borders, spec) for _, after in steps]
    return _Plan(
        rank,
        size,
        spans[rank],
        tuple(blocks),
        tuple(_needed(found, spans[before]) for found, (before, _) in zip(blocks, steps, strict=True)),
        tuple(_needed(found, spans[rank]) for found in seeing),
    )


def _needed(blocks: Sequence[Block], owned: Sequence[Span]) -> tuple[Span, ...]:
    """For each chunk of `owned`, the span from the first to the last key that `blocks` need; chunks without any are
    left out."""
    spans = []
    for start, stop in owned:
        keys = [block.keys for block in blocks if start <= block.keys[0] < stop]
        if keys:
            spans.append((min(first for first, _ in keys), max(last for _, last in keys)))
    return tuple(spans)


class _Mail:
    """A pair of tensors being sent to one rank, while another pair is received from another rank.

    Both are of shapes [K, tokens, D] and [K, tokens, E], and are sent as one message.
    """

    def __init__(
        self, outgoing: tuple[Tensor, Tensor], to: int, expected: int, origin: int, group: dist.ProcessGroup, tag: int
    ) -> None:
        first, second = outgoing
        self._shapes = [(len(item), expected, item.shape[-1]) for item in outgoing]
        self._sent = torch.cat([first.reshape(-1), second.reshape(-1)])  # kept alive until it is sent
        self._received = first.new_empty(sum(heads * tokens * width for heads, tokens, width in self._shapes))
        messages = []
        if self._sent.numel():
            messages.append(dist.P2POp(dist.isend, self._sent, group=group, tag=tag, group_peer=to))
        if expected:
            messages.append(dist.P2POp(dist.irecv, self._received, group=group, tag=tag, group_peer=origin))
        self._works = dist.batch_isend_irecv(messages) if messages else []

    def collect(self) -> tuple[Tensor, Tensor]:
        """Wait for both transfers, and return the pair that arrived."""
        for work in self._works:
            work.wait()
        first, second = self._shapes
        parts = self._received.split([first[0] * first[1] * first[2], second[0] * second[1] * second[2]])
        return parts[0].view(first), parts[1].view(second)


class _Ring:
    """Communication of one pass around the ring. Every rank makes the same calls in the same order."""

    def __init__(self, plan: _Plan, group: dist.ProcessGroup) -> None:
        self._plan, self._group = plan, group

    def fetch(self, step: int, own: Keys) -> Callable[[], Keys]:
        """Start sending the keys of `own` that another rank needs in `step`; call the result to get the keys for
        this rank."""
        if step == 0:
            return lambda: own
        plan = self._plan
        wanted = [slice_of(span, plan.spans) for span in plan.seeing[step]]
        key, value = (
            torch.cat([item[:, place] for place in wanted] or [item[:, :0]], 1) for item in (own.key, own.value)
        )
        spans = plan.seen[step]
        to, origin = (plan.rank + step) % plan.size, (plan.rank - step) % plan.size
        mail = _Mail((key, value), to, sum(last - first for first, last in spans), origin, self._group, _KEYS)
        return lambda: Keys(*mail.collect(), spans)

    def give_back(self, step: int, sums: Gradients, total: Gradients, dtype: torch.dtype) -> Callable[[], None]:
        """Start sending back the gradients of the keys fetched in `step`; call the result to add to `total` the
        gradients that another rank has for the keys it fetched from here."""
        if step == 0:
            return lambda: None
        plan = self._plan
        spans = plan.seeing[step]
        outgoing = (sums.key.to(dtype), sums.value.to(dtype))
        to, origin = (plan.rank - step) % plan.size, (plan.rank + step) % plan.size
        mail = _Mail(outgoing, to, sum(last - first for first, last in spans), origin, self._group, _GRADIENTS)

        def add() -> None:
            for sent_home, mine in zip(mail.collect(), (total.key, total.value), strict=True):
                for span in spans:
                    mine[:, slice_of(span, plan.spans)] += sent_home[:, slice_of(span, spans)]

        return add


def _start(query: Tensor, borders: Tensor, spec: list[float], group_name: str) -> tuple[_Plan, _Ring, AttentionSpec]:
    see, group = AttentionSpec.unpack(spec), process_group(group_name)
    # Blocks do not depend on scale and softcap, which differ between layers of some models.
    plan = _plan(tuple(borders.tolist()), see._replace(scale=1.0, softcap=0.0), group.rank(), group.size())
    return plan, _Ring(plan, group), see


@torch.library.custom_op("tutti::ring_attention", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    borders: Tensor,
    sinks: Tensor | None,
    spec: list[float],
    group: str,
) -> tuple[Tensor, Tensor]:
    """Returns the output [T, H, E] and the log of each query's softmax denominator, fp32 [H, T]."""
    plan, ring, see = _start(query, borders, spec, group)
    kernel = flash if flash.fits(query, value, see) else tiled
    heads, total, _ = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    queries = Queries(query, query.new_full((heads, total), float("-inf"), dtype=wide), plan.spans)
    out = query.new_zeros(heads, total, value.shape[-1], dtype=wide)
    own = Keys(key, value, plan.spans)
    arriving = ring.fetch(0, own)
    for step in range(plan.size):
        keys = arriving()
        if step + 1 < plan.size:
            arriving = ring.fetch(step + 1, own)
        kernel.attend(queries, out, keys, plan.blocks[step], see)
    if sinks is not None:
        add_sinks(queries, out, sinks)
    return out.transpose(0, 1).to(query.dtype, memory_format=torch.contiguous_format, copy=True), queries.lse


@_forward.register_fake
def _(query, key, value, borders, sinks, spec, group):  # type: ignore[no-untyped-def]
    heads, total, _ = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(total, heads, value.shape[-1]), query.new_empty(heads, total, dtype=wide)


@torch.library.custom_op("tutti::ring_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    saved: list[Tensor],
    spec: list[float],
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, heads first. saved: query, key, value, borders, out and lse of `_forward`."""
    query, key, value, borders, out, lse = saved
    plan, ring, see = _start(query, borders, spec, group)
    kernel = flash if flash.fits(query, value, see) else tiled
    dtype, wide = query.dtype, lse.dtype
    outer = grad.transpose(0, 1), out.transpose(0, 1)
    queries = Queries(query, lse, plan.spans)
    own = Keys(key, value, plan.spans)
    total = Gradients(*(torch.zeros_like(item, dtype=wide) for item in (query, key, value)))
    arriving = ring.fetch(0, own)
    returned = []
    for step in range(plan.size):
        keys = arriving()
        if step + 1 < plan.size:
            arriving = ring.fetch(step + 1, own)
        sums = total
        if step > 0:
            sums = Gradients(total.query, *(torch.zeros_like(item, dtype=wide) for item in (keys.key, keys.value)))
        kernel.attend_backward(queries, keys, plan.blocks[step], see, outer, sums)
        returned.append(ring.give_back(step, sums, total, dtype))
    for add in returned:
        add()
    return total.query.to(dtype), total.key.to(dtype), total.value.to(dtype)


@_backward.register_fake
def _(grad, saved, spec, group):  # type: ignore[no-untyped-def]
    return tuple(torch.empty_like(item) for item in saved[:3])


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    query, key, value, borders, sinks, ctx.spec, ctx.group = inputs
    ctx.save_for_backward(query, key, value, borders, sinks, *output)


def _autograd(ctx: Any, grad: Tensor, _: Tensor) -> tuple:
    query, key, value, borders, sinks, out, lse = ctx.saved_tensors
    grads = _backward(grad, [query, key, value, borders, out, lse], ctx.spec, ctx.group)
    grad_sinks = None
    if sinks is not None:
        # A sink has no value: its probability only reduces the others.
        delta = (out.to(lse.dtype) * grad).sum(-1).transpose(0, 1)
        grad_sinks = -((sinks[:, None] - lse).exp() * delta).sum(-1).to(sinks.dtype)
    return *grads, None, grad_sinks, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
