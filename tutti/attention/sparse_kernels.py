"""The kernels of native sparse attention on CUDA, in Triton; `tutti.attention.sparse_triton` runs them.

A tile of rows is some queries times the G query heads that share a key/value head: row r is query r // P and head
r % P, where P is G filled up to a power of two. Softmax is to the base of two, which the hardware has. Products of fp32
are exact ones, never TF32. Nothing is added up by atomics: the results of one run are those of the next.

Numbers that are fixed when a kernel is compiled are in `Fixed`. Others that change with the batch are not specialized
on, so that no batch makes Triton compile anew.

Shapes: T tokens of a batch, H query heads, K key/value heads, D head dimension, E value dimension, M compressed blocks,
B blocks to select from (of all samples, end to end), S slots a query. Tokens come first: query [T, H, D], key [T, K,
D]. A pair is a query and one of its slots; pairs are numbered (query * K + key/value head) * S + slot.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
FAR = tl.constexpr(2**30)
"""A place that no token has."""


class Fixed(NamedTuple):
    """Constants of a compiled kernel. A P at the end of a name: filled up to a power of two.

    PER_BLOCK, WITHIN: strides of a block to select, and of a compressed one. WIDTH: of a row of blocks' scores. ROWS,
    KEYS: of a tile. CHUNK: pairs of a program. ADDS: gradients of keys add to earlier ones.
    """

    K: int
    G: int
    GP: int
    D: int
    DP: int
    E: int
    EP: int
    S: int
    SP: int
    PER_BLOCK: int
    WITHIN: int
    SCALE: float
    WIDTH: int = 16
    ROWS: int = 128
    KEYS: int = 64
    CHUNK: int = 512
    ADDS: bool = False


class Heads(NamedTuple):
    """Queries and the keys and values that they attend to, tokens first."""

    query: Tensor
    key: Tensor
    value: Tensor


class Span(NamedTuple):
    """From where to before where, int32: of compressed blocks by query, of queries by compressed block, or of tokens by
    block."""

    first: Tensor
    end: Tensor


class Blocks(NamedTuple):
    """By query the first block of its sample and its own, and by block the compressed block that starts with it."""

    first: Tensor
    own: Tensor
    compressed: Tensor


class Index(NamedTuple):
    """The pairs, sorted by cell, which is key/value head * B + block: `order`; where each cell's begin among them, and
    its chunks among all chunks; and the cell of each chunk, K * B where there is none."""

    order: Tensor
    pairs: Tensor
    chunks: Tensor
    cell: Tensor


class Outer(NamedTuple):
    """By row of a query and head: the gradient of the mixed output [E], gates [3], their gradients [3], log-sum-exp."""

    grad: Tensor
    gates: Tensor
    grad_gates: Tensor
    lse: Tensor


class Two(NamedTuple):
    """Partial results: outputs and their log-sum-exp, or gradients of keys and of values."""

    one: Tensor
    other: Tensor


class Parts(NamedTuple):
    """Partial gradients."""

    query: Tensor
    key: Tensor
    value: Tensor


class Branches(NamedTuple):
    """The outputs of the three branches [T, H, E]."""

    compressed: Tensor
    selected: Tensor
    sliding: Tensor


@triton.jit
def _rows(first, end, c: tl.constexpr):
    """The query and head of each row of a tile whose first query is `first`, and which of them are real."""
    row = tl.arange(0, c.ROWS)
    place, group = first + row // c.GP, row % c.GP
    return place, group, (place < end) & (group < c.G)


@triton.jit
def _queries(heads, seen, stop, c: tl.constexpr):
    """The queries of this program's tile, the long ones first: their places, heads in the group, which are real, their
    rows, themselves [ROWS, DP], and the compressed keys that each sees (from where to before where)."""
    first_query = (tl.num_programs(0) - 1 - tl.program_id(0)) * (c.ROWS // c.GP)
    place, group, real = _rows(first_query, stop, c)
    row = place * (c.K * c.G) + tl.program_id(1) * c.G + group
    query = _load(heads.query, row, real, c.D, c.DP)
    first = tl.load(seen.first + place, mask=place < stop, other=FAR)
    end = tl.load(seen.end + place, mask=place < stop, other=0)
    return place, group, real, row, query, first, end


@triton.jit
def _load(pointer, rows, real, width: tl.constexpr, padded: tl.constexpr):
    """[rows, padded], 0 where there is nothing."""
    columns = tl.arange(0, padded)
    offsets = rows.to(tl.int64)[:, None] * width + columns[None, :]
    return tl.load(pointer + offsets, mask=real[:, None] & (columns < width)[None, :], other=0.0)


@triton.jit
def _store(pointer, rows, real, tile, width: tl.constexpr, padded: tl.constexpr):
    columns = tl.arange(0, padded)
    offsets = rows.to(tl.int64)[:, None] * width + columns[None, :]
    tl.store(pointer + offsets, tile.to(pointer.dtype.element_ty), mask=real[:, None] & (columns < width)[None, :])


@triton.jit
def _scores(left, right, seen, c: tl.constexpr):
    """Scores to the base of two of queries and keys, or of keys and queries, -inf where a key is not seen."""
    made = tl.dot(left, tl.trans(right), input_precision="ieee") * (c.SCALE * LOG2_E)
    return tl.where(seen, made, -float("inf"))


@triton.jit
def _outer(outer, row, real, branch: tl.constexpr):
    """Of a branch, by row: its log-sum-exp, gate, and the gradient of that."""
    lse = tl.load(outer.lse + row, mask=real, other=float("inf"))
    gate = tl.load(outer.gates + row * 3 + branch, mask=real, other=0.0).to(tl.float32)
    return lse, gate, tl.load(outer.grad_gates + row * 3 + branch, mask=real, other=0.0)


@triton.jit
def _backward(left, right, seen, scalars, axis: tl.constexpr, c: tl.constexpr):
    """The probabilities times the gate, and the gradients of scores, both in the inputs' type.

    left, right: queries and gradients of the output, and keys and values, for results [rows, keys] with axis 1; or the
    other way round for [keys, rows] with axis 0, whose products with queries need no transposing.

    The gradient of a branch's output is the gate times that of the mixed one, and its product with the output, which
    the gradient of softmax takes off, is the gate times that of the gate.
    """
    lse, gate, grad_gate = scalars
    gate = tl.expand_dims(gate, axis)
    weights = tl.exp2(_scores(left[0], right[0], seen, c) - tl.expand_dims(lse, axis)) * gate
    change = tl.dot(left[1], tl.trans(right[1]), input_precision="ieee") - tl.expand_dims(grad_gate, axis)
    return weights.to(left[0].dtype), (weights * change).to(left[0].dtype)


@triton.jit(do_not_specialize=["stop"])
def compressed_forward(heads, seen, out, lse, stop, c: tl.constexpr):
    """Attention to compressed keys [M, K, D]: out [T, H, E] and lse [T, H], inf for queries that see none."""
    head = tl.program_id(1)
    _, _, real, row, query, first, end = _queries(heads, seen, stop, c)
    top = tl.full([c.ROWS], -float("inf"), tl.float32)
    total = tl.full([c.ROWS], 0.0, tl.float32)
    mixed = tl.full([c.ROWS, c.EP], 0.0, tl.float32)
    last = tl.max(end, 0)
    for start in range(tl.min(first, 0), last, c.KEYS):
        keys = start + tl.arange(0, c.KEYS)
        key = _load(heads.key, keys * c.K + head, keys < last, c.D, c.DP)
        value = _load(heads.value, keys * c.K + head, keys < last, c.E, c.EP)
        shown = (keys[None, :] >= first[:, None]) & (keys[None, :] < end[:, None])
        scores = _scores(query, key, shown, c)
        higher = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(higher == -float("inf"), 0.0, higher)
        weights = tl.exp2(scores - base[:, None])
        shrunk = tl.exp2(top - base)
        total = total * shrunk + tl.sum(weights, 1)
        mixed = mixed * shrunk[:, None]
        mixed += tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        top = higher
    none = total == 0.0
    mixed = mixed / tl.where(none, 1.0, total)[:, None]
    _store(out, row, real, mixed, c.E, c.EP)
    tl.store(lse + row, tl.where(none, float("inf"), top + tl.log2(tl.where(none, 1.0, total))), mask=real)


@triton.jit(do_not_specialize=["stop"])
def block_scores(heads, seen, blocks, lse, scores, stop, c: tl.constexpr):
    """The scores [T, K, WIDTH] of the blocks of a query's sample up to its own: the probabilities of compressed keys
    times the strides that they share with the block, over all heads of a group; inf for the blocks that are always
    selected."""
    head = tl.program_id(1)
    first_query = (tl.num_programs(0) - 1 - tl.program_id(0)) * (c.ROWS // c.GP)
    _, _, real, row, query, first, end = _queries(heads, seen, stop, c)
    sums = tl.load(lse + row, mask=real, other=float("inf"))
    some = first_query + tl.arange(0, c.ROWS // c.GP)
    first_block = tl.load(blocks.first + some, mask=some < stop, other=FAR)
    own = tl.load(blocks.own + some, mask=some < stop, other=-1)
    last, last_key = tl.max(own, 0) + 1, tl.max(end, 0)
    for start in range(tl.min(first_block, 0), last, c.KEYS):
        block = start + tl.arange(0, c.KEYS)
        base = tl.load(blocks.compressed + block, mask=block < last, other=-FAR)
        added = tl.full([c.ROWS, c.KEYS], 0.0, tl.float32)
        for number in tl.static_range(c.WITHIN - 1 + c.PER_BLOCK):
            keys = base + (number - c.WITHIN + 1)
            shown = (keys[None, :] >= first[:, None]) & (keys[None, :] < end[:, None])
            key = _load(heads.key, keys * c.K + head, (keys >= 0) & (keys < last_key), c.D, c.DP)
            weights = tl.exp2(_scores(query, key, shown, c) - sums[:, None])
            added += weights * (min(number + 1, c.PER_BLOCK) - max(number + 1 - c.WITHIN, 0))
        found = tl.sum(tl.reshape(added, [c.ROWS // c.GP, c.GP, c.KEYS]), 1)
        column, before = block[None, :] - first_block[:, None], own[:, None] - block[None, :]
        found = tl.where((column == 0) | (before == 0) | (before == 1), float("inf"), found)
        rows = (some * c.K + head).to(tl.int64) * c.WIDTH
        to_see = (column >= 0) & (before >= 0) & (some < stop)[:, None]
        tl.store(scores + rows[:, None] + column, found, mask=to_see)


@triton.jit
def choose_blocks(scores, first_block, chosen, c: tl.constexpr):
    """The S blocks of the highest scores [WIDTH], the first of equal ones: chosen [T, K, S], -1 for none."""
    row = tl.program_id(0)
    block = tl.arange(0, c.WIDTH)
    left = tl.load(scores + row.to(tl.int64) * c.WIDTH + block)
    first = tl.load(first_block + row // c.K)
    for slot in range(c.S):
        best, place = tl.max(left, 0), tl.argmax(left, 0)
        tl.store(chosen + row * c.S + slot, tl.where(best == -float("inf"), -1, first + place))
        left = tl.where(block == place, -float("inf"), left)


@triton.jit
def _chunk(index, num_blocks, c: tl.constexpr):
    """The key/value head and block of this program's chunk, and from which to before which pair it goes."""
    number = tl.program_id(0)
    cell = tl.load(index.cell + number)
    head, block = cell // num_blocks, cell % num_blocks
    first, stop = head, head  # an empty span
    if head < c.K:
        first = tl.load(index.pairs + cell) + (number - tl.load(index.chunks + cell)) * c.CHUNK
        stop = tl.minimum(first + c.CHUNK, tl.load(index.pairs + cell + 1))
    return head, block, first, stop


@triton.jit
def _pairs(order, start, stop, head, c: tl.constexpr):
    """The rows of a tile of pairs: their queries, rows in query [T, H, D], rows in partial results, which are real."""
    row = tl.arange(0, c.ROWS)
    slot, group = start + row // c.GP, row % c.GP
    pair = tl.load(order + slot, mask=slot < stop, other=0)
    place = pair // (c.K * c.S)
    return place, place * (c.K * c.G) + head * c.G + group, pair * c.G + group, (slot < stop) & (group < c.G)


@triton.jit(do_not_specialize=["begin", "num_blocks"])
def selected_forward(heads, tokens, index, parts, begin, num_blocks, c: tl.constexpr):
    """Attention of a chunk of pairs to their block: outputs [pairs, G, E] and log-sum-exp [pairs, G]. begin: the place
    among the keys of the first of the queries."""
    head, block, first, stop = _chunk(index, num_blocks, c)
    if first < stop:
        keys = tl.load(tokens.first + block) + tl.arange(0, c.KEYS)
        last = tl.load(tokens.end + block)
        key = _load(heads.key, keys * c.K + head, keys < last, c.D, c.DP)
        value = _load(heads.value, keys * c.K + head, keys < last, c.E, c.EP)
        for start in range(first, stop, c.ROWS // c.GP):
            place, row, into, real = _pairs(index.order, start, stop, head, c)
            query = _load(heads.query, row, real, c.D, c.DP)
            shown = (keys < last)[None, :] & (keys[None, :] <= (begin + place)[:, None])
            scores = _scores(query, key, shown, c)
            top = tl.where(real, tl.max(scores, 1), 0.0)
            weights = tl.exp2(scores - top[:, None])
            total = tl.where(real, tl.sum(weights, 1), 1.0)
            mixed = tl.dot(weights.to(value.dtype), value, input_precision="ieee") / total[:, None]
            _store(parts.one, into, real, mixed, c.E, c.EP)
            tl.store(parts.other + into, top + tl.log2(total), mask=real)


@triton.jit(do_not_specialize=["stop"])
def mix_branches(parts, chosen, branches, gates, out, lse, stop, c: tl.constexpr):
    """Put the partial results of a query's slots together to branches.selected and its log-sum-exp [T, H], and add up
    the branches by their gates [T, H, 3] to out."""
    head = tl.program_id(1)
    place, group, real = _rows(tl.program_id(0) * (c.ROWS // c.GP), stop, c)
    pair = (place * c.K + head) * c.S
    slots = tl.arange(0, c.SP)[None, :]
    picked = real[:, None] & (slots < c.S)
    picked &= tl.load(chosen + pair[:, None] + slots, mask=picked, other=-1) >= 0
    at = (pair[:, None] + slots) * c.G + group[:, None]
    sums = tl.load(parts.other + at, mask=picked, other=-float("inf"))
    top = tl.where(real, tl.max(sums, 1), 0.0)
    whole = top + tl.log2(tl.where(real, tl.sum(tl.exp2(sums - top[:, None]), 1), 1.0))
    selected = tl.full([c.ROWS, c.EP], 0.0, tl.float32)
    for slot in range(c.S):
        used = real & (tl.load(chosen + pair + slot, mask=real, other=-1) >= 0)
        share = tl.exp2(tl.load(parts.other + (pair + slot) * c.G + group, mask=used, other=-float("inf")) - whole)
        selected += share[:, None] * _load(parts.one, (pair + slot) * c.G + group, used, c.E, c.EP)
    row = place * (c.K * c.G) + head * c.G + group
    tl.store(lse + row, whole, mask=real)
    _store(branches.selected, row, real, selected, c.E, c.EP)
    mixed = selected * tl.load(gates + row * 3 + 1, mask=real, other=0.0).to(tl.float32)[:, None]
    compressed = _load(branches.compressed, row, real, c.E, c.EP).to(tl.float32)
    mixed += compressed * tl.load(gates + row * 3, mask=real, other=0.0).to(tl.float32)[:, None]
    sliding = _load(branches.sliding, row, real, c.E, c.EP).to(tl.float32)
    mixed += sliding * tl.load(gates + row * 3 + 2, mask=real, other=0.0).to(tl.float32)[:, None]
    _store(out, row, real, mixed, c.E, c.EP)


@triton.jit(do_not_specialize=["stop"])
def mix_backward(grad, branches, gates, grad_gates, grad_sliding, stop, c: tl.constexpr):
    """From the gradient of the mixed output [rows, E] those of the gates [rows, 3] and of the sliding branch."""
    row = tl.program_id(0) * c.ROWS + tl.arange(0, c.ROWS)
    real = row < stop
    coming = _load(grad, row, real, c.E, c.EP).to(tl.float32)
    compressed = tl.sum(coming * _load(branches.compressed, row, real, c.E, c.EP), 1)
    tl.store(grad_gates + row * 3, compressed, mask=real)
    selected = tl.sum(coming * _load(branches.selected, row, real, c.E, c.EP), 1)
    tl.store(grad_gates + row * 3 + 1, selected, mask=real)
    sliding = tl.sum(coming * _load(branches.sliding, row, real, c.E, c.EP), 1)
    tl.store(grad_gates + row * 3 + 2, sliding, mask=real)
    gate = tl.load(gates + row * 3 + 2, mask=real, other=0.0).to(tl.float32)
    _store(grad_sliding, row, real, coming * gate[:, None], c.E, c.EP)


@triton.jit(do_not_specialize=["begin", "num_blocks"])
def selected_backward(heads, tokens, index, outer, parts, begin, num_blocks, c: tl.constexpr):
    """Of a chunk of pairs: the gradients of queries [pairs, G, D], and of the block's keys and values [chunks, KEYS,
    D or E]; parts is these three."""
    head, block, first, stop = _chunk(index, num_blocks, c)
    if first < stop:
        keys = tl.load(tokens.first + block) + tl.arange(0, c.KEYS)
        last = tl.load(tokens.end + block)
        key = _load(heads.key, keys * c.K + head, keys < last, c.D, c.DP)
        value = _load(heads.value, keys * c.K + head, keys < last, c.E, c.EP)
        grad_key = tl.full([c.KEYS, c.DP], 0.0, tl.float32)
        grad_value = tl.full([c.KEYS, c.EP], 0.0, tl.float32)
        for start in range(first, stop, c.ROWS // c.GP):
            place, row, into, real = _pairs(index.order, start, stop, head, c)
            query = _load(heads.query, row, real, c.D, c.DP)
            grad = _load(outer.grad, row, real, c.E, c.EP)
            scalars = _outer(outer, row, real, 1)
            shown = (keys < last)[:, None] & (keys[:, None] <= (begin + place)[None, :])
            weights, change = _backward((key, value), (query, grad), shown, scalars, 0, c)
            grad_value += tl.dot(weights, grad, input_precision="ieee")
            grad_key += tl.dot(change, query, input_precision="ieee")
            grad_query = tl.dot(tl.trans(change), key, input_precision="ieee")
            _store(parts.query, into, real, grad_query, c.D, c.DP)
        rows, all_keys = tl.program_id(0) * c.KEYS + tl.arange(0, c.KEYS), tl.arange(0, c.KEYS) >= 0
        _store(parts.key, rows, all_keys, grad_key * c.SCALE, c.D, c.DP)
        _store(parts.value, rows, all_keys, grad_value, c.E, c.EP)


@triton.jit(do_not_specialize=["num_blocks"])
def add_chunks(parts, tokens, chunks, sums, num_blocks, c: tl.constexpr):
    """The gradients of a block's keys and values, sums [T, K, D or E]: of all its chunks, and what is there if ADDS."""
    cell = tl.program_id(0)
    head, block = cell // num_blocks, cell % num_blocks
    number = tl.arange(0, c.KEYS)
    keys = tl.load(tokens.first + block) + number
    real = keys < tl.load(tokens.end + block)
    grad_key = tl.full([c.KEYS, c.DP], 0.0, tl.float32)
    grad_value = tl.full([c.KEYS, c.EP], 0.0, tl.float32)
    if c.ADDS:
        grad_key += _load(sums.one, keys * c.K + head, real, c.D, c.DP)
        grad_value += _load(sums.other, keys * c.K + head, real, c.E, c.EP)
    for chunk in range(tl.load(chunks + cell), tl.load(chunks + cell + 1)):
        grad_key += _load(parts.key, chunk * c.KEYS + number, real, c.D, c.DP)
        grad_value += _load(parts.value, chunk * c.KEYS + number, real, c.E, c.EP)
    _store(sums.one, keys * c.K + head, real, grad_key, c.D, c.DP)
    _store(sums.other, keys * c.K + head, real, grad_value, c.E, c.EP)


@triton.jit(do_not_specialize=["stop"])
def query_backward(heads, seen, outer, part, chosen, grad_query, stop, c: tl.constexpr):
    """The gradient of queries: what compressed keys give, and the parts [pairs, G, D] of the selected branch."""
    head = tl.program_id(1)
    place, group, real, row, query, first, end = _queries(heads, seen, stop, c)
    grad = _load(outer.grad, row, real, c.E, c.EP)
    scalars = _outer(outer, row, real, 0)
    added = tl.full([c.ROWS, c.DP], 0.0, tl.float32)
    last = tl.max(end, 0)
    for start in range(tl.min(first, 0), last, c.KEYS):
        keys = start + tl.arange(0, c.KEYS)
        key = _load(heads.key, keys * c.K + head, keys < last, c.D, c.DP)
        value = _load(heads.value, keys * c.K + head, keys < last, c.E, c.EP)
        shown = (keys[None, :] >= first[:, None]) & (keys[None, :] < end[:, None])
        _, change = _backward((query, grad), (key, value), shown, scalars, 1, c)
        added += tl.dot(change, key, input_precision="ieee")
    pair = (place * c.K + head) * c.S
    for slot in range(c.S):
        used = real & (tl.load(chosen + pair + slot, mask=real, other=-1) >= 0)
        added += _load(part, (pair + slot) * c.G + group, used, c.D, c.DP)
    _store(grad_query, row, real, added * c.SCALE, c.D, c.DP)


@triton.jit(do_not_specialize=["count", "span"])
def compressed_backward(heads, seers, outer, parts, count, span, c: tl.constexpr):
    """The gradients of `count` compressed keys and values from each span of queries, so many long: parts [spans, M, K,
    D or E]."""
    keys = tl.program_id(0) * c.KEYS + tl.arange(0, c.KEYS)
    number, head = tl.program_id(1), tl.program_id(2)
    key = _load(heads.key, keys * c.K + head, keys < count, c.D, c.DP)
    value = _load(heads.value, keys * c.K + head, keys < count, c.E, c.EP)
    first = tl.load(seers.first + keys, mask=keys < count, other=FAR)
    end = tl.load(seers.end + keys, mask=keys < count, other=0)
    grad_key = tl.full([c.KEYS, c.DP], 0.0, tl.float32)
    grad_value = tl.full([c.KEYS, c.EP], 0.0, tl.float32)
    stop = tl.minimum(tl.max(end, 0), (number + 1) * span)
    for start in range(tl.maximum(tl.min(first, 0), number * span), stop, c.ROWS // c.GP):
        place, group, real = _rows(start, stop, c)
        row = place * (c.K * c.G) + head * c.G + group
        query = _load(heads.query, row, real, c.D, c.DP)
        grad = _load(outer.grad, row, real, c.E, c.EP)
        shown = (place[None, :] >= first[:, None]) & (place[None, :] < end[:, None])
        scalars = _outer(outer, row, real, 0)
        weights, change = _backward((key, value), (query, grad), shown, scalars, 0, c)
        grad_value += tl.dot(weights, grad, input_precision="ieee")
        grad_key += tl.dot(change, query, input_precision="ieee")
    rows = (number * count + keys) * c.K + head
    _store(parts.one, rows, keys < count, grad_key * c.SCALE, c.D, c.DP)
    _store(parts.other, rows, keys < count, grad_value, c.E, c.EP)
