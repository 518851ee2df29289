"""The kinds of model that a run can train: language models, image autoencoders, and diffusion transformers.

Each module here is one kind, with the functions of `Kind`: how a model is built from a configuration, which checks are
done before a run, how rows become inputs, where its weights come from, and how it is exported. Training, `tutti check`
and `tutti export` do the rest for all kinds. `tutti.config.tasks` says which kind a task trains.

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
    """The tokenizer and processor that turn rows into inputs of the model.

    processor: of a multimodal model, if its folder has one; for a model of pixels the size of its images, or the
    encoder of captions and images.
    """

    tokenizer: Any
    processor: Any = None


class Kind(Protocol):
    """A module of this package."""

    def build(self, config: Config, device: torch.device) -> tuple[Any, PreTrainedModel]:
        """Build the tokenizer (None if there is none) and the model on the meta device, with the adapters in
        `config`. device: where it will run. ValueError: its files cannot be used."""

    def inspect(self, config: Config, layout: Layout, model: PreTrainedModel) -> ModelStructure:
        """The structure of `model`, which is on the meta device. ValueError: it cannot be trained packed, or
        `layout` does not divide it evenly."""

    def read_inputs(self, config: Config, tokenizer: Any, structure: ModelStructure) -> Inputs:
        """The tokenizer and processor for the rows of a model of this structure. ValueError: they cannot be used."""

    def load(
        self,
        config: Config,
        model: Any,
        *,
        world: World,
        device: torch.device,
        full_model: Any = None,
    ) -> None:
        """Allocate `model` on `device` and load its weights from model.model_path, or initialize them from
        train.seed. full_model: the complete model, on the meta device, if `model` is a part of its depth.
        Collective. ValueError, on all ranks: weights are damaged, or of another model."""

    def load_adapters(self, config: Config, model: Any, full_model: Any = None) -> None:
        """Load the adapters of `model`, whose other weights are loaded, from model.adapter_path. full_model: as in
        `load`. ValueError: they do not fit."""

    def export(self, config: Config, model: Any, tokenizer: Any, folder: Path, world: World, full: Full) -> None:
        """Write the complete `model` to `folder`, which is replaced. full: returns its tensors by name on rank 0.
        tokenizer: or its processor. Collective. ValueError, on all ranks: it cannot be written."""

    def export_adapters(
        self, config: Config, model: Any, tokenizer: Any, folder: Path, world: World, full_model: Any = None
    ) -> None:
        """Write only the adapters of `model` to `folder`, which is replaced. full_model: as in `load`. Collective.
        ValueError, on all ranks: they cannot be written."""


def kind_of(config: Config) -> Kind:
    """The kind of the model that `config` trains."""
    return cast(Kind, import_module(f"tutti.kinds.{config.data.task.kind}"))
