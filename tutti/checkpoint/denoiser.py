"""Folders of diffusion models: loading a transformer into a model, however it is distributed, and writing a complete
one.

An export contains all parts of the source folder besides the new transformer, so that
`DiffusionPipeline.from_pretrained` loads it. Adapters are written alone (`denoiser_adapter`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from tutti.checkpoint.hf_save import Full, prepare_folder
from tutti.checkpoint.net_files import fill_net, write_net_config, write_weights
from tutti.core.dist import World
from tutti.core.files import describe_error, put_folder, write_synced
from tutti.model.conditions import write_part
from tutti.model.denoiser import Denoiser
from tutti.model.diffusion import require_diffusers
from tutti.model.initialize import give_storage
from tutti.model.pipeline_folder import CONDITIONS, INDEX, TRANSFORMER, PipelineFolder, read_scheduler

_PREFIX = "net."


def load_denoiser(model: Denoiser, folder: Path | None, *, seed: int, device: torch.device, world: World) -> None:
    """Load the weights of `model` from the folder of a transformer; None initializes them from `seed`.

    ValueError, on all ranks: there are none, or they belong to another model.
    """
    give_storage(model, device)
    fill_net(model.net, model.config, folder, seed=seed, world=world)


def export_pipeline(
    model: Denoiser, source: PipelineFolder, folder: Path, world: World, full: Full, *, seed: int
) -> None:
    """Write `model`, with the other parts of `source`, to `folder`, which is replaced. full: returns full tensors by
    name on rank 0. seed: for parts without weights. Collective. ValueError, on all ranks: it cannot be written."""
    partial = folder.with_name(f".{folder.name}.partial")
    world.run_on_all_ranks(lambda: prepare_folder(folder, partial) if world.is_main else None)
    names = [name for name in model.state_dict() if "_lora_" not in name]
    finish_weights = write_weights(names, full, partial / TRANSFORMER, world, _PREFIX)

    def finish() -> None:
        try:
            finish_weights()
            write_net_config(model.config.net, partial / TRANSFORMER)
            _copy_parts(source, partial, seed)
            put_folder(partial, folder)
        except OSError as error:
            raise ValueError(f"could not write {folder}: {describe_error(error)}") from error

    world.run_on_all_ranks(lambda: finish() if world.is_main else None)


def _copy_parts(source: PipelineFolder, partial: Path, seed: int) -> None:
    """Copy the frozen parts, and list all parts in a model_index.json."""
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
    """The library and the class of a part, in the format of model_index.json."""
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
