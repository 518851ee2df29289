"""Attention of some queries to some keys, merged into what the same queries have seen already.

Ring attention sees the keys of a batch in several portions. For each query a running output and the log of the sum of
its exponentiated scores (`lse`) are kept, both in fp32. Attending to another block of keys with scores s and values v
gives

    lse' = log(exp(lse) + sum exp(s)),    out' = out * exp(lse - lse') + sum exp(s - lse') * v

so that after the last block `out` is exactly the softmax-weighted mean over all of them, in whatever order they came.
The backward pass needs only the final `lse` and `out` to recompute a block's probabilities
and its gradients, one block at a time.

A *block* is a rectangle: queries and keys that lie in one sample and in one contiguous piece of the batch each. Blocks
name tokens by their positions in the whole batch; *spans* say which positions a tensor holds, one after the other.

Shapes: H query heads, K key/value heads (H = K * G), T queries held, N keys held, D head dimension, E of values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tutti.attention.tiles import AttentionSpec, Biases, scores, tiles

Span = tuple[int, int]
"""Positions in the whole batch: the first and the last + 1."""


class Block(NamedTuple):
    queries: Span
    keys: Span


class Queries(NamedTuple):
    """The queries [H, T, D] of the positions in `spans`, and lse [H, T] of what they have seen, in fp32 (or fp64)."""

    query: Tensor
    lse: Tensor
    spans: tuple[Span, ...]


class Keys(NamedTuple):
    """The keys [K, N, D] and values [K, N, E] of the positions in `spans`."""

    key: Tensor
    value: Tensor
    spans: tuple[Span, ...]


def slice_of(span: Span, spans: Iterable[Span]) -> slice:
    """Where in a tensor that holds `spans` the positions of `span`, which lies in one of them, are."""
    offset = 0
    for first, last in spans:
        if first <= span[0] < last:
            return slice(offset + span[0] - first, offset + span[1] - first)
        offset += last - first
    raise AssertionError(f"positions {span} are not held here")


class _Tile(NamedTuple):
    """One tile's rows [K, G * rows, D], keys and values, scores in fp32, and where the rows and the keys are held."""

    rows: Tensor
    keys: Tensor
    values: Tensor
    scores: Tensor
    tanh: Tensor | None
    rows_at: slice
    keys_at: slice


def _tiles(queries: Queries, keys: Keys, blocks: Iterable[Block], spec: AttentionSpec) -> Iterator[_Tile]:
    heads, kv_heads = len(queries.query), len(keys.key)
    biases = Biases(heads // kv_heads, spec, queries.query)
    for block in blocks:
        for tile in tiles(block.queries, block.keys, spec):
            rows_at = slice_of((tile.start, tile.stop), queries.spans)
            keys_at = slice_of((tile.first, tile.last), keys.spans)
            rows = queries.query[:, rows_at].reshape(kv_heads, -1, queries.query.shape[-1])
            seen = keys.key[:, keys_at]
            made, tanh = scores(rows, seen, biases(tile), spec)
            yield _Tile(rows, seen, keys.value[:, keys_at], made.to(queries.lse.dtype), tanh, rows_at, keys_at)


def attend(queries: Queries, out: Tensor, keys: Keys, blocks: Iterable[Block], spec: AttentionSpec) -> None:
    """Have `queries` see `keys` as far as `blocks` go: updates queries.lse (at first -inf) and `out`, fp32 [H, T, E].

    Every query of a block must see a key in it.
    """
    query, lse, _ = queries
    kv_heads = len(keys.key)
    for tile in _tiles(queries, keys, blocks, spec):
        before = lse[:, tile.rows_at].reshape(kv_heads, -1, 1)
        after = torch.logaddexp(before, tile.scores.logsumexp(-1, keepdim=True))
        weights = (tile.scores - after).exp_().to(query.dtype)
        mixed = torch.bmm(weights, tile.values)
        place = out[:, tile.rows_at]
        place.mul_((before - after).exp_().view(*place.shape[:2], 1)).add_(mixed.view(place.shape))
        lse[:, tile.rows_at] = after.view(place.shape[:2])


def add_sinks(queries: Queries, out: Tensor, sinks: Tensor) -> None:
    """Let a score per head [H] without a value take part in the softmax, once all keys are seen."""
    total = torch.logaddexp(queries.lse, sinks[:, None].to(queries.lse.dtype))
    out.mul_((queries.lse - total).exp_()[..., None])
    queries.lse.copy_(total)


class Gradients(NamedTuple):
    """Sums in fp32: of the queries [H, T, D], and of the keys [K, N, D] and values [K, N, E] of one portion."""

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

    queries.lse is the final one; outer: the gradient of the final output and that output itself, [H, T, E].
    """
    kv_heads, scale = len(keys.key), spec.scale
    grad, out = outer
    delta = (out.to(queries.lse.dtype) * grad).sum(-1)
    for tile in _tiles(queries, keys, blocks, spec):
        place = sums.query[:, tile.rows_at]
        grad_rows = grad[:, tile.rows_at].reshape(kv_heads, -1, grad.shape[-1])
        weights = (tile.scores - queries.lse[:, tile.rows_at].reshape(kv_heads, -1, 1)).exp_()
        sums.value[:, tile.keys_at] += torch.bmm(weights.to(grad.dtype).transpose(1, 2), grad_rows)
        grad_weights = torch.bmm(grad_rows, tile.values.transpose(1, 2))
        grad_scores = weights * (grad_weights - delta[:, tile.rows_at].reshape(kv_heads, -1, 1))
        if tile.tanh is not None:
            grad_scores *= 1 - tile.tanh * tile.tanh
        narrow = grad_scores.to(grad.dtype)
        place.add_(torch.bmm(narrow, tile.keys).view(place.shape), alpha=scale)
        sums.key[:, tile.keys_at].add_(torch.bmm(narrow.transpose(1, 2), tile.rows), alpha=scale)
