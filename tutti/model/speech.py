"""Models that answer in speech (Qwen-Omni): their thinker is trained, and the speech modules stay as they are.

Such a checkpoint contains a multimodal language model, the *thinker*, whose keys begin with `thinker.`, and modules
that turn its hidden states into speech. Only the thinker is built and loaded. An export contains the whole model again:
the speech modules are copied from the checkpoint that the thinker came from.
"""

from __future__ import annotations

import copy
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedModel

THINKER = "thinker."
"""The prefix of the thinker's keys."""


def thinker_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the trained part of a model: its thinker's, or all of it."""
    return getattr(config, "thinker_config", config)


def keep_speech(model: PreTrainedModel, folder: Path, config: PreTrainedConfig) -> None:
    """Record that `model` is the thinker of the model with this `config`, whose checkpoint is in `folder`."""
    vars(model)["speech"] = folder, config


def speech_of(model: PreTrainedModel) -> tuple[Path, PreTrainedConfig] | None:
    """The folder and the config of the model whose thinker `model` is; None if it is not a thinker."""
    return vars(model).get("speech")


def whole_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The config for an export of `model`; for a thinker, that of the whole model around it."""
    found = speech_of(model)
    if found is None:
        return copy.deepcopy(model.config)
    whole = copy.deepcopy(found[1])
    whole.thinker_config = copy.deepcopy(model.config)
    return whole
