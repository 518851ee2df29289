"""Arguments that packed attention needs, and that a family's code does not pass to it.

- transformers' models pass unknown keyword arguments on to attention. This is how packed attention learns where samples
  begin, and how the cache reaches it in generation. The blocks of some families (Nemotron, StableLM) accept such
  arguments and drop them. There, a block remembers its arguments while it runs, and its attention takes those that it
  did not get itself.
- A sliding window is both an argument of attention and a mask. Some families (Qwen2-MoE, Phi-MoE) only put it into the
  mask, which packed attention ignores. There, the window is added to the arguments.

Which families these are is determined from their code.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterable
from functools import partial, wraps
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from tutti.core.modules import Forward, wrap_forward
from tutti.model.mixers import names_passed, names_read


def pass_arguments(language: Any, blocks: Iterable[tuple[str, nn.Module]]) -> None:
    """Add to the attention of `blocks` (with their names) the arguments that the language model's code does not
    pass, in place."""
    of: Any = type(language)
    masks_windows = "create_sliding_window_causal_mask" in names_read(of)
    for _, block in blocks:
        told: dict[str, Any] = {}
        if drops := _drops(type(block)):
            named = frozenset(inspect.signature(block.forward).parameters)
            wrap_forward(block, "arguments", partial(_remembered, named=named, told=told))
        for attention in filter(_takes_any, block.modules()):
            kind: Any = type(attention)
            fixed: dict[str, Any] = {}
            if masks_windows and "sliding_window" not in names_passed(kind):
                fixed["sliding_window"] = _window(attention, language.config)
            if drops or any(fixed.values()):
                wrap_forward(attention, "arguments", partial(_added, told=told, fixed=fixed))


def _window(attention: Any, config: PreTrainedConfig) -> int | None:
    """The window in an attention layer's mask: that of sliding layers, or of all layers if the config does not
    distinguish them."""
    kinds = getattr(config, "layer_types", None)
    slides = kinds is None or kinds[attention.layer_idx] == "sliding_attention"
    return getattr(config, "sliding_window", None) if slides else None


def _drops(kind: Any) -> bool:
    """True for a class whose forward takes any keyword argument, and reads none."""
    forward = inspect.unwrap(kind.forward)
    rest = {item.name for item in inspect.signature(forward).parameters.values() if item.kind is item.VAR_KEYWORD}
    read = set()
    for step in dis.get_instructions(forward.__code__):
        read |= set(step.argval) if isinstance(step.argval, tuple) else {step.argval}  # two names at once
    return bool(rest) and rest.isdisjoint(name for name in read if isinstance(name, str))


def _takes_any(module: nn.Module) -> bool:
    """True for attention through transformers' attention interface, to which any argument is passed on."""
    kind: Any = type(module)
    return "Attention" in kind.__name__ and "ALL_ATTENTION_FUNCTIONS" in names_read(kind) and not _drops(kind)


def _remembered(forward: Forward, named: frozenset[str], told: dict[str, Any]) -> Forward:
    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        told.clear()
        told.update((name, value) for name, value in kwargs.items() if name not in named)
        try:
            return forward(*args, **kwargs)
        finally:
            told.clear()

    return run


def _added(forward: Forward, told: dict[str, Any], fixed: dict[str, Any]) -> Forward:
    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **(fixed | told | kwargs))

    return run
