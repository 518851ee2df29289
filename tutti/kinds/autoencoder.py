"""Autoencoders of images: VQModel and AutoencoderKL of diffusers, which have neither tokens nor a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tutti.checkpoint.autoencoder import export_autoencoder, load_autoencoder
from tutti.checkpoint.hf_save import Full
from tutti.config import Config
from tutti.config.layout import Layout, fit
from tutti.core.dist import World
from tutti.core.pixels import Square
from tutti.core.structure import ModelStructure, structure_without_tokens
from tutti.kinds import Inputs
from tutti.model.autoencoder import Autoencoder, build_autoencoder


def build(config: Config, device: torch.device) -> tuple[None, Autoencoder]:
    return None, build_autoencoder(config)


def inspect(config: Config, layout: Layout, model: Autoencoder) -> ModelStructure:
    fit(config, layout.world)
    return structure_without_tokens(model, model.config.net["_class_name"])


def read_inputs(config: Config, tokenizer: Any, structure: ModelStructure) -> Inputs:
    return Inputs(tokenizer, Square(structure.config.side))


def load(
    config: Config, model: Autoencoder, *, world: World, device: torch.device, full_model: Autoencoder | None = None
) -> None:
    load_autoencoder(model, config.model.model_path, seed=config.train.seed, device=device, world=world)


def load_adapters(config: Config, model: Autoencoder, full_model: Autoencoder | None = None) -> None:
    raise AssertionError("model.adapter_path is refused for autoencoders")


def export(config: Config, model: Autoencoder, tokenizer: Any, folder: Path, world: World, full: Full) -> None:
    export_autoencoder(model, folder, world, full)


def export_adapters(
    config: Config,
    model: Autoencoder,
    tokenizer: Any,
    folder: Path,
    world: World,
    full_model: Autoencoder | None = None,
) -> None:
    raise AssertionError("train.architecture lora is refused for autoencoders")
