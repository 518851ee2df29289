"""`tutti export`: a training checkpoint as a complete Hugging Face folder, or as an adapter folder."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tutti.checkpoint.adapter import export_adapter
from tutti.checkpoint.hf_files import find_index
from tutti.checkpoint.hf_save import export_hf
from tutti.checkpoint.hub import with_local_paths
from tutti.checkpoint.manager import recorded_compute_dtype
from tutti.checkpoint.trained import config_path, load_trained
from tutti.config import Config
from tutti.config.load import load
from tutti.core.dist import World, init_world, shutdown_world
from tutti.core.hub import name_in_cache
from tutti.core.log import setup_logging
from tutti.model.lora import lora_of, merge
from tutti.train.placement import tokenizer_and_model

log = logging.getLogger(__name__)


def export(source: str, out: str, *, merge_adapters: bool = False) -> None:
    """Write the model of `source` (a checkpoint, or an output folder: its newest whole one) to the new folder `out`.

    merge_adapters: of an adapted model not the adapter, but the complete model that it makes of its base.
    Runs in one process on the CPU. ValueError: there is no checkpoint, it is damaged, or `out` exists.
    """
    setup_logging(0)
    if Path(out).exists():
        raise ValueError(f"{out} exists already: give the name of a new folder")
    config = load([str(config_path(Path(source)))], verb=None)
    ranks = init_world(torch.device("cpu"))
    try:
        config = with_local_paths(config, ranks, weights=config.train.architecture == "lora")
        # The magnitudes of DoRA are stored as changes from those of base weights in the run's own dtype.
        held = replace(config.train, compute_dtype=recorded_compute_dtype(source, Path(source)) or "float32")
        if merge_adapters:
            # What is merged into bf16 is rounded away, and quantized weights take no change.
            held = replace(config.train, compute_dtype="float32", lora_base_dtype="compute")
        config = replace(config, train=held)
        tokenizer, model = tokenizer_and_model(config, ranks.device)
        if merge_adapters and lora_of(model) is None:
            raise ValueError(f"--merge: {source} is of a model that was trained whole, there is nothing to merge")
        load_trained(config, Path(source), model, ranks)
        if merge_adapters:
            merge(model)
        export_trained(config, model, tokenizer, Path(out), ranks)
    finally:
        shutdown_world()
    log.info("wrote the model to %s", out)


def export_trained(
    config: Config,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    world: World,
    *,
    whole: PreTrainedModel | None = None,
) -> None:
    """Write `model` to `folder`: complete, or of an adapted one its adapter, which peft reads. Collective.

    whole: as in `export_hf`.
    """
    if lora_of(model) is not None:
        path = config.model.model_path or config.model.config_path
        base, revision = (path and name_in_cache(path)) or (path and str(Path(path).absolute()), None)
        export_adapter(model, folder, tokenizer, world=world, base=base, revision=revision, whole=whole)
        return
    index = find_index(config.model.model_path, config.model.safetensor_idx_path)
    export_hf(model, folder, tokenizer, world=world, index_path=index, whole=whole)
