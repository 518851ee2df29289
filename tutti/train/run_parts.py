"""The parts of a run after set-up, and the facts about it for reports and checkpoints."""

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
    """The parts of a run after set-up."""

    config: Config
    world: World
    layout: Layout
    mesh: Mesh
    inputs: Inputs
    data: Data
    placed: PlacedModel

    def describe(self) -> dict[str, Any]:
        """The facts about a run that the report shows next to the curves."""
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
        """The documents that each checkpoint contains, by file name: the run's configuration as the user gave it, and
        the model's."""
        model = self.placed.full_model or self.placed.model
        return {CONFIG: to_yaml(asked), MODEL_CONFIG: model.config.to_json_string()}

    def facts(self, asked: Config) -> dict[str, Any]:
        """The facts about the run in a checkpoint's manifest, including the values chosen for settings left to
        `auto`."""
        digest = hashlib.sha256(to_yaml(asked).encode()).hexdigest()
        return {"layout": asdict(self.layout), "config": digest, "compute_dtype": self.config.train.compute_dtype}


def model_name(model: PreTrainedModel, structure: ModelStructure) -> str:
    """The name to show for a model: its class and model_type, or for a composed model the classes of its parts."""
    if not isinstance(model, OmniModel):
        return f"{structure.name} ({model.config.model_type})"
    foundation, *others = (model_class(part.module).__name__ for part in model.parts())
    return f"{foundation} with {' and '.join(others)}"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"
