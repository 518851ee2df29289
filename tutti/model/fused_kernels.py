"""Triton kernels of what lies between a model's matrix products: RMS norms, gated activations, rotary embeddings.

Written out in torch each of these is a chain of small kernels (casts, squares, means, products), which read and write a
whole activation each, and of which autograd keeps several. Here each is one kernel a pass, bound by one read of its
inputs and one write of its outputs. They round where transformers' modules round, so that both give equal values but
for the order of a norm's sums. No kernel adds into memory that another program adds to: results are the same each time,
and a row's result is the same whatever other rows there are.

Only imported where there is Triton; `tutti.model.fused` calls the functions and has their gradients.

Shapes: R rows, N their width; T tokens, H heads, D head dimension.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_kernel = partial(triton.jit, do_not_specialize=["num_rows"])
"""A kernel that is compiled once for any number of rows: packed batches differ in it from one to the next."""


class Tile(NamedTuple):
    """The part of a matrix that one program works on at a time, and the warps that do."""

    rows: int
    cols: int
    warps: int = 4


class NormForm(NamedTuple):
    """A kind of norm, for which its kernels are compiled. offset: added to the weight. is_rounded: the normalised row
    is, to its dtype, before it is multiplied with the weight. with_weight: the backward pass gives the weight's
    gradient."""

    width: int
    tile: Tile
    offset: int
    is_rounded: bool
    with_weight: bool = True


@lru_cache
def norm_tile(width: int) -> Tile:
    """The tile of a norm's forward pass over rows of this width."""
    cols = triton.next_power_of_2(width)
    return Tile(max(1, 4096 // cols), cols, min(max(4, cols // 1024), 16))


@lru_cache
def norm_backward_tile(width: int) -> Tile:
    """The tile of a norm's backward pass, which holds more of each row."""
    cols = triton.next_power_of_2(width)
    return Tile(max(1, 4096 // cols), cols, min(max(4, cols // 512), 16))


PROGRAMS = 4
"""Programs of a norm's backward pass for each multiprocessor: each sums the weight's gradient of its rows."""


@lru_cache
def _num_programs(device: torch.device) -> int:
    if device.type != "cuda":
        return PROGRAMS
    return PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count


@_kernel
def _norm_kernel(x, weight, out, rstd, num_rows, eps, form: tl.constexpr):  # type: ignore[no-untyped-def]
    width: tl.constexpr = form.width
    rows: tl.constexpr = form.tile.rows
    cols: tl.constexpr = form.tile.cols
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    col = tl.arange(0, cols)
    places = row[:, None] * width + col[None, :]
    inside = row[:, None] < num_rows
    if cols != width:
        inside = inside & (col[None, :] < width)
    values = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, axis=1) / width + eps)
    tl.store(rstd + row, scale, mask=row < num_rows)
    normal = values * scale[:, None]
    if form.is_rounded:
        normal = normal.to(x.dtype.element_ty).to(tl.float32)
    factor = tl.load(weight + col, mask=col < width, other=0.0).to(tl.float32) + form.offset
    tl.store(out + places, (normal * factor[None, :]).to(out.dtype.element_ty), mask=inside)


@_kernel
def _norm_backward_kernel(grad, x, weight, rstd, grad_x, sums, num_rows, form: tl.constexpr):  # type: ignore[no-untyped-def]
    """Each program takes every so many tiles of rows; `sums` [programs, N] are of the weight's gradient."""
    width: tl.constexpr = form.width
    rows: tl.constexpr = form.tile.rows
    cols: tl.constexpr = form.tile.cols
    program = tl.program_id(0)
    col = tl.arange(0, cols)
    factor = tl.load(weight + col, mask=col < width, other=0.0).to(tl.float32) + form.offset
    total = tl.zeros((cols,), tl.float32)
    for first in range(program * rows, num_rows, tl.num_programs(0) * rows):
        row = first + tl.arange(0, rows)
        places = row.to(tl.int64)[:, None] * width + col[None, :]
        inside = row[:, None] < num_rows
        if cols != width:
            inside = inside & (col[None, :] < width)
        scale = tl.load(rstd + row, mask=row < num_rows, other=0.0)
        outer = tl.load(grad + places, mask=inside, other=0.0).to(tl.float32)
        normal = tl.load(x + places, mask=inside, other=0.0).to(tl.float32) * scale[:, None]
        inner = outer * factor[None, :]
        seen = normal
        if form.is_rounded:
            inner = inner.to(x.dtype.element_ty).to(tl.float32)
            seen = normal.to(x.dtype.element_ty).to(tl.float32)
        if form.with_weight:
            total += tl.sum(outer * seen, axis=0)
        along = tl.sum(inner * normal, axis=1) / width
        found = (inner - normal * along[:, None]) * scale[:, None]
        tl.store(grad_x + places, found.to(grad_x.dtype.element_ty), mask=inside)
    if form.with_weight:
        tl.store(sums + program * width + col, total, mask=col < width)


@_kernel
def _column_sum_kernel(sums, out, num_rows, width, rows: tl.constexpr, cols: tl.constexpr):  # type: ignore[no-untyped-def]
    col = tl.program_id(0) * cols + tl.arange(0, cols)
    total = tl.zeros((rows, cols), tl.float32)
    for first in range(0, num_rows, rows):
        row = first + tl.arange(0, rows)
        inside = (row[:, None] < num_rows) & (col[None, :] < width)
        total += tl.load(sums + row[:, None] * width + col[None, :], mask=inside, other=0.0)
    tl.store(out + col, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=col < width)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: int, is_rounded: bool) -> tuple[Tensor, Tensor]:
    """The norm of x [R, N], contiguous, by weight [N], and fp32 [R]: one divided by each row's root mean square."""
    num_rows, width = x.shape
    dtype = torch.promote_types(x.dtype, weight.dtype) if is_rounded else x.dtype
    out = torch.empty_like(x, dtype=dtype)
    rstd = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    tile = norm_tile(width)
    if num_rows:
        form = NormForm(width, tile, offset, is_rounded)
        grid = (-(-num_rows // tile.rows),)
        _norm_kernel[grid](x, weight, out, rstd, num_rows, eps, form, num_warps=tile.warps)
    return out, rstd


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: int, is_rounded: bool, with_weight: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of `rms_norm`: of x, and of the weight, empty unless `with_weight`."""
    num_rows, width = x.shape
    grad_x = torch.empty_like(x)
    tile = norm_backward_tile(width)
    programs = min(_num_programs(x.device), -(-num_rows // tile.rows))
    sums = torch.empty(programs if with_weight else 0, width, dtype=torch.float32, device=x.device)
    grad_weight = torch.empty_like(weight) if with_weight else weight.new_empty(0)
    if programs:
        form = NormForm(width, tile, offset, is_rounded, with_weight)
        _norm_backward_kernel[(programs,)](
            grad, x, weight, rstd, grad_x, sums, num_rows, form, num_warps=tile.warps
        )  # fmt: skip
    if with_weight:
        _column_sum_kernel[(-(-width // 32),)](sums, grad_weight, programs, width, 128, 32)
    return grad_x, grad_weight


class GateForm(NamedTuple):
    """A kind of gated activation, for which its kernels are compiled: its name, the rows' width, a program's tile."""

    activation: str
    width: int
    tile: Tile


GATE_ELEMENTS = 2048
"""Elements of a gated activation's tile."""


@lru_cache
def gate_tile(width: int) -> Tile:
    """The tile of a gated activation over rows of this width: whole vectors of a row, if the width allows."""
    even = width & -width
    cols = min(1024, even if even >= 64 else triton.next_power_of_2(width))
    return Tile(GATE_ELEMENTS // cols, cols)


@triton.jit
def _activate(x, activation: tl.constexpr):  # type: ignore[no-untyped-def]
    if activation == "silu":
        return x / (1.0 + tl.exp(-x))
    else:  # gelu_tanh: 1 + tanh(u) is twice the sigmoid of 2u
        return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))


@triton.jit
def _slope(x, activation: tl.constexpr):  # type: ignore[no-untyped-def]
    """The derivative of `_activate`."""
    if activation == "silu":
        gate = 1.0 / (1.0 + tl.exp(-x))
        return gate * (1.0 + x * (1.0 - gate))
    else:
        gate = 1.0 / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
        inner = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        return gate * (1.0 + x * (1.0 - gate) * inner)


@triton.jit
def _tile_of(num_rows, width: tl.constexpr, rows: tl.constexpr, cols: tl.constexpr):  # type: ignore[no-untyped-def]
    """The rows, columns and mask of this program's tile; tiles of a row lie side by side."""
    across: tl.constexpr = (width + cols - 1) // cols
    program = tl.program_id(0)
    row = ((program // across).to(tl.int64) * rows + tl.arange(0, rows))[:, None]
    col = ((program % across) * cols + tl.arange(0, cols))[None, :]
    inside = row < num_rows
    if width % cols != 0:
        inside = inside & (col < width)
    return row, col, inside


@_kernel
def _gate_kernel(gate, up, out, num_rows, strides, form: tl.constexpr):  # type: ignore[no-untyped-def]
    """strides: between rows of gate and of up."""
    width: tl.constexpr = form.width
    rows: tl.constexpr = form.tile.rows
    cols: tl.constexpr = form.tile.cols
    activation: tl.constexpr = form.activation
    row, col, inside = _tile_of(num_rows, width, rows, cols)
    before = tl.load(gate + row * strides[0] + col, mask=inside, other=0.0).to(tl.float32)
    opened = _activate(before, activation)
    opened = opened.to(out.dtype.element_ty).to(tl.float32)
    values = tl.load(up + row * strides[1] + col, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + col, (opened * values).to(out.dtype.element_ty), mask=inside)


@_kernel
def _gate_backward_kernel(grad, gate, up, grad_gate, grad_up, num_rows, strides, form: tl.constexpr):  # type: ignore[no-untyped-def]
    """strides: between rows of gate, of up, and of their gradients."""
    width: tl.constexpr = form.width
    rows: tl.constexpr = form.tile.rows
    cols: tl.constexpr = form.tile.cols
    activation: tl.constexpr = form.activation
    row, col, inside = _tile_of(num_rows, width, rows, cols)
    outer = tl.load(grad + row * width + col, mask=inside, other=0.0).to(tl.float32)
    before = tl.load(gate + row * strides[0] + col, mask=inside, other=0.0).to(tl.float32)
    values = tl.load(up + row * strides[1] + col, mask=inside, other=0.0).to(tl.float32)
    kind = grad_gate.dtype.element_ty
    opened = _activate(before, activation).to(kind).to(tl.float32)
    inner = (outer * values).to(kind).to(tl.float32)
    place = row * strides[2] + col
    tl.store(grad_gate + place, (inner * _slope(before, activation)).to(kind), mask=inside)
    tl.store(grad_up + place, (outer * opened).to(kind), mask=inside)


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up, of [R, N] each, whose rows may lie apart; activation: silu or gelu_tanh."""
    num_rows, width = gate.shape
    out = torch.empty(num_rows, width, dtype=gate.dtype, device=gate.device)
    if out.numel():
        tile = gate_tile(width)
        _gate_kernel[_num_tiles(num_rows, width, tile)](
            gate, up, out, num_rows, (gate.stride(0), up.stride(0)),
            GateForm(activation, width, tile), num_warps=tile.warps,
        )  # fmt: skip
    return out


def gated_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str, joined: bool) -> list[Tensor]:
    """The gradients of `gated`, of gate and of up; with `joined` side by side in one tensor [R, 2N].

    grad [R, N]: contiguous."""
    num_rows, width = gate.shape
    if joined:
        found = [torch.empty(num_rows, 2 * width, dtype=gate.dtype, device=gate.device)]
        halves: Any = found[0].chunk(2, -1)
    else:
        halves = found = [torch.empty(num_rows, width, dtype=gate.dtype, device=gate.device) for _ in range(2)]
    if grad.numel():
        tile = gate_tile(width)
        _gate_backward_kernel[_num_tiles(num_rows, width, tile)](
            grad, gate, up, *halves, num_rows, (gate.stride(0), up.stride(0), halves[0].stride(0)),
            GateForm(activation, width, tile), num_warps=tile.warps,
        )  # fmt: skip
    return found


def _num_tiles(num_rows: int, width: int, tile: Tile) -> tuple[int]:
    return (-(-num_rows // tile.rows) * -(-width // tile.cols),)


class RotaryForm(NamedTuple):
    """A kind of rotation, for which the kernel is compiled. half: half the columns of a head that are turned. rest: its
    other columns, and these filled up to a power of two. is_rounded: each product is, to the dtype of the result,
    before they are added. tile: of the heads of one token and the columns of a half."""

    heads: int
    kv_heads: int
    half: int
    rest: tuple[int, int]
    is_inverse: bool
    is_rounded: bool
    tile: Tile


@lru_cache
def rotary_tile(heads: int, half: int) -> Tile:
    """The heads of one token that are rotated at a time, and the columns of each of their halves."""
    cols = triton.next_power_of_2(half)
    rows = min(triton.next_power_of_2(heads), max(1, 2048 // cols))
    return Tile(rows, cols, 4)


@triton.jit
def _product(left, right, kind: tl.constexpr, is_rounded: tl.constexpr):  # type: ignore[no-untyped-def]
    product = left * right
    if is_rounded:
        product = product.to(kind).to(tl.float32)
    return product


@triton.jit
def _rotate_heads(source, out, angles, stride, heads: tl.constexpr, form: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rotate the heads of one token. angles: cosines of both halves, and sines. stride: between heads."""
    half: tl.constexpr = form.half
    rows: tl.constexpr = form.tile.rows
    cols: tl.constexpr = form.tile.cols
    rest: tl.constexpr = form.rest[0]
    rest_cols: tl.constexpr = form.rest[1]
    is_rounded: tl.constexpr = form.is_rounded
    kind: tl.constexpr = out.dtype.element_ty
    width: tl.constexpr = 2 * half + rest
    col = tl.arange(0, cols)[None, :]
    for first in tl.static_range(0, heads, rows):
        head = (first + tl.arange(0, rows))[:, None]
        inside = (head < heads) & (col < half)
        left = tl.load(source + head * stride + col, mask=inside, other=0.0).to(tl.float32)
        right = tl.load(source + head * stride + half + col, mask=inside, other=0.0).to(tl.float32)
        if form.is_inverse:
            from_right = _product(right, angles[3], kind, is_rounded)
            from_left = _product(-left, angles[2], kind, is_rounded)
        else:
            from_right = _product(-right, angles[2], kind, is_rounded)
            from_left = _product(left, angles[3], kind, is_rounded)
        place = out + head * width + col
        kept = _product(left, angles[0], kind, is_rounded)
        tl.store(place, (kept + from_right).to(kind), mask=inside)
        kept = _product(right, angles[1], kind, is_rounded)
        tl.store(place + half, (kept + from_left).to(kind), mask=inside)
        if rest > 0:
            other = 2 * half + tl.arange(0, rest_cols)[None, :]
            inside = (head < heads) & (other < width)
            tl.store(out + head * width + other, tl.load(source + head * stride + other, mask=inside), mask=inside)


@triton.jit
def _rotary_kernel(query, key, out_query, out_key, cos, sin, strides, form: tl.constexpr):  # type: ignore[no-untyped-def]
    """strides: of query and key between sequences, heads and tokens each; of the angles between sequences."""
    half: tl.constexpr = form.half
    cols: tl.constexpr = form.tile.cols
    heads: tl.constexpr = form.heads
    kv_heads: tl.constexpr = form.kv_heads
    width: tl.constexpr = 2 * half + form.rest[0]
    token = tl.program_id(0).to(tl.int64)
    sequence = tl.program_id(1).to(tl.int64)
    place = sequence * tl.num_programs(0) + token
    col = tl.arange(0, cols)[None, :]
    at = sequence * strides[6] + token * (2 * half) + col
    angles = (
        tl.load(cos + at, mask=col < half, other=0.0).to(tl.float32),
        tl.load(cos + at + half, mask=col < half, other=0.0).to(tl.float32),
        tl.load(sin + at, mask=col < half, other=0.0).to(tl.float32),
        tl.load(sin + at + half, mask=col < half, other=0.0).to(tl.float32),
    )
    source = query + sequence * strides[0] + token * strides[2]
    _rotate_heads(source, out_query + place * (heads * width), angles, strides[1], heads, form)
    source = key + sequence * strides[3] + token * strides[5]
    _rotate_heads(source, out_key + place * (kv_heads * width), angles, strides[4], kv_heads, form)


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, is_inverse: bool) -> tuple[Tensor, Tensor]:
    """query [B, H, T, D] and key [B, K, T, D], laid out in any way but along D, with the first columns of each head
    turned by the angles whose cosines and sines [B or 1, T, D or less] are given, contiguous.

    is_inverse: turned back, as gradients are. Both results lie in memory with tokens before heads."""
    batch, heads, length, width = query.shape
    kv_heads, turned = key.shape[1], cos.shape[-1]
    out_query = torch.empty(batch, length, heads, width, dtype=query.dtype, device=query.device)
    out_key = torch.empty(batch, length, kv_heads, width, dtype=key.dtype, device=key.device)
    if out_query.numel():
        tile = rotary_tile(max(heads, kv_heads), turned // 2)
        strides = (*query.stride()[:3], *key.stride()[:3], 0 if len(cos) == 1 else cos.stride(0))
        rest = width - turned, triton.next_power_of_2(max(1, width - turned))
        is_rounded = is_inverse or cos.dtype == query.dtype
        form = RotaryForm(heads, kv_heads, turned // 2, rest, is_inverse, is_rounded, tile)
        # Not fused to products and sums in one: that would not round a product before it is added.
        _rotary_kernel[(length, batch)](
            query, key, out_query, out_key, cos, sin, strides, form, num_warps=tile.warps, enable_fp_fusion=False
        )  # fmt: skip
    return out_query.transpose(1, 2), out_key.transpose(1, 2)
