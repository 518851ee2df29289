"""The parts of a Hugging Face model that training works with, by name.

`tutti.model.structure.read_structure` finds them once, when the complete model is on the meta device. The record is
then passed along, so that everything that divides, wraps, shards or counts uses the same modules. The module objects
stay the same whatever is done to the model later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class LogitTransform(NamedTuple):
    """The transform between a model's head and its loss: logits = softcap * tanh(scale * head(x) / softcap).

    softcap 0: no soft-capping. masked: the first and the last + 1 of the token ids that are never predicted, if any
    (such as image codes in a model that generates text).
    """

    scale: float = 1.0
    softcap: float = 0.0
    masked: tuple[int, int] | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        logits = logits * self.scale if self.scale != 1.0 else logits
        logits = torch.tanh(logits / self.softcap) * self.softcap if self.softcap else logits
        if self.masked is None:
            return logits
        ids = torch.arange(logits.shape[-1], device=logits.device)
        never = (ids >= self.masked[0]) & (ids < self.masked[1])
        return logits.masked_fill(never, torch.finfo(logits.dtype).min)


@dataclass(frozen=True)
class ModelStructure:
    """The parts of one model.

    name: of its class. config: of its language model. decoder: the inner model, from tokens to hidden states.
    text_model: the language model within it; the same module unless the model is multimodal. blocks: the language
    model's repeated layers with their names, in running order. basic: further modules that FSDP shards as units, inner
    ones first. head: the linear layer from hidden states to logits. classifies: logits are over classes rather than
    tokens. transform: applied to the logits. towers: media encoders and their projectors. tower_blocks: their repeated
    layers, and those of a diffusion decoder. experts: the stacks of experts, in running order. mixers: layers that
    carry a state along the tokens (`tutti.model.mixers`). undivided: parts of blocks that mix features, so that no rank
    can compute only some of them. by_keyword: blocks receive tensors that need gradients as keyword arguments.
    """

    name: str
    config: Any
    decoder: nn.Module
    text_model: nn.Module
    blocks: tuple[tuple[str, nn.Module], ...]
    basic: tuple[nn.Module, ...]
    head: nn.Linear
    classifies: bool
    transform: LogitTransform
    towers: tuple[nn.Module, ...]
    tower_blocks: tuple[nn.Module, ...]
    experts: tuple[nn.Module, ...]
    mixers: tuple[nn.Module, ...] = ()
    undivided: tuple[nn.Module, ...] = ()
    by_keyword: bool = False

    def within(self, model: nn.Module) -> ModelStructure:
        """The structure of the modules that remain in `model` after other ranks have taken their pipeline stages.
        The decoder and head are always set."""
        present = set(model.modules())

        def left(modules: tuple[nn.Module, ...]) -> tuple[nn.Module, ...]:
            return tuple(module for module in modules if module in present)

        return replace(
            self,
            blocks=tuple((name, block) for name, block in self.blocks if block in present),
            basic=left(self.basic),
            towers=left(self.towers),
            tower_blocks=left(self.tower_blocks),
            experts=left(self.experts),
            mixers=left(self.mixers),
            undivided=left(self.undivided),
        )


def structure_without_tokens(
    model: nn.Module,
    name: str,
    blocks: Sequence[tuple[str, nn.Module]] = (),
    basic: Sequence[nn.Module] = (),
    *,
    by_keyword: bool = False,
) -> ModelStructure:
    """The structure of a model without a vocabulary: its repeated blocks, further units (model.basic_modules), and a
    placeholder head that never runs."""
    return ModelStructure(
        name=name,
        config=model.config,
        decoder=model,
        text_model=model,
        blocks=tuple(blocks),
        basic=tuple(basic),
        head=nn.Linear(1, 1, bias=False, device="meta"),
        classifies=False,
        transform=LogitTransform(),
        towers=(),
        tower_blocks=(),
        experts=(),
        by_keyword=by_keyword,
    )


@dataclass(frozen=True)
class StageTrace:
    """The points where a language model can be cut between its blocks (found by `tutti.model.stage_trace`).

    blocks: the name of its list of blocks. front, tail: names of the modules with parameters that run before and after
    them. tuple_length: length of the tuple that a block returns, with hidden states first; 0 if it returns only hidden
    states.
    """

    blocks: str
    front: tuple[str, ...]
    tail: tuple[str, ...]
    tuple_length: int
