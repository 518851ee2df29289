"""Tracing where a decoder can be cut between its blocks, so that its stages can run on different ranks.

A Hugging Face decoder is a list of blocks, with some modules that run before them (the embedding, rotary positions) and
some after (the final norm). Whether a class is built like this, and which module runs when, is tested rather than kept
in a table: its own `forward` runs once on the meta device with a stand-in for every block. It can be cut if

1. each block is called once, in order, and receives the unmodified output of the block before it;
2. no other input of a block depends on a parameter (a later stage does not have the first one's);
3. every other module with parameters runs either before or after all blocks, and the final output depends on what runs
   before only through the blocks.

Any other class is refused by name. In a multimodal model the language model is cut; the towers run before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from tutti.attention.interface import PACKED
from tutti.config.layout import Layout
from tutti.core.compat import tree_leaves
from tutti.core.structure import ModelStructure, StageTrace
from tutti.parallel.pipeline.stage import as_output, plain_attributes
from tutti.parallel.tp_plan import TensorPlan, read_plan

_HOOKED = "_output_capturing_hooks_installed"

_TOKENS = 6
"""Number of tokens of a run with stand-ins, which is never a number of streams of hidden states."""

_LENGTHS = range(4)
"""Lengths of the tuples that blocks return, with hidden states first; 0 if they return only these."""


def trace_stages(structure: ModelStructure) -> StageTrace:
    """The points where a model on the meta device can be cut between its blocks. ValueError: it cannot be cut."""
    name, inner = f"train.pipeline_parallel_size: {structure.name}", structure.text_model
    if getattr(structure.config, "num_kv_shared_layers", 0):  # shared through a dict, which stand-ins do not see
        raise ValueError(f"{name} cannot be cut in stages: its last blocks read keys and values of ones before them")
    lists = _lists_of_blocks(structure)
    path, _, leaf = lists[0].rpartition(".") if lists else ("", "", "")
    loop = inner.get_submodule(path)
    inside = {id(parameter) for child in loop.children() for parameter in child.parameters()}
    if not lists or any(id(parameter) not in inside for parameter in inner.parameters()):
        raise ValueError(f"{name} is not a list of blocks between an embedding and a norm, and cannot be cut in stages")
    problem = ""
    for length in _LENGTHS:
        trace = _Trace(length)
        try:
            with _unfrozen(loop), _stand_ins(loop, leaf, trace):
                output = _run(inner, bool(structure.mixers))
        except Exception as error:  # whatever the class does with what it does not expect
            problem = problem or f"its forward fails: {str(error).splitlines()[0] if str(error) else error!r}"
            continue
        with _unfrozen(loop):
            mistake = trace.mistake(loop, leaf, output, structure.config.hidden_size)
        if mistake is None:
            front, tail = (tuple(f"{path}.{key}".lstrip(".") for key in keys) for keys in (trace.front, trace.tail))
            return StageTrace(lists[0], front, tail, length)
        problem = mistake
    raise ValueError(f"{name} cannot be cut in stages: {problem}")


def tensor_plan(structure: ModelStructure, layout: Layout) -> TensorPlan | None:
    """The plan for splitting a model on the meta device over tensor ranks; None if it is not split. ValueError: it
    cannot be."""
    if layout.tensor == 1:
        return None
    plan, traces = read_plan(structure), _runs(structure, _TOKENS)
    if any(hidden.shape[-2] != _TOKENS for trace in traces.values() for hidden in trace.given):
        raise ValueError(
            f"train.tensor_parallel_size: {structure.name} hands its blocks several streams of hidden states for a "
            "token, which are not divided yet; leave it at 1"
        )
    return replace(plan, reshaping=structure.text_model) if reshapes_tokens(structure) else plan


def reshapes_tokens(structure: ModelStructure) -> bool:
    """True if the decoder reshapes its last hidden states to the number of input tokens, although its blocks
    returned fewer (GPT-BigCode): on the meta device it fails with half of them, and not with all."""
    return bool(_runs(structure, _TOKENS).keys() - _runs(structure, _TOKENS // 2).keys())


def _runs(structure: ModelStructure, tokens: int) -> dict[int, _Trace]:
    """The runs with stand-ins that return hidden states of this many tokens, by the length of their tuples, if the
    decoder runs to its end."""
    inner, lists = structure.text_model, _lists_of_blocks(structure)
    if not lists:
        return {}
    path, _, leaf = lists[0].rpartition(".")
    found: dict[int, _Trace] = {}
    for length in _LENGTHS:
        trace = _Trace(length, tokens)
        try:
            with _stand_ins(inner.get_submodule(path), leaf, trace):
                _run(inner, bool(structure.mixers))
        except Exception:  # whatever the class does with what it does not expect
            continue
        found[length] = trace
    return found


def _lists_of_blocks(structure: ModelStructure) -> list[str]:
    """The names of the decoder's lists that contain exactly its blocks: at most one."""
    found = [block for _, block in structure.blocks]
    modules = structure.text_model.named_modules()
    return [key for key, child in modules if isinstance(child, nn.ModuleList) and found and list(child) == found]


@dataclass
class _Trace:
    """A record of one run with stand-ins that return hidden states of this many tokens in tuples of this length."""

    tuple_length: int
    tokens: int = _TOKENS
    called: list[int] = field(default_factory=list)
    given: list[Any] = field(default_factory=list)
    made: list[Tensor] = field(default_factory=list)
    beside: list[Any] = field(default_factory=list)
    front: list[str] = field(default_factory=list)
    tail: list[str] = field(default_factory=list)
    num_blocks: int = 0

    def mistake(self, inner: nn.Module, path: str, output: Any, width: int) -> str | None:
        """The reason why a decoder with hidden states of this width cannot be cut; None if it can."""
        if self.called != list(range(self.num_blocks)):
            return f"its blocks run in the order {self.called}"
        if any(got is not gave for got, gave in zip(self.given[1:], self.made[:-1], strict=True)):
            return "something happens to the hidden states between two blocks"
        if any(hidden.ndim > 3 or hidden.shape[-1] != width for hidden in self.given):
            return "its hidden states come in several streams"
        if any(isinstance(item, Tensor) and item.requires_grad for item in tree_leaves(self.beside)):
            return "its blocks are handed more than hidden states by what comes before them"
        placed = {*self.front, *self.tail}
        for key, child in inner.named_children():
            has_parameters = any(True for _ in child.parameters())
            if key != path and has_parameters and (key not in placed or (key in self.front and key in self.tail)):
                return f"its {key} runs neither before all blocks nor after them"
        first = [p for key in self.front for p in inner.get_submodule(key).parameters()]
        last: Tensor = output.last_hidden_state
        if not last.requires_grad:
            return "its output does not come from its blocks"
        grads = torch.autograd.grad(last.sum(), [*first, self.made[-1]], allow_unused=True)
        if grads[-1] is None or any(grad is not None for grad in grads[:-1]):
            return "its output comes from more than its last block"
        return None


class _Probe(nn.Module):
    """A stand-in for a block, which records its inputs and returns new hidden states."""

    def __init__(self, number: int, block: nn.Module, trace: _Trace) -> None:
        super().__init__()
        self.__dict__.update(plain_attributes(block))
        self._number, self._trace = number, trace

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        trace = self._trace
        trace.called.append(self._number)
        trace.given.append(hidden)
        trace.beside.append((args, kwargs))
        trace.made.append(torch.empty_like(hidden[:, : trace.tokens]).detach().requires_grad_())
        return as_output(trace.made[-1], trace.tuple_length)


class _Positions(nn.Module):
    """A stand-in for a module without parameters (rotary frequencies), which might look at values that do not exist
    on meta."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.__dict__.update(plain_attributes(module))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return args[0].detach()


@contextmanager
def _unfrozen(inner: nn.Module) -> Iterator[None]:
    """Make every dependency on a parameter visible, even if the parameter is frozen."""
    frozen = [p for p in inner.parameters() if p.is_floating_point() and not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_()
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


@contextmanager
def _stand_ins(inner: nn.Module, path: str, trace: _Trace) -> Iterator[None]:
    """Put stand-ins into `inner` within this context, and record which of its other modules run when."""
    held = dict(inner._modules)
    original: Any = held[path]
    trace.num_blocks = len(original)
    handles = []
    for key, child in held.items():
        if child is None or key == path:
            continue
        if not any(True for _ in child.parameters()):
            if any(True for _ in child.buffers()):
                each = [_Positions(part) for part in child] if isinstance(child, nn.ModuleList) else None
                inner._modules[key] = _Positions(child) if each is None else nn.ModuleList(each)
            continue
        handles.append(child.register_forward_pre_hook(_note(key, trace)))
    inner._modules[path] = nn.ModuleList(_Probe(number, block, trace) for number, block in enumerate(original))
    config: Any = inner.config
    implementation = config._attn_implementation
    config._attn_implementation = PACKED
    # transformers installs hooks on blocks when their additional outputs are first requested.
    hooked = inner.__dict__.get(_HOOKED, False)
    inner.__dict__[_HOOKED] = True
    try:
        yield
    finally:
        inner.__dict__[_HOOKED] = hooked
        config._attn_implementation = implementation
        inner._modules.update(held)
        for handle in handles:
            handle.remove()


def _note(key: str, trace: _Trace) -> Any:
    def note(module: nn.Module, args: Any) -> None:
        places: Sequence[list[str]] = (trace.front,) if not trace.called else (trace.tail,)
        if 0 < len(trace.called) < trace.num_blocks:
            places = (trace.front, trace.tail)
        for place in places:
            if key not in place:
                place.append(key)

    return note


def _run(inner: nn.Module, mixing: bool) -> Any:
    tokens = torch.zeros(1, _TOKENS, dtype=torch.int64, device="meta")
    # Given a mask, transformers does not look for borders in the positions, which have no values on meta; nor, in a
    # pairwise mask, for padding, which mixers must not see.
    mask = torch.ones(*((1, 1, _TOKENS) if mixing else (1,)), _TOKENS, device="meta")
    return inner(input_ids=tokens, position_ids=tokens, attention_mask=mask.bool(), use_cache=False)
