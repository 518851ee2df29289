"""Pipeline parallelism: the depth of a model cut into stages, each on ranks of its own.

Every rank builds the whole model on the meta device, and `cut` keeps the blocks of its own stages, under the names that
they have in the whole model. The embedding goes to the first stage, final norm and head to the last. Nothing else
changes, so loading, FSDP, the optimizer and checkpoints see an ordinary, smaller model.

A stage runs the decoder class's own `forward`, which computes positions and masks and calls block after block. In the
list of blocks, stand-ins surround the stage's blocks: the one before them ignores its input and returns the hidden
states that were received from the previous stage, and the one after them captures the stage's result. So it does not
matter what a family does between its embedding and its blocks. `tutti.model.stage_trace` finds out whether a class can
be cut at all.

The cost of blocks decides how they are divided into stages (`split_blocks`): the slowest stage sets the pace, and a
head over a large vocabulary may cost as much as several blocks.

Tied weights exist twice, on the first rank as the embedding and on the last as the head. If they are trained, their
gradients are added once per step, so both copies stay equal.

Shapes: t tokens on this rank, H hidden size, n router layers before a stage, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tutti.core.structure import ModelStructure, StageTrace
from tutti.parallel.mesh import Mesh

MEMORY_WEIGHT = 0.25
"""The cost of a share of the model's parameters, relative to the same share of its work."""


class Cost(NamedTuple):
    """work: number of parameters that a token is multiplied with. size: number of all parameters."""

    work: float
    size: float


def split_blocks(blocks: Sequence[Cost], front: Cost, tail: Cost, num_stages: int) -> list[range]:
    """The consecutive `blocks` of each stage; `front` is on the first stage, `tail` on the last.

    Minimizes the cost of the most expensive stage, and among such splits the sum of squared costs. Every stage has a
    block.
    """
    assert 0 < num_stages <= len(blocks), "more stages than blocks"
    everything = [front, *blocks, tail]
    work, size = (sum(values) or 1.0 for values in zip(*everything, strict=True))
    share = [cost.work / work + MEMORY_WEIGHT * cost.size / size for cost in everything]
    sums = [0.0]
    for value in share[1:-1]:
        sums.append(sums[-1] + value)

    def cost(stage: int, first: int, last: int) -> float:
        ends = share[0] * (stage == 0) + share[-1] * (stage == num_stages - 1)
        return sums[last] - sums[first] + ends

    largest, _ = _search(len(blocks), num_stages, lambda so_far, value: max(so_far, value), cost)
    limit = largest * (1 + 1e-9)

    def squares(so_far: float, value: float) -> float:
        return so_far + value * value if value <= limit else math.inf

    _, borders = _search(len(blocks), num_stages, squares, cost)
    return [range(first, last) for first, last in pairwise(borders)]


def _search(
    num_blocks: int,
    num_stages: int,
    combine: Callable[[float, float], float],
    cost: Callable[[int, int, int], float],
) -> tuple[float, tuple[int, ...]]:
    """The minimum of the combined costs, and the block borders that give it, by dynamic programming over the stages.
    cost: of a stage with the blocks from the first up to the last."""
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, (0,))}
    for stage in range(num_stages):
        after = num_stages - 1 - stage
        best = {
            last: min(
                (combine(so_far, cost(stage, first, last)), (*borders, last))
                for first, (so_far, borders) in best.items()
                if first < last
            )
            for last in range(stage + 1, num_blocks - after + 1)
        }
    return best[num_blocks]


class Handoff(NamedTuple):
    """The tensors that a stage passes to the next one. hidden: [1, t, H]. routed: fp32 [n, t, E], the router logits
    of all layers so far, if there is a router loss; else None."""

    hidden: Tensor
    routed: Tensor | None


class States(NamedTuple):
    """A stage's decoder output, with transformers' names; router_logits: of all layers so far."""

    last_hidden_state: Tensor
    router_logits: tuple[Tensor, ...]


@dataclass(frozen=True)
class Stage:
    """One stage of this rank's model. index: among all stages. blocks: the indices of its blocks."""

    index: int
    blocks: range
    is_first: bool
    is_last: bool
    holder: StageBlocks

    def run(self, decoder: Callable[..., Any], kwargs: Mapping[str, Any], received: Handoff | None) -> States:
        """Run `decoder(**kwargs)` through this stage's blocks, starting from `received` if there is a previous
        stage."""
        kwargs, length = dict(kwargs), kwargs["position_ids"].shape[-1] if "position_ids" in kwargs else 0
        if received is not None:
            # Only shape and dtype matter: the blocks get the received states instead.
            blank = (
                received.hidden.detach()[:, :1].expand(-1, length, -1).clone()
            )  # cloned, because CTRL writes into it
            kwargs |= {"input_ids": None, "inputs_embeds": blank}
        with self.holder.only(self.blocks, None if received is None else received.hidden, length) as result:
            output = decoder(**kwargs)
        own = getattr(output, "router_logits", None) or ()
        before = () if received is None or received.routed is None else received.routed.unbind()
        hidden = output.last_hidden_state if self.is_last else result[0]
        return States(hidden, (*before, *own))


def make_handoff(states: States) -> Handoff:
    """The tensors to pass to the next stage."""
    hidden, logits = states.last_hidden_state, [each.float() for each in states.router_logits]
    return Handoff(hidden, torch.stack(by_layer(logits, hidden.shape[1])) if logits else None)


def by_layer(router_logits: Sequence[Tensor], num_tokens: int) -> tuple[Tensor, ...]:
    """The router logits [t, E] of each layer for all tokens; a router may have run separately on each sample."""
    if all(len(logits) == num_tokens for logits in router_logits):
        return tuple(router_logits)
    return torch.cat(list(router_logits)).split(num_tokens)


class StageBlocks(nn.ModuleList):
    """A decoder's list of blocks of which only some are present, under their indices; a stand-in's slot is empty.

    For the decoder's loop it has its original length. `only` selects the blocks that the loop finds in it.
    """

    def __init__(self, blocks: Sequence[nn.Module], held: Iterable[int], *, tuple_length: int) -> None:
        super().__init__()
        for number in held:
            self.add_module(str(number), blocks[number])
        self._attributes = [plain_attributes(block) for block in blocks]
        self._tuple_length = tuple_length
        self._found: list[Any] = []

    def __len__(self) -> int:
        return len(self._attributes)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._found)

    def __getitem__(self, index: Any) -> Any:
        return self._found[index]

    @contextmanager
    def only(self, numbers: range, received: Tensor | None, length: int) -> Iterator[list[Tensor]]:
        """Within this context, the loop runs these blocks on `received`. The result of the last one is appended to
        the yielded list, unless it is the model's last block. length: of the row given to the decoder, if known,
        whose shape its output may get."""
        result: list[Tensor] = []

        def take_out(hidden: Tensor) -> Tensor:
            result.append(hidden)
            return (
                hidden
                if length in (0, hidden.shape[-2])
                else hidden.detach()[..., :1, :].expand(*hidden.shape[:-2], length, -1)
            )

        def stand_in(number: int) -> Any:
            if number in numbers:
                return self._modules[str(number)]
            action: Callable[[Tensor], Tensor] = lambda hidden: hidden  # noqa: E731
            if number == numbers.start - 1:
                assert received is not None, "nothing was received"
                states = received
                action = lambda hidden: states  # noqa: E731
            elif number == numbers.stop:
                action = take_out
            return _StandIn(action, self._tuple_length, self._attributes[number])

        self._found = [stand_in(number) for number in range(len(self))]
        try:
            yield result
        finally:
            self._found = []


class _StandIn:
    """A stand-in for a block of another stage."""

    def __init__(self, action: Callable[[Tensor], Tensor], tuple_length: int, attributes: dict[str, Any]) -> None:
        self.__dict__.update(attributes)
        self._action, self._tuple_length = action, tuple_length

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return as_output(self._action(hidden), self._tuple_length)


def as_output(hidden: Tensor, tuple_length: int) -> Any:
    """The output of a block with these hidden states: the first element of a tuple of this length, or just them if
    that is 0."""
    return (hidden, *[None] * (tuple_length - 1)) if tuple_length else hidden


def plain_attributes(block: nn.Module) -> dict[str, Any]:
    """The attributes that a decoder's loop may read from a block, in addition to calling it."""
    return {key: value for key, value in block.__dict__.items() if not key.startswith("_") and key != "training"}


class Absent(nn.Module):
    """A stand-in for a module of another stage; only the shape of its output is used."""

    def forward(self, first: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        is_hidden = first.is_floating_point() and first.ndim > 2  # not a token mask or ids
        return first if is_hidden else first.new_zeros((*first.shape, 1), dtype=torch.float32)


@dataclass(frozen=True)
class Pipeline:
    """The pipeline that this rank belongs to.

    stages: this rank's, ascending. per_rank: number of stages per rank. group: the ranks that one batch runs through,
    in order. hidden_size: H. token_parts: number of tensor ranks that share a batch's tokens between blocks. routed:
    for each stage of the model, the number of routers before it (0 without a router loss). num_experts: the width of
    their logits. tied: names of this rank's copies of trained parameters that another rank of `tied_group` also has.
    """

    stages: tuple[Stage, ...]
    per_rank: int
    group: dist.ProcessGroup
    hidden_size: int
    token_parts: int
    routed: tuple[int, ...]
    num_experts: int
    tied: tuple[str, ...]
    tied_group: dist.ProcessGroup | None

    @property
    def num_stages(self) -> int:
        return self.per_rank * self.group.size()

    @property
    def is_last(self) -> bool:
        """True if this rank has the last stage."""
        return self.stages[-1].is_last


def cut(
    model: nn.Module,
    structure: ModelStructure,
    trace: StageTrace,
    borders: Sequence[range],
    rank: int,
    num_ranks: int,
) -> tuple[Stage, ...]:
    """Keep in `model` what the stages of `rank` need, in place, and return these stages.

    structure, trace: of the whole model. borders: the blocks of each stage, stage s being on rank s % num_ranks.
    """
    decoder, head = structure.text_model, structure.head
    names = {module: name for name, module in model.named_modules()}
    numbers = range(rank, len(borders), num_ranks)
    held = [number for stage in numbers for number in borders[stage]]
    blocks: Any = decoder.get_submodule(trace.blocks)
    holder = StageBlocks(list(blocks), held, tuple_length=trace.tuple_length)
    decoder.set_submodule(trace.blocks, holder)
    has_last = numbers[-1] == len(borders) - 1
    needed = {id(p) for p in head.parameters()} if has_last else set()
    for name in trace.front if numbers[0] > 0 else ():
        # A parameter tied to the head keeps the name that checkpoints use.
        if not any(id(p) in needed for p in decoder.get_submodule(name).parameters()):
            decoder.set_submodule(name, Absent())
    for tower in structure.towers if numbers[0] > 0 else ():
        model.set_submodule(names[tower], Absent())
    if not has_last:
        for name in trace.tail:
            decoder.set_submodule(name, Absent())
        model.set_submodule(names[head], Absent())
    return tuple(Stage(index, borders[index], index == 0, index == len(borders) - 1, holder) for index in numbers)


def tied_ranks(mesh: Mesh) -> dist.ProcessGroup | None:
    """The group of the first and the last rank of this rank's pipeline, on these two. They call it together."""
    group = mesh.group("pipeline")
    ranks = dist.get_process_group_ranks(group)
    if dist.get_rank() not in (ranks[0], ranks[-1]):
        return None
    made = dist.new_group([ranks[0], ranks[-1]], use_local_synchronization=True)
    assert isinstance(made, dist.ProcessGroup)
    return made
