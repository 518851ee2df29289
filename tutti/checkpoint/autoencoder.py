"""Folders of diffusers' autoencoders: loading one into a model, however it is distributed, and writing one.

A folder has a config.json, and the weights in diffusion_pytorch_model.safetensors under their names within the class,
so that diffusers' `from_pretrained` can read it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tutti.checkpoint.hf_save import Full, prepare_folder
from tutti.checkpoint.net_files import write_net_config
from tutti.core.dist import World
from tutti.core.files import describe_error, put_folder
from tutti.core.tensors import local_part
from tutti.model.autoencoder import Autoencoder
from tutti.model.initialize import init_weights, materialize, own_part
from tutti.model.vq import WEIGHTS

_PREFIX = "net."


def load_autoencoder(
    model: Autoencoder, path: str | Path | None, *, seed: int, device: torch.device, world: World
) -> None:
    """Load the weights of `model` from the folder `path`; None initializes them from `seed`. Every rank reads them.

    ValueError, on all ranks: there are none, or they belong to another model.
    """
    if path is None:
        init_weights(model, seed, device)
        return
    materialize(model, device)
    wanted = {name: item for name, item in model.named_parameters()}
    shapes = {name.removeprefix(_PREFIX): item.shape for name, item in wanted.items()}
    found = world.run_on_all_ranks(lambda: read_weights(Path(path), shapes))
    with torch.no_grad():
        for name, item in wanted.items():
            local_part(item).copy_(own_part(found[name.removeprefix(_PREFIX)], item))
        for buffer in model.buffers():
            buffer.zero_()


def read_weights(folder: Path, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """The tensors in the folder of an autoencoder. ValueError: they cannot be read, or do not
    have these names and shapes."""
    file = folder / WEIGHTS
    if not file.is_file():
        raise ValueError(f"model.model_path: there is no {WEIGHTS} in {folder}")
    try:
        found = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"model.model_path: {file} cannot be read: {error}") from None
    if {name: item.shape for name, item in found.items()} != shapes:
        odd = sorted(name for name in shapes.keys() | found.keys() if name not in found or name not in shapes)
        odd = odd or sorted(name for name, item in found.items() if item.shape != shapes[name])
        raise ValueError(f"model.model_path: {file} is of another model than its config.json: {', '.join(odd[:5])}")
    return found


def export_autoencoder(model: Autoencoder, folder: Path, world: World, full: Full) -> None:
    """Write `model` to `folder`, which is replaced. full: returns full tensors by name on rank 0. Collective.

    ValueError, on all ranks: it cannot be written.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    world.run_on_all_ranks(lambda: prepare_folder(folder, partial) if world.is_main else None)
    tensors = {name: full(_PREFIX + name) for name in model.net.state_dict()}

    def finish() -> None:
        try:
            write_net(model.config.net, tensors, partial)
            put_folder(partial, folder)
        except OSError as error:
            raise ValueError(f"could not write {folder}: {describe_error(error)}") from error

    world.run_on_all_ranks(lambda: finish() if world.is_main else None)


def write_net(config: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> None:
    """Write the config and the full tensors of an autoencoder into the existing `folder`."""
    write_net_config(config, folder)
    contiguous = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    save_file(contiguous, folder / WEIGHTS, metadata={"format": "pt"})
