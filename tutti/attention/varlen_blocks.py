"""The blocks of `tutti.attention.online_softmax` on torch's variable-length flash kernel, for CUDA in half precision.

The kernel gives the log of the softmax denominator beside its output, and its backward pass takes those of the whole
softmax, so that both passes can be put together from blocks. Two kinds of call serve all blocks:

- blocks in which queries see themselves, which cover all queries in order: one call, causal or not, with a window;
- a block of earlier keys, all of which are seen: one call without a mask. Within a sliding window not all are, and the
  kernel cannot be told how far apart queries and keys are: those blocks, at most a window wide, go by tiles.

Shapes: H query heads, K key/value heads, T queries, N keys, D head dimension, E <= D of values, padded to D for the
kernel, which lays them out tokens first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.attention.varlen  # defines the operators
from torch import Tensor

from tutti.attention import online_softmax as tiled
from tutti.attention.online_softmax import Block, Gradients, Keys, Queries, slice_of
from tutti.attention.tiles import AttentionSpec


def fits(query: Tensor, value: Tensor, spec: AttentionSpec) -> bool:
    """Whether the kernel can do this attention on this device."""
    half = query.dtype in (torch.bfloat16, torch.float16)
    return query.is_cuda and half and not spec.softcap and value.shape[-1] <= query.shape[-1]


class _Call(NamedTuple):
    """One run of the kernel: where its queries and keys are held, their borders, the longest, and what is masked."""

    rows_at: slice
    keys_at: slice
    query_borders: Tensor
    key_borders: Tensor
    max_queries: int
    max_keys: int
    window: list[int]


def _calls(
    blocks: Sequence[Block], queries: Queries, keys: Keys, spec: AttentionSpec
) -> tuple[list[_Call], list[Block]]:
    """The runs of the kernel, and the blocks that it cannot do."""
    device = queries.query.device

    def call(members: Sequence[Block], rows_at: slice, keys_at: slice, window: list[int]) -> _Call:
        lengths = [[last - first for first, last in spans] for spans in zip(*members, strict=True)]
        borders = [torch.tensor([0, *accumulate(item)], dtype=torch.int32, device=device) for item in lengths]
        return _Call(rows_at, keys_at, borders[0], borders[1], max(lengths[0]), max(lengths[1]), window)

    own = [block for block in blocks if block.queries == block.keys]
    others = [block for block in blocks if block.queries != block.keys]
    found = []
    if own:
        behind, ahead = spec.window - 1, 0 if spec.causal else spec.window - 1
        everything = slice(0, queries.query.shape[1])
        found.append(call(own, everything, everything, [behind, ahead]))
    if spec.window:
        return found, others
    for block in others:
        places = slice_of(block.queries, queries.spans), slice_of(block.keys, keys.spans)
        found.append(call([block], *places, [-1, -1]))
    return found, []


def _inputs(call: _Call, queries: Queries, keys: Keys) -> Iterator[Tensor]:
    """The call's queries, keys and values, tokens first and equally wide."""
    width = queries.query.shape[-1]
    for tensor, place in ((queries.query, call.rows_at), (keys.key, call.keys_at), (keys.value, call.keys_at)):
        part = tensor[:, place].transpose(0, 1)
        yield torch.nn.functional.pad(part, (0, width - part.shape[-1])).contiguous()


def _arguments(call: _Call) -> tuple[Tensor, Tensor, int, int, bool]:
    causal = call.window == [-1, 0]
    return call.query_borders, call.key_borders, call.max_queries, call.max_keys, causal


def attend(queries: Queries, out: Tensor, keys: Keys, blocks: Sequence[Block], spec: AttentionSpec) -> None:
    """As `tutti.attention.online_softmax.attend`."""
    calls, rest = _calls(blocks, queries, keys, spec)
    gqa = len(queries.query) != len(keys.key)
    for call in calls:
        arguments = (*_inputs(call, queries, keys), *_arguments(call), spec.scale, call.window, gqa)
        mixed, seen, _ = torch.ops.torch_attn._varlen_attn(*arguments)
        before = queries.lse[:, call.rows_at]
        after = torch.logaddexp(before, seen)
        place = out[:, call.rows_at]
        added = mixed[..., : out.shape[-1]].transpose(0, 1) * (seen - after).exp()[..., None]
        place.mul_((before - after).exp()[..., None]).add_(added)
        before.copy_(after)
    tiled.attend(queries, out, keys, rest, spec)


def attend_backward(
    queries: Queries,
    keys: Keys,
    blocks: Sequence[Block],
    spec: AttentionSpec,
    outer: tuple[Tensor, Tensor],
    sums: Gradients,
) -> None:
    """As `tutti.attention.online_softmax.attend_backward`."""
    calls, rest = _calls(blocks, queries, keys, spec)
    width = queries.query.shape[-1]
    for call in calls:
        grad, out = (
            torch.nn.functional.pad(item[:, call.rows_at].transpose(0, 1), (0, width - item.shape[-1])).contiguous()
            for item in outer
        )
        arguments = (*_inputs(call, queries, keys), out, queries.lse[:, call.rows_at].contiguous(), *_arguments(call))
        unused = torch.zeros(2, dtype=torch.uint64, device=grad.device)  # the state of dropout
        grads = torch.ops.torch_attn._varlen_attn_backward(grad, *arguments, unused, spec.scale, call.window)
        for total, part, place in zip(sums, grads, (call.rows_at, call.keys_at, call.keys_at), strict=True):
            total[:, place] += part[..., : total.shape[-1]].transpose(0, 1)
    tiled.attend_backward(queries, keys, rest, spec, outer, sums)
