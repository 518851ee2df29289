"""Files of an export of a composed model beside the folders of its parts: how they are joined, and the projectors.

final/                 the foundation's own complete folder, with the tokenizer
  omni.yaml            the encoders' settings, by kind
  encoders/image/      the tower's own complete folder, with its image processor
    projector.safetensors
  decoders/image/        the tokenizer of pictures that it draws by, as it was
    codes.safetensors    the codes' embeddings and head
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from safetensors.torch import save_file
from torch import Tensor

from tutti.core.dist import World
from tutti.core.files import write_synced
from tutti.model.omni import OmniModel
from tutti.model.omni_config import DECODER, IMAGE_SIZE, OMNI, SETTINGS
from tutti.model.vq import copy_tokenizer

PROJECTOR = "projector.safetensors"


CODE_DECODER = "codes.safetensors"


class Joins(NamedTuple):
    """settings: of each encoder, by kind. projectors: the tensors of each encoder's projector, by name within it.
    drawing_folder, drawing_size, codes: of a model that draws, the folder of its tokenizer of pictures, their side
    where that has none of its own, and the tensors of what the model has for their codes."""

    settings: Mapping[str, Mapping[str, Any]]
    projectors: Mapping[str, Mapping[str, Tensor]]
    drawing_folder: Path | None = None
    drawing_size: int | None = None
    codes: Mapping[str, Tensor] = {}


def joins_of(model: OmniModel, full: Callable[[str], Tensor], world: World) -> Joins:
    """Collect what joins the parts of `model`, whose full tensors `full` gives by name on rank 0. Collective."""
    projectors: dict[str, dict[str, Tensor]] = {}
    for kind, encoder in model.encoders.items():
        names = list(encoder.projector.state_dict())  # type: ignore[union-attr]
        projectors[kind] = {name: full(f"encoders.{kind}.projector.{name}") for name in names}
    encoders: Any = model.config.encoders
    settings = {kind: {name: encoders[kind][name] for name in SETTINGS} for kind in projectors}
    codes = {name: full(f"decoders.{name}") for name in model.decoders.state_dict()}
    return Joins(settings, projectors, model.drawing_folder, model.drawing_size, codes)


def write_joins(joins: Joins, folder: Path) -> None:
    """Write them to the folder of an export, which has those of its parts."""
    content: dict[str, Any] = {"encoders": dict(joins.settings)}
    if joins.drawing_folder is not None:
        size = {} if joins.drawing_size is None else {IMAGE_SIZE: joins.drawing_size}
        content["decoders"] = {"image": size}
        place = folder / DECODER
        place.mkdir(parents=True, exist_ok=True)
        copy_tokenizer(joins.drawing_folder, place, joins.drawing_size)
        codes = {name.removeprefix("image."): tensor.contiguous() for name, tensor in joins.codes.items()}
        save_file(codes, place / CODE_DECODER, metadata={"format": "pt"})
    write_synced(folder / OMNI, yaml.safe_dump(content, sort_keys=False))
    for kind, tensors in joins.projectors.items():
        if tensors:
            contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
            save_file(contiguous, folder / "encoders" / kind / PROJECTOR, metadata={"format": "pt"})
