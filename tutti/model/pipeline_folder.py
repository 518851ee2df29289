"""The folder of a diffusion model, with the layout of diffusers' pipelines: one subfolder per part.

    transformer/     the trained part: config.json with its _class_name, and weights
    vae/             the autoencoder between images and latents; without one, the pixels are the latents
    text_encoder/    encodes captions; with tokenizer/; also _2 and _3 of both, in families with several
    scheduler/       the times of sampling
    model_index.json the pipeline's class; a part that has a text there is in that folder, relative to this one or to
                     the working directory

A folder without `transformer/` whose own config.json is a transformer's contains only that; the other parts are then in
model.condition_model_path. Text encoders are those of the family, or any language model, whose last hidden states are
then the embeddings (`tutti.model.conditions`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tutti.config import Config
from tutti.model.diffusion import FAMILIES, Family, class_named_in, family_of, require_diffusers

INDEX = "model_index.json"
TRANSFORMER, WEIGHTS_OF = "transformer", "weights"
_NUMBERED = ("", "_2", "_3")
CONDITIONS = ("vae", "scheduler", *(f"{part}{n}" for n in _NUMBERED for part in ("text_encoder", "tokenizer")))
"""The frozen parts."""


@dataclass(frozen=True)
class PipelineFolder:
    """The parts of a diffusion model, by name, each with its folder. argument: the argument that named it. root: the
    folder itself. index: its model_index.json."""

    argument: str
    root: Path
    parts: Mapping[str, Path]
    index: Mapping[str, Any] = field(default_factory=dict)

    @property
    def transformer(self) -> Path:
        return self.parts[TRANSFORMER]

    @property
    def weights(self) -> Path:
        """The folder with the transformer's weights."""
        return self.parts.get(WEIGHTS_OF, self.transformer)

    @property
    def class_name(self) -> str:
        """The class of its transformer."""
        return class_named_in(self.transformer, self.argument)

    @property
    def family(self) -> Family:
        return family_of(self.class_name, self.argument)

    def text_parts(self) -> Iterator[tuple[str, Path]]:
        """The folders of text encoders and tokenizers."""
        yield from ((name, path) for name, path in self.parts.items() if name.startswith(("text_encoder", "tokenizer")))


def open_folder(config: Config) -> PipelineFolder:
    """The folder that model.config_path (by default model.model_path) names. ValueError: it does not exist, or its
    model cannot be trained."""
    name = config.model.config_path or config.model.model_path
    argument = "model.model_path" if name == config.model.model_path else "model.config_path"
    if name is None:
        raise ValueError("model.model_path: required, or model.config_path to start from random weights")
    found = read_folder(Path(name), argument)
    if config.model.model_path is not None and config.model.model_path != name:
        weights = read_folder(Path(config.model.model_path), "model.model_path")
        found = replace(found, parts={**weights.parts, **found.parts, WEIGHTS_OF: weights.transformer})
    beside = config.model.condition_model_path
    if beside is not None:
        parts = {**read_folder(Path(beside), "model.condition_model_path", needs_transformer=False).parts}
        parts.pop(TRANSFORMER, None)
        found = replace(found, parts={**parts, **found.parts})
    _ = found.family
    if "text_encoder" not in found.parts:
        raise ValueError(
            f"{argument}: {name} has no text_encoder: add a link to it to {INDEX}, or name a folder that has one in "
            "model.condition_model_path"
        )
    return found


def read_folder(root: Path, argument: str, *, needs_transformer: bool = True) -> PipelineFolder:
    """The parts of the folder `root`. ValueError: it has no transformer, or more than one."""
    index: dict[str, Any] = {}
    if (root / INDEX).is_file():
        try:
            index = json.loads((root / INDEX).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{argument}: {root / INDEX} is not JSON: {error}") from None
    parts: dict[str, Path] = {}
    for name in (TRANSFORMER, *CONDITIONS):
        link = index.get(name)
        if isinstance(link, str):
            parts[name] = _linked(root, link, f"{argument}: {root / INDEX}: {name}")
        elif (root / name).is_dir():
            parts[name] = root / name
    if (root / "transformer_2").is_dir():
        raise ValueError(f"{argument}: {root} has a transformer_2: models of two transformers cannot be trained yet")
    if TRANSFORMER not in parts and (root / "config.json").is_file():
        parts[TRANSFORMER] = root
    if needs_transformer and TRANSFORMER not in parts:
        other = "unet, which cannot be trained" if (root / "unet").is_dir() else "transformer/ with its config.json"
        raise ValueError(f"{argument}: {root} has {'a ' if 'unet' in other else 'no '}{other}")
    return PipelineFolder(argument, root, parts, index)


def is_pipeline(root: Path) -> bool:
    """True if the folder `root` contains a diffusion transformer."""
    if (root / TRANSFORMER / "config.json").is_file():
        return True
    files = [root / name for name in (INDEX, "config.json") if (root / name).is_file()]
    contents = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return any(isinstance(one.get(TRANSFORMER), str) or one.get("_class_name") in FAMILIES for one in contents)


def _linked(root: Path, link: str, what: str) -> Path:
    for folder in (root / link, Path(link)):
        if folder.is_dir():
            return folder
    raise ValueError(f"{what} is {link}, which is no folder, neither in {root} nor here")


def read_scheduler(folder: PipelineFolder) -> Any:
    """The scheduler in the folder, or a default one for the model's kind of prediction."""
    diffusers = require_diffusers()
    if "scheduler" in folder.parts:
        path = folder.parts["scheduler"]
        try:
            name = json.loads((path / "scheduler_config.json").read_text())["_class_name"]
            return getattr(diffusers, name).from_pretrained(path)
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{folder.argument}: no scheduler can be read in {path}: {error}") from None
    if folder.family.prediction == "eps":
        return diffusers.DPMSolverMultistepScheduler()
    return diffusers.FlowMatchEulerDiscreteScheduler()
