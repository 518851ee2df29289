"""The parts of a run once it is set up, and the facts of it that reports and checkpoints give."""

from __future__ import annotations

import hashlib
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import torch
from transformers import PreTrainedModel

from tutti import __version__
from tutti.checkpoint.differences import CONFIG
from tutti.checkpoint.trained import MODEL_CONFIG
from tutti.config import Config
from tutti.config.layout import Layout
from tutti.config.yamlfile import to_yaml
from tutti.core.dist import World
from tutti.core.structure import ModelStructure
from tutti.data.loader import Data
from tutti.kinds import Inputs
from tutti.model.omni import OmniModel
from tutti.model.structure import model_class, num_params
from tutti.parallel.mesh import Mesh
from tutti.train.placement import PlacedModel


@dataclass(frozen=True)
class Run:
    """The parts of a run once it is set up."""

    config: Config
    world: World
    layout: Layout
    mesh: Mesh
    inputs: Inputs
    data: Data
    placed: PlacedModel

    def describe(self) -> dict[str, Any]:
        """The facts of a run that the report shows beside the curves."""
        model = self.placed.full_model or self.placed.model
        sizes = num_params(model)
        packages = {name: version(name) for name in ("torch", "transformers")}
        return {
            "model": model_name(model, self.placed.structure),
            "parameters": sizes.total,
            "trainable_parameters": sum(item.numel() for item in model.parameters() if item.requires_grad),
            "device": _device_name(self.world.device),
            "layout": {"ranks": self.world.size, "mesh": str(self.mesh), "accumulation": self.layout.accumulation},
            "versions": {"python": platform.python_version(), "tutti": __version__, **packages},
            "data": lambda: self.data.report,
            "steps_reason": self.data.steps_reason,
        }

    def documents(self, asked: Config) -> dict[str, str]:
        """The configurations of the run, as it was asked for, and of its model, by file name, for its checkpoints."""
        model = self.placed.full_model or self.placed.model
        return {CONFIG: to_yaml(asked), MODEL_CONFIG: model.config.to_json_string()}

    def facts(self, asked: Config) -> dict[str, Any]:
        """The facts that a checkpoint's manifest gives of the run that wrote it: also how it came out what was left to
        it."""
        digest = hashlib.sha256(to_yaml(asked).encode()).hexdigest()
        return {"layout": asdict(self.layout), "config": digest, "compute_dtype": self.config.train.compute_dtype}


def model_name(model: PreTrainedModel, structure: ModelStructure) -> str:
    """The class of a model and its model_type, as they are shown; of a composed model the classes of its parts."""
    if not isinstance(model, OmniModel):
        return f"{structure.name} ({model.config.model_type})"
    foundation, *others = (model_class(part.module).__name__ for part in model.parts())
    return f"{foundation} with {' and '.join(others)}"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"
