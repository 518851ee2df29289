"""Language models of Hugging Face, including multimodal and composed ones."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from tutti.checkpoint.adapter import export_adapter, load_adapter, plan_adapters
from tutti.checkpoint.hf_files import find_index, read_index
from tutti.checkpoint.hf_load import load_weights
from tutti.checkpoint.hf_save import Full, export_hf
from tutti.checkpoint.omni import load_parts
from tutti.config import Config
from tutti.config.layout import Layout, ModelFacts, Piece, fit
from tutti.core.compute_dtype import compute_dtype
from tutti.core.dist import World
from tutti.core.hub import named_base
from tutti.core.structure import ModelStructure
from tutti.kinds import Inputs
from tutti.model.build import build_model, check_composed, check_dtypes, check_eager, check_packable, language_config
from tutti.model.drawing import draws, let_draw
from tutti.model.families import untested
from tutti.model.initialize import init_weights
from tutti.model.lora import adapters, add_adapters
from tutti.model.mixers import check_mixers
from tutti.model.multimodal import check_multimodal
from tutti.model.omni import OmniModel
from tutti.model.omni_config import is_composed
from tutti.model.omni_processor import add_placeholders, write_markers
from tutti.model.positions import check_positions, check_rotary
from tutti.model.processor import build_processor
from tutti.model.quantized import hold_quantized
from tutti.model.sparse import check_sparse
from tutti.model.stage_trace import tensor_plan, trace_stages
from tutti.model.structure import freeze_parts, read_structure
from tutti.model.tokenizer import build_tokenizer, end_ids, set_chat_template

log = logging.getLogger(__name__)


def build(config: Config, device: torch.device) -> tuple[Any, PreTrainedModel]:
    check_composed(config)
    if config.model.safetensor_idx_path is not None:
        # Checked early, since otherwise an export at the end of training would be the first to need it.
        read_index(Path(config.model.safetensor_idx_path))
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
        let_draw(model, tokenizer, Path(config.model.model_path or ""), config.data)
    freeze_parts(model, config.train.freeze)
    lora = plan_adapters(config, model)
    if lora is not None:
        add_adapters(model, lora, compute_dtype(config.train))
        if config.train.lora_base_dtype != "compute":
            hold_quantized([(module, each.weight) for module, each in adapters(model)], config.train.lora_base_dtype)
    return tokenizer, model


def inspect(config: Config, layout: Layout, model: PreTrainedModel) -> ModelStructure:
    check_packable(model)
    check_eager(model)
    if config.train.architecture != "lora":  # frozen weights may have other dtypes than adapters
        check_dtypes(model)
    structure = read_structure(model, config.model.basic_modules)
    check_multimodal(structure, layout, config.train)
    check_sparse(structure, layout)
    check_rotary(structure, layout)
    check_mixers(structure, layout)
    check_positions(structure, config.data.max_seq_len)
    fit(config, layout.world, read_facts(structure, layout))
    if (problem := untested(language_config(model.config))) is not None:
        log.info("%s", problem)
    return structure


def read_facts(structure: ModelStructure, layout: Layout) -> ModelFacts:
    """The sizes in a model that the axes of `layout` divide. ValueError: an axis cannot divide it at all."""
    num_blocks, plan = 0, tensor_plan(structure, layout)
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


def read_inputs(config: Config, tokenizer: Any, structure: ModelStructure) -> Inputs:
    return Inputs(tokenizer, build_processor(config, tokenizer) if structure.towers or draws(config) else None)


def load(config: Config, model: Any, *, world: World, device: torch.device, full_model: Any = None) -> None:
    path, train = config.model.model_path, config.train
    options: dict[str, Any] = {
        "world": world,
        "device": device,
        "broadcast": train.broadcast_model_weights_from_rank0,
        "index_path": config.model.safetensor_idx_path,
        "seed": train.seed,
        "full_model": full_model,
    }
    if isinstance(model, OmniModel):
        load_parts(model, path, **options)
    elif path is None:
        init_weights(model, train.seed, device)
    else:
        load_weights(model, Path(path), **options)


def load_adapters(config: Config, model: PreTrainedModel, full_model: PreTrainedModel | None = None) -> None:
    load_adapter(model, Path(config.model.adapter_path or ""), full_model)


def export(config: Config, model: PreTrainedModel, tokenizer: Any, folder: Path, world: World, full: Full) -> None:
    index_path = find_index(config.model.model_path, config.model.safetensor_idx_path)
    export_hf(model, folder, tokenizer, world=world, full=full, index_path=index_path)


def export_adapters(
    config: Config,
    model: PreTrainedModel,
    tokenizer: Any,
    folder: Path,
    world: World,
    full_model: PreTrainedModel | None = None,
) -> None:
    base, revision = named_base(config.model.model_path or config.model.config_path)
    composed = config.model if isinstance(model, OmniModel) else None
    named: dict[str, Any] = {"base": base, "revision": revision, "composed": composed}
    export_adapter(model, folder, tokenizer, world=world, full_model=full_model, **named)
