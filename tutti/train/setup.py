"""What a run is made of before its first step: the process, and the parts it is assembled from.

`assemble` is shared by training, `tutti check` and export: it makes everything that is described by the configuration
and the data, and leaves parameters without storage where training would load them (`load_parameters`).
"""

from __future__ import annotations

import copy
import gc
import hashlib
import logging
import os
import platform
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from tutti.attention.interface import check_packable
from tutti.checkpoint.adapter import load_adapter, plan_adapters
from tutti.checkpoint.hf_load import load_weights
from tutti.config import Config, TrainConfig
from tutti.config.effect import warnings_on_cpu
from tutti.config.fits import ModelFacts, Piece
from tutti.config.layout import Layout, fit
from tutti.config.yamlfile import to_yaml
from tutti.core.device import keep_freed_memory, limit_threads, pick_device
from tutti.core.dist import World
from tutti.core.log import setup_logging
from tutti.data.loader import Data, build_data
from tutti.data.template import end_of_turn, make_template
from tutti.model.build import build_model, build_tokenizer
from tutti.model.initial import init_weights
from tutti.model.lora import adapters, add_adapters, init_adapters
from tutti.model.multimodal import check_multimodal
from tutti.model.quantized import hold_quantized
from tutti.model.stage_trace import anatomy
from tutti.model.structure import (
    basic_modules,
    blocks,
    experts,
    head,
    is_classifier,
    num_params,
    text_model,
    tower_blocks,
    towers,
)
from tutti.parallel.apply import parallelize
from tutti.parallel.fsdp import offloads
from tutti.parallel.mesh import Mesh, build_mesh
from tutti.parallel.pipeline.stage import Pipeline, own_modules
from tutti.parallel.tensor import tensor_ranks
from tutti.parallel.tp_plan import TensorPlan, read_plan
from tutti.train.objective import Objective
from tutti.train.optim import decay_groups
from tutti.train.stages import cut_model
from tutti.train.tasks.preference import make_preference

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parts:
    """The parts of a run. The objective is the parallelized root; model is the Hugging Face model within it.

    pipeline: where this rank has a part of the model's depth. whole: what the model was before, without storage,
    and plan: what of it is split into tensors.
    """

    layout: Layout
    mesh: Mesh
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    objective: Objective
    data: Data
    pipeline: Pipeline | None = None
    whole: PreTrainedModel | None = None
    plan: TensorPlan | None = None

    def describe(self, world: World) -> dict[str, Any]:
        """What the report shows beside the curves."""
        model = self.whole or self.model
        sizes = num_params(model)
        packages = ("tutti", "torch", "transformers")
        return {
            "model": f"{type(self.objective.model).__name__} ({self.model.config.model_type})",
            "parameters": sizes.total,
            "trainable_parameters": sum(item.numel() for item in model.parameters() if item.requires_grad),
            "device": _device_name(world.device),
            "layout": {"ranks": world.size, "mesh": str(self.mesh), "accumulation": self.layout.accumulation},
            "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
            "data": self.data.report,
            "steps_reason": self.data.steps_reason,
        }

    def facts(self, config: Config) -> dict[str, Any]:
        """What a checkpoint's manifest says of the run that wrote it."""
        digest = hashlib.sha256(to_yaml(config).encode()).hexdigest()
        return {"layout": asdict(self.layout), "config": digest}

    def documents(self, config: Config) -> dict[str, str]:
        """The configurations of the run and of its model, by file name, for its checkpoints."""
        model = self.whole or self.model
        return {"config.yaml": to_yaml(config), "config.json": model.config.to_json_string()}


def prepare_process(config: Config) -> torch.device:
    """Set up logging, threads, memory, seeds and determinism of this process; the device it computes on."""
    rank, local_world = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    setup_logging(rank)
    disable_progress_bar()
    limit_threads(local_world)
    keep_freed_memory()
    if config.train.enable_full_determinism:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    if config.train.gc_steps > 0:
        gc.disable()
    # Dropout differs from rank to rank; nothing else draws from these generators.
    torch.manual_seed(config.train.seed + rank)
    device = pick_device(config.train.init_device)
    if device.type == "cpu" and rank == 0:
        for warning in warnings_on_cpu(config):
            log.warning("%s", warning)
    return device


def assemble(config: Config, world: World) -> Parts:
    """Everything that `config` and its data describe; parameters still on the meta device where they can be.

    A collective call. ValueError, on all ranks: what is wrong with the model's or the data's files.
    """
    layout, train = fit(config, world.size), config.train
    tokenizer, model = world.run_on_all_ranks(lambda: tokenizer_and_model(config, world.device))
    world.run_on_all_ranks(lambda: check_fits(config, layout, model))
    mesh = build_mesh(layout, world, ddp=train.data_parallel_mode == "ddp", ep_outside=train.ep_outside)
    data = open_data(config, tokenizer, model, world, dp_rank=mesh.dp_rank, dp_size=mesh.dp_size)
    log.info("%s", data.steps_reason)
    objective = world.run_on_all_ranks(lambda: make_objective(config, model, mesh))
    world.run_on_all_ranks(lambda: decay_groups(model, train))
    return Parts(layout, mesh, tokenizer, model, objective, data, *own_depth(objective, layout, mesh, train))


def make_objective(config: Config, model: PreTrainedModel, mesh: Mesh) -> Objective:
    """What is optimized with `model`. ValueError: the model is not made of a decoder and a head that are known."""
    by_sample = config.train.enable_batch_invariant_mode
    return Objective(model, tensor_ranks(mesh), make_preference(config), by_sample=by_sample)


Depth = tuple[Pipeline | None, PreTrainedModel | None, TensorPlan | None]
"""A rank's part of the depth of a model: `pipeline`, `whole` and `plan` of `Parts`."""


def own_depth(objective: Objective, layout: Layout, mesh: Mesh, train: TrainConfig) -> Depth:
    """Leave the objective's model with this rank's part of its depth. A collective call."""
    plan = tensor_plan(objective.model, layout)
    if layout.pipeline == 1:
        return None, None, plan
    whole = copy.deepcopy(objective.model)
    return cut_model(objective, layout, mesh, train.pipeline_stages_per_rank), whole, plan


def divide(
    config: Config, objective: Objective, mesh: Mesh, whole: PreTrainedModel | None, plan: TensorPlan | None
) -> None:
    """Parallelize the objective's model in place; whole and plan as in `Parts`."""
    model = objective.model
    parallelize(
        objective,
        own_modules(model, blocks(whole or model)),
        mesh,
        config.train,
        basic=own_modules(model, basic_modules(whole or model, config.model.basic_modules)),
        experts=experts(model),
        plan=plan,
        towers=tower_blocks(model),
    )


def second_model(config: Config, parts: Parts, world: World) -> Parts:
    """The parts of a run with another model, made as `config` says and with its weights. A collective call."""
    _, model = world.run_on_all_ranks(lambda: tokenizer_and_model(config, world.device))
    objective = make_objective(config, model, parts.mesh)
    pipeline, whole, plan = own_depth(objective, parts.layout, parts.mesh, config.train)
    second = replace(parts, model=model, objective=objective, pipeline=pipeline, whole=whole, plan=plan)
    load_parameters(config, second, world)
    return second


def check_fits(config: Config, layout: Layout, model: PreTrainedModel) -> None:
    """ValueError unless `model` can be trained packed, and all that `layout` divides in it divides evenly."""
    check_packable(model)
    check_multimodal(model, layout, config.train)
    fit(config, layout.world, read_facts(model, layout))


def read_facts(model: PreTrainedModel, layout: Layout) -> ModelFacts:
    """What of `model` the axes of `layout` divide; ValueError where it cannot be divided along one of them at all."""
    num_blocks, plan = 0, tensor_plan(model, layout)
    if layout.pipeline > 1:
        num_blocks = len(list(text_model(model).get_submodule(anatomy(model).blocks).children()))
    pieces: dict[tuple, Piece] = {}  # the first of each kind
    for linear in plan.linears if plan else ():
        pieces.setdefault(linear.piece[1:], linear.piece)
    return ModelFacts(
        blocks=num_blocks,
        heads=(model.config.get_text_config().num_attention_heads,),
        experts=tuple({int(module.num_experts) for module in experts(model)}),  # type: ignore[arg-type]
        pieces=tuple(pieces.values()),
        vocabulary=plan.embedding.weight.shape[0] if plan else 0,
    )


def tokenizer_and_model(config: Config, device: torch.device) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """The tokenizer, with the chat template that data.chat_template names, and the model on the meta device, adapted
    with train.architecture lora."""
    tokenizer = build_tokenizer(config)
    named = config.data.chat_template != "default"
    if config.data.holds_chats and (named or not tokenizer.chat_template):
        # What is exported must render chats as they were rendered in training.
        tokenizer.chat_template = make_template(config.data.chat_template, tokenizer).source
    model = build_model(config, tokenizer=tokenizer, device=device)
    if model.can_generate():
        _end_as_trained(model, tokenizer, config)
    _leave_towers(model)
    lora = plan_adapters(config, model)
    if lora is not None:
        add_adapters(model, lora, getattr(torch, config.train.compute_dtype))
        if config.train.lora_base_dtype != "compute":
            hold_quantized([(module, each.weight) for module, each in adapters(model)], config.train.lora_base_dtype)
    return tokenizer, model


def _leave_towers(model: PreTrainedModel) -> None:
    """Freeze what encodes images: the data has none, and weight decay would wear away what is never used."""
    left = [tower for tower in towers(model) if any(item.requires_grad for item in tower.parameters())]
    for tower in left:
        tower.requires_grad_(False)
    if left:
        names = ", ".join(type(tower).__name__ for tower in left)
        log.info("%s: stays as it is, since the data has no images", names)


def _end_as_trained(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: Config) -> None:
    """Have generation stop at what ends the trained texts, beside what the model's generation config ends at already.

    A base model's config knows the end of a text, but not the marker by which a chat template ends a turn: a server
    that goes by the exported generation config would let the model speak for the user next.
    """
    trained = tokenizer.eos_token_id
    if config.data.holds_chats:
        trained = end_of_turn(make_template(config.data.chat_template, tokenizer), tokenizer) or trained
    known = model.generation_config.eos_token_id
    ends = [known] if isinstance(known, int) else list(known or ())
    if isinstance(trained, int) and trained not in ends:
        ends.append(trained)
    model.generation_config.eos_token_id = ends[0] if len(ends) == 1 else ends or None


def open_data(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    world: World,
    *,
    dp_rank: int,
    dp_size: int,
) -> Data:
    """The run's data, encoded for `model`. A collective call."""
    return build_data(
        config,
        tokenizer,
        world=world,
        dp_rank=dp_rank,
        dp_size=dp_size,
        vocab_size=model.config.get_text_config().vocab_size,
        num_labels=model.config.num_labels,
        label_names=_label_names(model),
    )


def load_parameters(config: Config, parts: Parts, world: World) -> None:
    """Parallelize the model and give it its weights, from model.model_path or drawn from train.seed.

    train.init_device meta: first parallelize, then fill each rank's slices; else build whole on that device first.
    A collective call.
    """
    model, train = parts.model, config.train
    whole = train.init_device != "meta"
    if not whole:
        divide(config, parts.objective, parts.mesh, parts.whole, parts.plan)
    device = torch.device("cpu") if train.init_device == "cpu" or offloads(train) else world.device
    if config.model.model_path is None:
        init_weights(model, train.seed, device)
    else:
        load_weights(
            model,
            Path(config.model.model_path),
            world=world,
            device=device,
            broadcast=train.broadcast_model_weights_from_rank0,
            index_path=config.model.safetensor_idx_path,
            seed=train.seed,
            whole=parts.whole,
        )
    if config.model.adapter_path is not None and train.architecture == "lora":
        world.run_on_all_ranks(lambda: load_adapter(model, Path(config.model.adapter_path or ""), parts.whole))
    else:
        init_adapters(model, train.seed)
    if whole:
        nn.Module.to(model, world.device)
        divide(config, parts.objective, parts.mesh, parts.whole, parts.plan)
    else:
        _move_buffers(model, world.device)
    parts.objective.train()


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    """Have what is not sharded where the model computes, also where its parameters are offloaded."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def tensor_plan(model: PreTrainedModel, layout: Layout) -> TensorPlan | None:
    """What of `model` the layout's tensor axis splits; ValueError where it cannot be split."""
    if layout.tensor == 1:
        return None
    output = None if is_classifier(model) else head(model)
    units = [block for _, block in blocks(model)]
    return read_plan(type(model).__name__, text_model(model), model.config.get_text_config(), units, output)


def _label_names(model: PreTrainedModel) -> tuple[str, ...]:
    names = [name for _, name in sorted((model.config.id2label or {}).items())]
    return () if all(name == f"LABEL_{number}" for number, name in enumerate(names)) else tuple(names)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"
