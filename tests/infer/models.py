"""Tiny random models in Hugging Face folders, with the quickstart's tokenizer, whose answers vary token by token."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tests.model.zoo import tiny
from tests.train.runs import QUICKSTART
from tutti.config import Config
from tutti.config.load import from_dict
from tutti.core.dist import World
from tutti.infer.load import LoadedModel, load_model

PROMPTS = (
    "Hello",
    "What is the capital of Sweden?",
    "In medieval England, what was used as currency, specifically in rents and by the monks of the abbey at Ely?",
    "Where?",
    "Tell me about dogs. " * 6,
)
ONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


def write_model(folder: Path, family: str = "qwen3", dtype: torch.dtype = torch.float32, **overrides: Any) -> str:
    """A random model of a family of the zoo; its path."""
    values = {"vocab_size": 2048, "eos_token_id": 2, "bos_token_id": None, "pad_token_id": 0, **overrides}
    config = tiny(family, **values)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(6)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(QUICKSTART / name, folder)
    return str(folder)


def infer_config(path: str, **infer: Any) -> Config:
    """`infer.*` as given, of the model at `path`."""
    return from_dict({"infer": {"model_path": path, **infer}})


def open_model(path: str, **infer: Any) -> tuple[Config, LoadedModel]:
    config = infer_config(path, **infer)
    return config, load_model(config, ONE)
