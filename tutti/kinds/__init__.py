"""The kinds of model that a run trains: language models, autoencoders of images, and diffusion transformers.

Each module here is one kind, and has the functions of `Kind`: how a model is built from a configuration, what of it is
looked at before a run, what its rows are made inputs with, where its weights come from, and what is written of it.
Training, `tutti check` and `tutti export` do the rest for all kinds alike. `tutti.config.tasks` says which kind a
task trains.

To add a kind: write its module, name it in the row of its task, and test it.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch
from transformers import PreTrainedModel

from tutti.checkpoint.hf_save import Full
from tutti.config import Config
from tutti.config.layout import Layout
from tutti.core.dist import World
from tutti.core.structure import ModelStructure


class Inputs(NamedTuple):
    """The means of turning rows into inputs of the model.

    processor: of a model that takes media, where its folder has one; of one of pixels alone the size of its images, or
    the encoder of its captions and pictures.
    """

    tokenizer: Any
    processor: Any = None


class Kind(Protocol):
    """A module of this package."""

    def build(self, config: Config, device: torch.device) -> tuple[Any, PreTrainedModel]:
        """The tokenizer, None where there is none, and the model on the meta device, with the adapters that `config`
        asks for. device: where it will run. ValueError: its files cannot be used."""

    def inspect(self, config: Config, layout: Layout, model: PreTrainedModel) -> ModelStructure:
        """The structure of `model`, which lies on the meta device. ValueError: it cannot be trained packed, or `layout`
        does not divide it evenly."""

    def read_inputs(self, config: Config, tokenizer: Any, structure: ModelStructure) -> Inputs:
        """The means of turning rows into the inputs of a model of this structure. ValueError: they cannot be used."""

    def load(
        self,
        config: Config,
        model: Any,
        *,
        world: World,
        device: torch.device,
        full_model: Any = None,
    ) -> None:
        """Give `model` storage on `device` and its weights, from model.model_path or drawn from train.seed.
        full_model: the complete model, without storage, where `model` is a part of its depth. Collective. ValueError,
        on all ranks: weights that are damaged, or of another model."""

    def load_adapters(self, config: Config, model: Any, full_model: Any = None) -> None:
        """Fill the adapters of `model`, whose other weights are loaded, from model.adapter_path. full_model: as in
        `load`. ValueError: they do not fit."""

    def export(self, config: Config, model: Any, tokenizer: Any, folder: Path, world: World, full: Full) -> None:
        """Write the complete `model`, whose tensors `full` gives by name on rank 0, to `folder`, which is replaced.
        tokenizer: or its processor. Collective. ValueError, on all ranks: it cannot be written."""

    def export_adapters(
        self, config: Config, model: Any, tokenizer: Any, folder: Path, world: World, full_model: Any = None
    ) -> None:
        """Write the adapters of `model` alone to `folder`, which is replaced. full_model: as in `load`. Collective.
        ValueError, on all ranks: they cannot be written."""


def kind_of(config: Config) -> Kind:
    """The kind of the model that `config` trains."""
    return cast(Kind, import_module(f"tutti.kinds.{config.data.task.kind}"))
