"""Wrappers around the forward of a model's modules, and a record of what else is put on them.

Models are transformers' own classes and stay what they are. What training adds to a module is a wrapper around its
`forward` (which FSDP's hooks, module names and parameter names do not notice), or a fact that other code looks up. Both
are kept in one record on the module, `Attached`.

Wrappers have one order, from the inside out, whoever applies them and whenever: `WRAPPERS`. `wrap_forward` asserts it,
and `describe_wrappers` prints what a module and its parts wear.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

Forward = Callable[..., Any]

WRAPPERS = (
    "patches",  # a matrix product in the place of a convolution
    "codes",  # codes of pictures, as tokens beyond a table and as logits beyond a head
    "adapter",  # a trained change beside a frozen weight
    "arguments",  # what a block is given and drops, for its attention
    "mask",  # a causal one, for attention that is written for one sample
    "samples",  # a mixer's own batch of the samples in a packed row
    "borders",  # where samples begin, for mixers within a block
    "shard",  # this rank's part of a matrix or table that tensor parallelism splits
    "tokens",  # from and to a rank's own tokens, around a part that is given all of them
    "row",  # the last block's own tokens in their place in the whole row
    "early values",  # values that are sent while queries and keys are made
    "compile",
    "local parameters",  # plain tensors in the place of DTensors
    "checkpoint",  # run again in the backward pass
    "by sample",  # one sample of the batch after the other
    "offload",  # what is saved for the backward pass goes to host memory
)
"""The wrappers that there are, innermost first."""


@dataclass(frozen=True)
class Attached:
    """The record of one module.

    wrappers: the names of those around its forward, innermost first. adapters: of its weights, by their names
    (`tutti.model.lora`). packed: how its quantized weights are read, by name (`tutti.model.quantized`). exchange: the
    way to experts that other ranks hold (`tutti.parallel.expert`). expert_load: counts of the tokens that chose each
    expert (`tutti.model.experts`). early_values: the exchange of an attention layer's values
    (`tutti.attention.ulysses`). lora: of a model, which layers are adapted and how. local_parameters: puts plain
    tensors in the place of a unit's DTensors (`tutti.parallel.tensor`).
    """

    wrappers: tuple[str, ...] = ()
    adapters: dict[str, Any] = field(default_factory=dict)
    packed: dict[str, Any] = field(default_factory=dict)
    exchange: Any = None
    expert_load: Any = None
    early_values: Any = None
    lora: Any = None
    local_parameters: Callable[[], AbstractContextManager[None]] | None = None


_NONE = Attached()


def attached(module: Any) -> Attached:
    """The record of `module`, or of what stands for it; an empty one where nothing was put on it."""
    return getattr(module, "_tutti_attached", _NONE)


def attach(module: nn.Module, **changes: Any) -> None:
    """Change the record of `module` by these fields of `Attached`."""
    module.__dict__["_tutti_attached"] = replace(attached(module), **changes)


def wrap_forward(module: nn.Module, name: str, wrapper: Callable[[Forward], Forward]) -> None:
    """Make `wrapper(module.forward)` be the forward of `module`; `name` is its place in `WRAPPERS`."""
    worn = attached(module).wrappers
    assert all(WRAPPERS.index(inner) < WRAPPERS.index(name) for inner in worn), f"{name} around {', '.join(worn)}"
    module.forward = wrapper(module.forward)
    attach(module, wrappers=(*worn, name))


def unwrap_forward(module: nn.Module) -> None:
    """Leave `module` with the forward of its class."""
    module.__dict__.pop("forward", None)
    attach(module, wrappers=())


def describe_wrappers(module: nn.Module) -> str:
    """The wrappers of `module` and of its parts, outermost first, as `checkpoint > compile; mlp, self_attn: tokens`."""
    found: dict[str, list[str]] = {}
    for name, part in module.named_modules():
        if worn := attached(part).wrappers:
            found.setdefault(" > ".join(reversed(worn)), []).append(name)
    return "; ".join(stack if names == [""] else f"{', '.join(names)}: {stack}" for stack, names in found.items())
