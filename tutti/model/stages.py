"""Cutting a model into pipeline stages: which blocks each stage has, and which modules stay on this rank.

`tutti.model.stage_trace` finds out where a model can be cut, `tutti.model.structure` counts the cost of its parts, and
`tutti.parallel.pipeline.stage` cuts it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import accumulate

from torch import nn
from transformers import PreTrainedModel

from tutti.config.layout import Layout
from tutti.config.nouns import counted
from tutti.core.structure import ModelStructure, StageTrace
from tutti.model.multimodal import check_first
from tutti.model.stage_trace import trace_stages
from tutti.model.structure import is_experts, part_sizes
from tutti.parallel.mesh import Mesh
from tutti.parallel.pipeline.stage import Cost, Pipeline, cut, split_blocks, tied_ranks

log = logging.getLogger(__name__)


def stage_blocks(model: PreTrainedModel, structure: ModelStructure, trace: StageTrace, num_stages: int) -> list[range]:
    """The indices of each stage's blocks, balanced by the cost of the model's parts."""
    inner = structure.text_model
    units = list(inner.get_submodule(trace.blocks).children())
    front = [*structure.towers, *(inner.get_submodule(name) for name in trace.front)]
    tail = [*(inner.get_submodule(name) for name in trace.tail), structure.head]
    costs = [Cost(size.active, size.total) for size in part_sizes(model, [*front, *units, *tail])]
    first, middle, last = costs[: len(front)], costs[len(front) : len(front) + len(units)], costs[-len(tail) :]
    # The embedding is a lookup, not a product, even if its weight is also the head's; and a tower's work does not
    # depend on the number of tokens.
    before = Cost(0.0, sum(cost.size for cost in first))
    after = Cost(sum(cost.work for cost in last), sum(cost.size for cost in last))
    return split_blocks(middle, before, after, num_stages)


def describe_stages(borders: Sequence[range]) -> str:
    """Describe stages by their first and last blocks: `0 to 4, 5 to 9`."""
    return ", ".join(f"{blocks[0]} to {blocks[-1]}" for blocks in borders)


def cut_into_stages(
    root: nn.Module,
    model: PreTrainedModel,
    structure: ModelStructure,
    layout: Layout,
    mesh: Mesh,
    per_rank: int,
    *,
    has_router_loss: bool,
) -> Pipeline:
    """Keep this rank's stages in `model`, in place, and return the pipeline. A collective call.

    root: the module around the model that runs the stages. has_router_loss: the loss needs the router logits of all
    stages. ValueError: the model cannot be cut.
    """
    trace = trace_stages(structure)
    borders = stage_blocks(model, structure, trace, layout.pipeline * per_rank)
    check_first(structure, len(borders[0]))
    inner = structure.text_model
    units = list(inner.get_submodule(trace.blocks).children())
    routers = [sum(map(is_experts, unit.modules())) for unit in units]
    before = [0, *accumulate(routers)]
    routed = tuple(before[blocks.start] if has_router_loss else 0 for blocks in borders)
    shared = {id(p) for name in trace.front for p in inner.get_submodule(name).parameters()}
    tied = [p for p in structure.head.parameters() if id(p) in shared and p.requires_grad]
    num_experts = max((module.num_experts for module in structure.experts), default=0)  # type: ignore[type-var]
    stages = cut(model, structure, trace, borders, mesh.rank("pipeline"), layout.pipeline)
    where = f"{counted(len(borders), 'stage')} on {counted(layout.pipeline, 'rank')}"
    log.info("pipeline: %s, of blocks %s", where, describe_stages(borders))
    if layout.accumulation < layout.pipeline:
        log.warning(
            "%s a step cannot fill a pipeline of %d ranks, which wait for each other: raise "
            "train.global_batch_size, or lower train.micro_batch_size",
            counted(layout.accumulation, "micro batch", "micro batches"),
            layout.pipeline,
        )
    return Pipeline(
        stages=stages,
        per_rank=per_rank,
        group=mesh.group("pipeline"),
        hidden_size=structure.config.hidden_size,
        token_parts=layout.tensor,
        routed=routed,
        num_experts=int(num_experts),  # type: ignore[arg-type]
        tied=tuple(name for name, p in root.named_parameters() if any(p is one for one in tied)),
        tied_group=tied_ranks(mesh) if tied else None,
    )
