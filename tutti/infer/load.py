"""Load the model at `infer.model_path` for generation: weights, tokenizer, chat template, limits.

The path may be a Hugging Face folder, an adapter folder, a training checkpoint
(`OUTPUT_DIR/checkpoints/global_step_N`), or a run's `train.output_dir`, of which the final export is used, or else the
newest complete checkpoint. A checkpoint describes its model, and how chats are rendered.

With several ranks, each reads and holds only its slices (FSDP2); a block is gathered when it runs.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from tutti.attention.interface import attention_by_part
from tutti.attention.kv_cache import register
from tutti.checkpoint import manifest
from tutti.checkpoint.adapter import load_adapter, plan_adapters
from tutti.checkpoint.hf_files import weights_digest
from tutti.checkpoint.hf_load import load_weights
from tutti.checkpoint.omni import load_parts
from tutti.checkpoint.trained import load_trained
from tutti.config import Config, DataConfig
from tutti.core.compute_dtype import compute_dtype, slow_dtypes
from tutti.core.dist import World
from tutti.core.files import sha256
from tutti.core.hub import name_in_cache
from tutti.data.media_processor import MediaProcessor
from tutti.data.template import ChatTemplate, read_template
from tutti.infer.drawing import Drawing, GuidedLogits, drawing_of, hiding
from tutti.infer.flow_painter import FlowPainter, LedLogits
from tutti.infer.generate import CachedLogits, NextLogits
from tutti.infer.hf_generate import GeneratedLogits, needs_generate
from tutti.infer.media import MediaInputs, media_inputs
from tutti.infer.model_source import ModelSource, data_of, find_source, named_as_infer
from tutti.infer.prompts import PromptFormat
from tutti.model.attention_arguments import pass_arguments
from tutti.model.build import build_model, load_model_config
from tutti.model.diffusion import Guided
from tutti.model.drawing import let_draw, ready_folder, write_drawn
from tutti.model.fuse_modules import fuse_modules
from tutti.model.lora import add_adapters
from tutti.model.multimodal import MultimodalForward
from tutti.model.omni import OmniModel
from tutti.model.omni_config import is_composed
from tutti.model.omni_processor import add_placeholders, write_markers
from tutti.model.positions import rotate_by_sample
from tutti.model.processor import build_processor
from tutti.model.sparse import is_sparse
from tutti.model.structure import blocks, num_params, read_structure, text_model, towers
from tutti.model.tokenizer import build_tokenizer, end_ids, set_chat_template
from tutti.parallel.fsdp import units_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A model, ready to generate.

    logits: computes its next logits. form: how prompts are written. stop_ids: tokens that end an answer. weights: a
    digest of its weights and their dtype. drawing: for a model that draws.
    """

    model: PreTrainedModel
    logits: NextLogits
    form: PromptFormat
    stop_ids: frozenset[int]
    weights: str
    drawing: Drawing | None = None


def load_model(config: Config, world: World) -> LoadedModel:
    """Load the model that `config.infer` names. Collective.

    ValueError, on all ranks: it does not exist, is damaged, or does not generate text.
    """
    source = find_source(config, world)
    slow = slow_dtypes(world)
    tokenizer, model = world.run_on_all_ranks(lambda: _build(config, source, world.device, slow))
    data = data_of(config, source)
    processor = world.run_on_all_ranks(lambda: _media_processor(data, source, tokenizer, model))
    _shard(model, world)
    with named_as_infer():
        weights = _fill(model, source, world)
    model.eval()
    rotate_by_sample(model)
    fuse_modules(model, world.device, model.dtype)
    is_chat = _is_chat(config, source, tokenizer)
    template = world.run_on_all_ranks(lambda: _template(config, source, tokenizer))
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    name, _ = name_in_cache(config.infer.model_path or "") or (config.infer.model_path, None)
    log.info("%s: %s, %s", name, _described(model), world.device)
    stop_ids = frozenset(end_ids(tokenizer, model.generation_config))
    logits = _next_logits(model, stop_ids, processor, world.device)
    painter = world.run_on_all_ranks(lambda: _painter(config, model, tokenizer, world))
    found = world.run_on_all_ranks(lambda: _drawing(config, model, tokenizer, world, painter))
    drawing, encode = (None, None) if found is None else (found[0], found[1].encode)
    if painter is not None:
        painter.begin()
        logits = LedLogits(logits, model.get_output_embeddings(), model.config.first_code, painter)
    elif drawing is not None and drawing.draws and config.infer.image_guidance != 1.0:
        logits = GuidedLogits(logits, drawing, config.infer.image_guidance, hiding(tokenizer, model))
    folders = data.media_root, data.row_template
    return LoadedModel(
        model=model,
        logits=logits,
        form=PromptFormat(
            tokenizer, template, is_chat, context, processor, *folders, drawing, encode, config.infer.stop
        ),
        stop_ids=stop_ids,
        weights=f"{weights} {model.dtype}",
        drawing=drawing,
    )


def _painter(config: Config, model: Any, tokenizer: Any, world: World) -> FlowPainter | None:
    """The painter for a model with a diffusion decoder."""
    if getattr(model, "flow", None) is None:
        return None
    settings = Guided(config.infer.image_steps, config.infer.image_guidance)
    return FlowPainter(model, world.device, settings, config.infer.seed, hiding(tokenizer, model))


def _drawing(config: Config, model: Any, tokenizer: Any, world: World, painter: FlowPainter | None) -> Any:
    """The model's `Drawing`, with the tokenizer that encodes images; None if it does not draw."""
    found = drawing_of(model, tokenizer, world.device, config.infer.image_temperature, painter)
    if found is not None and needs_generate(model):
        raise ValueError("infer.model_path: a model of this family draws in training alone yet")
    return found


def _build(
    asked: Config, source: ModelSource, device: torch.device, slow: frozenset[torch.dtype]
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Build the tokenizer, and the model on the meta device, with the attention for generation.

    asked: its train.compute_dtype is the dtype to compute in; with auto it is that of the files, or fp32 if that is one
    of `slow`.
    """
    with named_as_infer():
        config = replace(source.config, model=replace(source.config.model, attn_implementation="sdpa"))
        tokenizer = build_tokenizer(config)
        if is_composed(config.model):
            add_placeholders(tokenizer, config.model)
        dtype = _dtype(source, load_model_config(config))
        if asked.train.compute_dtype != "auto":
            dtype = compute_dtype(asked.train)
        elif dtype in slow:
            log.info("computing in float32: products in %s, which the weights are held in, are slower here", dtype)
            dtype = torch.float32
        model = build_model(config, tokenizer=tokenizer, device=device, dtype=dtype)
        if (folder := ready_folder(config.model)) is not None:
            let_draw(model, tokenizer, folder, data_of(asked, source))
        lora = plan_adapters(config, model)
        if lora is not None:
            add_adapters(model, lora, model.dtype)
    if needs_generate(model):
        if is_sparse(model.config):
            raise ValueError(
                "infer.model_path: native-sparse attention runs in models that Tutti generates with itself"
            )
        model.set_attn_implementation(_own_attention(model))
    else:
        model.set_attn_implementation(attention_by_part(model.config, register()))
        pass_arguments(text_model(model), blocks(model))
    return tokenizer, model


def _own_attention(model: PreTrainedModel) -> dict[str, str]:
    """transformers' own attention for each part of a model: sdpa, or eager if the part supports no other."""
    best = "sdpa" if model._supports_sdpa else "eager"
    slow = {
        id(part.config) for part in model.modules() if isinstance(part, PreTrainedModel) and not part._supports_sdpa
    }
    parts = {name: getattr(model.config, name, None) for name in model.config.sub_configs}
    return {"": best} | {
        name: "eager" if id(part) in slow else best for name, part in parts.items() if part is not None
    }


def _media_processor(data: DataConfig, source: ModelSource, tokenizer: Any, model: Any) -> MediaProcessor | None:
    """The processor of a multimodal model, with the limits in `data`; None if it has none."""
    takes = _takes_media(model) or getattr(model, "code_decoder", None) is not None
    processor = build_processor(replace(source.config, data=data), tokenizer) if takes else None
    return None if processor is None else MediaProcessor(processor, data)


def _takes_media(model: PreTrainedModel) -> bool:
    return model.config.get_text_config() is not model.config and bool(towers(model))


def _next_logits(
    model: PreTrainedModel, stop_ids: frozenset[int], processor: MediaProcessor | None, device: torch.device
) -> NextLogits:
    """The way to compute the model's logits, with media if it is multimodal."""
    if needs_generate(model):
        return GeneratedLogits(model, stop_ids, MediaInputs(processor))
    if not _takes_media(model):
        return CachedLogits(lambda inputs, extras: model(**inputs), device, MediaInputs())
    structure = read_structure(model)
    multimodal = MultimodalForward(structure, None)
    return CachedLogits(
        lambda inputs, extras: multimodal.generate(model, inputs, extras),
        device,
        media_inputs(structure, processor),
    )


def _dtype(source: ModelSource, model_config: PreTrainedConfig) -> torch.dtype:
    """The dtype of the model's files, of an adapter's base, or of the run's checkpoints."""
    if source.trained is None and any(
        name.endswith("ForSequenceClassification") for name in model_config.architectures or ()
    ):
        raise ValueError("infer.model_path: the model is a classifier, which generates no text")
    if source.trained is not None and source.config.train.architecture != "lora":
        return torch.float32 if source.config.train.enable_mixed_precision else torch.bfloat16
    return model_config.dtype if isinstance(model_config.dtype, torch.dtype) else torch.float32


def _shard(model: PreTrainedModel, world: World) -> None:
    """Shard the parameters over the ranks."""
    if world.size == 1:
        return
    mesh = init_device_mesh(world.device.type, (world.size,))
    for unit in units_of(block for _, block in blocks(model)):
        fully_shard(unit, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _fill(model: PreTrainedModel, source: ModelSource, world: World) -> str:
    """Load the weights of `source` into `model`, and return their digest. Collective."""
    settings = source.config.model
    parts = [Path(path) for path in (settings.model_path, settings.adapter_path) if path is not None]
    digests = world.broadcast(
        world.run_on_all_ranks(lambda: [weights_digest(part) for part in parts] if world.is_main else [])
    )
    if source.trained is not None:
        folder = source.trained.folder
        load_trained(replace(source.trained, config=source.config), model, world)
        whole = source.config.train.architecture != "lora"
        held = world.run_on_all_ranks(lambda: sha256(folder / manifest.NAME))
        return held if whole else " ".join([*digests, held])
    if isinstance(model, OmniModel):
        load_parts(model, settings.model_path, world=world, device=world.device, broadcast=False)
        drawn = model.drawing_folder if model.flow is None else model.flow.weights
        beside = [folder for folder in (*model.weights.values(), drawn) if folder]
        digests += map(weights_digest, beside)
    else:
        load_weights(model, settings.model_path or "", world=world, broadcast=False)
    if settings.adapter_path is not None:
        world.run_on_all_ranks(lambda: load_adapter(model, Path(settings.adapter_path or "")))
    return " ".join(digests)


def _template(config: Config, source: ModelSource, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate | None:
    """The chat template, which is also set on the tokenizer; None if nothing defines how a turn ends."""
    wanted = config.infer.chat_template
    name = source.template if wanted in ("default", "none") else wanted
    if name == "default" and not tokenizer.chat_template and tokenizer.eos_token is None:
        return None
    set_chat_template(tokenizer, name, "infer.chat_template")
    if is_composed(source.config.model):
        write_markers(tokenizer, source.config.model)
    write_drawn(tokenizer)
    return read_template(tokenizer)


def _is_chat(config: Config, source: ModelSource, tokenizer: PreTrainedTokenizerBase) -> bool:
    if config.infer.chat_template != "default":
        return config.infer.chat_template != "none"
    return source.of_chats or bool(tokenizer.chat_template)


def _described(model: PreTrainedModel) -> str:
    dtype = str(model.dtype).removeprefix("torch.")
    return f"{model.config.model_type} of {num_params(model).total:,} parameters in {dtype}"
