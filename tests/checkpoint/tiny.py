"""A tiny model and its checkpoints, for tests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tutti.checkpoint import manifest
from tutti.checkpoint.manager import Checkpointer
from tutti.checkpoint.state import model_tensors, optimizer_tensors
from tutti.core.dist import World
from tutti.train.adamw import AnyPrecisionAdamW


class Tiny(nn.Module):
    """A model with tied weights, a buffer, an unused parameter, and sizes that two ranks cannot split evenly."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(17, 6)
        self.body = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 6))
        self.scale = nn.Parameter(torch.ones(1))
        self.unused = nn.Parameter(torch.ones(3))
        self.head = nn.Linear(6, 17, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("count", torch.zeros(2))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, ids):
        self.count += 1
        return self.head(self.body(self.embed(ids)) * self.scale)


def build(layout: str, kind: str = "adamw", seed: int = 0, groups: bool = False):
    torch.manual_seed(seed)
    model: nn.Module = Tiny()
    if layout != "plain":
        world = torch.distributed.get_world_size()
        shape = {"shard": (1, world), "copies": (world, 1), "hybrid": (world // 2, 2)}[layout]
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
        for block in (model.body[0], model.body[2], model):
            fully_shard(block, mesh=mesh, reshard_after_forward=layout != "copies")
    parameters = list(model.parameters())
    split = [{"params": parameters[::-2]}, {"params": parameters[-2::-2]}] if groups else parameters
    if kind == "bf16":
        model.bfloat16()
        return model, AnyPrecisionAdamW(split, lr=1e-2)
    return model, torch.optim.AdamW(split, lr=1e-2, fused=True)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        ids = torch.randint(0, 17, (24,))
        nn.functional.cross_entropy(model(ids).float(), ids).backward()
        optimizer.step()
        optimizer.zero_grad()


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, np.ndarray]:
    """All tensors of model and optimizer, gathered."""
    tensors = {**model_tensors(model), **optimizer_tensors(model, optimizer)}
    full = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}
    return {name: t.detach().float().numpy().copy() for name, t in full.items()}


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def checkpointer(root: Path, world: World, **settings) -> Checkpointer:
    return Checkpointer(root, world, **{"save_async": False, **settings})


def saved(root: Path, world: World, *steps: int, layout: str = "plain", **settings) -> tuple:
    """A model trained a little and saved at `steps`."""
    model, optimizer = build(layout)
    keeper = checkpointer(root, world, **settings)
    for step in steps:
        train(model, optimizer, 1)
        keeper.save(step, model, optimizer, {"step": step})
    keeper.wait()
    return model, optimizer, keeper


def names(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "checkpoints").iterdir())


def raising(error: BaseException):
    def raise_it(*args, **kwargs):
        raise error

    return raise_it


class Killed(BaseException):
    """Simulates the end of the process; nothing catches it."""


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def forge(folder: Path, name: str, content: bytes) -> None:
    """Replace a file, and update the manifest to match."""
    (folder / name).write_bytes(content)
    found = manifest.read(folder)
    manifest.write(folder, replace(found, files={**found.files, name: manifest.describe(folder / name)}))
