"""Tiny base models, and runs that train adapters on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from tests.train.runs import TINY, tiny_config
from tutti.checkpoint.adapter import base_path, load_adapter, read_lora
from tutti.config import Config
from tutti.model.lora import add_adapters, merge

MOE = TINY | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 24,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
DEEP = TINY | {"num_hidden_layers": 4, "tie_word_embeddings": False, "attention_bias": True}
BASES = {"dense": TINY, "deep": DEEP, "moe": MOE}


def open_merged(folder: Path) -> Any:
    """The base of the adapter in `folder`, a causal language model, with the adapter merged, on the CPU."""
    model = AutoModelForCausalLM.from_pretrained(base_path(folder), local_files_only=True)
    add_adapters(model, read_lora(folder, model), model.dtype)
    load_adapter(model, folder)
    merge(model)
    return model


def write_bases(folder: Path) -> Path:
    """A folder in `folder` for a dense model with tied embeddings, a deeper one with biases and a head of its own, and
    one with experts."""
    for name, values in BASES.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values), dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.01)  # biases begin at zero
        model.save_pretrained(folder / name)
    return folder


def lora_config(folder: Path, base: Path, world: int = 1, **train: Any) -> Config:
    """Adapters of rank 4 on the model in `base`. train: arguments of that group, or others by their dotted names."""
    changes = {
        "model.model_path": str(base),
        "train.architecture": "lora",
        "train.lora_rank": 4,
        "train.micro_batch_size": 1,
    }
    changes |= {key if "." in key else f"train.{key}": value for key, value in train.items()}
    return tiny_config(folder, world=world, **changes)


def written(config: Config) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of the adapter that a run wrote in the end, and its settings."""
    folder = Path(config.train.output_dir or "") / "hf" / "final"
    return load_file(folder / "adapter_model.safetensors"), json.loads((folder / "adapter_config.json").read_text())


def export_quietly(source: str, out: str, merge: bool) -> None:
    import logging

    from tutti.kinds.export import export

    logging.disable(logging.INFO)
    export(source, out, merge_adapters=merge)
