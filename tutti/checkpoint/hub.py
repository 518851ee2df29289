"""Models by hub name: `model_path: Qwen/Qwen3-0.6B` becomes the folder of its files.

`with_local_paths` is called once, before anything is read, and returns a configuration in which every hub name is
replaced by a folder, so that all other code only handles folders. Only files that are read are downloaded: configs,
tokenizer, chat templates, and the weights in one format, preferably safetensors. For a diffusers pipeline this applies
to each of its parts. Code is not downloaded.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tutti.checkpoint import adapter
from tutti.checkpoint.denoiser_adapter import ADAPTERS
from tutti.checkpoint.hf_files import INDEX, WEIGHT_FILES, read_index
from tutti.checkpoint.net_files import WEIGHTS_INDEX
from tutti.config import Config
from tutti.core.dist import World
from tutti.core.hub import HubFiles, Repo, repo_named
from tutti.core.remote import fetch
from tutti.model.pipeline_folder import INDEX as PIPELINE
from tutti.model.vq import WEIGHTS

log = logging.getLogger(__name__)

_MODEL = tuple(f"model.{name}_path" for name in ("config", "tokenizer", "model", "adapter", "condition_model"))
_GROUPS = ("encoders", "decoders")
_INFER = ("infer.tokenizer_path", "infer.model_path")
_HOLD_WEIGHTS = ("model_path", "adapter_path")
_SMALL = re.compile(
    r"[^/]+\.(json|jinja|model|tiktoken)|additional_chat_templates/[^/]+\.jinja|(vocab|merges)\.txt"
    r"|omni\.yaml|encoders/\w+/[^/]+\.json"
)
_OF_ENCODERS = re.compile(r"encoders/\w+/[^/]+\.safetensors")
"""Weights of the additional parts in an export of a composed model."""
_PARTS = re.compile(r"(?P<part>transformer|vae|scheduler|(text_encoder|tokenizer)(_[23])?)/[^/]+")
_SMALL_OF_PARTS = re.compile(r".*(?<!\.index)\.(json|jinja|model|txt)")
_NET_WEIGHTS = (WEIGHTS_INDEX, WEIGHTS)


def with_local_paths(config: Config, world: World, *, weights: bool = True) -> Config:
    """`config` with its models' hub names replaced by the folders they were downloaded to. Collective.

    weights: download the weights too. ValueError, on all ranks: a model does not exist.
    """
    names = {argument: name for argument in (*_MODEL, *_INFER) if (name := _get(config, argument))}
    names |= {
        f"model.{group}.{kind}.{leaf}": name
        for group in _GROUPS
        for kind, spec in getattr(config.model, group).items()
        if isinstance(spec, Mapping)
        for leaf, name in spec.items()
        if leaf.endswith("_path") and isinstance(name, str)
    }
    found = fetch(lambda: _pin_all(names, weights), world)
    for argument in (argument for argument, name in names.items() if name in found):
        folder = str(found[names[argument]].folder)
        group, *between, leaf = argument.split(".")
        if between:
            parts, kind = between
            before = getattr(config.model, parts)
            changed: Any = {parts: {**before, kind: {**before[kind], leaf: folder}}}
            config = replace(config, model=replace(config.model, **changed))
            continue
        changed = replace(getattr(config, group), **{leaf: folder})
        config = replace(config, **{group: changed})
    return config


def _get(config: Config, argument: str) -> str | None:
    group, _, leaf = argument.partition(".")
    return getattr(getattr(config, group), leaf)


def _pin_all(names: Mapping[str, str], weights: bool) -> dict[str, HubFiles]:
    """The downloaded files of every argument's value that is a repository name."""
    found: dict[str, HubFiles] = {}
    for name in dict.fromkeys(names.values()):
        arguments = [argument for argument, value in names.items() if value == name]
        held = [argument for argument in arguments if argument.rpartition(".")[2] in _HOLD_WEIGHTS]
        repo = repo_named("model", name, (held or arguments)[0])
        if repo is not None:
            led = all(
                argument.startswith("model.decoders.") for argument in arguments
            )  # a diffusion decoder needs no text encoders
            conditions = () if not weights else ("vae",) if led else ("vae", "text_encoder")
            found[name] = pin_model(repo, weights=weights and bool(held), conditions=conditions)
    return found


def pin_model(repo: Repo, *, weights: bool, conditions: Sequence[str] = ()) -> HubFiles:
    """The needed files of a model, downloaded; with `weights` including those. conditions: prefixes of pipeline
    parts besides the transformer whose weights are needed."""
    commit = repo.commit()
    there = repo.files(commit)
    # Exports reproduce the layout of the index, even if the weights are not needed.
    files = [file for file in there if _SMALL.fullmatch(file) and (file == INDEX or not file.endswith(".index.json"))]
    parts = {match["part"] for file in there if (match := _PARTS.fullmatch(file))}
    if PIPELINE in there or "transformer" in parts:
        files += [file for file in there if _PARTS.fullmatch(file) and _SMALL_OF_PARTS.fullmatch(file)]
        wanted = (*conditions, *(["transformer"] if weights else []))
        held = sorted(part for part in parts if part.startswith(wanted))
        files += [file for part in held for file in _weight_files(repo, commit, there, f"{part}/")]
    elif weights:
        files += [*_weight_files(repo, commit, there), *filter(_OF_ENCODERS.fullmatch, there)]
    found = HubFiles(repo, commit, tuple(dict.fromkeys(files)))
    found.local(download=True)
    log.info("%s: %s is commit %s", repo.argument, repo.name, commit)
    return found


def _weight_files(repo: Repo, commit: str, there: Mapping[str, Any], part: str = "") -> Sequence[str]:
    """The weight files, in the first format that the repository has. part: their folder."""
    known = (*WEIGHT_FILES, *_NET_WEIGHTS) if part else (*WEIGHT_FILES, *_NET_WEIGHTS, *adapter.WEIGHTS, ADAPTERS)
    first = next((f"{part}{file}" for file in known if f"{part}{file}" in there), None)
    if first is None:
        others = [file for file in there if Path(file).suffix in (".safetensors", ".bin", ".gguf", ".pth", ".pt")][:3]
        raise ValueError(
            f"{repo.argument}: {repo} has no weights {f'in {part} ' if part else ''}in Hugging Face's format "
            f"({', '.join(WEIGHT_FILES)})" + (f"; it has {', '.join(others)}" if others else "")
        )
    if not first.endswith(".index.json"):
        return [first]
    repo.download(commit, [first])
    return [first, *sorted({f"{part}{file}" for file in read_index(repo.folder(commit) / first).values()})]
