"""Folders of diffusion models: reading a transformer into a model, wherever its parts lie, and writing a complete one.

A transformer's weights are one `diffusion_pytorch_model.safetensors`, or several files with an index, by the names that
they have within the class. Every rank reads its own slices of them. An export has all parts of the folder that was
trained from beside the new transformer, so that `DiffusionPipeline.from_pretrained` loads it. Adapters are written
alone, in the file that diffusers has for them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer

from tutti.checkpoint.hf_files import read_index
from tutti.checkpoint.hf_save import Full, gather_full, prepare_folder
from tutti.core.dist import World
from tutti.core.files import describe_error, put_folder, write_synced
from tutti.core.tensors import local_part
from tutti.model.conditions import write_part
from tutti.model.denoiser import Denoiser, random_net
from tutti.model.diffusion import require_diffusers
from tutti.model.initial import give_storage, own_part
from tutti.model.lora import adapters, lora_of
from tutti.model.pipeline_folder import CONDITIONS, INDEX, TRANSFORMER, PipelineFolder, read_scheduler

WEIGHTS = "diffusion_pytorch_model.safetensors"
WEIGHTS_INDEX = f"{WEIGHTS}.index.json"
ADAPTERS = "pytorch_lora_weights.safetensors"
_PREFIX = "net."
_FILE_BYTES = 5 * 10**9


def load_denoiser(model: Denoiser, folder: Path | None, *, seed: int, device: torch.device, world: World) -> None:
    """Fill `model` with the weights in the folder of a transformer; None draws them from `seed`.

    ValueError, on all ranks: there are none, or they are of another model.
    """
    give_storage(model, device)
    targets = {name.removeprefix(_PREFIX): item for name, item in model.state_dict(keep_vars=True).items()}
    if folder is None:
        for name, value in random_net(model.config, seed).state_dict().items():
            local_part(targets[name]).copy_(own_part(value, targets[name]))
        return
    world.run_on_all_ranks(lambda: _fill(targets, folder, model))


@torch.no_grad()
def _fill(targets: dict[str, Tensor], folder: Path, model: Denoiser) -> None:
    ignored = tuple(getattr(model.net, "_keys_to_ignore_on_load_unexpected", None) or ())
    found: set[str] = set()
    odd: list[str] = []
    for file, names in weight_files(folder):
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
            raise ValueError(f"model.model_path: {file} cannot be read: {error}") from None
    parameters = {name.removeprefix(_PREFIX) for name, _ in model.named_parameters()}
    odd += [f"{name} is missing" for name in sorted(parameters - found) if "_lora_" not in name]
    if odd:
        more = f" and {len(odd) - 5} more" if len(odd) > 5 else ""
        raise ValueError(
            f"model.model_path: the weights in {folder} do not fit its config.json: {', '.join(odd[:5])}{more}"
        )


def weight_files(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """The weight files of a folder, each with the names that its index has for it (none without an index)."""
    if (folder / WEIGHTS_INDEX).is_file():
        by_file: dict[str, list[str]] = {}
        for name, file in read_index(folder / WEIGHTS_INDEX).items():
            by_file.setdefault(file, []).append(name)
        yield from ((folder / file, names) for file, names in by_file.items())
    elif (folder / WEIGHTS).is_file():
        yield folder / WEIGHTS, []
    else:
        raise ValueError(f"model.model_path: there is no {WEIGHTS} in {folder}")


def export_pipeline(
    model: Denoiser, source: PipelineFolder, folder: Path, world: World, full: Full, *, seed: int
) -> None:
    """Write `model`, whose full tensors `full` gives by name on rank 0, with the other parts of `source`, to `folder`,
    which is replaced. seed: of parts that have no weights. Collective. ValueError, on all ranks: it cannot be written.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    world.run_on_all_ranks(lambda: prepare_folder(folder, partial) if world.is_main else None)
    place = partial / TRANSFORMER
    if world.is_main:
        place.mkdir()
    names = [name for name in model.state_dict() if "_lora_" not in name]
    held: dict[str, Tensor] = {}
    files: dict[str, dict[str, Tensor]] = {}
    index: dict[str, str] = {}
    failure: Exception | None = None
    for name in names:
        tensor = full(name)
        if world.is_main and failure is None:
            if held and sum(item.nbytes for item in held.values()) + tensor.nbytes > _FILE_BYTES:
                failure = failure or _write(held, place / _numbered(len(files)))
                files[_numbered(len(files))], held = {}, {}
            held[name.removeprefix(_PREFIX)] = tensor.contiguous()
            index[name.removeprefix(_PREFIX)] = _numbered(len(files))

    def finish() -> None:
        if failure is not None:
            raise ValueError(f"could not write {folder}: {describe_error(failure)}")
        try:
            _finish_weights(held, index, len(files), place)
            write_synced(place / "config.json", json.dumps(model.config.net, indent=2, sort_keys=True) + "\n")
            _copy_parts(source, partial, seed)
            put_folder(partial, folder)
        except OSError as error:
            raise ValueError(f"could not write {folder}: {describe_error(error)}") from error

    world.run_on_all_ranks(lambda: finish() if world.is_main else None)


def export_adapters(model: Denoiser, folder: Path, world: World) -> None:
    """Write the adapters of `model` to `folder`, which is replaced, as diffusers' `load_lora_weights` reads them.
    Collective. ValueError, on all ranks: it cannot be written."""
    lora = lora_of(model)
    assert lora is not None
    partial = folder.with_name(f".{folder.name}.partial")
    world.run_on_all_ranks(lambda: prepare_folder(folder, partial) if world.is_main else None)
    tensors: dict[str, Tensor] = {}
    names = []
    for module, adapter in adapters(model):
        name = adapter.name.removeprefix(_PREFIX)
        names.append(name)
        factors = adapter.factors(module)
        for part, tensor in (("A", factors.A), ("B", factors.B)):
            full = gather_full(tensor, keep=world.is_main)
            if world.is_main:
                tensors[f"{TRANSFORMER}.{name}.lora_{part}.weight"] = full.contiguous()
    settings = {"r": lora.rank, "lora_alpha": lora.alpha, "use_rslora": lora.rslora, "target_modules": names}
    described = json.dumps({f"{TRANSFORMER}.{name}": value for name, value in settings.items()}, sort_keys=True)

    def write() -> None:
        try:
            save_file(tensors, partial / ADAPTERS, metadata={"format": "pt", "lora_adapter_metadata": described})
            put_folder(partial, folder)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"could not write {folder}: {describe_error(error)}") from error

    world.run_on_all_ranks(lambda: write() if world.is_main else None)


def _numbered(number: int) -> str:
    return f"diffusion_pytorch_model-{number + 1:05d}.safetensors"


def _write(tensors: dict[str, Tensor], file: Path) -> Exception | None:
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        return error
    return None


def _finish_weights(held: dict[str, Tensor], index: dict[str, str], before: int, place: Path) -> None:
    """Write the last file of weights, and the index where there are more."""
    if not before:
        save_file(held, place / WEIGHTS, metadata={"format": "pt"})
        return
    save_file(held, place / _numbered(before), metadata={"format": "pt"})
    write_synced(place / WEIGHTS_INDEX, json.dumps({"metadata": {}, "weight_map": index}, indent=2) + "\n")


def _copy_parts(source: PipelineFolder, partial: Path, seed: int) -> None:
    """Copy the parts that were not trained, and name all parts in a model_index.json."""
    diffusers = require_diffusers()
    index: dict[str, Any] = {"_class_name": source.family.pipeline, "_diffusers_version": diffusers.__version__}
    index |= {name: value for name, value in source.index.items() if name.startswith("_") or not isinstance(value, str)}
    for name in CONDITIONS:
        if name in source.parts:
            write_part(source, name, partial / name, seed)
    if "scheduler" not in source.parts:
        read_scheduler(source).save_pretrained(partial / "scheduler")
    if "tokenizer" not in source.parts:
        AutoTokenizer.from_pretrained(source.parts["text_encoder"]).save_pretrained(partial / "tokenizer")
    kind = getattr(diffusers, source.family.pipeline)
    for name in kind._get_signature_keys(kind)[0]:
        if (partial / name).is_dir():
            if not isinstance(index.get(name), list) or name == TRANSFORMER:
                index[name] = _class_of(partial / name)
        else:
            index[name] = [None, None]
    write_synced(partial / INDEX, json.dumps(index, indent=2) + "\n")


def _class_of(folder: Path) -> list[str]:
    """The library and the class of a part, as model_index.json has them."""
    if folder.name.startswith("tokenizer"):
        found = _json(folder / "tokenizer_config.json").get("tokenizer_class") or "AutoTokenizer"
        return ["transformers", found]
    file = "scheduler_config.json" if folder.name == "scheduler" else "config.json"
    content = _json(folder / file)
    if name := content.get("_class_name"):
        return ["diffusers", name]
    return ["transformers", (content.get("architectures") or ["AutoModel"])[0]]


def _json(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content
