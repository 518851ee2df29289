"""Native sparse attention on CUDA, by Triton kernels (`tutti.attention.sparse_kernels`). `attend` is all of it.

The samples of a batch are worked on together, and the host waits for nothing. Forward:

1. Queries attend to compressed keys, as flash attention does: outputs and log-sum-exp.
2. The probabilities of that are made once more, and added up by block; each query selects the blocks of the highest.
3. The pairs of a query and a block that it selected are sorted by block. A program takes a part of a block's pairs: it
   holds the block's keys and values, gathers the queries, and writes the attention of each to this block alone with its
   log-sum-exp. So products have 128 rows instead of the few that share a query's blocks, and keys are read once for
   some hundred queries instead of for each.
4. These partial outputs are put together by query, and added to the other branches by their gates.

Backward, the branches' share of the output's gradient follows from the gates alone. A program for a part of a block's
pairs gives what they add to the gradients of the block's keys and values, and of each query; both are added up later,
in a fixed order. For compressed keys it is one kernel by queries, and one by keys and spans of queries.

Partial results take S times the memory of the output: of long batches, the selected branch goes through segments of
queries one after another (`_MEMORY`).

Kernels are tried on few tokens before they are trusted: where they cannot be compiled, or give other values than the
tensor operations of `tutti.attention.sparse_tensors`, these take their place, with a log line.

Shapes: T tokens, H query heads, K key/value heads, G = H / K, D head dimension, E value dimension, M compressed blocks,
B blocks of all samples, S selected ones of a query. Tokens come first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.weak import WeakIdKeyDictionary

from tutti.attention import sparse_kernels as kernels
from tutti.attention.sparse_kernels import Blocks, Branches, Fixed, Heads, Index, Outer, Parts, Span, Two
from tutti.attention.sparse_tensors import attend_compressed, selected_attention
from tutti.attention.spec import SparseSizes

_MEMORY = 2**31
"""The bytes that the partial results of a segment may take."""

_SPAN, _SPANS = 1024, 16
"""Queries of a program for the gradients of compressed keys; at most so many programs for one key."""


class Tile(NamedTuple):
    """The size of a kernel's tiles (keys of 0: a block's), and how the compiler may arrange the work on it."""

    rows: int
    keys: int
    warps: int
    stages: int


TILES = {
    "compressed_forward": Tile(64, 64, 4, 3),
    "block_scores": Tile(128, 32, 8, 2),
    "choose_blocks": Tile(1, 0, 1, 1),
    "selected_forward": Tile(64, 0, 4, 3),
    "mix_branches": Tile(16, 0, 4, 2),
    "mix_backward": Tile(8, 0, 2, 2),
    "selected_backward": Tile(64, 0, 4, 2),
    "add_chunks": Tile(16, 0, 8, 2),
    "query_backward": Tile(64, 64, 4, 2),
    "compressed_backward": Tile(64, 64, 4, 2),
}
"""By kernel, for half precision and heads up to 128 wide: the fastest of some on an H200, with 4 heads a group."""

_WIDE, _EXACT = Tile(64, 32, 8, 1), Tile(16, 32, 8, 1)
"""The largest for wider heads, and for fp32, whose tiles take more memory."""

_AGREED = 0.95
"""The share of blocks that kernels have to select as tensor operations do."""


class Layout(NamedTuple):
    """Places of the samples of a batch, of their compressed blocks and of their blocks to select from.

    Compressed blocks begin at every stride of a row in which each sample fills whole strides; those that reach over a
    sample's end are seen by no query. source [row]: the token of each place of that row, T for none; None if the row is
    the tokens. seen: the compressed blocks of each query. seers: the queries of each compressed block. most: the number
    of blocks of the longest sample.
    """

    cu_seqlens: Tensor
    longest: int
    source: Tensor | None
    seen: Span
    seers: Span
    blocks: Blocks
    tokens: Span
    most: int


_layouts: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""By the borders of a batch, which all layers are given."""


def layout_of(borders: Tensor, sizes: SparseSizes, device: torch.device) -> Layout:
    """The layout of samples that begin and end at `borders` (on the host), on `device`, without waiting for it."""
    known = _layouts.setdefault(borders, {})
    if (sizes, device) not in known:
        known[sizes, device] = _make_layout(borders, sizes, device)
    found: Layout = known[sizes, device]
    return found


def _make_layout(borders: Tensor, sizes: SparseSizes, device: torch.device) -> Layout:
    lengths = [end - begin for begin, end in pairwise(borders.tolist())]
    num_strides, num_blocks = (
        [-(-length // size) for length in lengths] for size in (sizes.stride, sizes.selected_block)
    )
    host = borders.to(torch.int32, copy=True)
    cu_seqlens = (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)

    def starts(size: int) -> Tensor:
        """Of each sample, and the end of the last, where samples fill whole pieces of a size."""
        return pad((cu_seqlens.diff() + size - 1).div(size, rounding_mode="floor").cumsum(0, dtype=torch.int32), (1, 0))

    def samples(count: int, ends: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers up to count, and the sample of each."""
        numbers = torch.arange(count, dtype=torch.int32, device=device)
        return numbers, torch.bucketize(numbers, ends[1:], right=True)

    strides, blocks = starts(sizes.stride), starts(sizes.selected_block)
    places, sample = samples(sum(lengths), cu_seqlens)
    local = places - cu_seqlens[sample]
    seen = ((local + 1 - sizes.block).div(sizes.stride, rounding_mode="floor") + 1).clamp_min(0)
    numbers, of = samples(sum(num_blocks), blocks)
    begin = cu_seqlens[of] + (numbers - blocks[of]) * sizes.selected_block
    compressed = strides[of] + (numbers - blocks[of]) * (sizes.selected_block // sizes.stride)
    windows, within = samples(max(0, sum(num_strides) - sizes.block // sizes.stride + 1), strides)
    first = cu_seqlens[within] + (windows - strides[within]) * sizes.stride + sizes.block - 1
    last = cu_seqlens[within + 1]
    source = None
    if len(lengths) > 1:
        row, owner = samples(sum(num_strides) * sizes.stride, strides * sizes.stride)
        source = cu_seqlens[owner] + row - strides[owner] * sizes.stride
        source = torch.where(source < cu_seqlens[owner + 1], source, sum(lengths))
    first_block = blocks[sample]
    return Layout(
        cu_seqlens,
        max(lengths, default=0),
        source,
        Span(strides[sample], strides[sample] + seen),
        Span(torch.where(first < last, first, 2**30), torch.where(first < last, last, 0)),
        Blocks(first_block, first_block + local.div(sizes.selected_block, rounding_mode="floor"), compressed),
        Span(begin, torch.minimum(begin + sizes.selected_block, cu_seqlens[of + 1])),
        max(num_blocks, default=0),
    )


def row_to_compress(tokens: Tensor, layout: Layout) -> Tensor:
    """[K, T, D] -> [K, row, D], the row whose every stride begins a compressed block; zeros at its samples' ends."""
    if layout.source is None:
        return tokens
    return pad(tokens, (0, 0, 0, 1)).index_select(1, layout.source)


def fits(query: Tensor, key: Tensor, value: Tensor, sizes: SparseSizes) -> bool:
    """True where there may be kernels for these tensors, heads first, and sizes."""
    groups, width = len(query) // len(key), max(query.shape[-1], value.shape[-1])
    return (
        query.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and width <= 256
        and groups <= 32
        and sizes.selected_block <= 128
        and sizes.selected <= 256
        and (sizes.block + sizes.selected_block) // sizes.stride <= 64
    )


def attend(
    heads: tuple[Tensor, Tensor, Tensor],
    compressed: tuple[Tensor, Tensor],
    sliding: Tensor,
    gates: Tensor,
    layout: Layout,
    sizes: SparseSizes,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The mixed output of the three branches [T, H, E], and the blocks of all samples that are selected [T, K, S], -1
    for none.

    heads: query [H, T, D], key [K, T, D], value [K, T, E]. compressed: keys [K, M, D] and values [K, M, E] of
    `row_to_compress`. sliding: that branch's output [T, H, E]. gates [H, T, 3].
    """
    tensors = [item.transpose(0, 1).contiguous() for item in (*heads, *compressed, gates)]
    out: tuple[Tensor, Tensor] = _Attend.apply(layout, sizes, scale, *tensors, sliding.contiguous())
    return out


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layout: Layout, sizes: SparseSizes, scale: float, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        query, key, value, keys, values, gates, sliding = tensors
        fixed, num_blocks = _fixed(query, key, value, layout, sizes, scale), len(layout.tokens.first)
        out, selected, compressed = (torch.empty_like(sliding) for _ in range(3))
        compressed_lse, lse = (torch.empty(query.shape[:2], device=query.device) for _ in range(2))
        chosen = torch.empty(len(query), fixed.K, fixed.S, dtype=torch.int32, device=query.device)
        run = _Run(fixed, query.dtype)
        heads = Heads(query, keys, values)
        run.by_queries("compressed_forward", len(query), heads, layout.seen, compressed, compressed_lse)
        saved: list[Tensor] = []
        for begin, of in _segments(query, fixed):
            heads = Heads(query[of], keys, values)
            chosen[of] = _choose(run, heads, layout, of, compressed_lse[of])
            index = _index(chosen[of], num_blocks, fixed)
            pairs = chosen[of].numel() * fixed.G
            parts = Two(value.new_empty(pairs, fixed.E), torch.empty(pairs, device=query.device))
            heads = Heads(query[of], key, value)
            run("selected_forward", (len(index.cell),), heads, layout.tokens, index, parts, begin, num_blocks)
            branches = Branches(compressed[of], selected[of], sliding[of])
            run.by_queries("mix_branches", len(query[of]), parts, chosen[of], branches, gates[of], out[of], lse[of])
            saved += index
        ctx.save_for_backward(*tensors, compressed, selected, compressed_lse, lse, chosen, *saved)
        ctx.layout, ctx.run = layout, run
        ctx.mark_non_differentiable(chosen)
        return out, chosen

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, keys, values, gates, sliding, *made = ctx.saved_tensors
        compressed, selected, compressed_lse, lse, chosen, *saved = made
        layout, run = ctx.layout, ctx.run
        fixed, num_blocks = run.fixed, len(layout.tokens.first)
        grad, grad_sliding = grad.contiguous(), torch.empty_like(sliding)
        grad_gates = torch.empty(gates.shape, device=grad.device)
        branches, rows = Branches(compressed, selected, sliding), lse.numel()
        run.by_rows("mix_backward", rows, grad, branches, gates, grad_gates, grad_sliding)
        segments = list(_segments(query, fixed))
        grad_query = torch.empty_like(query)
        sums = Two(
            *(item.new_empty(item.shape, dtype=None if len(segments) == 1 else torch.float32) for item in (key, value))
        )
        for number, (begin, of) in enumerate(segments):
            index = Index(*saved[4 * number : 4 * number + 4])
            chunks, pairs = len(index.cell), chosen[of].numel() * fixed.G
            parts = Parts(
                query.new_empty(pairs, fixed.D),
                torch.empty(chunks, run.block, fixed.D, device=grad.device),
                torch.empty(chunks, run.block, fixed.E, device=grad.device),
            )
            outer = Outer(grad[of], gates[of], grad_gates[of], lse[of])
            heads = Heads(query[of], key, value)
            run("selected_backward", (chunks,), heads, layout.tokens, index, outer, parts, begin, num_blocks)
            grid = (fixed.K * num_blocks,)
            run("add_chunks", grid, parts, layout.tokens, index.chunks, sums, num_blocks, ADDS=number > 0)
            outer, heads = outer._replace(lse=compressed_lse[of]), Heads(query[of], keys, values)
            seen = Span(*(item[of] for item in layout.seen))
            run.by_queries(
                "query_backward", len(query[of]), heads, seen, outer, parts.query, chosen[of], grad_query[of]
            )
        outer = Outer(grad, gates, grad_gates, compressed_lse)
        given = _of_compressed(run, Heads(query, keys, values), layout, outer)
        grads = [grad_query, *(item.to(key.dtype) for item in (*sums, *given))]
        return None, None, None, *grads, grad_gates.to(gates.dtype), grad_sliding


_OF_WIDTH = ("block_scores", "choose_blocks")


class _Run(NamedTuple):
    """Runs kernels for tensors of a kind."""

    fixed: Fixed
    dtype: torch.dtype

    @property
    def block(self) -> int:
        """The keys of a tile that holds a block."""
        return self.fixed.KEYS

    def tile(self, name: str) -> Tile:
        """The tile of a kernel, whose rows hold a query at least."""
        tile = TILES[name]
        most = _WIDE if max(self.fixed.DP, self.fixed.EP) > 128 else tile
        most = _EXACT if self.dtype == torch.float32 else most
        tile = tile._replace(rows=min(tile.rows, most.rows), keys=min(tile.keys, most.keys), stages=most.stages)
        return tile._replace(rows=max(tile.rows, self.fixed.GP), keys=tile.keys or self.block)

    def __call__(self, name: str, grid: tuple[int, ...], *arguments: Any, **changes: Any) -> None:
        """Run a kernel on a grid of programs."""
        if 0 in grid:
            return
        tile = self.tile(name)
        fixed = self.fixed._replace(ROWS=tile.rows, KEYS=tile.keys, **changes)
        if name not in _OF_WIDTH:
            fixed = fixed._replace(WIDTH=0)  # kernels are compiled anew for another width
        kernel: Any = getattr(kernels, name)
        kernel[grid](*arguments, c=fixed, num_warps=tile.warps, num_stages=tile.stages)

    def by_queries(self, name: str, count: int, *arguments: Any) -> None:
        """Run a kernel for each tile of so many queries and each key/value head."""
        queries = self.tile(name).rows // self.fixed.GP
        self(name, (-(-count // queries), self.fixed.K), *arguments, count)

    def by_rows(self, name: str, count: int, *arguments: Any) -> None:
        """Run a kernel for each tile of so many rows of queries and heads."""
        self(name, (-(-count // self.tile(name).rows),), *arguments, count)


def _fixed(query: Tensor, key: Tensor, value: Tensor, layout: Layout, sizes: SparseSizes, scale: float) -> Fixed:
    (kv_heads, width), groups = key.shape[1:], query.shape[1] // key.shape[1]
    return Fixed(
        K=kv_heads,
        G=groups,
        GP=_padded(groups, 1),
        D=width,
        DP=_padded(width),
        E=value.shape[2],
        EP=_padded(value.shape[2]),
        S=sizes.selected,
        SP=_padded(sizes.selected),
        PER_BLOCK=sizes.selected_block // sizes.stride,
        WITHIN=sizes.block // sizes.stride,
        SCALE=scale,
        WIDTH=_padded(max(layout.most, 1)),
        KEYS=_padded(sizes.selected_block),
    )


def _padded(size: int, least: int = 16) -> int:
    """The next power of two, which tiles have; products have 16 at least."""
    return max(least, 1 << (size - 1).bit_length())


def _segments(query: Tensor, fixed: Fixed) -> Iterator[tuple[int, slice]]:
    """The queries whose partial results may be in memory at once: the first, and a slice of them."""
    each = fixed.K * (fixed.S * fixed.G * max(fixed.D, fixed.E) * query.element_size() + 4 * fixed.WIDTH)
    count = max(64, _MEMORY // each // 64 * 64)
    for begin in range(0, len(query), count):
        yield begin, slice(begin, min(begin + count, len(query)))


def _choose(run: _Run, heads: Heads, layout: Layout, of: slice, lse: Tensor) -> Tensor:
    """The blocks [t, K, S] that a segment's queries select, -1 for none. heads: of compressed keys."""
    fixed, count = run.fixed, len(lse)
    seen, blocks = Span(*(item[of] for item in layout.seen)), layout.blocks
    blocks = blocks._replace(first=blocks.first[of], own=blocks.own[of])
    scores = torch.full((count, fixed.K, fixed.WIDTH), -math.inf, device=lse.device)
    run.by_queries("block_scores", count, heads, seen, blocks, lse, scores)
    chosen = torch.empty(count, fixed.K, fixed.S, dtype=torch.int32, device=lse.device)
    run("choose_blocks", (count * fixed.K,), scores, blocks.first, chosen)
    return chosen


def _index(chosen: Tensor, num_blocks: int, fixed: Fixed) -> Index:
    """The pairs of a segment by cell. The host does not know how many chunks there are, only how many at most."""
    device, num_cells = chosen.device, fixed.K * num_blocks
    heads = torch.arange(fixed.K, dtype=torch.int32, device=device)[:, None]
    cells = torch.where(chosen < 0, num_cells, chosen + heads * num_blocks)
    cells, order = cells.flatten().sort(stable=True)
    pairs = torch.searchsorted(cells, torch.arange(num_cells + 1, dtype=torch.int32, device=device), out_int32=True)
    chunks = (pairs.diff() + fixed.CHUNK - 1).div(fixed.CHUNK, rounding_mode="floor").cumsum(0, dtype=torch.int32)
    most = torch.arange(chosen.numel() // fixed.CHUNK + num_cells, dtype=torch.int32, device=device)
    cell = torch.searchsorted(chunks, most, right=True, out_int32=True)
    return Index(order.int(), pairs, pad(chunks, (1, 0)), cell)


def _of_compressed(run: _Run, heads: Heads, layout: Layout, outer: Outer) -> tuple[Tensor, Tensor]:
    """The gradients of compressed keys [M, K, D] and values [M, K, E], in fp32."""
    count, kv_heads, _ = heads.key.shape
    span = max(_SPAN, -(-len(heads.query) // _SPANS))
    spans = -(-len(heads.query) // span)
    parts = Two(*(torch.empty(spans, *item.shape, device=item.device) for item in heads[1:]))
    grid = (-(-count // run.tile("compressed_backward").keys), spans, kv_heads)
    run("compressed_backward", grid, heads, layout.seers, outer, parts, count, span)
    return parts.one.sum(0), parts.other.sum(0)


def try_kernels(
    device: torch.device, dtype: torch.dtype, heads: tuple[int, int, int, int], sizes: SparseSizes, scale: float
) -> float | None:
    """The largest difference of output and gradients by kernels from those by tensor operations in fp32, relative to
    the largest value, on two samples of which one is longer than what is selected; None where there are no kernels.

    heads: H, K, D, E. Both see the blocks that the kernels select, whose scores may be all but equal.
    """
    num_heads, kv_heads, width, value_width = heads
    lengths = (sizes.block + 3, sizes.reach + 2 * sizes.selected_block + 5)
    total, borders = sum(lengths), torch.tensor([0, lengths[0], sum(lengths)])
    draws = torch.Generator(device).manual_seed(0)
    shapes = [(num_heads, total, width), (kv_heads, total, width), (kv_heads, total, value_width)]
    drawn = [torch.randn(shape, generator=draws, device=device, dtype=dtype) for shape in shapes]
    if not fits(drawn[0], drawn[1], drawn[2], sizes):
        return None
    drawn.append(torch.rand(num_heads, total, 3, generator=draws, device=device, dtype=dtype))
    drawn.append(torch.randn(total, num_heads, value_width, generator=draws, device=device, dtype=dtype))
    layout = layout_of(borders, sizes, device)
    ours, theirs = ([item.to(kind, copy=True).requires_grad_() for item in drawn] for kind in (dtype, torch.float32))
    rows = (row_to_compress(item, layout) for item in ours[1:3])
    keys, values = (item.unfold(1, sizes.block, sizes.stride).mean(-1) for item in rows)
    heads_first = (ours[0], ours[1], ours[2])
    out, chosen = attend(heads_first, (keys, values), ours[4], ours[3], layout, sizes, scale)
    want, agreed = _by_chosen(theirs, chosen.long().transpose(0, 1), lengths, sizes, scale)
    if agreed < _AGREED:
        return math.inf
    weight = torch.randn(out.shape, generator=draws, device=device)
    results = ((out, (out * weight).sum(), ours), (want, (want * weight).sum(), theirs))
    found = [[made.detach(), *torch.autograd.grad(loss, given)] for made, loss, given in results]
    return max(float((one - other).abs().max() / other.abs().max()) for one, other in zip(*found, strict=True))


def _by_chosen(
    given: list[Tensor], chosen: Tensor, lengths: tuple[int, ...], sizes: SparseSizes, scale: float
) -> tuple[Tensor, float]:
    """The output for query, key, value, gates and the sliding branch of samples that see the blocks `chosen` [K, T, S]
    of all samples, compressed to their means, and the share of blocks that tensor operations select as well."""
    parts, same, first = [], [], 0
    samples = zip(*(item.split(list(lengths), 1) for item in (*given[:4], chosen)), strict=True)
    for query, key, value, gates, picked in samples:
        picked = torch.where(picked < 0, -1, picked - first)
        length = query.shape[1]
        keys, values = (item.unfold(1, sizes.block, sizes.stride).mean(-1) for item in (key, value))
        compressed, wanted = attend_compressed(query, keys, values, length, sizes, scale)
        same.append((picked[..., None] == wanted[..., None, :]).any(-1)[picked >= 0].float())
        selected = selected_attention(query, key, value, picked, sizes.selected_block, scale)
        parts.append(gates[..., :1] * compressed + gates[..., 1:2] * selected)
        first += -(-length // sizes.selected_block)
    out = torch.cat(parts, 1).transpose(0, 1) + given[3][..., 2:].transpose(0, 1) * given[4]
    return out, float(torch.cat(same).mean())
