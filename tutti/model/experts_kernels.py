"""Triton kernels for layers of experts on CUDA: sort tokens by expert, copy their rows there, and sum them back.

With torch's operators each of these steps is many launches (a sort of 64-bit keys, a gather per choice, casts and sums
through memory), and counting the tokens per expert makes the host wait. Here a layer needs five launches besides its
products:

1. `sort` is a counting sort. Each tile of the choices counts its experts (`_count_tile`). A running sum over experts,
   and over the tiles within each, says where each tile's choices of each expert begin. `_place_tile` writes them there.
2. `spread` reads each token's row once and writes it to the places of its k choices.
3. `sum_choices` reads the k rows of each token and writes their (weighted) sum, which is in fp32.

`combine_backward` makes the gradients of the rows and of the weights in one launch. No kernel uses atomic operations,
so every run gives the same result, and a token's result does not depend on the others. Each function equals the plain
form in `tutti.model.experts`, which runs everywhere else. This module is imported if there is CUDA and Triton; tests
also run it in Triton's interpreter on a CPU.

Shapes: N tokens, H hidden size, E experts, k experts per token, S = N * k pairs of a token and an expert it chose.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE_ELEMENTS = 16_384
"""The size of a tile's table [choices, experts]: 64 elements for each of 256 threads."""


def sort(chosen: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sort the pairs by expert, and those of one expert by token. chosen: [N, k], numbers from 0 to E - 1.

    Returns the sorted experts [S], the pair at each place [S] and the place of each pair [S], all int32, and the number
    of pairs per expert, int64 [E].
    """
    num_pairs, columns = chosen.numel(), triton.next_power_of_2(num_experts)
    tile = max(16, _TILE_ELEMENTS // columns)
    num_tiles = triton.cdiv(num_pairs, tile)
    chosen = chosen.contiguous()
    of_tiles = chosen.new_empty(columns, num_tiles, dtype=torch.int32)
    placed = chosen.new_empty(3, num_pairs, dtype=torch.int32)
    counts = (chosen.new_empty if num_pairs else chosen.new_zeros)(columns, dtype=torch.int64)
    if num_pairs:
        sizes = {"COLUMNS": columns, "TILE": tile, "num_warps": 8}
        _count_tile[(num_tiles,)](chosen, of_tiles, num_pairs, num_tiles, **sizes)
        ends = of_tiles.flatten().cumsum(0, dtype=torch.int32)
        _place_tile[(num_tiles,)](chosen, ends, placed, counts, num_pairs, num_tiles, **sizes)
    experts, order, places = placed.unbind(0)
    return experts, order, places, counts[:num_experts]


def spread(hidden: Tensor, places: Tensor) -> Tensor:
    """Copy each token's row of `hidden` [N, H] to its `places` [N, k] -> [S, H]."""
    rows = hidden.new_empty(places.numel(), hidden.shape[1])
    if len(hidden):
        _spread_token[(len(hidden),)](hidden.contiguous(), places, rows, **_sizes(hidden, places))
    return rows


def sum_choices(rows: Tensor, places: Tensor, weights: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Sum each token's `rows` [S, H], at `places` [N, k], with `weights` [N, k] if given: [N, H] of `dtype`."""
    sums = rows.new_empty(len(places), rows.shape[1], dtype=dtype)
    given = None if weights is None else weights.contiguous()
    if len(places):
        _sum_token[(len(places),)](rows.contiguous(), places, given, sums, **_sizes(rows, places))
    return sums


def combine_backward(
    grad: Tensor, rows: Tensor, places: Tensor, weights: Tensor, needed: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of `rows` [S, H] and `weights` [N, k] of `sum_choices` (None if not `needed`), given the gradient
    of the sums [N, H]."""
    grad_rows = torch.empty_like(rows, memory_format=torch.contiguous_format) if needed[0] else None
    grad_weights = torch.empty_like(weights, memory_format=torch.contiguous_format) if needed[1] else None
    given = (grad.contiguous(), rows.contiguous(), places, weights.contiguous())
    if len(places):
        _combine_token_backward[(len(places),)](*given, grad_rows, grad_weights, **_sizes(rows, places))
    return grad_rows, grad_weights


def _sizes(rows: Tensor, places: Tensor) -> dict[str, Any]:
    """The constants of kernels that run once per token. Each thread takes 8 numbers of a row or more."""
    num_warps = min(max(triton.next_power_of_2(rows.shape[1]) // 256, 1), 16)
    return {"HIDDEN": rows.shape[1], "CHOICES": places.shape[1], "num_warps": num_warps}


@triton.jit
def _choices_of_tile(chosen, tile, num_pairs, COLUMNS: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The tile's pairs [TILE], their experts, a mask of those below `num_pairs`, and a one at each [pair, expert]."""
    pairs = tile * TILE + tl.arange(0, TILE)
    is_pair = pairs < num_pairs
    experts = tl.load(chosen + pairs, mask=is_pair, other=0).to(tl.int32)
    is_chosen = (experts[:, None] == tl.arange(0, COLUMNS)[None, :]) & is_pair[:, None]
    return pairs, experts, is_pair, is_chosen.to(tl.int32)


@triton.jit(do_not_specialize=["num_pairs", "num_tiles"])
def _count_tile(chosen, counts, num_pairs, num_tiles, COLUMNS: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write the number of the tile's pairs per expert to counts [COLUMNS, tiles]."""
    tile = tl.program_id(0)
    _, _, _, ones = _choices_of_tile(chosen, tile, num_pairs, COLUMNS, TILE)
    tl.store(counts + tl.arange(0, COLUMNS) * num_tiles + tile, tl.sum(ones, axis=0))


@triton.jit(do_not_specialize=["num_pairs", "num_tiles"])
def _place_tile(  # type: ignore[no-untyped-def]
    chosen, ends, placed, counts, num_pairs, num_tiles, COLUMNS: tl.constexpr, TILE: tl.constexpr
):
    """Write the tile's part of placed [3, S]: experts and pairs by place, and places by pair. ends [COLUMNS, tiles]:
    the place after a tile's last pair of each expert. counts [COLUMNS]: for the number of pairs per expert."""
    tile = tl.program_id(0)
    pairs, experts, is_pair, ones = _choices_of_tile(chosen, tile, num_pairs, COLUMNS, TILE)
    columns = tl.arange(0, COLUMNS)
    begins = tl.load(ends + columns * num_tiles + tile) - tl.sum(ones, axis=0)
    place = tl.sum(ones * (begins[None, :] + tl.cumsum(ones, axis=0) - 1), axis=1)
    tl.store(placed + place, experts, mask=is_pair)
    tl.store(placed + num_pairs + place, pairs, mask=is_pair)
    tl.store(placed + 2 * num_pairs + pairs, place, mask=is_pair)
    if tile == 0:
        last = columns * num_tiles + num_tiles - 1
        begin = tl.load(ends + last - num_tiles, mask=columns > 0, other=0)
        tl.store(counts + columns, (tl.load(ends + last) - begin).to(tl.int64))


@triton.jit(do_not_specialize_on_alignment=["places"])
def _spread_token(  # type: ignore[no-untyped-def]
    hidden, places, rows, HIDDEN: tl.constexpr, CHOICES: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, triton.next_power_of_2(HIDDEN))
    inside = columns < HIDDEN
    row = tl.load(hidden + token * HIDDEN + columns, mask=inside)
    for choice in tl.static_range(CHOICES):
        place = tl.load(places + token * CHOICES + choice).to(tl.int64)
        tl.store(rows + place * HIDDEN + columns, row, mask=inside)


@triton.jit(do_not_specialize_on_alignment=["places"])
def _sum_token(  # type: ignore[no-untyped-def]
    rows, places, weights, sums, HIDDEN: tl.constexpr, CHOICES: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, triton.next_power_of_2(HIDDEN))
    inside = columns < HIDDEN
    total = tl.zeros([triton.next_power_of_2(HIDDEN)], dtype=tl.float32)
    for choice in tl.static_range(CHOICES):
        place = tl.load(places + token * CHOICES + choice).to(tl.int64)
        row = tl.load(rows + place * HIDDEN + columns, mask=inside, other=0.0).to(tl.float32)
        if weights is not None:
            row *= tl.load(weights + token * CHOICES + choice).to(tl.float32)
        total += row
    tl.store(sums + token * HIDDEN + columns, total, mask=inside)


@triton.jit(do_not_specialize_on_alignment=["places"])
def _combine_token_backward(  # type: ignore[no-untyped-def]
    grad,
    rows,
    places,
    weights,
    grad_rows,
    grad_weights,
    HIDDEN: tl.constexpr,
    CHOICES: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, triton.next_power_of_2(HIDDEN))
    inside = columns < HIDDEN
    of_sum = tl.load(grad + token * HIDDEN + columns, mask=inside, other=0.0).to(tl.float32)
    # Two loops, because the compiler does not move a load before a store.
    if grad_weights is not None:
        for choice in tl.static_range(CHOICES):
            pair = token * CHOICES + choice
            place = tl.load(places + pair).to(tl.int64)
            row = tl.load(rows + place * HIDDEN + columns, mask=inside, other=0.0).to(tl.float32)
            tl.store(grad_weights + pair, tl.sum(row * of_sum))
    if grad_rows is not None:
        for choice in tl.static_range(CHOICES):
            pair = token * CHOICES + choice
            place = tl.load(places + pair).to(tl.int64)
            weight = tl.load(weights + pair).to(tl.float32)
            tl.store(grad_rows + place * HIDDEN + columns, of_sum * weight, mask=inside)
