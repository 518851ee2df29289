"""Schedules: the order in which each pipeline rank runs its stages on the micro batches of a step.

The model's depth is cut into P * V stages for P ranks, with stage s on rank s % P. A step takes each of M micro batches
through all stages and back:

    F  forward of a stage
    B  its backward pass; or, split in two, I (the gradient of its input, which the previous stage waits for) and
       W (the gradients of its parameters, which nobody waits for)

All schedules have one pattern. A rank runs some forwards ahead (warmup), then alternates one forward and one backward,
and ends with the remaining backwards:

    1f1b (arXiv 2104.04473)        V = 1. As many forwards ahead as there are stages after this one.
    interleaved (same paper)       V > 1. A rank's stages are thin slices, so that the pipeline fills and drains sooner.
                                   Micro batches go in groups of P through the stages of a rank, first to last.
    zero_bubble (arXiv 2401.10241) Backward is split. Rank r postpones W by r micro batches, and so has something to do
                                   while it waits for gradients at the end; no rank holds more activations than rank 0.

Any number of micro batches works; with fewer than ranks, some ranks are idle for much of the step.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Literal, NamedTuple

Kind = Literal["F", "B", "I", "W"]


class Action(NamedTuple):
    kind: Kind
    stage: int
    batch: int


def rank_schedule(rank: int, num_ranks: int, per_rank: int, num_batches: int, *, split: bool) -> list[Action]:
    """The actions of a training step in the order in which `rank` runs them; split: with I and W instead of B.

    The first stage has no I: its input has no gradient, so its whole backward pass is a B.
    """
    forwards = forward_schedule(rank, num_ranks, per_rank, num_batches)
    backwards = list(_backwards(rank, num_ranks, per_rank, num_batches, split=split))
    after = num_ranks - 1 - rank
    largest = max(map(len, _groups(num_ranks, num_batches)), default=0)
    ahead = after if per_rank == 1 else 2 * after + (per_rank - 1) * largest
    ahead = min(ahead, len(forwards))
    order, postponed = forwards[:ahead], list[Action]()
    for number, backward in enumerate(backwards):
        order.extend(forwards[ahead + number : ahead + number + 1])
        order.append(backward)
        if backward.kind == "I":
            postponed.append(Action("W", backward.stage, backward.batch))
        if postponed and number >= rank:
            order.append(postponed.pop(0))
    return order + postponed


def forward_schedule(rank: int, num_ranks: int, per_rank: int, num_batches: int) -> list[Action]:
    """A rank's forwards in order, for evaluation."""
    return [
        Action("F", chunk * num_ranks + rank, batch)
        for group in _groups(num_ranks, num_batches)
        for chunk in range(per_rank)
        for batch in group
    ]


def _backwards(rank: int, num_ranks: int, per_rank: int, num_batches: int, *, split: bool) -> Iterator[Action]:
    for group in _groups(num_ranks, num_batches):
        for chunk in reversed(range(per_rank)):
            stage = chunk * num_ranks + rank
            for batch in group:
                yield Action("I" if split and stage > 0 else "B", stage, batch)


def _groups(num_ranks: int, num_batches: int) -> list[range]:
    """The micro batches in groups of `num_ranks`, or slightly more if that does not divide their number."""
    count = max(1, num_batches // num_ranks)
    borders = [number * num_batches // count for number in range(count + 1)]
    return [range(first, last) for first, last in pairwise(borders)]
