"""Loading a composed model: each part from its own folder, and the rest initialized at random.

The foundation is loaded from model.model_path, and a tower from its encoder's model_path, which may contain a larger
model that the tower is a part of. A projector is loaded from the file next to its tower, as in exports. If it does not
fit the foundation, or does not exist, it is new, and the log says so.
"""

from __future__ import annotations

import copy
import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tutti.checkpoint.hf_files import PartOfCheckpoint
from tutti.checkpoint.hf_load import load_opened, load_weights
from tutti.checkpoint.net_files import fill_net
from tutti.checkpoint.omni_files import CODE_DECODER, FEATURE_HEAD, NET, PROJECTOR, QUERIES
from tutti.core.dist import World
from tutti.core.tensors import local_part
from tutti.model.denoiser import DenoiserConfig
from tutti.model.initialize import fill_by_rules, materialize, own_part
from tutti.model.omni import OmniModel
from tutti.model.vq import DECODER

log = logging.getLogger(__name__)

_SAID = {
    "projector": "the projector",
    "features": "the head that predicts features",
    "image": "what the model has for codes",
}
"""By a word in the names of connecting parts, their name in messages."""


def load_parts(
    model: OmniModel,
    path: str | Path | None,
    *,
    world: World,
    device: torch.device,
    broadcast: bool = True,
    index_path: str | Path | None = None,
    seed: int = 0,
    full_model: OmniModel | None = None,
) -> None:
    """Load `model`, whose foundation's weights are at `path` (None: random), as `load_weights` does. Collective.

    full_model: the complete model, on the meta device, if `model` is a part of its depth. ValueError, on all ranks:
    weights are damaged or do not fit their part.
    """
    complete = full_model or model
    materialize(model, device)
    left = set(complete.state_dict()) - set(complete.all_tied_weights_keys)
    options: dict[str, Any] = {"world": world, "device": device, "broadcast": broadcast, "seed": seed}
    if path is not None:
        whole = complete.foundation
        load_weights(model.foundation, path, index_path=index_path, full_model=whole, **options)
        left = {name for name in left if not name.startswith("foundation.")}
    for kind, folder in complete.weights.items():
        if folder is None:
            continue
        tower: Any = complete.encoders[kind].tower
        held: Any = getattr(model.encoders[kind], "tower", None) or _without_parts(tower)
        opened = partial(PartOfCheckpoint, folder, list(tower.state_dict()))
        try:
            load_opened(held, folder, opened, full_model=tower, **options)
        except ValueError as error:
            raise ValueError(str(error).replace("model.model_path", f"model.encoders.{kind}.model_path")) from error
        left = {name for name in left if not name.startswith(f"encoders.{kind}.tower.")}
        left -= _load_file(model, complete, f"encoders.{kind}.projector.", folder / PROJECTOR, world)
        if kind == "image":
            left -= _load_file(model, complete, "decoders.features.", folder / FEATURE_HEAD, world)
    left -= _load_decoder(model, complete, world, seed)
    if left:
        log.info("new, drawn from train.seed: %s", ", ".join(sorted({_part_of(name) for name in left})))
        fill_by_rules(model, left & set(model.state_dict()), seed)


def _without_parts(module: nn.Module) -> nn.Module:
    """An empty module with the same class and attributes, which a rank without the part loads."""
    shell = copy.copy(module)
    shell.__dict__ |= {"_modules": {}, "_parameters": {}, "_buffers": {}}
    return shell


def _part_of(name: str) -> str:
    """The part that a parameter belongs to: foundation, encoders.image.tower, encoders.image.projector."""
    parts = name.split(".")
    return parts[0] if parts[0] == "foundation" else ".".join(parts[:3])


def _load_decoder(model: OmniModel, complete: OmniModel, world: World, seed: int) -> set[str]:
    """Load the model's modules for image codes from the file next to their tokenizer, or for queries from the one
    next to its diffusion transformer, as `_load_file` does, and that transformer. Collective."""
    if (flow := complete.flow) is not None:
        config = DenoiserConfig(net=flow.net)
        fill_net(model.flow_decoder.net, config, flow.weights, seed=seed, world=world, argument=DECODER)
        loaded = {name for name in complete.state_dict() if name.startswith(NET)}
        file = None if flow.weights is None else flow.weights.parent / QUERIES
        return loaded | (_load_file(model, complete, "decoders.image.", file, world) if file else set())
    if complete.drawing_folder is None:
        return set()
    return _load_file(model, complete, "decoders.image.", complete.drawing_folder / CODE_DECODER, world)


def _load_file(model: OmniModel, complete: OmniModel, prefix: str, file: Path, world: World) -> set[str]:
    """Load the parameters below `prefix` from a file, if it exists and fits; returns the names of the loaded
    parameters in the complete model. Collective."""
    named = ((name, item) for name, item in complete.named_parameters() if not name.startswith(NET))
    wanted = {name: item.shape for name, item in named if name.startswith(prefix)}
    found: dict[str, Tensor] = world.run_on_all_ranks(lambda: load_file(file) if file.is_file() else {})
    if not wanted or not found:
        return set()
    if {prefix + name: tensor.shape for name, tensor in found.items()} != wanted:
        part = next(said for name, said in _SAID.items() if name in prefix)
        log.warning("%s joins other widths than these parts have: %s is new", file, part)
        return set()
    with torch.no_grad():
        for name, item in model.named_parameters():
            if name in wanted:
                local_part(item).copy_(own_part(found[name.removeprefix(prefix)], item))
    return set(wanted)
