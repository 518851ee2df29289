"""`tutti export`: a training checkpoint as a complete Hugging Face folder, or as an adapter folder."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tutti.checkpoint.adapter import base_path, is_adapter_folder, read_composed
from tutti.checkpoint.hf_save import gather_full_tensors
from tutti.checkpoint.hub import with_local_paths
from tutti.checkpoint.manager import leave_unsaved, model_reader, read_model
from tutti.checkpoint.trained import find_trained, load_trained
from tutti.config import Config, ModelConfig, TrainConfig
from tutti.core.dist import World, init_world, shutdown_world
from tutti.core.files import close_new_files_to_others
from tutti.core.log import setup_logging
from tutti.kinds import kind_of
from tutti.model.denoiser import Denoiser
from tutti.model.initialize import give_storage
from tutti.model.lora import lora_of, merge
from tutti.model.processor import build_processor

log = logging.getLogger(__name__)


def export(source: str, out: str, *, merge_adapters: bool = False) -> None:
    """Write the model of `source` (a checkpoint, or an output folder: its newest complete one) to the new folder `out`.

    It runs in one process on the CPU, whatever layout wrote the checkpoint, and holds about one tensor at a time;
    merging adapters, and DoRA, need the whole model in memory. merge_adapters: write the complete model with its
    adapters merged; `source` may then also be an adapter folder, including one of peft. ValueError: there is no
    checkpoint, it is damaged, or `out` exists or cannot be written.
    """
    setup_logging(0)
    close_new_files_to_others()
    if Path(out).exists():
        raise ValueError(f"{out} exists already: give the name of a new folder")
    world = init_world(torch.device("cpu"))
    try:
        if is_adapter_folder(Path(source)):
            if not merge_adapters:
                raise ValueError(f"{source} is an adapter folder already; --merge adds it to its base model")
            _export_merged(Path(source), Path(out), world)
            log.info("wrote the model to %s", out)
            return
        try:
            trained = find_trained(Path(source), world)
        except ValueError as error:
            raise ValueError(str(error).replace("train.load_checkpoint_path: ", "").replace(", or auto", "")) from error
        # The other parts of a pipeline are copied; adapters need their base.
        copies = trained.config.data.task.kind == "denoiser" or trained.config.train.architecture == "lora"
        config = with_local_paths(trained.config, world, weights=copies)
        trained = replace(trained, config=config)
        if merge_adapters:
            # Merging into bf16 would round the changes away, and quantized weights cannot be changed.
            exact = replace(trained.config.train, compute_dtype="float32", lora_base_dtype="compute")
            trained = replace(trained, config=replace(trained.config, train=exact))
        kind, config = kind_of(trained.config), trained.config
        tokenizer, model = kind.build(config, world.device)
        # Processor files belong to a multimodal model.
        if config.data.task.has_tokens:
            tokenizer = build_processor(config, tokenizer) or tokenizer
        lora = lora_of(model)
        if merge_adapters and lora is None:
            raise ValueError(f"--merge: {source} is of a model that was trained whole, there is nothing to merge")
        if merge_adapters and isinstance(model, Denoiser):
            raise ValueError("--merge: diffusers merges a diffusion model's adapters itself (fuse_lora)")
        if lora is None:
            kind.export(config, model, tokenizer, Path(out), world, model_reader(trained.folder, model, world))
        else:
            if merge_adapters or lora.dora:
                load_trained(trained, model, world)
            else:
                leave_unsaved(trained.folder, model, world)
                give_storage(model, world.device, only_trained=True)
                read_model(trained.folder, model, world)
            if merge_adapters:
                merge(model)
            export_trained(config, model, tokenizer, Path(out), world)
    finally:
        shutdown_world()
    log.info("wrote the model to %s", out)


def _export_merged(folder: Path, out: Path, world: World) -> None:
    """Write the base of the adapter in `folder` with the adapter merged, in fp32."""
    own = str(folder) if (folder / "tokenizer_config.json").is_file() else None
    base: dict[str, Any] = {"model_path": base_path(folder), "tokenizer_path": own, "adapter_path": str(folder)}
    model_config = ModelConfig(**base, **read_composed(folder))
    adapted = TrainConfig(architecture="lora", compute_dtype="float32", broadcast_model_weights_from_rank0=False)
    config = with_local_paths(Config(model=model_config, train=adapted), world, weights=True)
    kind = kind_of(config)
    tokenizer, model = kind.build(config, world.device)
    tokenizer = build_processor(config, tokenizer) or tokenizer
    kind.load(config, model, world=world, device=world.device)
    kind.load_adapters(config, model)
    merge(model)
    export_trained(config, model, tokenizer, out, world)


def export_trained(
    config: Config,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    world: World,
    full_model: PreTrainedModel | None = None,
) -> None:
    """Write `model` to `folder`: complete, or for an adapted one its adapter. Collective.

    full_model: the complete model, on the meta device, if the ranks' models are parts of it.
    """
    kind = kind_of(config)
    if lora_of(model) is not None:
        kind.export_adapters(config, model, tokenizer, folder, world, full_model)
        return
    complete = full_model or model
    kind.export(config, complete, tokenizer, folder, world, gather_full_tensors(model, complete, world))
