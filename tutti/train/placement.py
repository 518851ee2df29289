"""A model on the mesh: cut into pipeline stages, parallelized, and filled with its weights.

`run.py` calls these functions in order. `tutti check` and the reference model of preference training call them again
for other ranks and models. Nothing here depends on the task or the data.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from tutti.config import Config, TrainConfig
from tutti.config.layout import Layout
from tutti.core.batch import Batch
from tutti.core.compute_dtype import compute_dtype
from tutti.core.dist import World
from tutti.core.structure import ModelStructure
from tutti.kinds import kind_of
from tutti.model.attention_arguments import pass_arguments
from tutti.model.build import turn_off_dropout
from tutti.model.denoiser import Denoiser
from tutti.model.denoiser_parallel import share_tokens
from tutti.model.fuse_modules import fuse_modules
from tutti.model.lora import init_adapters
from tutti.model.mixers import separate_mixers
from tutti.model.multimodal import make_media_positions
from tutti.model.positions import rotate_by_sample
from tutti.model.stage_trace import tensor_plan
from tutti.model.stages import cut_into_stages
from tutti.parallel.apply import parallelize
from tutti.parallel.batch_invariant import equal_counts
from tutti.parallel.fsdp import gradient_sync, offloads, postpones
from tutti.parallel.mesh import Mesh
from tutti.parallel.pipeline.executor import Executor, PipelineExecutor, SequentialExecutor
from tutti.parallel.pipeline.stage import Pipeline
from tutti.parallel.sequence import sequence_ranks, split_samples, split_tokens
from tutti.parallel.tensor import tensor_ranks
from tutti.parallel.tp_plan import TensorPlan
from tutti.train.objective import Objective
from tutti.train.tasks import Task


@dataclass(frozen=True)
class PlacedModel:
    """This rank's part of a model.

    objective: the root module that is parallelized; `objective.model` is the Hugging Face model. structure: describes
    the modules on this rank. pipeline: set if this rank has only a part of the model's depth. full_model: the model
    before it was cut, on the meta device; None if it was not cut. plan: the tensor-parallel plan.
    """

    objective: Objective
    structure: ModelStructure
    pipeline: Pipeline | None = None
    full_model: PreTrainedModel | None = None
    plan: TensorPlan | None = None

    @property
    def model(self) -> PreTrainedModel:
        return self.objective.model

    @property
    def is_complete(self) -> bool:
        """True if this rank has the model's full depth."""
        return self.full_model is None


def place_model(
    config: Config, model: PreTrainedModel, structure: ModelStructure, task: Task, layout: Layout, mesh: Mesh
) -> PlacedModel:
    """Wrap `model` (complete, on the meta device) in an objective with `task`, and keep this rank's pipeline stages. A
    collective call.

    ValueError: the model cannot be split along an axis of `layout`.
    """
    if not task.may_drop:
        turn_off_dropout(model)
    by_sample = config.train.enable_batch_invariant_mode
    objective = Objective(model, task, tensor_ranks(mesh), structure=structure, by_sample=by_sample)
    plan = tensor_plan(structure, layout)
    if layout.pipeline == 1:
        rotate_by_sample(model)
        pass_arguments(structure.text_model, structure.blocks)
        separate_mixers(structure)
        return PlacedModel(objective, structure, plan=plan)
    full_model, per_rank = copy.deepcopy(model), config.train.pipeline_stages_per_rank
    pipeline = cut_into_stages(
        objective, model, structure, layout, mesh, per_rank, has_router_loss=objective.has_router_loss
    )
    left = structure.within(model)
    rotate_by_sample(model)
    pass_arguments(left.text_model, left.blocks)
    separate_mixers(left)
    return PlacedModel(objective, left, pipeline, full_model, plan)


def load_parameters(config: Config, placed: PlacedModel, mesh: Mesh, world: World) -> None:
    """Parallelize the model and load its weights from model.model_path, or initialize them from train.seed.

    With train.init_device meta the model is parallelized first and then each rank fills its own slices; otherwise it is
    built in full on that device and parallelized afterwards. A collective call.
    """
    model, train = placed.model, config.train
    if isinstance(model, Denoiser):
        share_tokens(model, mesh, world)
    if not train.enable_compile:  # inductor fuses the plain forms with more than these
        fuse_modules(model, world.device, compute_dtype(train))
    on_meta = train.init_device == "meta"
    if on_meta:
        parallelize(placed.objective, placed.structure, mesh, train, placed.plan)
    device = torch.device("cpu") if train.init_device == "cpu" or offloads(train) else world.device
    kind = kind_of(config)
    kind.load(config, model, world=world, device=device, full_model=placed.full_model)
    if config.model.adapter_path is not None and train.architecture == "lora":
        world.run_on_all_ranks(lambda: kind.load_adapters(config, model, placed.full_model))
    else:
        init_adapters(model, train.seed)
    if on_meta:
        # Buffers are on the computing device, also if parameters are offloaded to the CPU.
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(world.device)
    else:
        nn.Module.to(model, world.device)
        parallelize(placed.objective, placed.structure, mesh, train, placed.plan)
    placed.objective.train()


def make_executor(train: TrainConfig, placed: PlacedModel, mesh: Mesh, device: torch.device) -> Executor:
    """Make the executor that runs a step's micro batches on the parallelized model. A collective call."""
    sync = gradient_sync(placed.objective, mesh, train)
    sharing, place = sequence_ranks(mesh), make_media_positions(placed.structure)

    def prepare(micro: Batch) -> Batch:
        return split_tokens(place(micro), sharing).to(device)

    def prepare_samples(micro: Batch) -> Batch:
        # Pad to the number of samples of ranks with other data; ranks that share samples have equally many anyway.
        others = (mesh.group("replicate"), mesh.group("shard"))
        return split_samples(equal_counts(place(micro), others, device), sharing).to(device)

    def prepare_whole(micro: Batch) -> Batch:
        return micro.to(device)

    if isinstance(placed.model, Denoiser):  # divides latents by itself
        prepare = prepare_whole
    elif train.enable_batch_invariant_mode:
        prepare = prepare_samples
    if placed.pipeline is None:
        return SequentialExecutor(placed.objective, sync, prepare)
    dtype = compute_dtype(train)
    return PipelineExecutor(placed.objective, placed.pipeline, sync, prepare, dtype, split=postpones(train))
