"""Variable-length attention on CUDA in half precision: torch's flash kernel, or that of an installed flash package.

A variable-length kernel takes the tokens of many samples end to end, and where each sample begins. It does for a packed
batch what `tutti.attention.packed_cpu` does on a CPU, in one call and without waiting for the device. Unsupported cases
(`fits`) use tiles instead: fp32, heads wider than 256, values wider than keys, devices before Ampere. torch's kernel
does not support soft-capping either (`tutti.attention.flex` does). Widths that are not a multiple of 8, and values
narrower than keys (MLA), are padded with zeros, which change no score, and cut off again.

The kernel also serves a ring of ranks, whose queries see their keys in blocks (`tutti.attention.online_softmax`): it
returns the log of the softmax denominator with its output, and its backward pass takes those of the whole softmax, so
that both passes can be assembled from blocks. Two kinds of calls cover all blocks:

- blocks in which queries see themselves, which cover all queries in order: one call, causal or not, with a window;
- a block of earlier keys, all of which are seen: one call without a mask. With a sliding window not all are seen, and
  the kernel does not know how far apart queries and keys are; such blocks, at most a window wide, use tiles.

Every call passes a window, if necessary one as wide as the longest sample. Without one torch may choose cuDNN's kernel,
by rules that differ between the two passes, and with another layout of the log denominator.

Shapes: T queries, N keys, H query heads, K key/value heads, D head dimension, E <= D of values. Heads come first here,
as elsewhere; the kernel takes tokens first.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.attention.varlen  # defines the operators
from torch import Tensor
from torch.nn.functional import pad

from tutti.attention import online_softmax as tiled
from tutti.attention.online_softmax import Block, Gradients, Keys, Queries, slice_of
from tutti.attention.spec import AttentionSpec
from tutti.core.compat import varlen_backward, varlen_forward

log = logging.getLogger(__name__)

MAX_WIDTH = 256
"""The largest head dimension that flash kernels support."""

PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
"""The modules of the packages, by the names in transformers and `model.attn_implementation`."""


def fits(query: Tensor, value: Tensor, spec: AttentionSpec) -> bool:
    """True if torch's kernel supports this attention on this device."""
    return not spec.softcap and fits_package(query, value)


def fits_package(query: Tensor, value: Tensor) -> bool:
    """True if a package's kernel supports it: as torch's kernel, and with soft-capping."""
    width, half = query.shape[-1], query.dtype in (torch.bfloat16, torch.float16)
    if not (query.is_cuda and half and value.shape[-1] <= width <= MAX_WIDTH):
        return False
    return torch.version.hip is not None or torch.cuda.get_device_properties(query.device).major >= 8


def load_package(name: str) -> Callable[..., Any] | None:
    """The variable-length function of the package that `model.attn_implementation` calls `name`.

    None, with a log line that says why, if it is not installed or cannot be used.
    """
    try:
        return importlib.import_module(PACKAGES[name]).flash_attn_varlen_func
    except ModuleNotFoundError:
        return None
    except (ImportError, OSError, AttributeError) as error:  # built for another torch or CUDA
        log.warning("model.attn_implementation %s: the installed %s cannot be used: %s", name, PACKAGES[name], error)
        return None


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    spec: AttentionSpec,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention with torch's kernel within each of the samples that `cu_seqlens` [S + 1] borders.

    query [H, T, D], key [K, T, D], value [K, T, E] -> [T, H, E]. max_seqlen: of the longest sample. sinks [H]: a
    learned score per head that takes part in the softmax and has no value.
    """
    width = _padded(query.shape[-1])
    tensors = [_tokens_first(item, width) for item in (query, key, value)]
    if sinks is not None:
        out = _WithSinks.apply(*tensors, sinks, cu_seqlens, max_seqlen, spec)
    else:
        sizes, window = _sizes(cu_seqlens, max_seqlen, spec)
        out = varlen_forward(*tensors, *sizes, spec.scale, window)[0]
    return out[..., : value.shape[-1]]


def _sizes(cu_seqlens: Tensor, longest: int, spec: AttentionSpec) -> tuple[tuple[Any, ...], list[int]]:
    """The kernel's arguments after the tensors for samples that see themselves, and the window."""
    window = _window(spec, longest)
    return (cu_seqlens, cu_seqlens, longest, longest, window == [-1, 0]), window


def package_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    spec: AttentionSpec,
    package: Callable[..., Any],
) -> Tensor:
    """Attention with the function of a package (`load_package`), which supports soft-capping; arguments as for
    `varlen_attention`."""
    width = _padded(query.shape[-1])
    out = package(
        *(_tokens_first(item, width) for item in (query, key, value)),
        *(cu_seqlens, cu_seqlens, max_seqlen, max_seqlen),
        softmax_scale=spec.scale,
        causal=spec.causal,
        window_size=tuple(_window(spec, max_seqlen)),
        softcap=spec.softcap,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return (out[0] if isinstance(out, tuple) else out)[..., : value.shape[-1]]


class _WithSinks(torch.autograd.Function):
    """torch's kernel with a score per head, without a value, added to the softmax.

    The kernel does not support this, but its backward pass accepts any denominator and output, and so those with the
    sinks.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        spec: AttentionSpec,
    ) -> Tensor:
        sizes, window = _sizes(cu_seqlens, max_seqlen, spec)
        out, lse, _ = varlen_forward(query, key, value, *sizes, spec.scale, window)
        total = torch.logaddexp(lse, sinks[:, None].to(lse.dtype))
        out = (out * (lse - total).exp().T[..., None]).to(query.dtype)
        ctx.save_for_backward(query, key, value, sinks, cu_seqlens, out, total)
        ctx.max_seqlen, ctx.spec = max_seqlen, spec
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, cu_seqlens, out, total = ctx.saved_tensors
        sizes, window = _sizes(cu_seqlens, ctx.max_seqlen, ctx.spec)
        grads = varlen_backward(
            grad.contiguous(), query, key, value, out, total, *sizes, _no_dropout(grad), ctx.spec.scale, window
        )
        # A sink has no value: its probability only reduces the others.
        delta = (out.to(total.dtype) * grad).sum(-1).T
        grad_sinks = -((sinks[:, None] - total).exp() * delta).sum(-1).to(sinks.dtype)
        return (*grads, grad_sinks, None, None, None)


def _no_dropout(like: Tensor) -> Tensor:
    """A placeholder for the dropout state that the backward pass expects."""
    return torch.zeros(2, dtype=torch.uint64, device=like.device)


def _padded(width: int) -> int:
    return -(-width // 8) * 8


def _tokens_first(tensor: Tensor, width: int) -> Tensor:
    """Rearrange [heads, T, D] to [T, heads, width], padded with zeros."""
    return pad(tensor.transpose(0, 1), (0, width - tensor.shape[-1])).contiguous()


def _window(spec: AttentionSpec, longest: int) -> list[int]:
    """The number of keys that a query sees before its own (-1: all) and after it."""
    behind = spec.window - 1
    if spec.causal:
        return [behind, 0]
    return [behind, behind] if spec.window else [longest, longest]


class _Call(NamedTuple):
    """One call of the kernel: where its queries and keys are, their borders, the longest segments, and the window."""

    rows_at: slice
    keys_at: slice
    query_borders: Tensor
    key_borders: Tensor
    max_queries: int
    max_keys: int
    window: list[int]

    @property
    def arguments(self) -> tuple[Tensor, Tensor, int, int, bool]:
        """The kernel's arguments that follow the tensors."""
        return self.query_borders, self.key_borders, self.max_queries, self.max_keys, self.window == [-1, 0]


@lru_cache(maxsize=64)
def _borders(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """The borders, int32 [S + 1], of samples of these lengths. Cached for the layers of a model, which ask for the
    same, and copied without waiting for the device."""
    host = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


def _calls(
    blocks: Sequence[Block], queries: Queries, keys: Keys, spec: AttentionSpec
) -> tuple[list[_Call], list[Block]]:
    """The kernel calls for `blocks`, and the blocks that it does not support."""

    def call(members: Sequence[Block], rows_at: slice, keys_at: slice, seen: AttentionSpec) -> _Call:
        lengths = [[last - first for first, last in spans] for spans in zip(*members, strict=True)]
        borders = [_borders(tuple(item), queries.query.device) for item in lengths]
        longest = max(lengths[0]), max(lengths[1])
        return _Call(rows_at, keys_at, borders[0], borders[1], *longest, _window(seen, max(longest)))

    own = [block for block in blocks if block.queries == block.keys]
    others = [block for block in blocks if block.queries != block.keys]
    found = []
    if own:
        everything = slice(0, queries.query.shape[1])
        found.append(call(own, everything, everything, spec))
    if spec.window:
        return found, others
    for block in others:
        places = slice_of(block.queries, queries.spans), slice_of(block.keys, keys.spans)
        found.append(call([block], *places, spec._replace(causal=False)))
    return found, []


def _inputs(call: _Call, queries: Queries, keys: Keys) -> Iterator[Tensor]:
    """The call's queries, keys and values, tokens first and equally wide."""
    width = _padded(queries.query.shape[-1])
    for tensor, place in ((queries.query, call.rows_at), (keys.key, call.keys_at), (keys.value, call.keys_at)):
        yield _tokens_first(tensor[:, place], width)


def attend(queries: Queries, out: Tensor, keys: Keys, blocks: Sequence[Block], spec: AttentionSpec) -> None:
    """Attend from `queries` to `keys` as `tutti.attention.online_softmax.attend` does, with the kernel where
    possible."""
    calls, rest = _calls(blocks, queries, keys, spec)
    for call in calls:
        arguments = (*_inputs(call, queries, keys), *call.arguments, spec.scale, call.window)
        mixed, seen, _ = varlen_forward(*arguments)
        before = queries.lse[:, call.rows_at]
        after = torch.logaddexp(before, seen)
        place = out[:, call.rows_at]
        added = mixed[..., : out.shape[-1]].transpose(0, 1) * (seen - after).exp()[..., None]
        place.mul_((before - after).exp()[..., None]).add_(added)
        before.copy_(after)
    tiled.attend(queries, out, keys, rest, spec)


def attend_backward(
    queries: Queries,
    keys: Keys,
    blocks: Sequence[Block],
    spec: AttentionSpec,
    outer: tuple[Tensor, Tensor],
    sums: Gradients,
) -> None:
    """Add the gradients of `attend` to `sums` as `tutti.attention.online_softmax.attend_backward` does, with the
    kernel."""
    calls, rest = _calls(blocks, queries, keys, spec)
    width = _padded(queries.query.shape[-1])
    for call in calls:
        grad, out = (_tokens_first(item[:, call.rows_at], width) for item in outer)
        lse = queries.lse[:, call.rows_at].contiguous()
        grads = varlen_backward(
            grad, *_inputs(call, queries, keys), out, lse, *call.arguments, _no_dropout(grad), spec.scale, call.window
        )
        for total, part, place in zip(sums, grads, (call.rows_at, call.keys_at, call.keys_at), strict=True):
            total[:, place] += part[..., : total.shape[-1]].transpose(0, 1)
    tiled.attend_backward(queries, keys, rest, spec, outer, sums)
