"""Attention to keys that arrive in several portions, each of which is merged into the previous result.

In ring attention (`tutti.attention.ring`) the keys of other ranks arrive one rank after the other. For each query a
running output and the log of the sum of its exponentiated scores (`lse`) are kept, both in fp32. Attending to another
block of keys with scores s and values v gives

    lse' = log(exp(lse) + sum exp(s)),    out' = out * exp(lse - lse') + sum exp(s - lse') * v

so that after the last block `out` is exactly the softmax-weighted mean over all of them, whatever their order. The
backward pass only needs the final `lse` and `out` to recompute a block's probabilities and its gradients, one block at
a time.

A *block* is a rectangle: queries and keys that are each in one sample and in one contiguous piece of the batch. Blocks
refer to tokens by their positions in the whole batch; *spans* say which consecutive positions a tensor holds.

Both passes are custom operators that update their sums in place and do not communicate.

Shapes: H query heads, K key/value heads (H = K * G), T queries held, N keys held, D head dimension, E of values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tutti.attention.spec import AttentionSpec
from tutti.attention.tiles import Biases, scores, tiles

Span = tuple[int, int]
"""A range of positions in the whole batch: the first and the last + 1."""


class Block(NamedTuple):
    queries: Span
    keys: Span


class Queries(NamedTuple):
    """The queries [H, T, D] at the positions in `spans`, and lse [H, T] over the keys seen so far, in fp32 (or
    fp64)."""

    query: Tensor
    lse: Tensor
    spans: tuple[Span, ...]


class Keys(NamedTuple):
    """The keys [K, N, D] and values [K, N, E] at the positions in `spans`."""

    key: Tensor
    value: Tensor
    spans: tuple[Span, ...]


def slice_of(span: Span, spans: Iterable[Span]) -> slice:
    """The slice for the positions `span` (a part of one of `spans`) in a tensor that holds `spans`."""
    offset = 0
    for first, last in spans:
        if first <= span[0] < last:
            return slice(offset + span[0] - first, offset + span[1] - first)
        offset += last - first
    raise AssertionError(f"positions {span} are on another rank")


def _placed(blocks: Iterable[Block], queries: Queries, keys: Keys) -> list[int]:
    """Six numbers per block, as operators accept them: its four positions, and the indices in the tensors of its
    first query and its first key."""
    numbers: list[int] = []
    for block in blocks:
        at = slice_of(block.queries, queries.spans).start, slice_of(block.keys, keys.spans).start
        numbers += (*block.queries, *block.keys, *at)
    return numbers


class _Tile(NamedTuple):
    """One tile: rows [K, G * rows, D], keys and values, scores in the dtype of lse, and where rows and keys are."""

    rows: Tensor
    keys: Tensor
    values: Tensor
    scores: Tensor
    tanh: Tensor | None
    rows_at: slice
    keys_at: slice


def _tiles(
    query: Tensor, key: Tensor, value: Tensor, lse: Tensor, placed: list[int], spec: AttentionSpec
) -> Iterator[_Tile]:
    heads, kv_heads = len(query), len(key)
    biases = Biases(heads // kv_heads, spec, query)
    for number in range(0, len(placed), 6):
        start, stop, first, last, row, column = placed[number : number + 6]
        for tile in tiles((start, stop), (first, last), spec):
            rows_at = slice(row + tile.start - start, row + tile.stop - start)
            keys_at = slice(column + tile.first - first, column + tile.last - first)
            rows = query[:, rows_at].reshape(kv_heads, -1, query.shape[-1])
            seen = key[:, keys_at]
            made, tanh = scores(rows, seen, biases(tile), spec)
            yield _Tile(rows, seen, value[:, keys_at], made.to(lse.dtype), tanh, rows_at, keys_at)


def attend(queries: Queries, out: Tensor, keys: Keys, blocks: Iterable[Block], spec: AttentionSpec) -> None:
    """Attend from `queries` to `keys` within `blocks`: updates queries.lse (initially -inf) and `out`, fp32 [H, T, E].

    Every query of a block must see a key in it.
    """
    placed = _placed(blocks, queries, keys)
    if placed:
        _attend(queries.query, keys.key, keys.value, queries.lse, out, placed, [float(item) for item in spec])


@torch.library.custom_op("tutti::attend_blocks", mutates_args=("lse", "out"))
def _attend(
    query: Tensor, key: Tensor, value: Tensor, lse: Tensor, out: Tensor, placed: list[int], spec: list[float]
) -> None:
    kv_heads = len(key)
    for tile in _tiles(query, key, value, lse, placed, AttentionSpec.unpack(spec)):
        before = lse[:, tile.rows_at].reshape(kv_heads, -1, 1)
        after = torch.logaddexp(before, tile.scores.logsumexp(-1, keepdim=True))
        weights = (tile.scores - after).exp_().to(query.dtype)
        mixed = torch.bmm(weights, tile.values)
        place = out[:, tile.rows_at]
        place.mul_((before - after).exp_().view(*place.shape[:2], 1)).add_(mixed.view(place.shape))
        lse[:, tile.rows_at] = after.view(place.shape[:2])


@_attend.register_fake
def _(query, key, value, lse, out, placed, spec):  # type: ignore[no-untyped-def]
    return None


def add_sinks(queries: Queries, out: Tensor, sinks: Tensor) -> None:
    """Add a score per head [H] without a value to the softmax, after all keys are seen."""
    total = torch.logaddexp(queries.lse, sinks[:, None].to(queries.lse.dtype))
    out.mul_((queries.lse - total).exp_()[..., None])
    queries.lse.copy_(total)


class Gradients(NamedTuple):
    """Sums of gradients in fp32: of the queries [H, T, D], and of the keys [K, N, D] and values [K, N, E] of one
    portion."""

    query: Tensor
    key: Tensor
    value: Tensor


def attend_backward(
    queries: Queries,
    keys: Keys,
    blocks: Iterable[Block],
    spec: AttentionSpec,
    outer: tuple[Tensor, Tensor],
    sums: Gradients,
) -> None:
    """Add the gradients of `attend` to `sums`.

    queries.lse is the final one. outer: the gradient of the final output, and that output, [H, T, E].
    """
    placed = _placed(blocks, queries, keys)
    if placed:
        seen = [queries.query, keys.key, keys.value, queries.lse]
        _attend_backward(seen, list(outer), *sums, placed, [float(item) for item in spec])


@torch.library.custom_op("tutti::attend_blocks_backward", mutates_args=("sum_query", "sum_key", "sum_value"))
def _attend_backward(
    seen: list[Tensor],
    outer: list[Tensor],
    sum_query: Tensor,
    sum_key: Tensor,
    sum_value: Tensor,
    placed: list[int],
    spec: list[float],
) -> None:
    """seen: query, key, value and lse."""
    query, key, value, lse = seen
    grad, out = outer
    kv_heads, see = len(key), AttentionSpec.unpack(spec)
    delta = (out.to(lse.dtype) * grad).sum(-1)
    for tile in _tiles(query, key, value, lse, placed, see):
        place = sum_query[:, tile.rows_at]
        grad_rows = grad[:, tile.rows_at].reshape(kv_heads, -1, grad.shape[-1])
        weights = (tile.scores - lse[:, tile.rows_at].reshape(kv_heads, -1, 1)).exp_()
        sum_value[:, tile.keys_at] += torch.bmm(weights.to(grad.dtype).transpose(1, 2), grad_rows)
        grad_weights = torch.bmm(grad_rows, tile.values.transpose(1, 2))
        grad_scores = weights * (grad_weights - delta[:, tile.rows_at].reshape(kv_heads, -1, 1))
        if tile.tanh is not None:
            grad_scores *= 1 - tile.tanh * tile.tanh
        narrow = grad_scores.to(grad.dtype)
        place.add_(torch.bmm(narrow, tile.keys).view(place.shape), alpha=see.scale)
        sum_key[:, tile.keys_at].add_(torch.bmm(narrow.transpose(1, 2), tile.rows), alpha=see.scale)


@_attend_backward.register_fake
def _(seen, outer, sum_query, sum_key, sum_value, placed, spec):  # type: ignore[no-untyped-def]
    return None
