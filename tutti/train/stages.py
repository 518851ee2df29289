"""A run whose model is cut into pipeline stages: where the cuts are, and what runs a step through them.

The facts come from the model (`tutti.model.stage_trace`: where it can be cut; `tutti.model.structure`: what its parts
cost), the machinery from `tutti.parallel`. Here they meet, when a run is set up.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import accumulate

import torch
from transformers import PreTrainedModel

from tutti.config import TrainConfig
from tutti.config.layout import Layout
from tutti.core.batch import Batch
from tutti.model.multimodal import check_first, make_placing
from tutti.model.stage_trace import Anatomy, anatomy
from tutti.model.structure import experts, head, is_experts, part_sizes, text_model, towers
from tutti.parallel.batch_invariant import equal_counts
from tutti.parallel.fsdp import GradientSync, postpones
from tutti.parallel.mesh import Mesh
from tutti.parallel.pipeline.executor import Executor, PipelineExecutor, SequentialExecutor
from tutti.parallel.pipeline.stage import Cost, Pipeline, Seams, cut, split_blocks, tied_ranks
from tutti.parallel.sequence import sequence_ranks, split_samples, split_tokens
from tutti.train.objective import Objective

log = logging.getLogger(__name__)


def stage_blocks(model: PreTrainedModel, found: Anatomy, num_stages: int) -> list[range]:
    """The numbers of each stage's blocks, balanced by what the model's parts cost."""
    inner = text_model(model)
    units = list(inner.get_submodule(found.blocks).children())
    front = [*towers(model), *(inner.get_submodule(name) for name in found.front)]
    tail = [*(inner.get_submodule(name) for name in found.tail), head(model)]
    costs = [Cost(size.active, size.total) for size in part_sizes(model, [*front, *units, *tail])]
    first, middle, last = costs[: len(front)], costs[len(front) : len(front) + len(units)], costs[-len(tail) :]
    # The embedding is looked up and not multiplied with, even where its weight is the head's too; and a tower's work
    # does not go by tokens.
    before = Cost(0.0, sum(cost.size for cost in first))
    after = Cost(sum(cost.work for cost in last), sum(cost.size for cost in last))
    return split_blocks(middle, before, after, num_stages)


def describe_stages(borders: Sequence[range]) -> str:
    """`0 to 4, 5 to 9`: the numbers of each stage's first and last block."""
    return ", ".join(f"{blocks[0]} to {blocks[-1]}" for blocks in borders)


def cut_model(objective: Objective, layout: Layout, mesh: Mesh, per_rank: int) -> Pipeline:
    """Leave the objective's model with this rank's stages, and say how they hang together. Collective."""
    model = objective.model
    found = anatomy(model)
    inner, output = text_model(model), head(model)
    names = {id(module): name for name, module in model.named_modules()}
    beside = tuple(names[id(tower)] for tower in towers(model))
    seams = Seams(inner, found.blocks, found.front, found.tail, found.gives_tuple, names[id(output)], beside)
    borders = stage_blocks(model, found, layout.pipeline * per_rank)
    check_first(model, len(borders[0]))
    units = list(inner.get_submodule(found.blocks).children())
    routers = [sum(map(is_experts, unit.modules())) for unit in units]
    before = [0, *accumulate(routers)]
    routed = tuple(before[blocks.start] if objective.has_router_loss else 0 for blocks in borders)
    shared = {id(p) for name in found.front for p in inner.get_submodule(name).parameters()}
    tied = [p for p in output.parameters() if id(p) in shared and p.requires_grad]
    num_experts = max((module.num_experts for module in experts(model)), default=0)  # type: ignore[type-var]
    stages = cut(model, seams, borders, mesh.rank("pipeline"), layout.pipeline)
    log.info("pipeline: %d stages on %d ranks, of blocks %s", len(borders), layout.pipeline, describe_stages(borders))
    if layout.accumulation < layout.pipeline:
        log.warning(
            "%d micro batches a step do not fill a pipeline of %d ranks, which wait for each other: raise "
            "train.global_batch_size, or lower train.micro_batch_size",
            layout.accumulation,
            layout.pipeline,
        )
    return Pipeline(
        stages=stages,
        per_rank=per_rank,
        group=mesh.group("pipeline"),
        hidden_size=model.config.get_text_config().hidden_size,
        token_parts=layout.tensor,
        routed=routed,
        num_experts=int(num_experts),  # type: ignore[arg-type]
        tied=tuple(name for name, p in objective.named_parameters() if any(p is one for one in tied)),
        tied_group=tied_ranks(mesh) if tied else None,
    )


def make_executor(
    train: TrainConfig, objective: Objective, mesh: Mesh, pipeline: Pipeline | None, device: torch.device
) -> Executor:
    """What runs the micro batches of a step, on the parallelized `objective`. A collective call."""
    sync = GradientSync(objective, mesh, train)
    sharing, place = sequence_ranks(mesh), make_placing(objective.model)

    def prepare(micro: Batch) -> Batch:
        return split_tokens(place(micro), sharing).to(device)

    def prepare_samples(micro: Batch) -> Batch:
        # Of ranks with other samples; those that share them have as many anyway.
        others = (mesh.group("replicate"), mesh.group("shard"))
        return split_samples(equal_counts(place(micro), others, device), sharing).to(device)

    if train.enable_batch_invariant_mode:
        prepare = prepare_samples
    if pipeline is None:
        return SequentialExecutor(objective, sync, prepare)
    dtype = getattr(torch, train.compute_dtype)
    return PipelineExecutor(objective, pipeline, sync, prepare, dtype, split=postpones(train))
