"""Models that answer in speech (Qwen-Omni): their thinker is trained, and what speaks stays as it is.

Such a checkpoint holds a multimodal language model, the *thinker*, whose keys begin with `thinker.`, and beside it what
makes speech of its hidden states. Only the thinker is built and loaded. An export holds the whole model again: what
speaks is copied from the checkpoint that the thinker came from.
"""

from __future__ import annotations

import copy
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedModel

THINKER = "thinker."
"""The prefix of the thinker's keys."""


def thinker_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of what is trained of a model: its thinker's, or all of it."""
    return getattr(config, "thinker_config", config)


def keep_speech(model: PreTrainedModel, folder: Path, config: PreTrainedConfig) -> None:
    """Remember that `model` is the thinker of the model with this `config`, whose checkpoint lies in `folder`."""
    vars(model)["speech"] = folder, config


def speech_of(model: PreTrainedModel) -> tuple[Path, PreTrainedConfig] | None:
    """The folder and the config of the model whose thinker `model` is, if it is one."""
    return vars(model).get("speech")


def whole_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The config that an export of `model` has: with a thinker, that of the whole model around it."""
    found = speech_of(model)
    if found is None:
        return copy.deepcopy(model.config)
    whole = copy.deepcopy(found[1])
    whole.thinker_config = copy.deepcopy(model.config)
    return whole
