"""The model that a run trained, read from one of its checkpoints without the rest of the run's state."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from tutti.checkpoint.hf_load import load_weights
from tutti.checkpoint.manager import load_model_only
from tutti.config import Config
from tutti.core.dist import World
from tutti.model.initial import init_weights, materialize
from tutti.model.lora import lora_of


def config_path(source: Path) -> Path:
    """The configuration of the run that `source`, an output folder or a checkpoint, is of. ValueError: there is none.

    A checkpoint has one of its own, which is what the model was trained by, whatever its folder's has become.
    """
    for folder in (source, *source.absolute().parents[:2]):
        if (folder / "config.yaml").is_file():
            return folder / "config.yaml"
    raise ValueError(f"{source} is neither an output folder of a run (with its config.yaml) nor a checkpoint in one")


def load_trained(config: Config, source: Path, model: PreTrainedModel, world: World) -> Path:
    """Give `model`, which has no storage, what the run of `config` had trained, and return the checkpoint's folder.

    source: a checkpoint, or an output folder, whose newest whole one is taken. A checkpoint of adapters holds no more
    than these: the base model is read from where the run read it. Collective.
    """
    if lora_of(model) is None:
        materialize(model, world.device)
    elif config.model.model_path is None:
        init_weights(model, config.train.seed, world.device)
    else:
        load_weights(model, config.model.model_path, world=world, broadcast=False, seed=config.train.seed)
    return load_model_only(source, model, world)
