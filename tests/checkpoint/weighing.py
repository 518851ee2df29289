"""Helpers for tests of weights: models on meta, sharded models, and the tensors in models and files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.device_mesh import init_device_mesh
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
)

from tests.model.zoo import tiny
from tutti.core.dist import World
from tutti.model.structure import blocks

CPU = torch.device("cpu")
ONE = World(rank=0, size=1, local_rank=0, device=CPU)
SHARDED = ("qwen3", "gpt2", "qwen3_moe")
"""Families for the tests on several ranks: tied weights, biases, stacked experts that are stored separately."""
IDS = torch.tensor([[5, 17, 3, 99, 42, 7, 250, 11, 64, 8, 9]])


def on_meta(name: str, factory: Any = AutoModelForCausalLM, **overrides: Any) -> PreTrainedModel:
    with torch.device("meta"):
        return factory.from_config(tiny(name, **overrides), dtype=torch.float32)


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS, use_cache=False).logits


def nothing_on_meta(model: nn.Module) -> bool:
    return not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def held(folder: Path) -> dict[str, list[int]]:
    shapes: dict[str, list[int]] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as handle:
            shapes.update({key: handle.get_slice(key).get_shape() for key in handle.keys()})  # noqa: SIM118
    return shapes


def sharded(name: str, hybrid: bool) -> PreTrainedModel:
    model = on_meta(name)
    world = int(os.environ["WORLD_SIZE"])
    shape, names = ((2, world // 2), ("replicate", "shard")) if hybrid else ((world,), ("shard",))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    for _, block in blocks(model):
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def full(model: PreTrainedModel) -> dict[str, Any]:
    """Every parameter in full, as arrays that travel between processes."""
    return {
        key: (value.full_tensor() if isinstance(value, DTensor) else value).detach().numpy()
        for key, value in model.state_dict().items()
    }
