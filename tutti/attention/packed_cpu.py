"""Attention over a packed batch on the CPU, sample by sample, as tiles of matrix products.

A packed batch contains many samples end to end in one row. Attention with one T x T mask would spend almost all of its
work on pairs that the mask discards. So each sample's queries are cut into tiles of rows (`tutti.attention.tiles`), and
a tile is only multiplied with the keys that it may see: its own sample's, up to the diagonal, within the sliding
window. Scores, softmax and their gradients are plain batched matrix products, which on CPUs with bf16 instructions are
two to three times as fast as torch's fused kernel on samples of a few hundred tokens.

It is a custom operator with its own backward, so that torch.compile treats it as one node and no padded copies are made
for the gradient of every slice. It runs on any device, for cases that the device's own kernel does not support.

Shapes: T tokens, S samples, H query heads, K key/value heads (H = K * G), D head dimension, E value dimension. The
operator takes heads first ([H, T, D], any strides) and returns [T, H, E], which is how the models lay out their
projections.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from tutti.attention.spec import AttentionSpec
from tutti.attention.tiles import Biases, scores, tiles
from tutti.core.device import on_accelerator

SAVED_SCORES = 8
"""The backward pass uses saved probabilities if they have at most this many times the size of the queries, and
otherwise recomputes them."""

SAVING_DIM = 128
"""Heads of at least this many channels save them; with 64, recomputing them takes no longer than reading them."""


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    borders: Tensor,
    spec: AttentionSpec,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention within each of the samples that `borders` [S + 1] delimits.

    query [H, T, D], key [K, T, D], value [K, T, E] -> [T, H, E]. borders: on the host, where they are read. sinks [H]:
    a learned score per head that takes part in the softmax and has no value.
    """
    # The size of saved probabilities depends on the data, which would break a compiled graph.
    keep = not (on_accelerator(query) or torch.compiler.is_compiling())
    return _forward(query, key, value, borders, sinks, keep, [float(item) for item in spec])[0]


def probabilities(
    rows: Tensor,
    keys: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    spec: AttentionSpec,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The softmax of one tile's scores [K, G * rows, keys (+ 1 with sinks)] and, with softcap, tanh(score / softcap).

    out: where to write the softmax.
    """
    made, tanh = scores(rows, keys, bias, spec)
    if sinks is not None:
        kv_heads, num_rows, _ = made.shape
        rows_a_head = num_rows * kv_heads // sinks.numel()
        column = sinks.repeat_interleave(rows_a_head).view(kv_heads, num_rows, 1)
        made = torch.cat([made, column.to(made.dtype)], dim=-1)
    return torch.softmax(made, dim=-1, out=out), tanh


@torch.library.custom_op("tutti::packed_attention", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    borders: Tensor,
    sinks: Tensor | None,
    keep: bool,
    spec: list[float],
) -> tuple[Tensor, Tensor]:
    """Returns the output [T, H, E] and the tiles' probabilities, flat; the latter are empty if they are to be
    recomputed, and always without `keep`."""
    heads, total, _ = query.shape
    kv_heads, groups = key.shape[0], heads // key.shape[0]
    out = query.new_empty(total, heads, value.shape[-1])
    see = AttentionSpec.unpack(spec)
    biases = Biases(groups, see, query)
    places = borders.tolist()
    saved = query.new_empty(num_saved(query, places, see, sinks) if keep else 0)
    offset = 0
    for begin, end in pairwise(places):
        keys, values = key[:, begin:end].contiguous(), value[:, begin:end].contiguous()
        for tile in tiles((0, end - begin), (0, end - begin), see):
            start, stop, first, last = tile
            rows = query[:, begin + start : begin + stop].reshape(kv_heads, groups * (stop - start), -1)
            place = None
            if saved.numel():
                shape = (kv_heads, rows.shape[1], last - first)
                place = saved[offset : offset + math.prod(shape)].view(shape)
                offset += place.numel()
            weights, _ = probabilities(rows, keys[:, first:last], biases(tile), sinks, see, place)
            seen = weights if sinks is None else weights[..., :-1]
            mixed = torch.bmm(seen, values[:, first:last]).view(heads, stop - start, -1)
            out[begin + start : begin + stop] = mixed.transpose(0, 1)
    return out, saved


def num_saved(query: Tensor, places: list[int], spec: AttentionSpec, sinks: Tensor | None) -> int:
    """The number of probabilities that a forward pass with `keep` saves for samples with borders at `places`."""
    if query.shape[-1] < SAVING_DIM:
        return 0
    num_scores = _num_scores(places, query.shape[0], spec, sinks)
    return int(num_scores) if num_scores <= SAVED_SCORES * query.numel() else 0


def _num_scores(places: list[int], heads: int, spec: AttentionSpec, sinks: Tensor | None) -> float:
    """The number of probabilities that a forward pass computes; infinite if the backward pass needs more than those."""
    if spec.softcap or sinks is not None:
        return float("inf")
    found = (tile for begin, end in pairwise(places) for tile in tiles((0, end - begin), (0, end - begin), spec))
    return heads * sum((stop - start) * (last - first) for start, stop, first, last in found)


@_forward.register_fake
def _(query, key, value, borders, sinks, keep, spec):  # type: ignore[no-untyped-def]
    size = torch.library.get_ctx().new_dynamic_size() if keep else 0
    return query.new_empty(query.shape[1], query.shape[0], value.shape[-1]), query.new_empty(size)


@torch.library.custom_op("tutti::packed_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    borders: Tensor,
    sinks: Tensor | None,
    saved: Tensor,
    spec: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and sinks (empty without), the first three laid out [T, heads, ...] in memory."""
    heads, total, dim = query.shape
    kv_heads, groups = key.shape[0], heads // key.shape[0]
    grad_query = query.new_empty(total, heads, dim)
    grad_key = key.new_empty(total, kv_heads, dim)
    grad_value = value.new_empty(total, kv_heads, value.shape[-1])
    grad_sinks = torch.zeros(heads if sinks is not None else 0, dtype=torch.float32, device=query.device)
    see = AttentionSpec.unpack(spec)
    biases = Biases(groups, see, query)
    offset = 0
    unused = query.new_zeros(1)
    for begin, end in pairwise(borders.tolist()):
        keys, values = key[:, begin:end].contiguous(), value[:, begin:end].contiguous()
        sum_keys, sum_values = torch.zeros_like(keys), torch.zeros_like(values)
        for tile in tiles((0, end - begin), (0, end - begin), see):
            start, stop, first, last = tile
            num_rows, place = groups * (stop - start), slice(begin + start, begin + stop)
            rows = query[:, place].reshape(kv_heads, num_rows, -1)
            tanh = None
            if saved.numel():
                size = kv_heads * num_rows * (last - first)
                weights = saved[offset : offset + size].view(kv_heads, num_rows, last - first)
                offset += size
            else:
                weights, tanh = probabilities(rows, keys[:, first:last], biases(tile), sinks, see)
            outer = grad[place].transpose(0, 1).reshape(kv_heads, num_rows, -1)
            grad_weights = torch.bmm(outer, values[:, first:last].transpose(1, 2))
            if sinks is not None:
                grad_weights = nn.functional.pad(grad_weights, (0, 1))
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            if sinks is not None:
                grad_sinks += grad_scores[..., -1].float().view(heads, -1).sum(-1)
                weights, grad_scores = weights[..., :-1], grad_scores[..., :-1]
            if tanh is not None:
                grad_scores = grad_scores * (1 - tanh * tanh)
            sum_values[:, first:last] += torch.bmm(weights.transpose(1, 2), outer)
            sum_keys[:, first:last] += torch.baddbmm(unused, grad_scores.transpose(1, 2), rows, beta=0, alpha=see.scale)
            grad_rows = torch.baddbmm(unused, grad_scores, keys[:, first:last], beta=0, alpha=see.scale)
            grad_query[place] = grad_rows.view(heads, stop - start, dim).transpose(0, 1)
        grad_key[begin:end] = sum_keys.transpose(0, 1)
        grad_value[begin:end] = sum_values.transpose(0, 1)
    return grad_query, grad_key, grad_value, grad_sinks


@_backward.register_fake
def _(grad, query, key, value, borders, sinks, saved, spec):  # type: ignore[no-untyped-def]
    def rows_first(tensor: Tensor) -> Tensor:
        return tensor.new_empty(tensor.shape[1], tensor.shape[0], tensor.shape[2])

    num_sinks = 0 if sinks is None else sinks.shape[0]
    return rows_first(query), rows_first(key), rows_first(value), query.new_empty(num_sinks, dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    query, key, value, borders, sinks, _, ctx.spec = inputs
    ctx.save_for_backward(query, key, value, borders, sinks, output[1])


def _autograd(ctx: Any, grad: Tensor, _: Tensor) -> tuple:
    query, key, value, borders, sinks, saved = ctx.saved_tensors
    grads = _backward(grad, query, key, value, borders, sinks, saved, ctx.spec)
    grad_query, grad_key, grad_value = (item.transpose(0, 1) for item in grads[:3])
    grad_sinks = None if sinks is None else grads[3].to(sinks.dtype)
    return grad_query, grad_key, grad_value, None, grad_sinks, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
