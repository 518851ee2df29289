"""A model on the mesh: built without storage, cut into stages, parallelized, and given its weights.

`run.py` calls these in order; `tutti check` and the reference model of preference training call them again for other
ranks and other models. Nothing here knows a task or the data.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import platform
from dataclasses import asdict, dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from tutti import __version__
from tutti.checkpoint.adapter import load_adapter, plan_adapters
from tutti.checkpoint.autoencoder import load_autoencoder
from tutti.checkpoint.denoiser import load_denoiser
from tutti.checkpoint.hf_load import load_weights
from tutti.checkpoint.manager import foresee
from tutti.checkpoint.omni import load_parts
from tutti.checkpoint.trained import CONFIG, MODEL_CONFIG
from tutti.config import Config, TrainConfig
from tutti.config.layout import Layout, ModelFacts, Piece, fit
from tutti.config.yamlfile import to_yaml
from tutti.core.batch import Batch
from tutti.core.compute_dtype import compute_dtype
from tutti.core.dist import World
from tutti.core.pixels import Square
from tutti.core.structure import ModelStructure, structure_without_tokens
from tutti.data.captions import CaptionEncoder
from tutti.data.loader import Classes, Data, build_data
from tutti.data.source import text_columns
from tutti.model.autoencoder import Autoencoder, AutoencoderConfig, build_autoencoder
from tutti.model.build import (
    build_model,
    check_composed,
    check_dtypes,
    check_eager,
    check_packable,
    num_token_ids,
    turn_off_dropout,
)
from tutti.model.conditions import read_grid
from tutti.model.denoiser import Denoiser, DenoiserConfig, build_denoiser, denoiser_structure
from tutti.model.denoiser_parallel import check_shares, share_tokens
from tutti.model.diffusion import latent_patch
from tutti.model.drawing import draws, let_draw
from tutti.model.initial import init_weights
from tutti.model.lora import adapters, add_adapters, init_adapters
from tutti.model.mixers import check_mixers, separate_mixers
from tutti.model.multimodal import check_multimodal, make_placing
from tutti.model.omni import OmniModel
from tutti.model.omni_config import is_composed
from tutti.model.omni_processor import add_placeholders, write_markers
from tutti.model.pipeline_folder import open_folder
from tutti.model.positions import check_positions, check_rotary, rotate_by_sample
from tutti.model.processor import build_processor
from tutti.model.quantized import hold_quantized
from tutti.model.sparse import check_sparse
from tutti.model.stage_trace import trace_stages
from tutti.model.stages import cut_into_stages
from tutti.model.structure import count_flops, freeze_parts, model_class, num_params, read_structure, towers
from tutti.model.tokenizer import build_tokenizer, end_ids, set_chat_template
from tutti.parallel.apply import parallelize
from tutti.parallel.batch_invariant import equal_counts
from tutti.parallel.fsdp import gradient_sync, offloads, postpones
from tutti.parallel.mesh import Mesh
from tutti.parallel.pipeline.executor import Executor, PipelineExecutor, SequentialExecutor
from tutti.parallel.pipeline.stage import Pipeline
from tutti.parallel.sequence import sequence_ranks, split_samples, split_tokens
from tutti.parallel.tensor import tensor_ranks
from tutti.parallel.tp_plan import TensorPlan, read_plan
from tutti.train.objective import Objective
from tutti.train.tasks import Task

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlacedModel:
    """This rank's part of a model.

    objective: the root that is parallelized; its model is the Hugging Face model. structure: of what is on this rank.
    pipeline: where this rank has a part of the model's depth. full_model: what the model was before it was cut, without
    storage, None where it was not. plan: what of it is split into tensors.
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
        """True if this rank has all of the model's depth."""
        return self.full_model is None


class Inputs(NamedTuple):
    """The means of turning rows into inputs of the model. processor: of one that takes media, where its folder has
    one."""

    tokenizer: Any
    processor: Any = None


def read_inputs(config: Config, tokenizer: Any, structure: ModelStructure) -> Inputs:
    """The tokenizer, and the processor of a model with towers, if one can be used, or the size of an autoencoder's
    images, or the encoder of captions and pictures of a diffusion model."""
    if isinstance(structure.config, DenoiserConfig):
        folder = open_folder(config)
        grid = read_grid(folder, latent_patch(folder.family, structure.text_model.net.config))  # type: ignore[union-attr]
        ranks = config.train.ulysses_parallel_size
        return Inputs(tokenizer, CaptionEncoder(text_columns(config), grid, config.data, ranks))
    if isinstance(structure.config, AutoencoderConfig):
        return Inputs(tokenizer, Square(structure.config.side))
    return Inputs(tokenizer, build_processor(config, tokenizer) if structure.towers else None)


@dataclass(frozen=True)
class Run:
    """The parts of a run once it is set up."""

    config: Config
    world: World
    layout: Layout
    mesh: Mesh
    inputs: Inputs
    data: Data
    placed: PlacedModel

    def describe(self) -> dict[str, Any]:
        """The facts of a run that the report shows beside the curves."""
        model = self.placed.full_model or self.placed.model
        sizes = num_params(model)
        packages = {name: version(name) for name in ("torch", "transformers")}
        return {
            "model": model_name(model, self.placed.structure),
            "parameters": sizes.total,
            "trainable_parameters": sum(item.numel() for item in model.parameters() if item.requires_grad),
            "device": _device_name(self.world.device),
            "layout": {"ranks": self.world.size, "mesh": str(self.mesh), "accumulation": self.layout.accumulation},
            "versions": {"python": platform.python_version(), "tutti": __version__, **packages},
            "data": lambda: self.data.report,
            "steps_reason": self.data.steps_reason,
        }

    def documents(self, asked: Config) -> dict[str, str]:
        """The configurations of the run, as it was asked for, and of its model, by file name, for its checkpoints."""
        model = self.placed.full_model or self.placed.model
        return {CONFIG: to_yaml(asked), MODEL_CONFIG: model.config.to_json_string()}

    def facts(self, asked: Config) -> dict[str, Any]:
        """The facts that a checkpoint's manifest gives of the run that wrote it: also how it came out what was left to
        it."""
        digest = hashlib.sha256(to_yaml(asked).encode()).hexdigest()
        return {"layout": asdict(self.layout), "config": digest, "compute_dtype": self.config.train.compute_dtype}


def model_name(model: PreTrainedModel, structure: ModelStructure) -> str:
    """The class of a model and its model_type, as they are shown; of a composed model the classes of its parts."""
    if not isinstance(model, OmniModel):
        return f"{structure.name} ({model.config.model_type})"
    foundation, *others = (model_class(part.module).__name__ for part in model.parts())
    return f"{foundation} with {' and '.join(others)}"


def tokenizer_and_model(config: Config, device: torch.device) -> tuple[Any, PreTrainedModel]:
    """The tokenizer, with the chat template that data.chat_template names, and the model on the meta device, adapted
    with train.architecture lora. A model of pixels has no tokenizer."""
    if config.data.task.rows == "captions":
        denoiser = build_denoiser(config, open_folder(config).transformer)
        if (lora := plan_adapters(config, denoiser)) is not None:
            add_adapters(denoiser, lora, compute_dtype(config.train))
        return None, denoiser
    if not config.data.task.has_tokens:
        return None, build_autoencoder(config)
    check_composed(config)
    tokenizer = build_tokenizer(config)
    if is_composed(config.model):
        add_placeholders(tokenizer, config.model)
    if config.data.task.holds_chats:
        set_chat_template(tokenizer, config.data.chat_template)
    if is_composed(config.model):
        write_markers(tokenizer, config.model)
    model = build_model(config, tokenizer=tokenizer, device=device)
    if model.can_generate():
        ends = end_ids(tokenizer, model.generation_config)
        model.generation_config.eos_token_id = ends[0] if len(ends) == 1 else ends or None
    if draws(config):
        let_draw(model, tokenizer, Path(config.model.model_path or ""))
    freeze_parts(model, config.train.freeze)
    lora = plan_adapters(config, model)
    if lora is not None:
        add_adapters(model, lora, compute_dtype(config.train))
        if config.train.lora_base_dtype != "compute":
            hold_quantized([(module, each.weight) for module, each in adapters(model)], config.train.lora_base_dtype)
    return tokenizer, model


def _leave_towers(model: PreTrainedModel) -> None:
    """Freeze what encodes media: the data has none, and weight decay would wear away what is never used."""
    left = [tower for tower in towers(model) if any(item.requires_grad for item in tower.parameters())]
    for tower in left:
        tower.requires_grad_(False)
    if left:
        names = ", ".join(type(tower).__name__ for tower in left)
        log.info("%s: stays as it is, since the data has no media", names)


def open_data(config: Config, inputs: Inputs, model: PreTrainedModel, world: World, dp_rank: int, dp_size: int) -> Data:
    """The run's data, encoded for `model`, whose towers are frozen if the data has nothing for them. dp_rank, dp_size:
    this rank's place among those with other data. A collective call. ValueError, on all ranks: data that cannot be
    used."""
    names = [name for _, name in sorted((model.config.id2label or {}).items())]
    numbered = all(name == f"LABEL_{number}" for number, name in enumerate(names))
    data = build_data(
        _dated(config, world),
        inputs.tokenizer,
        world=world,
        dp_rank=dp_rank,
        dp_size=dp_size,
        vocab_size=num_ids(model) if config.data.task.has_tokens else 1,
        classes=Classes(model.config.num_labels, () if numbered else tuple(names)),
        processor=inputs.processor,
    )
    if config.data.task.has_tokens:
        data.deal_by(count_flops(model).batch)
        if data.has_media is False:
            _leave_towers(model)
        elif data.has_media and not data.report.media.numbers["drawn"]:
            _leave_codes(model)
    return data


def num_ids(model: PreTrainedModel) -> int:
    """The number of token ids that rows of the model may hold, codes of pictures left out."""
    codes = getattr(model, "code_decoder", None)
    return max(num_token_ids(model.config), 0 if codes is None else codes.first)


def _leave_codes(model: PreTrainedModel) -> None:
    """Freeze what the model has for codes of pictures: the data has none."""
    codes = getattr(model, "code_decoder", None)
    if codes is not None and any(item.requires_grad for item in codes.parameters()):
        codes.requires_grad_(False)
        log.info("what is for codes of pictures stays as it is, since the data has none that are drawn")


def _dated(config: Config, world: World) -> Config:
    """`config` with data.chat_date as it was when the run began: as given, as in the checkpoint that the run goes on
    from, or today's. A collective call."""
    if config.data.chat_date is not None or not config.data.task.holds_chats:
        return config

    def find() -> str:
        state = foresee(config.train.load_checkpoint_path, Path(config.train.output_dir or "")).state
        return state.get("data", {}).get("settings", {}).get("data.chat_date") or date.today().isoformat()

    found = world.broadcast(find() if world.is_main else None)
    return replace(config, data=replace(config.data, chat_date=found))


def inspect_model(config: Config, layout: Layout, model: PreTrainedModel) -> ModelStructure:
    """The structure of `model`, which lies on the meta device.

    ValueError: it cannot be trained packed, or `layout` does not divide it evenly.
    """
    if isinstance(model, Autoencoder | Denoiser):
        fit(config, layout.world)
        if isinstance(model, Autoencoder):
            return structure_without_tokens(model, model.config.net["_class_name"])
        check_shares(model, layout.ulysses)
        return denoiser_structure(model)
    check_packable(model)
    check_eager(model)
    if config.train.architecture != "lora":  # frozen weights may be of other dtypes than adapters
        check_dtypes(model)
    structure = read_structure(model, config.model.basic_modules)
    check_multimodal(structure, layout, config.train)
    check_sparse(structure, layout)
    check_rotary(structure, layout)
    check_mixers(structure, layout)
    check_positions(structure, config.data.max_seq_len)
    fit(config, layout.world, read_facts(structure, layout))
    return structure


def read_facts(structure: ModelStructure, layout: Layout) -> ModelFacts:
    """The sizes in a model that the axes of `layout` divide; ValueError where one of them cannot divide it at all."""
    num_blocks, plan = 0, read_plan(structure) if layout.tensor > 1 else None
    if layout.pipeline > 1:
        num_blocks = len(list(structure.text_model.get_submodule(trace_stages(structure).blocks).children()))
    pieces: dict[tuple, Piece] = {}  # the first of each kind
    for linear in plan.linears if plan else ():
        pieces.setdefault(linear.piece[1:], linear.piece)
    return ModelFacts(
        blocks=num_blocks,
        heads=(heads,) if (heads := getattr(structure.config, "num_attention_heads", 0)) else (),
        experts=tuple({int(module.num_experts) for module in structure.experts}),  # type: ignore[arg-type]
        pieces=tuple(pieces.values()),
        vocabulary=plan.embedding.weight.shape[0] if plan else 0,
    )


def place_model(
    config: Config, model: PreTrainedModel, structure: ModelStructure, task: Task, layout: Layout, mesh: Mesh
) -> PlacedModel:
    """Put `model`, whole and without storage, under `task`, and leave this rank's part of its depth. A collective call.

    ValueError: it cannot be split along an axis of `layout`.
    """
    if not task.may_drop:
        turn_off_dropout(model)
    by_sample = config.train.enable_batch_invariant_mode
    objective = Objective(model, task, tensor_ranks(mesh), structure=structure, by_sample=by_sample)
    plan = read_plan(structure) if layout.tensor > 1 else None
    if layout.pipeline == 1:
        rotate_by_sample(model)
        separate_mixers(structure)
        return PlacedModel(objective, structure, plan=plan)
    full_model, per_rank = copy.deepcopy(model), config.train.pipeline_stages_per_rank
    pipeline = cut_into_stages(
        objective, model, structure, layout, mesh, per_rank, has_router_loss=objective.has_router_loss
    )
    left = structure.within(model)
    rotate_by_sample(model)
    separate_mixers(left)
    return PlacedModel(objective, left, pipeline, full_model, plan)


def load_parameters(config: Config, placed: PlacedModel, mesh: Mesh, world: World) -> None:
    """Parallelize the model and give it its weights, from model.model_path or drawn from train.seed.

    train.init_device meta: first parallelize, then fill each rank's slices; else build whole on that device first.
    A collective call.
    """
    model, train = placed.model, config.train
    if isinstance(model, Denoiser):
        share_tokens(model, mesh, world)
    on_meta = train.init_device == "meta"
    if on_meta:
        parallelize(placed.objective, placed.structure, mesh, train, placed.plan)
    device = torch.device("cpu") if train.init_device == "cpu" or offloads(train) else world.device
    options: dict[str, Any] = {
        "world": world,
        "device": device,
        "broadcast": train.broadcast_model_weights_from_rank0,
        "index_path": config.model.safetensor_idx_path,
        "seed": train.seed,
    }
    if isinstance(model, Denoiser):
        source = open_folder(config).weights if config.model.model_path is not None else None
        load_denoiser(model, source, seed=train.seed, device=device, world=world)
    elif isinstance(model, Autoencoder):
        load_autoencoder(model, config.model.model_path, seed=train.seed, device=device, world=world)
    elif isinstance(model, OmniModel):
        load_parts(model, config.model.model_path, **options, full_model=placed.full_model)  # type: ignore[arg-type]
    elif config.model.model_path is None:
        init_weights(model, train.seed, device)
    else:
        load_weights(model, Path(config.model.model_path), **options, full_model=placed.full_model)
    if config.model.adapter_path is not None and train.architecture == "lora":
        path = Path(config.model.adapter_path)
        world.run_on_all_ranks(lambda: load_adapter(model, path, placed.full_model))
    else:
        init_adapters(model, train.seed)
    if on_meta:
        # What is not sharded lies where the model computes, also where its parameters are offloaded.
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(world.device)
    else:
        nn.Module.to(model, world.device)
        parallelize(placed.objective, placed.structure, mesh, train, placed.plan)
    placed.objective.train()


def make_executor(train: TrainConfig, placed: PlacedModel, mesh: Mesh, device: torch.device) -> Executor:
    """The executor of a step's micro batches on the parallelized model. A collective call."""
    sync = gradient_sync(placed.objective, mesh, train)
    sharing, place = sequence_ranks(mesh), make_placing(placed.structure)

    def prepare(micro: Batch) -> Batch:
        return split_tokens(place(micro), sharing).to(device)

    def prepare_samples(micro: Batch) -> Batch:
        # Of ranks with other samples; those that share them have as many anyway.
        others = (mesh.group("replicate"), mesh.group("shard"))
        return split_samples(equal_counts(place(micro), others, device), sharing).to(device)

    def prepare_whole(micro: Batch) -> Batch:
        return micro.to(device)

    if isinstance(placed.model, Denoiser):  # which divides latents itself
        prepare = prepare_whole
    elif train.enable_batch_invariant_mode:
        prepare = prepare_samples
    if placed.pipeline is None:
        return SequentialExecutor(placed.objective, sync, prepare)
    dtype = compute_dtype(train)
    return PipelineExecutor(placed.objective, placed.pipeline, sync, prepare, dtype, split=postpones(train))


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"
