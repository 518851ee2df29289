"""Trained models, read from a run's checkpoints without the rest of the run's state: for export and inference.

A checkpoint contains the configuration of the run that wrote it and of its model, since what is around it (the output
folder's config.yaml, the folder of the model's config) may have changed. Only the tokenizer, and the base model of
adapters, are read from where the run read them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from tutti.checkpoint.differences import CONFIG
from tutti.checkpoint.hf_load import load_weights
from tutti.checkpoint.manager import find_checkpoint, leave_unsaved, read_model
from tutti.checkpoint.manifest import Manifest
from tutti.checkpoint.omni import load_parts
from tutti.config import Config
from tutti.config.load import load
from tutti.core.dist import World
from tutti.model.initialize import init_weights, materialize
from tutti.model.lora import lora_of
from tutti.model.omni import OmniModel

MODEL_CONFIG = "model_config.json"


@dataclass(frozen=True)
class TrainedModel:
    """A checkpoint whose files are verified, and the configuration that describes its model and tokenizer; its
    train.compute_dtype is the dtype that the run computed in."""

    folder: Path
    config: Config


def is_of_run(path: Path) -> bool:
    """True if `path` is the output folder of a run, or in one as a checkpoint."""
    return any((folder / CONFIG).is_file() for folder in (path, *path.absolute().parents[:2]))


def find_trained(path: Path, world: World) -> TrainedModel:
    """The checkpoint at `path`, or the newest complete one of an output folder. Collective.

    ValueError, on every rank: there is none, it is damaged, or it does not describe its model.
    """
    folder, found = find_checkpoint(path, world)
    return TrainedModel(folder, world.run_on_all_ranks(lambda: _config_of(folder, found)))


def _config_of(folder: Path, found: Manifest) -> Config:
    # Old checkpoints do not contain their configuration; the output folder has one.
    owners = [owner for owner in (folder, folder.absolute().parents[1]) if (owner / CONFIG).is_file()]
    if not owners:
        raise ValueError(f"there is no {CONFIG} in {folder}, nor in an output folder that it lies in")
    config = load([str(owners[0] / CONFIG)], verb=None)
    model, train = config.model, config.train
    train = replace(train, compute_dtype=found.facts.get("compute_dtype", "float32"))
    of_folder = config.data.task.kind == "denoiser"  # a diffusion model's config is in one part of its folder
    if (folder / MODEL_CONFIG).is_file() and train.architecture != "lora" and not of_folder:
        tokenizer = model.tokenizer_path or model.model_path or model.config_path
        model = replace(model, tokenizer_path=tokenizer, config_path=str(folder / MODEL_CONFIG))
    return replace(config, model=model, train=train)


def load_trained(trained: TrainedModel, model: PreTrainedModel, world: World) -> None:
    """Load the checkpoint's weights into `model`, which `trained.config` describes and which is on the meta device.
    Collective.

    A checkpoint of adapters contains nothing else: the base model is read from where the run read it, or initialized.
    """
    config = trained.config
    if lora_of(model) is None:
        materialize(model, world.device)
    elif isinstance(model, OmniModel):
        options: dict[str, Any] = {"world": world, "device": world.device, "broadcast": False}
        load_parts(model, config.model.model_path, **options, seed=config.train.seed)
    elif config.model.model_path is None:
        init_weights(model, config.train.seed, world.device)
    else:
        load_weights(model, config.model.model_path, world=world, broadcast=False, seed=config.train.seed)
    leave_unsaved(trained.folder, model, world)
    read_model(trained.folder, model, world)
