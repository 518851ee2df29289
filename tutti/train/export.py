"""`tutti export`: a training checkpoint as a complete Hugging Face folder."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from tutti.config.load import load
from tutti.core.dist import init_dist, shutdown_dist
from tutti.core.log import setup_logging
from tutti.model.export import export_hf
from tutti.model.files import find_index
from tutti.model.initial import materialize
from tutti.train.checkpoint import load_model_only
from tutti.train.setup import tokenizer_and_model

log = logging.getLogger(__name__)


def export(source: str, out: str) -> None:
    """Write the model of `source` (a checkpoint, or an output folder: its newest whole one) to the new folder `out`.

    Runs in one process on the CPU. ValueError: there is no checkpoint, it is damaged, or `out` exists.
    """
    setup_logging(0)
    if Path(out).exists():
        raise ValueError(f"{out} exists already: give the name of a new folder")
    output = _output_folder(Path(source))
    config = load([str(output / "config.yaml")], verb=None)
    ranks = init_dist(torch.device("cpu"))
    try:
        tokenizer, model = tokenizer_and_model(config, ranks.device)
        materialize(model, ranks.device)
        load_model_only(Path(source), model, ranks)
        index = find_index(config.model.model_path, config.model.safetensor_idx_path)
        export_hf(model, Path(out), tokenizer, dist=ranks, index_path=index)
    finally:
        shutdown_dist()
    log.info("wrote the model to %s", out)


def _output_folder(source: Path) -> Path:
    """The run's output folder that `source` is or lies in: where its config.yaml is."""
    for folder in (source, *source.absolute().parents[:2]):
        if (folder / "config.yaml").is_file():
            return folder
    raise ValueError(f"{source} is neither an output folder of a run (with its config.yaml) nor a checkpoint in one")
