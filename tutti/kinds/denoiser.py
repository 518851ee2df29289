"""Diffusion transformers of diffusers, in folders that hold the parts of a pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tutti.checkpoint import denoiser as files
from tutti.checkpoint import denoiser_adapter
from tutti.checkpoint.adapter import plan_adapters
from tutti.checkpoint.hf_save import Full
from tutti.config import Config
from tutti.config.layout import Layout, fit
from tutti.core.compute_dtype import compute_dtype
from tutti.core.dist import World
from tutti.core.hub import named_base
from tutti.core.structure import ModelStructure
from tutti.data.captions import CaptionEncoder
from tutti.data.source import text_columns
from tutti.kinds import Inputs
from tutti.model.conditions import read_grid
from tutti.model.denoiser import Denoiser, build_denoiser, denoiser_structure
from tutti.model.denoiser_parallel import check_shares
from tutti.model.lora import add_adapters
from tutti.model.pipeline_folder import open_folder
from tutti.model.structure import freeze_parts


def build(config: Config, device: torch.device) -> tuple[None, Denoiser]:
    model = build_denoiser(config, open_folder(config).transformer)
    freeze_parts(model, config.train.freeze)
    if (lora := plan_adapters(config, model, denoiser_adapter.read_lora)) is not None:
        add_adapters(model, lora, compute_dtype(config.train))
    return None, model


def inspect(config: Config, layout: Layout, model: Denoiser) -> ModelStructure:
    fit(config, layout.world)
    check_shares(model, layout.ulysses)
    return denoiser_structure(model, config.model.basic_modules)


def read_inputs(config: Config, tokenizer: Any, structure: ModelStructure) -> Inputs:
    folder, net = open_folder(config), structure.text_model.net
    grid = read_grid(folder, net.config)  # type: ignore[union-attr]
    return Inputs(
        tokenizer, CaptionEncoder(text_columns(config), grid, config.data, config.train.ulysses_parallel_size)
    )


def load(
    config: Config, model: Denoiser, *, world: World, device: torch.device, full_model: Denoiser | None = None
) -> None:
    source = open_folder(config).weights if config.model.model_path is not None else None
    files.load_denoiser(model, source, seed=config.train.seed, device=device, world=world)


def load_adapters(config: Config, model: Denoiser, full_model: Denoiser | None = None) -> None:
    denoiser_adapter.load_adapters(model, Path(config.model.adapter_path or ""))


def export(config: Config, model: Denoiser, tokenizer: Any, folder: Path, world: World, full: Full) -> None:
    files.export_pipeline(model, open_folder(config), folder, world, full, seed=config.train.seed)


def export_adapters(
    config: Config, model: Denoiser, tokenizer: Any, folder: Path, world: World, full_model: Denoiser | None = None
) -> None:
    denoiser_adapter.export_adapters(model, folder, world, *named_base(config.model.model_path))
