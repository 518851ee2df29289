"""Wrappers around the `forward` of a model's modules, and a record of everything else that is attached to a module.

Models are transformers' own classes and are not modified. What training adds to a module is a wrapper around its
`forward` (which FSDP's hooks, module names and parameter names do not notice), or a fact that other code looks up. Both
are kept in one record on the module, `Attached`.

Wrappers have a fixed order, from the inside out, whoever applies them and when: `WRAPPERS`. `wrap_forward` asserts it,
and `describe_wrappers` prints the wrappers of a module and its parts.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

Forward = Callable[..., Any]

WRAPPERS = (
    "fused",  # one kernel instead of many
    "patches",  # a matrix product instead of a convolution
    "codes",  # image codes, as tokens beyond a table and as logits beyond a head
    "adapter",  # a trained change to a frozen weight
    "arguments",  # arguments that a block receives but does not pass to its attention
    "mask",  # a causal mask for attention that is written for a single sample
    "samples",  # samples of a packed row as a batch, for a mixer
    "borders",  # sample borders, for mixers within a block
    "shard",  # this rank's part of a matrix or table that tensor parallelism splits
    "tokens",  # gather all tokens before, and keep this rank's after
    "row",  # a rank's tokens of the last block, in their place in the whole row
    "early values",  # values that are sent while queries and keys are computed
    "compile",
    "local parameters",  # plain tensors instead of DTensors
    "checkpoint",  # activation checkpointing
    "by sample",  # one sample at a time
    "offload",  # activations in host memory
)
"""All wrappers, innermost first."""


@dataclass(frozen=True)
class Attached:
    """Everything that is attached to one module.

    wrappers: names of the wrappers around its forward, innermost first. adapters: by the name of the adapted weight
    (`tutti.model.lora`). packed: how quantized weights are stored, by name (`tutti.model.quantized`). exchange: sends
    tokens to experts on other ranks (`tutti.parallel.expert`). expert_load: counts of the tokens that chose each expert
    (`tutti.model.experts`). gated_by: the activation of experts whose gate has a kernel (`tutti.model.fused`).
    early_values: the exchange of an attention layer's values (`tutti.attention.ulysses`). lora: for a model, the
    settings of its adapters. local_parameters: replaces a unit's DTensors by plain tensors (`tutti.parallel.tensor`).
    """

    wrappers: tuple[str, ...] = ()
    adapters: dict[str, Any] = field(default_factory=dict)
    packed: dict[str, Any] = field(default_factory=dict)
    exchange: Any = None
    expert_load: Any = None
    gated_by: str | None = None
    early_values: Any = None
    lora: Any = None
    local_parameters: Callable[[], AbstractContextManager[None]] | None = None


_NONE = Attached()


def attached(module: Any) -> Attached:
    """The record of what is attached to `module` (or to a stand-in for it); an empty record if nothing is."""
    return getattr(module, "_tutti_attached", _NONE)


def attach(module: nn.Module, **changes: Any) -> None:
    """Set these fields of what is attached to `module`."""
    module.__dict__["_tutti_attached"] = replace(attached(module), **changes)


def wrap_forward(module: nn.Module, name: str, wrapper: Callable[[Forward], Forward]) -> None:
    """Replace `module.forward` by `wrapper(module.forward)`; `name` is its place in `WRAPPERS`."""
    worn = attached(module).wrappers
    assert all(WRAPPERS.index(inner) < WRAPPERS.index(name) for inner in worn), f"{name} around {', '.join(worn)}"
    module.forward = wrapper(module.forward)
    attach(module, wrappers=(*worn, name))


def unwrap_forward(module: nn.Module) -> None:
    """Restore the forward of the module's class."""
    module.__dict__.pop("forward", None)
    attach(module, wrappers=())


def describe_wrappers(module: nn.Module) -> str:
    """The wrappers of `module` and of its parts, outermost first, as `checkpoint > compile; mlp, self_attn: tokens`."""
    found: dict[str, list[str]] = {}
    for name, part in module.named_modules():
        if worn := attached(part).wrappers:
            found.setdefault(" > ".join(reversed(worn)), []).append(name)
    return "; ".join(stack if names == [""] else f"{', '.join(names)}: {stack}" for stack, names in found.items())
