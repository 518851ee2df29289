"""Files of an export of a composed model, besides the folders of its parts: how they are connected, and the projectors.

final/                   the foundation's own complete folder, with the tokenizer
  omni.yaml              the encoders' settings, by kind
  encoders/image/        the tower's own complete folder, with its image processor
    projector.safetensors
    features.safetensors the head that predicts its features, if there is one
  decoders/image/        the image tokenizer, unchanged
    codes.safetensors    the codes' embeddings and head
  decoders/image/        or the diffusion transformer, and the frozen parts
    transformer/
    vae/  scheduler/
    queries.safetensors  the queries' embeddings, and the projection of their hidden states
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from safetensors.torch import save_file
from torch import Tensor

from tutti.checkpoint.net_files import write_net_config, write_weights
from tutti.core.dist import World
from tutti.core.files import write_synced
from tutti.model.conditions import write_part
from tutti.model.flow_decoder import FlowSpec
from tutti.model.omni import OmniModel
from tutti.model.omni_config import DECODER, IMAGE_SIZE, OMNI, SETTINGS
from tutti.model.pipeline_folder import TRANSFORMER, read_scheduler
from tutti.model.vq import copy_tokenizer

PROJECTOR = "projector.safetensors"


CODE_DECODER = "codes.safetensors"
FEATURE_HEAD = "features.safetensors"
QUERIES = "queries.safetensors"

NET = "decoders.image.net."
"""The prefix of the tensor names of a diffusion decoder's transformer."""


class Connectors(NamedTuple):
    """The parts that connect a composed model.

    settings: of each encoder, by kind. projectors: each encoder's projector tensors, by name within it. drawing_folder,
    drawing_size: for a model that draws, the folder of its image tokenizer, and its image size if the tokenizer does
    not fix it. codes: the tensors for codes, or for queries. features: those of the feature head, if any. flow: the
    diffusion decoder. finish_flow: finishes the files of its transformer's weights.
    """

    settings: Mapping[str, Mapping[str, Any]]
    projectors: Mapping[str, Mapping[str, Tensor]]
    drawing_folder: Path | None = None
    drawing_size: int | None = None
    codes: Mapping[str, Tensor] = {}
    features: Mapping[str, Tensor] = {}
    flow: FlowSpec | None = None
    finish_flow: Callable[[], None] = lambda: None


def connectors_of(model: OmniModel, full: Callable[[str], Tensor], folder: Path, world: World) -> Connectors:
    """Collect the connecting parts of `model`. full: returns full tensors by name on rank 0. A diffusion decoder's
    transformer is written to the export's `folder` at once. Collective."""
    projectors: dict[str, dict[str, Tensor]] = {}
    for kind, encoder in model.encoders.items():
        names = list(encoder.projector.state_dict())  # type: ignore[union-attr]
        projectors[kind] = {name: full(f"encoders.{kind}.projector.{name}") for name in names}
    encoders: Any = model.config.encoders
    settings = {kind: {name: encoders[kind][name] for name in SETTINGS} for kind in projectors}
    codes, features = (_tensors_of(model, part, full) for part in ("decoders.image", "decoders.features"))
    connectors = Connectors(settings, projectors, model.drawing_folder, model.drawing_size, codes, features, model.flow)
    if model.flow is None:
        return connectors
    names = [name for name in model.state_dict() if name.startswith(NET)]
    return connectors._replace(finish_flow=write_weights(names, full, folder / DECODER / TRANSFORMER, world, NET))


def _tensors_of(model: OmniModel, part: str, full: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """The full tensors of a part of `model`, by name within it; empty if it has no such part."""
    names = [name for name in model.state_dict() if name.startswith(f"{part}.") and not name.startswith(NET)]
    return {name.removeprefix(f"{part}."): full(name).contiguous() for name in names}


def write_connectors(connectors: Connectors, folder: Path) -> None:
    """Write the connecting parts to the folder of an export that already contains the other parts."""
    content: dict[str, Any] = {"encoders": dict(connectors.settings)}
    if connectors.drawing_folder is not None:
        size = {} if connectors.drawing_size is None else {IMAGE_SIZE: connectors.drawing_size}
        content["decoders"] = {"image": size}
        place = folder / DECODER
        place.mkdir(parents=True, exist_ok=True)
        copy_tokenizer(connectors.drawing_folder, place, connectors.drawing_size)
        save_file(dict(connectors.codes), place / CODE_DECODER, metadata={"format": "pt"})
    if connectors.flow is not None:
        content["decoders"] = {"image": {"tokens": connectors.flow.tokens, IMAGE_SIZE: connectors.flow.side}}
        _write_flow(connectors, connectors.flow, folder / DECODER)
    if connectors.features:
        content["output_encoder"] = "encoder"
        save_file(dict(connectors.features), folder / "encoders" / "image" / FEATURE_HEAD, metadata={"format": "pt"})
    write_synced(folder / OMNI, yaml.safe_dump(content, sort_keys=False))
    for kind, tensors in connectors.projectors.items():
        if tensors:
            contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
            save_file(contiguous, folder / "encoders" / kind / PROJECTOR, metadata={"format": "pt"})


def _write_flow(connectors: Connectors, flow: FlowSpec, place: Path) -> None:
    """Write a diffusion decoder, whose transformer's weights are written except for their end, to `place`."""
    connectors.finish_flow()
    write_net_config(flow.net, place / TRANSFORMER)
    if "vae" in flow.folder.parts:
        write_part(flow.folder, "vae", place / "vae", seed=0)
    read_scheduler(flow.folder).save_pretrained(place / "scheduler")
    save_file(dict(connectors.codes), place / QUERIES, metadata={"format": "pt"})
