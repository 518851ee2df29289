"""RMS norms, gated activations and rotary embeddings as one kernel a pass, with their gradients.

On CUDA the kernels are Triton's (`tutti.model.fused_kernels`). Each function also exists in plain torch, rounding where
the kernel rounds: that form says which modules compute the same (`tutti.model.fuse_modules`), and stands for the kernel
in a rehearsal, which needs no more than the shapes of what is made and kept.

For the backward pass are kept: of a norm its input and fp32 [R], of a gated activation gate and up, of a rotary
embedding the cosines and sines alone.

Shapes: R rows, N their width; T tokens, H heads, D head dimension.
"""

from __future__ import annotations

import logging
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.functional import gelu, silu

from tutti.core.compat import FakeTensor
from tutti.core.device import on_accelerator

log = logging.getLogger(__name__)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

MAX_WIDTH = 16_384
"""The widest row that a norm's kernels hold at once."""


class Norm(NamedTuple):
    """The rule of an RMS norm: x / sqrt(mean(x^2) + eps) in fp32, times (weight + offset).

    is_rounded: the first factor is rounded to the dtype of x before the product, and not only after it.
    """

    eps: float
    offset: int
    is_rounded: bool


@cache
def load_kernels() -> ModuleType | None:
    """The module of Triton's kernels; None where there is no Triton, with a log line that says so."""
    try:
        from tutti.model import fused_kernels
    except ImportError as error:
        log.info("norms, gated activations and rotary embeddings run as torch's kernels: %s", error)
        return None
    return fused_kernels


def fits(*tensors: Tensor) -> bool:
    """True where the kernels take such tensors: on CUDA, or in the rehearsal of an accelerator; not under
    torch.compile, which fuses the plain form with what is around it."""
    first = tensors[0]
    if torch.compiler.is_compiling() or any(isinstance(item, DTensor) or item.dtype not in DTYPES for item in tensors):
        return False
    if isinstance(first, FakeTensor):
        return on_accelerator(first)
    return first.device.type == "cuda" and load_kernels() is not None


def _kernels(tensor: Tensor) -> Any:
    """Triton's kernels, where `tensor` is on CUDA, or the operators that stand for them."""
    return load_kernels() if tensor.device.type == "cuda" and not isinstance(tensor, FakeTensor) else torch.ops.tutti


def rms_norm(x: Tensor, weight: Tensor, norm: Norm) -> Tensor:
    """The norm of x [.., N] along its last dimension, by weight [N]."""
    out: Tensor = _RMSNorm.apply(x, weight, norm)
    return out


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, norm: Norm) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        out, rstd = _kernels(x).rms_norm(rows, weight, *norm)
        ctx.save_for_backward(rows, weight, rstd)
        ctx.norm, ctx.shape = norm, x.shape
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, rstd = ctx.saved_tensors
        _, offset, is_rounded = ctx.norm
        grad = grad.reshape(rows.shape).contiguous()
        with_weight = ctx.needs_input_grad[1]
        grad_x, grad_weight = _kernels(rows).rms_norm_backward(
            grad, rows, weight, rstd, offset, is_rounded, with_weight
        )
        return grad_x.view(ctx.shape), grad_weight if with_weight else None, None


ACTIVATIONS = {"silu": silu, "gelu_tanh": lambda x: gelu(x, approximate="tanh")}
"""The activations that the kernels know, by name, as torch has them."""

unusable: set[str] = set()
"""The activations whose kernel has failed its trial."""


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up, of [.., N] each; activation: a name in `ACTIVATIONS`. Plain where no kernel takes them."""
    if gate.shape == up.shape and gate.dtype == up.dtype and activation not in unusable and fits(gate, up):
        out: Tensor = _Gated.apply(gate, up, activation)
        return out
    return ACTIVATIONS[activation](gate) * up


def gated_halves(gate_up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up of [.., 2N], gate before up; their gradients come side by side as they do. Plain where no
    kernel takes it."""
    if activation not in unusable and fits(gate_up):
        out: Tensor = _GatedHalves.apply(gate_up, activation)
        return out
    gate, up = gate_up.chunk(2, -1)
    return ACTIVATIONS[activation](gate) * up


def _rows(tensor: Tensor) -> Tensor:
    """[.., N] as [R, N], without a copy where its rows are only apart."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        rows, others = _rows(gate), _rows(up)
        ctx.save_for_backward(rows, others)
        ctx.activation, ctx.shape = activation, gate.shape
        out: Tensor = _kernels(gate).gated(rows, others, activation)
        return out.view(gate.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, others = ctx.saved_tensors
        grad = grad.reshape(rows.shape).contiguous()
        first, second = _kernels(rows).gated_backward(grad, rows, others, ctx.activation, False)
        return first.view(ctx.shape), second.view(ctx.shape), None


class _GatedHalves(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, activation: str) -> Tensor:
        rows = _rows(gate_up)
        ctx.save_for_backward(rows)
        ctx.activation, ctx.shape = activation, gate_up.shape
        out: Tensor = _kernels(rows).gated(*rows.chunk(2, -1), activation)
        return out.view(*gate_up.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (rows,) = ctx.saved_tensors
        grad = grad.reshape(len(rows), -1).contiguous()
        (found,) = _kernels(rows).gated_backward(grad, *rows.chunk(2, -1), ctx.activation, True)
        return found.view(ctx.shape), None


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """query [B, H, T, D] and key [B, K, T, D] with the first half of each head turned against the second, by angles
    whose cosines and sines are [B or 1, T, D]; of fewer columns, where only the first ones of a head are turned; in the
    dtype of the query or in fp32, and then only the result is rounded.

    The results lie in memory as attention reads them, tokens before heads."""
    out: tuple[Tensor, Tensor] = _Rotate.apply(query, key, cos, sin)
    return out


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        return _turned(query, key, cos, sin, False)

    @staticmethod
    def backward(ctx: Any, grad_query: Tensor, grad_key: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return *_turned(grad_query, grad_key, cos, sin, True), None, None


def _turned(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, is_inverse: bool) -> tuple[Tensor, Tensor]:
    query, key = (item if item.stride(-1) == 1 else item.contiguous() for item in (query, key))
    turned: tuple[Tensor, Tensor] = _kernels(query).rotate(query, key, cos, sin, is_inverse)
    return turned


@torch.library.custom_op("tutti::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float, offset: int, is_rounded: bool) -> tuple[Tensor, Tensor]:
    values = x.float()
    rstd = torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + eps)
    normal = values * rstd
    if is_rounded:
        out = normal.to(x.dtype) * (weight + offset if offset else weight)
    else:
        out = (normal * (weight.float() + offset)).to(x.dtype)
    return out, rstd.squeeze(-1)


@_rms_norm.register_fake
def _(x, weight, eps, offset, is_rounded):  # type: ignore[no-untyped-def]
    dtype = torch.promote_types(x.dtype, weight.dtype) if is_rounded else x.dtype
    return torch.empty_like(x, dtype=dtype), x.new_empty(len(x), dtype=torch.float32)


@torch.library.custom_op("tutti::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: int, is_rounded: bool, with_weight: bool
) -> tuple[Tensor, Tensor]:
    """The weight's gradient is empty unless `with_weight`."""
    normal = x.float() * rstd[:, None]
    inner, seen = grad.float() * (weight.float() + offset), normal
    if is_rounded:
        inner, seen = inner.to(x.dtype).float(), normal.to(x.dtype).float()
    grad_x = (inner - normal * (inner * normal).mean(-1, keepdim=True)) * rstd[:, None]
    grad_weight = (grad.float() * seen).sum(0) if with_weight else weight.new_empty(0)
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype)


@_rms_norm_backward.register_fake
def _(grad, x, weight, rstd, offset, is_rounded, with_weight):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), torch.empty_like(weight) if with_weight else weight.new_empty(0)


@torch.library.custom_op("tutti::gated", mutates_args=())
def _gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return ACTIVATIONS[activation](gate) * up


@_gated.register_fake
def _(gate, up, activation):  # type: ignore[no-untyped-def]
    return gate.new_empty(gate.shape)


@torch.library.custom_op("tutti::gated_backward", mutates_args=())
def _gated_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str, joined: bool) -> list[Tensor]:
    """The gradients of gate and up; with `joined` side by side in one tensor."""
    inner, opened = grad * up, ACTIVATIONS[activation](gate)
    if activation == "silu":
        grad_gate = torch.ops.aten.silu_backward(inner, gate)
    else:
        grad_gate = torch.ops.aten.gelu_backward(inner, gate, approximate="tanh")
    found = [grad_gate, grad * opened]
    return [torch.cat(found, -1)] if joined else found


@_gated_backward.register_fake
def _(grad, gate, up, activation, joined):  # type: ignore[no-untyped-def]
    if joined:
        return [gate.new_empty(len(gate), 2 * gate.shape[1])]
    return [gate.new_empty(gate.shape), up.new_empty(up.shape)]


@torch.library.custom_op("tutti::rotate", mutates_args=())
def _rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, is_inverse: bool) -> tuple[Tensor, Tensor]:
    def products(left: Tensor, right: Tensor) -> Tensor:
        found = left * right[:, None]
        return found.to(left.dtype) if is_inverse else found

    results = []
    for item in (query, key):
        part, rest = item.split((cos.shape[-1], item.shape[-1] - cos.shape[-1]), -1)
        if is_inverse:
            left, right = products(part, sin).chunk(2, -1)
            across = torch.cat((right, -left), -1)
        else:
            left, right = part.chunk(2, -1)
            across = products(torch.cat((-right, left), -1), sin)
        turned = (products(part, cos) + across).to(item.dtype)
        results.append(torch.cat((turned, rest), -1).transpose(1, 2).contiguous().transpose(1, 2))
    return results[0], results[1]


@_rotate.register_fake
def _(query, key, cos, sin, is_inverse):  # type: ignore[no-untyped-def]
    shapes = (item.transpose(1, 2) for item in (query, key))
    first, second = (item.new_empty(item.shape).transpose(1, 2) for item in shapes)
    return first, second
