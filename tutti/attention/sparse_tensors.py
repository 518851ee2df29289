"""The compressed and the selected branch of native sparse attention by tensor operations, one sample at a time.

The work of the selected branch is arranged by key blocks: the queries that selected a block are gathered and
multiplied with its keys at once, which makes matrix products of some hundred rows out of single rows. All that is made
of a block's pairs is used at once and added up by query, so that it stays in the caches, except for the scores, which
have to wait for the maximum over a query's blocks; the backward pass computes them anew from the saved log-sum-exp. The
same code runs on every device.

Shapes: n tokens of a sample, H query heads, K key/value heads, G = H / K, D head dimension, E value dimension, M
compressed blocks, B blocks to select from, S selected ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from tutti.attention.spec import SparseSizes
from tutti.core.device import on_accelerator

_QUERIES = 4096
"""Queries of a sample whose selected blocks are worked on at a time: each block's product is the larger for more of
them, and their scores wait for one another in memory."""

_ROWS = 128
"""Queries of a sample that are multiplied with compressed keys at a time."""

_FILLED = 32
"""On a CPU, bf16 products of a block's queries are filled up to a multiple of this many. oneDNN makes a kernel for each
number of rows, which takes four times as long as such a product."""


def attend_compressed(
    query: Tensor, keys: Tensor, values: Tensor, length: int, sizes: SparseSizes, scale: float, first: int = 0
) -> tuple[Tensor, Tensor]:
    """Attention of one sample to its compressed `keys` [K, M, D] and `values` [K, M, E], and what it selects.

    query [H, m, D] of the tokens from place `first` on -> [H, m, E], and blocks [K, m, S], where -1 stands for none.
    """
    return _Compressed.apply(query, keys, values, length, sizes, scale, first)


class _Compressed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        length: int,
        sizes: SparseSizes,
        scale: float,
        first: int,
    ) -> tuple[Tensor, Tensor]:
        heads, count, _ = query.shape
        kv_heads = keys.shape[0]
        out = query.new_zeros(heads, count, values.shape[2])
        num_blocks = -(-length // sizes.selected_block)
        chosen = torch.empty(kv_heads, count, min(sizes.selected, num_blocks), dtype=torch.int64, device=query.device)
        for start, stop, seen in _compressed_tiles(count, first, sizes):
            rows, places = query[:, start:stop], torch.arange(first + start, first + stop, device=query.device)
            weights = _compressed_weights(rows, keys[:, :seen], places, sizes, scale)
            if seen:
                out[:, start:stop] = (weights @ values[:, :seen]).view(heads, stop - start, -1)
            grouped = weights.view(kv_heads, heads // kv_heads, stop - start, seen)
            by_kv_head = grouped.sum(1, dtype=torch.float32)
            chosen[:, start:stop] = _select(by_kv_head, places, num_blocks, sizes)
        ctx.save_for_backward(query, keys, values)
        ctx.fixed = (sizes, scale, first)  # type: ignore[attr-defined]
        ctx.mark_non_differentiable(chosen)
        return out, chosen

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        query, keys, values = ctx.saved_tensors
        sizes, scale, first = ctx.fixed
        kv_heads = keys.shape[0]
        unused, grad_query = query.new_zeros(1), torch.zeros_like(query)
        grad_keys, grad_values = (torch.zeros_like(item, dtype=torch.float32) for item in (keys, values))
        for start, stop, seen in _compressed_tiles(query.shape[1], first, sizes):
            if not seen:
                continue
            places = torch.arange(first + start, first + stop, device=query.device)
            rows = query[:, start:stop].reshape(kv_heads, -1, query.shape[-1])
            weights = _compressed_weights(query[:, start:stop], keys[:, :seen], places, sizes, scale)
            coming = grad[:, start:stop].reshape(kv_heads, -1, grad.shape[-1])
            change = coming @ values[:, :seen].transpose(1, 2)
            change = torch._softmax_backward_data(change, weights, -1, weights.dtype)
            into = torch.baddbmm(unused, change, keys[:, :seen], beta=0, alpha=scale)
            grad_query[:, start:stop] = into.view(query.shape[0], stop - start, -1)
            grad_keys[:, :seen] += torch.baddbmm(unused, change.transpose(1, 2), rows, beta=0, alpha=scale)
            grad_values[:, :seen] += weights.transpose(1, 2) @ coming
        return grad_query, grad_keys.to(keys.dtype), grad_values.to(values.dtype), None, None, None, None


def _compressed_tiles(count: int, first: int, sizes: SparseSizes) -> Iterator[tuple[int, int, int]]:
    """Parts of the queries at places `first` and on: (start, stop, number of compressed blocks that the last sees, or a
    few more, so that there are not as many shapes of products as parts)."""
    for start in range(0, count, _ROWS):
        stop = min(start + _ROWS, count)
        seen = sizes.num_compressed(first + stop)
        yield start, stop, min(seen + -seen % 64, sizes.num_compressed(first + count))


def _compressed_weights(rows: Tensor, keys: Tensor, places: Tensor, sizes: SparseSizes, scale: float) -> Tensor:
    """The softmax of queries at `places` over compressed keys that end by then, 0 where there are none.

    rows [H, m, D], keys [K, M, D] -> [K, G * m, M].
    """
    (kv_heads, seen), groups = keys.shape[:2], rows.shape[0] // keys.shape[0]
    grouped = rows.reshape(kv_heads, -1, rows.shape[-1])
    scores = torch.baddbmm(rows.new_zeros(1), grouped, keys.transpose(1, 2), beta=0, alpha=scale)
    last = torch.div(places - sizes.block + 1, sizes.stride, rounding_mode="floor")
    first_last = int(last[0])
    all_see = max(0, min(first_last + 1, seen))
    hidden = torch.arange(all_see, seen, device=rows.device) > last[:, None]
    scores.view(kv_heads, groups, len(places), seen)[..., all_see:].masked_fill_(hidden, -torch.inf)
    weights = torch.softmax(scores, -1)
    # A query before the end of the first block sees none: its softmax is 0 / 0.
    return weights.nan_to_num_(0.0) if first_last < 0 else weights


def _select(weights: Tensor, places: Tensor, num_blocks: int, sizes: SparseSizes) -> Tensor:
    """The blocks that the weights [K, m, M] of compressed ones select: [K, m, S], -1 where there are fewer.

    A block's score is the weight of all compressed ones times the number of strides that they have within it.
    """
    kv_heads, count, seen = weights.shape
    within, per_block = sizes.block // sizes.stride, sizes.selected_block // sizes.stride
    strides = weights.new_zeros(kv_heads, count, num_blocks * per_block)
    for shift in range(within):
        kept = min(seen, strides.shape[2] - shift)
        strides[..., shift : shift + kept] += weights[..., :kept]
    scores = strides.view(kv_heads, count, num_blocks, per_block).sum(-1)
    own = (places // sizes.selected_block)[:, None]
    blocks = torch.arange(num_blocks, device=weights.device)
    scores.masked_fill_((blocks == 0) | (blocks == own) | (blocks == own - 1), torch.inf)
    scores.masked_fill_(blocks > own, -torch.inf)
    found, chosen = scores.topk(min(sizes.selected, num_blocks), -1)
    return chosen.masked_fill_(found == -torch.inf, -1)


def selected_attention(query: Tensor, key: Tensor, value: Tensor, chosen: Tensor, block: int, scale: float) -> Tensor:
    """Attention of each query of one sample to the tokens up to its own of the blocks that its row in `chosen` names.

    query [H, n, D], key [K, n, D], value [K, n, E], chosen [K, n, S] with the query's own block among them, -1 for none
    -> [H, n, E].
    """
    return _Selected.apply(query, key, value, chosen, block, scale)


class _Pairs(NamedTuple):
    """The queries, among some of one key/value head, that selected a block: their `rows`, ascending.

    num: how many; after them rows may be filled up with the part's last, which is none of its queries. span: the
    tokens of the block in the sample. own: how many of the queries are the block's own, which see it up to themselves,
    and come first; the first of them is the block's token `own_first`.
    """

    rows: Tensor
    num: int
    span: slice
    own: int
    own_first: int


class _Selected(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, query: Tensor, key: Tensor, value: Tensor, chosen: Tensor, block: int, scale: float
    ) -> Tensor:
        heads, length, _ = query.shape
        kv_heads, width = key.shape[0], value.shape[2]
        out = query.new_empty(heads, length, width)
        sums = torch.empty(heads, length, device=query.device)
        counts = _count_pairs(chosen, -(-length // block))
        for part in _selected_parts(query, key, value, chosen, counts, block):
            made = [part.scores(pairs, part.queries(pairs), scale) for pairs in part.blocks]
            best = [scores[: pairs.num].float().amax(-1) for pairs, scores in zip(part.blocks, made, strict=True)]
            top = part.maxima(best)
            exact = top.to(query.dtype)  # it is one of the scores, or 0
            total = torch.zeros_like(top)
            mixed = top.new_zeros(len(top), top.shape[1] * width)
            for pairs, scores in zip(part.blocks, made, strict=True):
                weights = scores.sub_(exact.index_select(0, pairs.rows)[..., None]).exp_()
                total.index_add_(0, pairs.rows, weights.sum(-1, dtype=torch.float32))
                product = _flat(weights) @ part.value[pairs.span]
                mixed.index_add_(0, pairs.rows, product.float().view(len(weights), -1))
            result = mixed.view(*top.shape, width) / total[..., None]
            part.of(out, kv_heads).copy_(result[:-1].transpose(0, 1))
            part.of(sums, kv_heads).copy_((top + total.log())[:-1].transpose(0, 1))
        ctx.save_for_backward(query, key, value, chosen, out, sums)
        ctx.fixed = (counts, block, scale)  # type: ignore[attr-defined]
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, chosen, out, sums = ctx.saved_tensors
        counts, block, scale = ctx.fixed
        kv_heads, width = key.shape[0], key.shape[2]
        grad_query = torch.empty_like(query)
        grad_key, grad_value = (torch.zeros_like(item, dtype=torch.float32) for item in (key, value))
        delta = (grad.float() * out).sum(-1)
        # By two more columns, products give scores less the log-sum-exp, and gradients of weights less delta.
        lowered, coming = _with_columns(query, sums / -scale), _with_columns(grad, -delta)
        key_and_ones, value_and_ones = (nn.functional.pad(item, (0, 2), value=1.0) for item in (key, value))
        for part in _selected_parts(lowered, key_and_ones, value_and_ones, chosen, counts, block):
            outers = _with_last(part.of(coming, kv_heads).transpose(0, 1).flatten(1))
            into = outers.new_zeros(len(outers), query.shape[0] // kv_heads * width, dtype=torch.float32)
            for pairs in part.blocks:
                queries, keys, values = part.queries(pairs), part.key[pairs.span], part.value[pairs.span]
                outer = outers.index_select(0, pairs.rows).view(-1, values.shape[1])
                weights = _flat(part.scores(pairs, queries, scale).exp_())
                change = (outer @ values.t()).mul_(weights)
                into.index_add_(0, pairs.rows, (change @ keys[:, :width]).float().view(len(pairs.rows), -1))
                grad_key[part.kv_head, pairs.span] += (change.t() @ queries)[:, :width]
                grad_value[part.kv_head, pairs.span] += (weights.t() @ outer)[:, : value.shape[2]]
            into = into.mul_(scale).view(len(into), -1, width)
            part.of(grad_query, kv_heads).copy_(into[:-1].transpose(0, 1))
        return grad_query, grad_key.mul_(scale).to(key.dtype), grad_value.to(value.dtype), None, None, None


class _Part(NamedTuple):
    """Some queries of one key/value head [m + 1, G * D], the last of which is zeros and stands for none, the tokens of
    its sample, and who selected each block.

    Keys, values and each head of a query have two more columns in the backward pass.
    places [m * S]: where the pair of each query and slot is in the order of the blocks, which is the number of pairs
    where there is none. hidden: bool [block, block], the tokens after a block's own queries.
    """

    kv_head: int
    span: slice
    query: Tensor
    key: Tensor
    value: Tensor
    blocks: list[_Pairs]
    places: Tensor
    hidden: Tensor

    def of(self, tensor: Tensor, kv_heads: int) -> Tensor:
        """The part [G, m, ...] of a tensor [H, n, ...] that belongs to these queries."""
        return tensor.unflatten(0, (kv_heads, -1))[self.kv_head, :, self.span]

    def queries(self, pairs: _Pairs) -> Tensor:
        """[pairs * G, D]."""
        return self.query.index_select(0, pairs.rows).view(-1, self.key.shape[1])

    def scores(self, pairs: _Pairs, queries: Tensor, scale: float) -> Tensor:
        """The scores [pairs, G, tokens of the block] of the gathered queries [pairs * G, D]."""
        keys = self.key[pairs.span]
        made = torch.addmm(queries.new_zeros(1), queries, keys.t(), beta=0, alpha=scale)
        made = made.view(len(pairs.rows), -1, len(keys))
        if pairs.own:
            mask = self.hidden[pairs.own_first : pairs.own_first + pairs.own, None, : len(keys)]
            made[: pairs.own].masked_fill_(mask, -torch.inf)
        return made

    def maxima(self, values: list[Tensor]) -> Tensor:
        """The maximum of each block's values [pairs, G] over the slots of each query: [m + 1, G], the last being 0."""
        heads = values[0].shape[1]
        padded = torch.cat([*values, values[0].new_full((1, heads), -torch.inf)])
        return _with_last(padded.index_select(0, self.places).view(len(self.query) - 1, -1, heads).amax(1))


def _count_pairs(chosen: Tensor, num_blocks: int) -> list[list[list[int]]]:
    """Count the queries of each key/value head and part that selected none, block 0, block 1 and so on, of chosen
    [K, n, S].

    The host has to know, and waits for it once.
    """
    kv_heads, length, _ = chosen.shape
    num_parts, device = -(-length // _QUERIES), chosen.device
    heads, places = torch.arange(kv_heads, device=device)[:, None], torch.arange(length, device=device)
    part = heads * num_parts + torch.div(places, _QUERIES, rounding_mode="floor")
    bins = chosen + 1 + part[..., None] * (num_blocks + 1)
    counts = torch.bincount(bins.flatten(), minlength=kv_heads * num_parts * (num_blocks + 1))
    found: list[list[list[int]]] = counts.view(kv_heads, num_parts, -1).tolist()
    return found


def _selected_parts(
    query: Tensor, key: Tensor, value: Tensor, chosen: Tensor, counts: list[list[list[int]]], block: int
) -> Iterator[_Part]:
    kv_heads, length = key.shape[:2]
    grouped = query.unflatten(0, (kv_heads, -1))
    hidden = torch.ones(block, block, dtype=torch.bool, device=query.device).triu(1)
    filled = _FILLED if query.dtype == torch.bfloat16 and not on_accelerator(query) else 1
    for head in range(kv_heads):
        keys, values = key[head].contiguous(), value[head].contiguous()
        for number, start in enumerate(range(0, length, _QUERIES)):
            span = slice(start, min(start + _QUERIES, length))
            rows = _with_last(grouped[head, :, span].transpose(0, 1).flatten(1))
            blocks, places = _by_block(chosen[head, span], counts[head][number], span, block, filled)
            yield _Part(head, span, rows, keys, values, blocks, places, hidden)


def _by_block(chosen: Tensor, counts: list[int], span: slice, block: int, filled: int) -> tuple[list[_Pairs], Tensor]:
    """The queries of each block, and the pair of each query and slot, of those at `span` in a sample whose selected
    blocks are `chosen` [m, S], so many of none and of each as `counts` says. filled: rows are filled up to a multiple
    of it."""
    flat = chosen.flatten()
    order = torch.argsort(flat, stable=True)[counts[0] :]
    places = torch.full_like(flat, len(order))
    places[order] = torch.arange(len(order), device=flat.device)
    rows = torch.div(order, chosen.shape[1], rounding_mode="floor").split(counts[1:])
    blocks = []
    for number, found in enumerate(rows):
        if count := len(found):
            found = nn.functional.pad(found, (0, -count % filled), value=len(chosen))
            tokens = slice(number * block, (number + 1) * block)
            own = slice(max(tokens.start, span.start), min(tokens.stop, span.stop))
            blocks.append(_Pairs(found, count, tokens, max(0, own.stop - own.start), own.start - tokens.start))
    return blocks, places


def _with_last(tensor: Tensor) -> Tensor:
    """With one more row at the end, of zeros."""
    return nn.functional.pad(tensor, (0, 0, 0, 1))


def _with_columns(tensor: Tensor, added: Tensor) -> Tensor:
    """[H, n, D] with `added` [H, n] as two more columns, whose sum it is to more digits than one would hold."""
    coarse = added.to(tensor.dtype)
    return torch.cat([tensor, coarse[..., None], (added - coarse).to(tensor.dtype)[..., None]], -1)


def _flat(tensor: Tensor) -> Tensor:
    """[pairs, G, X] -> [pairs * G, X]."""
    return tensor.view(-1, tensor.shape[-1])
