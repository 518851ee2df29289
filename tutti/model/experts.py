"""Mixture-of-experts layers as grouped matrix products, for every model behind transformers' `ExpertsInterface`.

The models' own loop looks up for each expert which tokens chose it, and adds its output back into the result row by
row: one search, one gather, one scatter and a full-size zero gradient per expert. Here the (token, choice) pairs are
sorted by expert once. Each expert's tokens are then adjacent, and all products are over slices:

1. sort the N x k choices by expert, gather the tokens in that order;
2. gate and up projection, activation, down projection, each one a grouped product (rows of group e times weight e);
3. weight the outputs, bring them back into token order, and sum each token's k rows.

The grouped product is torch's `grouped_mm` if its kernels support the case, and otherwise (widths that are not a
multiple of 16 bytes, fp32 on an accelerator) a loop of plain products over slices, whose lengths the host has to wait
for. On CUDA the other steps run kernels of our own (`tutti.model.experts_kernels`). torch.compile does not trace any of
this: a compiled block stops before its experts and continues after them.

The possible layouts are described by the class's own attributes: `has_gate` (gate and up in one matrix, which the
class's `_apply_gate` splits in halves or interleaved), `has_bias`, `is_transposed` ([E, in, out] instead of [E, out,
in]) and `has_post_expert_norm`.

If the experts are divided among ranks (the layer has an exchange, see `tutti.parallel.expert`), the sorted tokens are
sent before step 2 and come back after it, and both kinds of product run on the local experts. On the way the number of
tokens per expert is counted, if the layer has an `ExpertLoad`.

Shapes: N tokens, H hidden size, E experts, k experts per token, S = N * k pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import grouped_mm

from tutti.core.batch import Batch
from tutti.core.compat import ExpertsInterface, has_triton
from tutti.core.device import on_accelerator
from tutti.core.modules import attach, attached
from tutti.model.fused import gated_halves
from tutti.model.lora import adapter_for
from tutti.model.quantized import product
from tutti.parallel.expert import inverse
from tutti.parallel.mesh import AXES, Mesh
from tutti.parallel.sequence import held_tokens

FUSED, EAGER = "tutti_fused", "tutti_eager"
"""The names under which grouped experts, and the models' own loop, are registered with transformers."""


def resolve_experts(requested: str | None) -> str:
    """The name to pass to transformers as `experts_implementation` for `model.moe_implementation`.

    None is fused: it is the fastest everywhere, and exact up to rounding.
    """
    ExpertsInterface.register(FUSED, fused_experts)
    ExpertsInterface.register(EAGER, eager_experts)
    return EAGER if requested == "eager" else FUSED


# When torch 2.11 compiles an autograd function that writes its result in place, its gradient is zero.
@torch.compiler.disable
def fused_experts(module: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """The experts' weighted output for each token, with grouped products.

    module: the model's experts layer. hidden [N, H], chosen [N, k] expert indices, weights [N, k] -> [N, H].
    """
    return _by_expert(module, hidden, chosen, weights, _grouped)


@torch.compiler.disable
def eager_experts(module: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Run the experts by the layer's own loop over them; arguments as for `fused_experts`."""
    if attached(module).exchange is not None:
        return _by_expert(module, hidden, chosen, weights, _one_by_one)
    _count(module, chosen)
    return _own_loop(module)(module, hidden, chosen, weights)


Products = Callable[[Any, Tensor, Tensor, Tensor], Tensor]
"""Function of (layer, rows [R, H] sorted by expert, experts [R], counts of rows for each expert) that returns [R,
H], not weighted."""


def _by_expert(module: Any, hidden: Tensor, chosen: Tensor, weights: Tensor, products: Products) -> Tensor:
    kernels = _kernels(hidden)
    sort = _sort if kernels is None else kernels.sort
    experts, order, places, counts = sort(chosen, module.num_experts)
    _count(module, chosen)
    places = places.view_as(chosen)
    rows: Tensor = _Spread.apply(hidden, order, places, kernels)
    exchange = attached(module).exchange
    if exchange is None:
        out = products(module, rows, experts, counts)
    else:
        out = exchange(rows, counts, partial(products, _LocalExperts(module)))
    combined: Tensor = _Combine.apply(out, weights, order, places, hidden.dtype, kernels)
    return combined


def _kernels(tensor: Tensor) -> ModuleType | None:
    """Return the module of kernels that can run on `tensor`, if there is one."""
    if not (tensor.is_cuda and has_triton()):
        return None
    from tutti.model import experts_kernels

    return experts_kernels


def _sort(chosen: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sort the pairs of `chosen` [N, k] by expert, without waiting for an accelerator.

    Returns the sorted experts [S], the pair at each place [S], the place of each pair [S], and the number of pairs per
    expert [E].
    """
    experts, order = chosen.flatten().sort(stable=True)
    if experts.device.type == "cpu":
        counts = torch.bincount(experts, minlength=num_experts)
    else:
        ends = torch.searchsorted(experts, torch.arange(num_experts, device=experts.device), right=True)
        counts = ends.diff(prepend=ends.new_zeros(1))
    return experts, order, inverse(order), counts


class _Spread(torch.autograd.Function):
    """Gather a row for each of the S pairs: hidden [N, H] -> [S, H]. order [S]: the pair at each place.
    places [N, k]: where each pair went.

    The gradient is gathered from those places. Autograd's own would add row by row into zeros, which a CPU does
    sequentially.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, order: Tensor, places: Tensor, kernels: ModuleType | None) -> Tensor:
        ctx.save_for_backward(places)
        ctx.kernels = kernels
        if kernels is not None:
            return kernels.spread(hidden, places)
        return hidden.index_select(0, order // places.shape[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (places,) = ctx.saved_tensors
        sum_choices = _sum_choices if ctx.kernels is None else ctx.kernels.sum_choices
        return sum_choices(grad, places, None, grad.dtype), None, None, None


class _Combine(torch.autograd.Function):
    """Sum each token's rows of `out` [S, H] with weights [N, k] -> [N, H] of `dtype`. places [N, k]: where the rows
    are."""

    @staticmethod
    def forward(
        ctx: Any,
        out: Tensor,
        weights: Tensor,
        order: Tensor,
        places: Tensor,
        dtype: torch.dtype,
        kernels: ModuleType | None,
    ) -> Tensor:
        ctx.save_for_backward(out, weights, order, places)
        ctx.kernels = kernels
        sum_choices = _sum_choices if kernels is None else kernels.sum_choices
        return sum_choices(out, places, weights, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        out, weights, order, places = ctx.saved_tensors
        needed = ctx.needs_input_grad[:2]
        if ctx.kernels is not None:
            return *ctx.kernels.combine_backward(grad, out, places, weights, needed), None, None, None, None
        grad_out, grad_weights = None, None
        if needed[0]:
            grad_out = grad.to(out.dtype).index_select(0, order // places.shape[1])
            grad_out *= weights.flatten()[order, None]
        if needed[1]:
            wide = grad.float()
            sums = [(out.index_select(0, column) * wide).sum(-1) for column in _columns(places)]
            grad_weights = torch.stack(sums, 1).to(weights.dtype)
        return grad_out, grad_weights, None, None, None, None


def _sum_choices(rows: Tensor, places: Tensor, weights: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Sum each token's rows, at `places` [N, k], with `weights` [N, k] if given: [N, H] of `dtype`.

    The sum is in fp32. One choice is processed at a time, so that only the rows and their gradient are that large.
    """
    total = rows.new_zeros(len(places), rows.shape[1], dtype=torch.float32)
    for choice, column in enumerate(_columns(places)):
        picked = rows.index_select(0, column)
        if weights is None:
            total += picked
        else:
            total.addcmul_(picked.float(), weights[:, choice, None].float())
    return total.to(dtype)


def _columns(places: Tensor) -> tuple[Tensor, ...]:
    """The columns of `places` [N, k], contiguous: with strided indices torch's CUDA kernel gathers single numbers."""
    return places.T.contiguous().unbind(0)


@dataclass
class _LayerLoad:
    """The counts of one layer.

    counts: int64 [E], the number of tokens that chose each expert. real: for each part of the current batch that goes
    through the layer separately, which of its tokens are not padding, bool [N]; () if nothing is to be counted. part:
    the index of the next part.
    """

    counts: Tensor
    real: Sequence[Tensor] = ()
    part: int = 0


def _count(module: Any, chosen: Tensor) -> None:
    load = attached(module).expert_load
    if load is None or not load.real:
        return
    real = load.real[load.part]
    load.part = (load.part + 1) % len(load.real)
    ones = real.to(torch.int64)[:, None].expand_as(chosen)
    load.counts.scatter_add_(0, chosen.flatten(), ones.flatten())


class ExpertLoad:
    """Counts for each layer how many tokens chose each expert, in the training batches that `root` is called with.

    Padding does not count, nor does recomputation for gradients. by_sample: samples go through the layers one by one.
    """

    def __init__(
        self, root: nn.Module, layers: Sequence[Any], mesh: Mesh, device: torch.device, *, by_sample: bool = False
    ) -> None:
        self._mesh, self._by_sample = mesh, by_sample
        self._sizes = [layer.num_experts for layer in layers]
        self._counts = torch.zeros(sum(self._sizes), dtype=torch.int64, device=device)
        self._loads = [_LayerLoad(counts) for counts in self._counts.split(self._sizes)]
        for layer, load in zip(layers, self._loads, strict=True):
            attach(layer, expert_load=load)
        if self._sizes:
            root.register_forward_pre_hook(self._begin)
            root.register_forward_hook(self._end)

    def _begin(self, root: nn.Module, args: tuple[Any, ...]) -> None:
        real = self._parts(args[0]) if root.training else ()
        for load in self._loads:
            load.real, load.part = real, 0

    def _end(self, root: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for load in self._loads:
            load.real = ()

    def _parts(self, batch: Batch) -> list[Tensor]:
        """Masks of the tokens of `batch` that are not padding (which comes last), restricted to those that this
        rank's layers see, for each part."""
        if batch.sequence is not None:
            parts = [held_tokens(int(part.borders[-1]), part.ranks) < part.num_tokens for part in batch.sequence.parts]
        else:
            lengths = batch.cu_seqlens.diff().tolist() if self._by_sample else [len(batch.input_ids)]
            parts = list((torch.arange(sum(lengths)) < batch.num_tokens).split(lengths))
        rank, size = self._mesh.rank("tensor"), self._mesh.size("tensor")
        return [part.chunk(size)[rank].to(self._counts.device, non_blocking=True) for part in parts]

    def take(self) -> dict[str, float]:
        """`expert_load_max` and `expert_load_min` since the last call: the tokens of the busiest and the least busy
        expert of any layer, as multiples of an even share; empty for a model without experts. A collective call."""
        stages = self._mesh.size("pipeline")
        if not self._sizes and stages == 1:
            return {}
        for axis in AXES[1:]:  # over all ranks with these layers; ranks that hold the same tokens count the same
            if self._mesh.size(axis) > 1:
                dist.all_reduce(self._counts, group=self._mesh.group(axis))
        shares = [counts / counts.float().mean() for counts in self._counts.split(self._sizes)]
        extremes = self._counts.new_tensor([-torch.inf, -torch.inf], dtype=torch.float32)
        if shares:
            flat = torch.cat(shares)
            extremes = torch.stack([flat.max(), -flat.min()])
        if stages > 1:
            dist.all_reduce(extremes, dist.ReduceOp.MAX, group=self._mesh.group("pipeline"))
        self._counts.zero_()
        busiest, idlest = extremes.tolist()
        return {"expert_load_max": busiest, "expert_load_min": -idlest} if math.isfinite(busiest) else {}


class _LocalExperts:
    """A view of an experts layer for its own code, on a rank that holds only some of the experts."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        return value.to_local() if isinstance(value, DTensor) else value

    @property
    def num_experts(self) -> int:
        return self._module.num_experts // attached(self._module).exchange.group.size()


def _grouped(module: Any, rows: Tensor, experts: Tensor, counts: Tensor) -> Tensor:
    """Compute all experts' products in grouped form."""
    name = "gate_up_proj" if module.has_gate else "up_proj"
    groups = _Groups(module, experts, counts)
    raw = groups.linear(rows, name)
    out = groups.linear(_activated(module, raw), "down_proj")
    return module.post_expert_norm(out) if module.has_post_expert_norm else out


def _activated(module: Any, raw: Tensor) -> Tensor:
    """Apply the gate, or the activation if there is none, to the first product."""
    if not module.has_gate:
        return module.act_fn(raw)
    activation = attached(module).gated_by
    return module._apply_gate(raw) if activation is None else gated_halves(raw, activation)


def _one_by_one(module: _LocalExperts, rows: Tensor, experts: Tensor, counts: Tensor) -> Tensor:
    """Run the layer's own loop over rows that have each chosen one expert.

    Without rows the loop uses no parameter, and no gradient would flow, which the other ranks wait for.
    """
    if not len(rows):
        return _grouped(module, rows, experts, counts)
    return _own_loop(module._module)(module, rows, experts[:, None].long(), rows.new_ones(len(rows), 1))


def _own_loop(module: Any) -> Callable[..., Tensor]:
    """The layer's forward as its class defines it, without transformers' selection of an implementation."""
    return type(module).forward.__wrapped__


class _Groups:
    """The groups of the S sorted rows, one per expert of `module`."""

    def __init__(self, module: Any, experts: Tensor, counts: Tensor) -> None:
        self._module = module
        self._experts = experts
        self._counts = counts
        self._ends = counts.cumsum(0, dtype=torch.int32)

    def linear(self, rows: Tensor, name: str) -> Tensor:
        """Multiply rows [S, in] by their experts' weights (and add biases) of this name -> [S, out]."""
        bias = getattr(self._module, f"{name}_bias") if self._module.has_bias else None
        out = product(self._module, name, rows, self._product, rows_are_inputs=bool(self._module.is_transposed))
        adapter = adapter_for(self._module, name)
        if adapter is not None:
            out = adapter.grouped(self._module, rows, out, self._experts, self._product)
        return out if bias is None else out + bias[self._experts]

    @cached_property
    def _sizes(self) -> list[int]:
        """The counts on the host, which waits for the device once."""
        return self._counts.tolist()

    def _product(self, rows: Tensor, weight: Tensor) -> Tensor:
        """Grouped product of rows [S, in] with weight [E, in, out] -> [S, out]."""
        rows = rows.to(weight.dtype)
        if _has_kernel(weight):
            return grouped_mm(rows, weight, offs=self._ends)
        # unbind, because indexing single experts would create a gradient of the whole stack for each
        pairs = zip(rows.split(self._sizes), weight.unbind(0), strict=True)
        return torch.cat([part @ matrix for part, matrix in pairs])


def _has_kernel(weight: Tensor) -> bool:
    """True if `grouped_mm` takes this weight [E, in, out]."""
    aligned = all(size * weight.element_size() % 16 == 0 for size in weight.shape[1:])
    return aligned and (weight.dtype == torch.bfloat16 or not on_accelerator(weight))
