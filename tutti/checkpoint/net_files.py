"""The weight files of a diffusion transformer, in diffusers' format.

There is one `diffusion_pytorch_model.safetensors`, or several files with an index, with the names of tensors within the
class. Every rank reads its own slices.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tutti.checkpoint.hf_files import read_index
from tutti.core.dist import World
from tutti.core.files import describe_error, write_synced
from tutti.core.tensors import local_part
from tutti.model.denoiser import DenoiserConfig, random_net
from tutti.model.initialize import own_part
from tutti.model.vq import WEIGHTS

WEIGHTS_INDEX = f"{WEIGHTS}.index.json"
_FILE_BYTES = 5 * 10**9


@torch.no_grad()
def fill_net(
    net: nn.Module,
    config: DenoiserConfig,
    folder: Path | None,
    *,
    seed: int,
    world: World,
    argument: str = "model.model_path",
) -> None:
    """Load the weights of a transformer, which is allocated, from the folder that `argument` names; None initializes
    them from `seed`.

    ValueError, on all ranks: there are none, or they belong to another model.
    """
    targets = net.state_dict(keep_vars=True)
    if folder is None:
        for name, value in random_net(config, seed).state_dict().items():
            local_part(targets[name]).copy_(own_part(value, targets[name]))
        return
    world.run_on_all_ranks(lambda: _fill(targets, folder, net, argument))


@torch.no_grad()
def _fill(targets: dict[str, Tensor], folder: Path, net: nn.Module, argument: str) -> None:
    ignored = tuple(getattr(net, "_keys_to_ignore_on_load_unexpected", None) or ())
    found: set[str] = set()
    odd: list[str] = []
    for file, names in weight_files(folder, argument):
        try:
            with safe_open(file, "pt") as content:
                for name in names or content.keys():
                    target, source = targets.get(name), content.get_slice(name)
                    if target is None:
                        odd += [] if any(part in name for part in ignored) else [f"{name} is too much"]
                    elif tuple(source.get_shape()) != tuple(target.shape):
                        odd.append(f"{name} is {source.get_shape()}, not {list(target.shape)}")
                    else:
                        part = source if target.ndim else content.get_tensor(name)
                        local_part(target).copy_(own_part(part, target))
                        found.add(name)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{argument}: {file} cannot be read: {error}") from None
    parameters = {name for name, _ in net.named_parameters()}
    odd += [f"{name} is missing" for name in sorted(parameters - found) if "_lora_" not in name]
    if odd:
        more = f" and {len(odd) - 5} more" if len(odd) > 5 else ""
        raise ValueError(f"{argument}: the weights in {folder} do not fit its config.json: {', '.join(odd[:5])}{more}")


def weight_files(folder: Path, argument: str) -> Iterator[tuple[Path, list[str]]]:
    """Yield the weight files of a folder, each with its names in the index (none without an index)."""
    if (folder / WEIGHTS_INDEX).is_file():
        by_file: dict[str, list[str]] = {}
        for name, file in read_index(folder / WEIGHTS_INDEX).items():
            by_file.setdefault(file, []).append(name)
        yield from ((folder / file, names) for file, names in by_file.items())
    elif (folder / WEIGHTS).is_file():
        yield folder / WEIGHTS, []
    else:
        raise ValueError(f"{argument}: there is no {WEIGHTS} in {folder}")


def write_net_config(net: Mapping[str, Any], place: Path) -> None:
    """Write the config `net` of a diffusers model to its folder."""
    write_synced(place / "config.json", json.dumps(net, indent=2, sort_keys=True) + "\n")


def write_weights(
    names: Iterable[str], full: Callable[[str], Tensor], place: Path, world: World, prefix: str
) -> Callable[[], None]:
    """Write the full tensors that `full` returns by name on rank 0 to files in the folder `place`, with `prefix`
    removed from their names. Returns a function that finishes the files on rank 0, and raises the first error.
    Collective."""
    if world.is_main:
        place.mkdir(parents=True)
    held: dict[str, Tensor] = {}
    written = 0
    index: dict[str, str] = {}
    failure: Exception | None = None
    for name in names:
        tensor = full(name)
        if world.is_main and failure is None:
            if held and sum(item.nbytes for item in held.values()) + tensor.nbytes > _FILE_BYTES:
                failure = _write(held, place / _numbered(written))
                written, held = written + 1, {}
            held[name.removeprefix(prefix)] = tensor.contiguous()
            index[name.removeprefix(prefix)] = _numbered(written)

    def finish() -> None:
        if failure is not None:
            raise ValueError(f"could not write {place}: {describe_error(failure)}")
        _finish_weights(held, index, written, place)

    return finish


def _numbered(number: int) -> str:
    return f"diffusion_pytorch_model-{number + 1:05d}.safetensors"


def _write(tensors: dict[str, Tensor], file: Path) -> Exception | None:
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        return error
    return None


def _finish_weights(held: dict[str, Tensor], index: dict[str, str], before: int, place: Path) -> None:
    """Write the last weight file, and the index if there are several."""
    if not before:
        save_file(held, place / WEIGHTS, metadata={"format": "pt"})
        return
    save_file(held, place / _numbered(before), metadata={"format": "pt"})
    write_synced(place / WEIGHTS_INDEX, json.dumps({"metadata": {}, "weight_map": index}, indent=2) + "\n")
