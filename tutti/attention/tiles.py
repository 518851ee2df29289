"""Attention in tiles: the tiles of scores for the queries and keys of a sample, and the scores of one tile.

The kernels of one rank (`tutti.attention.packed_cpu`) and of a ring of ranks (`tutti.attention.online_softmax`) share
these. Tokens are identified by their positions within a sample or within a batch.

Shapes: H query heads, K key/value heads (H = K * G), D head dimension. A tile's rows are [K, G * rows, D]: the query
heads that share a key/value head one after the other, so that a tile is one batched matrix product.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tutti.attention.spec import AttentionSpec

TILE = 256
"""Query rows per tile: large enough for efficient products, small enough to skip most of the upper triangle."""


class Tile(NamedTuple):
    """Queries at positions [start, stop) and keys at positions [first, last)."""

    start: int
    stop: int
    first: int
    last: int


def tiles(queries: tuple[int, int], keys: tuple[int, int], spec: AttentionSpec) -> Iterator[Tile]:
    """Yield the tiles of the queries and keys at these positions (first, last + 1) of one sample: at most `TILE`
    queries, and the keys that any of them may see."""
    causal, window = spec.causal, spec.window
    for start in range(queries[0], queries[1], TILE):
        stop = min(queries[1], start + TILE)
        first = max(keys[0], start - window + 1) if window else keys[0]
        ahead = 1 if causal else window
        last = min(keys[1], stop + ahead - 1) if ahead else keys[1]
        if first < last:
            yield Tile(start, stop, first, last)


class Biases:
    """Makes a tile's bias [G * rows, keys]: 0 where the query may see the key, -inf elsewhere; None if it may see all.

    Equal tiles share one bias.
    """

    def __init__(self, groups: int, spec: AttentionSpec, like: Tensor) -> None:
        self._groups, self._spec, self._like = groups, spec, like
        self._made: dict[tuple[int, int, int], Tensor | None] = {}

    def __call__(self, tile: Tile) -> Tensor | None:
        start, stop, first, last = tile
        shape = (stop - start, last - first, start - first)
        if shape not in self._made:
            self._made[shape] = self._bias(tile)
        return self._made[shape]

    def _bias(self, tile: Tile) -> Tensor | None:
        start, stop, first, last = tile
        causal, window, device = self._spec.causal, self._spec.window, self._like.device
        # The nearest and the farthest pair: keys behind their query count as positive.
        nearest, farthest = start - (last - 1), stop - 1 - first
        if (nearest >= 0 or not causal) and (max(farthest, -nearest) < window or not window):
            return None
        distance = torch.arange(start, stop, device=device)[:, None] - torch.arange(first, last, device=device)
        hidden = distance < 0 if causal else distance < -(window - 1)
        if window:
            hidden |= distance >= window
        bias = torch.zeros(hidden.shape, dtype=self._like.dtype, device=device)
        return bias.masked_fill_(hidden, float("-inf")).repeat(self._groups, 1)


def scores(rows: Tensor, keys: Tensor, bias: Tensor | None, spec: AttentionSpec) -> tuple[Tensor, Tensor | None]:
    """A tile's scores [K, G * rows, keys] and, with softcap, tanh(score / softcap); keys [K, keys, D]."""
    transposed, scale, softcap = keys.transpose(1, 2), spec.scale, spec.softcap
    if softcap:
        tanh = torch.bmm(rows, transposed).mul_(scale / softcap).tanh_()
        return tanh * softcap if bias is None else tanh * softcap + bias, tanh
    base = rows.new_zeros(1) if bias is None else bias
    return torch.baddbmm(base, rows, transposed, beta=1, alpha=scale), None
