"""The parts of a Hugging Face model that training works with, by name.

`tutti.model.structure.read_structure` reads them off a model once, when it lies whole on the meta device; the record is
then passed on, so that everything that divides, wraps, shards or counts means the same modules. The modules stay the
same objects whatever is done to the model later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class LogitTransform(NamedTuple):
    """The step between a model's head and its loss: logits = softcap * tanh(scale * head(x) / softcap).

    softcap 0: no soft-capping. masked: the first and the last + 1 of the tokens that are never predicted, if there are
    any (a model's codes of pictures where it writes text).
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
    text_model: the language model within it, which is all of it unless the model takes images, video or audio.
    blocks: the language model's repeated units with their names, in the order they run. basic: further units that FSDP
    gathers separately, inner ones first. head: the linear layer from hidden states to logits; classifies: these are of
    classes rather than tokens; transform: what is done to them. towers: encoders of images, video and audio and their
    projectors; tower_blocks: the repeated units of these, and of a diffusion decoder. experts: the stacks of experts,
    in the order they run. mixers: the layers that carry a state along the tokens (`tutti.model.mixers`). undivided:
    parts of blocks that look across their own features, so that no rank can compute some of these.
    by_keyword: blocks are given tensors that need gradients by keyword.
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
        """The structure of what is left in `model` once other ranks have taken over stages of it. Its decoder and head
        are named also where they are not here."""
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
    """The structure of a model that knows no vocabulary: its repeated blocks, further units (model.basic_modules), and
    a stand-in for a head that never runs."""
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
    """The cuts of a language model between its blocks (`tutti.model.stage_trace` finds them).

    blocks: the name of its list of blocks. front, tail: of its modules with parameters that run before and after them.
    tuple_length: a block's hidden states are the first of a tuple of this length; 0 if they are all it gives.
    """

    blocks: str
    front: tuple[str, ...]
    tail: tuple[str, ...]
    tuple_length: int
