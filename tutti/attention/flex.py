"""Attention with soft-capped scores over a packed batch on CUDA, with torch's FlexAttention (Gemma 2).

torch's variable-length kernel does not support soft-capping. FlexAttention compiles a kernel from two functions, one
for the score and one for which keys a query sees (Dong et al., arXiv 2412.05496), and skips blocks in which nothing is
seen. It is tried on a few tokens before it is used: if it cannot be compiled, or its results differ from those of tiles
of matrix products (`tutti.attention.packed_cpu`), the latter are used, with a log line.

Numbers are passed to the functions as tensors, and rows are padded to whole blocks, so that one kernel serves all
batches.

Shapes: T tokens, H query heads, K key/value heads, D head dimension, E value dimension.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad
from torch.utils.weak import WeakIdKeyDictionary

from tutti.attention.packed_cpu import packed_attention
from tutti.attention.spec import AttentionSpec
from tutti.core.compat import FakeTensor

log = logging.getLogger(__name__)

BLOCK = 128
"""Block size, in queries and in keys."""

_EVERYTHING = 2**30
"""A window that is larger than any sample."""

_TOLERANCE = 0.02
"""Tolerated relative difference (by the norm) from tiles in fp32; rounding in half precision makes about 0.005."""


def takes(query: Tensor) -> bool:
    """True if the kernel may be compiled: on CUDA, in half precision."""
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and not isinstance(query, FakeTensor)


@torch.compiler.disable  # compiles its own kernel
def capped_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, borders: Tensor, spec: AttentionSpec
) -> Tensor:
    """Attention within each of the samples that `cu_seqlens` [S + 1] borders, with spec.softcap.

    query [H, T, D], key [K, T, D], value [K, T, E] -> [T, H, E]. borders: cu_seqlens on the host.
    """
    if not _works(query.device, query.dtype, len(query), len(key), query.shape[-1], value.shape[-1], spec):
        return packed_attention(query, key, value, borders, spec)
    return _attend(query, key, value, cu_seqlens, spec)


def _attend(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, spec: AttentionSpec) -> Tensor:
    length = query.shape[1]
    rows = (pad(item, (0, 0, 0, -length % BLOCK))[None] for item in (query, key, value))
    cap = torch.full((), spec.softcap, device=query.device)
    out: Tensor = _kernel()(*rows, cap, spec.scale, _mask(cu_seqlens, length + -length % BLOCK, spec))
    return out[0, :, :length].transpose(0, 1)


@cache
def _kernel() -> Callable[..., Any]:
    return torch.compile(_capped)


def _capped(query: Tensor, key: Tensor, value: Tensor, cap: Tensor, scale: float, mask: BlockMask) -> Any:
    """FlexAttention over rows [1, heads, T, width]."""

    def score(score: Tensor, batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return flex_attention(query, key, value, score, mask, scale, enable_gqa=query.shape[1] != key.shape[1])


_masks: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Masks by a batch's borders, which all layers get, and by rule."""


def _mask(cu_seqlens: Tensor, length: int, spec: AttentionSpec) -> BlockMask:
    known = _masks.setdefault(cu_seqlens, {})
    rule = (length, spec.causal, spec.window)
    if rule not in known:
        known[rule] = packed_block_mask(cu_seqlens, length, spec)
    return known[rule]


def packed_block_mask(cu_seqlens: Tensor, length: int, spec: AttentionSpec) -> BlockMask:
    """The mask for a row of `length` tokens (a multiple of `BLOCK`), which follows `spec` within the samples that
    `cu_seqlens` borders, and within the padding after the last one. It is made without waiting for the device."""
    places = torch.arange(length, dtype=torch.int32, device=cu_seqlens.device)
    sample = torch.bucketize(places, cu_seqlens[1:], right=True, out_int32=True)
    window = spec.window or _EVERYTHING
    behind = places.new_full((), window - 1)
    ahead = places.new_full((), 0 if spec.causal else window - 1)

    def seen(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return (sample[row] == sample[column]) & (row - column <= behind) & (column - row <= ahead)

    first, last = sample[::BLOCK], sample[BLOCK - 1 :: BLOCK]
    begin, end = places[::BLOCK], places[BLOCK - 1 :: BLOCK]
    rows = [item[:, None] for item in (first, last, begin, end)]
    some = (rows[0] <= last) & (first <= rows[1]) & (rows[2] - end <= behind) & (begin - rows[3] <= ahead)
    every = (rows[0] == last) & (first == rows[1]) & (rows[3] - begin <= behind) & (end - rows[2] <= ahead)
    lists = (*_listed(some & ~every), *_listed(every))
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=BLOCK, mask_mod=seen, seq_lengths=(length, length))


def _listed(grid: Tensor) -> tuple[Tensor, Tensor]:
    """The number of key blocks of each query block [1, 1, n], and their indices followed by all others [1, 1, n, n],
    from bool [n, n]."""
    order = grid.int().argsort(dim=-1, descending=True, stable=True).int()
    return grid.sum(-1, dtype=torch.int32)[None, None], order[None, None]


@cache
def _works(
    device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, width: int, values: int, spec: AttentionSpec
) -> bool:
    """True if the kernel's results equal those of tiles for such tensors. The trial runs in a thread, so that no
    context of the caller (checkpointing, offloading) sees its tensors."""
    try:
        with ThreadPoolExecutor(1) as thread:
            difference = thread.submit(_trial, device, dtype, (heads, kv_heads, width, values), spec).result()
    except Exception as error:  # compilers fail in many ways
        log.warning("FlexAttention cannot be used here (%s): soft-capped attention goes by tiles, slower", error)
        return False
    if difference > _TOLERANCE:
        log.warning("FlexAttention gives other values here: soft-capped attention goes by tiles, slower")
    return difference <= _TOLERANCE


def _trial(device: torch.device, dtype: torch.dtype, sizes: tuple[int, int, int, int], spec: AttentionSpec) -> float:
    """The largest relative difference (by the norm) of outputs and gradients from those of tiles in fp32. Two
    lengths are tried, so that the compiler learns that lengths vary."""
    heads, kv_heads, width, values = sizes
    worst = 0.0
    with torch.accelerator.device_index(device.index):
        draws = torch.Generator(device).manual_seed(0)
        for length in (3 * BLOCK - 10, 5 * BLOCK):
            shapes = ((heads, length, width), (kv_heads, length, width), (kv_heads, length, values))
            drawn = [torch.randn(shape, generator=draws, device=device, dtype=dtype) for shape in shapes]
            borders = torch.tensor([0, 1, BLOCK + 7, 2 * BLOCK, length], dtype=torch.int32)
            ours = _out_and_gradients(_attend, drawn, borders.to(device), spec)
            theirs = _out_and_gradients(packed_attention, [item.float() for item in drawn], borders, spec)
            for one, other in zip(ours, theirs, strict=True):
                worst = max(worst, float((one.float() - other).norm() / other.norm()))
    return worst


def _out_and_gradients(
    attend: Callable[..., Tensor], rows: list[Tensor], borders: Tensor, spec: AttentionSpec
) -> list[Tensor]:
    inputs = [item.clone().requires_grad_() for item in rows]
    out = attend(*inputs, borders, spec)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), inputs)]
