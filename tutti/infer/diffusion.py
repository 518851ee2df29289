"""Sampling from a diffusion model: images or videos for prompts, written to a folder.

The model can be a folder with the layout of a diffusers pipeline (an export of a run, or from diffusers), a folder of
adapters in diffusers' format (on the base that they name, or on model.model_path), a run's output folder, or a
checkpoint (using the averaged weights if it has them). Prompts are distributed over the ranks, each of which has the
whole model. The initial noise of an image depends only on infer.seed and the prompt, so that the same command gives the
same images on any number of ranks.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from tutti.checkpoint.adapter import is_adapter_folder, plan_adapters
from tutti.checkpoint.denoiser import load_denoiser
from tutti.checkpoint.denoiser_adapter import ADAPTERS, base_of_adapters, holds_adapters, load_adapters, read_lora
from tutti.checkpoint.hub import with_local_paths
from tutti.checkpoint.manager import read_model
from tutti.checkpoint.trained import TrainedModel, find_trained, is_of_run, load_trained
from tutti.config import Config, ModelConfig, TrainConfig
from tutti.core.batch import Grid
from tutti.core.dist import World
from tutti.core.keyed_random import generator
from tutti.core.pixels import frame_image
from tutti.infer.model_source import named_as_infer
from tutti.model.conditions import Conditions, read_grid
from tutti.model.denoiser import Denoiser, build_denoiser, cast_to_infer
from tutti.model.diffusion import EncodedText, Guided, default_side, join_texts, latent_shape, sample
from tutti.model.lora import add_adapters, lora_of
from tutti.model.pipeline_folder import TRANSFORMER, PipelineFolder, open_folder, read_scheduler

log = logging.getLogger(__name__)

_FPS = 16
"""Frame rate of written videos."""


class DiffusionSource(NamedTuple):
    """A diffusion model to sample from. folder: its parts. trained: the checkpoint with its weights, if any.
    adapted: for an adapter folder, a configuration that names it and its base."""

    folder: PipelineFolder
    trained: TrainedModel | None = None
    adapted: Config | None = None


def find_denoiser(config: Config, world: World) -> DiffusionSource | None:
    """The diffusion model at infer.model_path; None if it is another kind of model. Collective.

    ValueError, on all ranks: something is missing, such as the base of adapters.
    """
    path = Path(config.infer.model_path or "").expanduser()
    for folder in (path, path / "hf" / "final"):
        if (folder / TRANSFORMER / "config.json").is_file():
            described = Config(model=replace(config.model, config_path=None, model_path=str(folder)))
            with named_as_infer():
                return DiffusionSource(world.run_on_all_ranks(partial(open_folder, described)))
    if holds_adapters(path):
        adapted = with_local_paths(world.run_on_all_ranks(lambda: _adapted(path, config.model)), world)
        return DiffusionSource(world.run_on_all_ranks(lambda: open_folder(adapted)), adapted=adapted)
    folders = (path, path / "hf" / "final")
    is_folder = any(is_adapter_folder(folder) or (folder / "config.json").is_file() for folder in folders)
    if not path.is_dir() or not is_of_run(path) or is_folder:
        return None
    trained = find_trained(path, world)
    if trained.config.data.task.kind != "denoiser":
        return None
    trained = replace(trained, config=with_local_paths(trained.config, world))
    return DiffusionSource(world.run_on_all_ranks(lambda: open_folder(trained.config)), trained)


def _adapted(folder: Path, asked: ModelConfig) -> Config:
    """The configuration of the adapters in `folder`, on model.model_path or else on the base that they name."""
    with named_as_infer():
        base = asked.model_path or base_of_adapters(folder)
    if base is None:
        raise ValueError(
            f"infer.model_path: {folder / ADAPTERS} does not name the model that it was trained on; name it in "
            "model.model_path"
        )
    model = ModelConfig(
        model_path=base,
        config_path=asked.config_path,
        condition_model_path=asked.condition_model_path,
        adapter_path=str(folder),
    )
    return Config(model=model, train=TrainConfig(architecture="lora"))


def draw(config: Config, source: DiffusionSource, prompts: Sequence[str], output: Path, world: World) -> list[Path]:
    """Write an image (.png) or video (.webp) for each of `prompts` to the folder `output`; returns this rank's files.

    Collective. ValueError, on all ranks: a mistake that the user can fix.
    """
    settings = config.infer
    dtype = torch.float32 if world.device.type == "cpu" else torch.bfloat16
    with named_as_infer() if source.adapted else nullcontext():
        model = world.run_on_all_ranks(lambda: _build(config, source))
        _load(model, source, world)
    model.to(world.device).eval()
    cast_to_infer(model.net, dtype)
    family, folder = model.family, source.folder
    grid = world.run_on_all_ranks(lambda: read_grid(folder, model.net.config))
    width, height = world.run_on_all_ranks(lambda: _size(config, model, grid))
    frames = 1 + (settings.video_frames - 1) // grid.frames * grid.frames if family.video else 1
    lengths = source.trained.config.data.max_seq_len if source.trained else config.data.max_seq_len
    seed = source.trained.config.train.seed if source.trained else config.train.seed
    conditions = Conditions(folder, world.device, dtype, max_length=lengths, seed=seed)
    world.run_on_all_ranks(lambda: _make(output) if world.is_main else None)
    scheduler, written = read_scheduler(folder), []
    shape = latent_shape(family, model.net.config, grid, (width, height, frames))
    for number in range(world.rank, len(prompts), world.size):
        text, empty = (
            EncodedText(**join_texts([conditions.encode_text(caption)])).map(lambda part: part.to(world.device))
            for caption in (prompts[number], "")
        )
        noise = torch.randn(shape, generator=generator(settings.seed, "sample", prompts[number])).unsqueeze(0)
        guided = Guided(settings.image_steps, settings.image_guidance)
        latents = sample(family, model.net, scheduler, text, empty, noise.to(world.device), guided)
        written.append(write_picture(conditions.decode(latents[0]), output / f"{number + 1}"))
        log.info("%s: %s", written[-1], prompts[number])
    return written


def _build(config: Config, source: DiffusionSource) -> Denoiser:
    described = source.adapted or (config if source.trained is None else source.trained.config)
    model = build_denoiser(described, source.folder.transformer)
    if (lora := plan_adapters(described, model, read_lora)) is not None:
        add_adapters(model, lora, torch.float32)
    return model


def _load(model: Denoiser, source: DiffusionSource, world: World) -> None:
    """Load the weights of `model` from its folder or a checkpoint; for adapters, load or initialize the base too."""
    trained, cpu = source.trained, torch.device("cpu")
    if source.adapted is not None:
        load_denoiser(model, source.folder.weights, seed=0, device=cpu, world=world)
        adapters = Path(source.adapted.model.adapter_path or "")
        world.run_on_all_ranks(lambda: load_adapters(model, adapters))
    elif trained is None:
        load_denoiser(model, source.folder.transformer, seed=0, device=cpu, world=world)
    elif lora_of(model) is None:
        load_trained(trained, model, world)
    else:
        base = source.folder.weights if trained.config.model.model_path is not None else None
        load_denoiser(model, base, seed=trained.config.train.seed, device=cpu, world=world)
        read_model(trained.folder, model, world)


def _size(config: Config, model: Denoiser, grid: Grid) -> tuple[int, int]:
    """The width and height of the image: infer.image_size, or the model's default."""
    side = default_side(model.net.config, grid)
    asked = config.infer.image_size or f"{side}x{side}"
    found = re.fullmatch(r"(\d+)x(\d+)", asked)
    if found is None or not all(int(part) > 0 and int(part) % grid.step == 0 for part in found.groups()):
        raise ValueError(f"infer.image_size: {asked} must be a width and a height such as 512x512, of {grid.step} each")
    most = (getattr(model.net.config, "pos_embed_max_size", None) or 0) * grid.step
    if most and max(int(found[1]), int(found[2])) > most:
        raise ValueError(f"infer.image_size: {asked} is beyond the {most} pixels a side that the model has places for")
    return int(found[1]), int(found[2])


def _make(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output: {output} cannot be made: {error.strerror}") from error


def write_picture(pixels: Tensor, stem: Path) -> Path:
    """Write an image as PNG, or a video as animated WebP, and return its path."""
    if pixels.ndim == 3:
        path = stem.with_suffix(".png")
        frame_image(pixels).save(path)
        return path
    path = stem.with_suffix(".webp")
    first, *rest = (frame_image(frame) for frame in pixels.transpose(0, 1))
    options: dict[str, Any] = {"save_all": True, "append_images": rest, "duration": 1000 // _FPS, "lossless": True}
    Image.Image.save(first, path, **options)
    return path
