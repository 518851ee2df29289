"""Mixture-of-experts layers as grouped matrix products, for every model behind transformers' `ExpertsInterface`.

The models' own loop asks for each expert which tokens chose it, and adds its output back into the result row by row:
one search, one gather, one scatter and a full-size zero gradient an expert. Here the (token, choice) pairs are sorted
by expert once; each expert's tokens then lie next to one another and all its products are over slices:

1. sort the N x k choices by expert, gather the tokens in that order;
2. gate and up projection, activation, down projection, each one grouped product (rows of group e times weight e);
3. weight the outputs, bring them back into token order, and sum each token's k rows.

The grouped product is torch's `grouped_mm` wherever its kernels go, and else (widths that are no multiple of 16 bytes,
fp32 on an accelerator or under torch.compile) a loop of plain products over slices.

The layouts that occur are the class's own attributes: `has_gate` (gate and up in one matrix; the class's `_apply_gate`
splits it, halves or interleaved), `has_bias`, `is_transposed` ([E, in, out] instead of [E, out, in]) and
`has_post_expert_norm`.

Shapes: N tokens, H hidden size, E experts, k experts a token, S = N * k pairs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm
from transformers.integrations.moe import ExpertsInterface

FUSED = "tutti_fused"
"""The name under which grouped experts are registered with transformers."""


def resolve_experts(requested: str | None) -> str:
    """The name to give transformers as `experts_implementation` for `model.moe_implementation`.

    None is fused: it is the fastest everywhere, and right to rounding.
    """
    ExpertsInterface.register(FUSED, fused_experts)
    return "eager" if requested == "eager" else FUSED


def fused_experts(module: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """The experts' weighted output for each token.

    module: the model's experts layer. hidden [N, H], chosen [N, k] expert indices, weights [N, k] -> [N, H].
    """
    num_tokens, num_chosen = chosen.shape
    experts, order = chosen.flatten().sort(stable=True)
    counts = torch.bincount(experts, minlength=module.num_experts)
    name = "gate_up_proj" if module.has_gate else "up_proj"
    groups = _Groups(module, experts, counts)
    raw = groups.linear(hidden[order // num_chosen], name)
    out = groups.linear(module._apply_gate(raw) if module.has_gate else module.act_fn(raw), "down_proj")
    if module.has_post_expert_norm:
        out = module.post_expert_norm(out)
    weighted = out * weights.flatten()[order, None]
    position = torch.empty_like(order)
    position[order] = torch.arange(len(order), device=order.device)
    return weighted[position].view(num_tokens, num_chosen, -1).sum(dim=1).to(hidden.dtype)


class _Groups:
    """How the S sorted rows divide among the experts of `module`."""

    def __init__(self, module: Any, experts: Tensor, counts: Tensor) -> None:
        self._module = module
        self._experts = experts
        self._counts = counts
        self._ends = counts.cumsum(0).to(torch.int32)

    def linear(self, rows: Tensor, name: str) -> Tensor:
        """rows [S, in], each through its expert's weight (and bias) of this name -> [S, out]."""
        weight = getattr(self._module, name)
        bias = getattr(self._module, f"{name}_bias") if self._module.has_bias else None
        weight = weight if self._module.is_transposed else weight.transpose(1, 2)
        rows = rows.to(weight.dtype)
        if _has_kernel(weight):
            out = grouped_mm(rows, weight, offs=self._ends)
        else:
            # unbind, because indexing one expert at a time would make a gradient of the whole stack for each
            pairs = zip(rows.split(self._counts.tolist()), weight.unbind(0), strict=True)
            out = torch.cat([part @ matrix for part, matrix in pairs])
        return out if bias is None else out + bias[self._experts]


def _has_kernel(weight: Tensor) -> bool:
    """Whether `grouped_mm` takes this weight [E, in, out]."""
    aligned = all(size * weight.element_size() % 16 == 0 for size in weight.shape[1:])
    plain = weight.device.type == "cpu" and not torch.compiler.is_compiling()
    return aligned and (weight.dtype == torch.bfloat16 or plain)
