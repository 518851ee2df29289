"""The device mesh: how the ranks are arranged. Made once from the layout and passed along.

The ranks form a grid with these axes, slowest first:

    pipeline    stages of the model's depth
    replicate   copies of the model that see different data; their gradients are all-reduced
    shard       ranks that see different data and split parameters, gradients and optimizer state (ZeRO)
    context     ranks that split the samples of one batch, and pass keys and values around (ring attention)
    ulysses     ranks that split the samples of one batch, and exchange tokens for heads in attention
    tensor      ranks that split single matrix products

Nearby ranks communicate fastest, so the axes that communicate most come last. Parameters are sharded over shard x
context x ulysses together (`fsdp`), since the ranks of one batch hold the same parameters too; with ddp they are
replicated over all of these. Experts have a grid of their own over the same ranks. Between the split parts of a block
each tensor rank has tokens of its own, as the ranks of the other axes have, so shard x context x ulysses x tensor can
be divided differently: into `expert` (each rank holds some experts, in full) and `expert_shard` (ranks with the same
experts, over which FSDP shards them, or replicates them with ddp). An expert group consists of neighboring ranks, or
with train.ep_outside of strided ones. Whether the sizes fit the world is checked before, in `tutti.config.layout`,
without torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tutti.config.layout import Layout
from tutti.core.dist import World

AXES = ("pipeline", "replicate", "shard", "context", "ulysses", "tensor")


@dataclass(frozen=True)
class Mesh:
    """The ranks as a grid.

    grid: all `AXES`, including those of size 1. fsdp: the mesh that `fully_shard` takes for dense parameters, (shards,)
    or (copies, shards). expert: the 1-D mesh that splits the experts. expert_fsdp: the mesh that `fully_shard` takes
    for them.
    """

    grid: DeviceMesh
    fsdp: DeviceMesh
    expert: DeviceMesh
    expert_fsdp: DeviceMesh

    def size(self, axis: str) -> int:
        return self.grid.size(AXES.index(axis))  # without making a mesh of that axis, which takes a millisecond

    def rank(self, axis: str) -> int:
        """This rank's coordinate on `axis`."""
        return self.grid.get_local_rank(axis)

    def group(self, axis: str) -> dist.ProcessGroup:
        """The ranks that differ from this one only on `axis`."""
        return self.grid.get_group(axis)

    @property
    def dp_size(self) -> int:
        """Number of data-parallel ranks: ranks that see different data."""
        return self.size("replicate") * self.size("shard")

    @property
    def dp_rank(self) -> int:
        """This rank's index among the data-parallel ranks."""
        return self.rank("replicate") * self.size("shard") + self.rank("shard")

    @property
    def num_shards(self) -> int:
        """Number of ranks over which FSDP splits a dense parameter."""
        return self.fsdp.shape[-1]

    @property
    def num_expert_shards(self) -> int:
        """Number of ranks over which FSDP splits a parameter of one rank's experts."""
        return self.expert_fsdp.shape[-1]

    def __str__(self) -> str:
        sizes = {axis: self.size(axis) for axis in AXES} | {"expert": self.expert.size()}
        return " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "one rank"


def build_mesh(layout: Layout, world: World, *, ddp: bool = False, ep_outside: bool = False) -> Mesh:
    """Arrange all ranks according to `layout`. ddp: parameters are replicated and not split. A collective call."""
    device = world.device.type
    # Named groups, so that even an axis that spans the whole world gets its own: concurrent calls along two axes
    # then do not wait for each other, and each can be identified by its group.
    backend = dist.get_backend_config()
    shape = tuple(getattr(layout, axis) for axis in AXES)
    grid = init_device_mesh(device, shape, mesh_dim_names=AXES, backend_override=dict.fromkeys(AXES, backend))
    if ddp:
        assert layout.shard == 1, "the layout was not validated"
        copies = grid["replicate", "context", "ulysses"]._flatten("copies", backend)
        fsdp = DeviceMesh._concatenate([copies, grid["shard"]])
    else:
        shards = grid["shard", "context", "ulysses"]._flatten("fsdp", backend)
        fsdp = DeviceMesh._concatenate([grid["replicate"], shards]) if layout.replicate > 1 else shards
    expert, expert_fsdp = _expert_meshes(layout, device, ddp=ddp, ep_outside=ep_outside)
    return Mesh(grid=grid, fsdp=fsdp, expert=expert, expert_fsdp=expert_fsdp)


def _expert_meshes(layout: Layout, device: str, *, ddp: bool, ep_outside: bool) -> tuple[DeviceMesh, DeviceMesh]:
    """The mesh that splits the experts, and the mesh that `fully_shard` takes for them: (shards,) or (copies,
    shards)."""
    inner = {"expert_shard": layout.expert_ranks // layout.expert, "expert": layout.expert}
    if ep_outside:
        inner = dict(reversed(inner.items()))
    axes = {"pipeline": layout.pipeline, "replicate": layout.replicate, **inner, "whole": 1}
    backend = dist.get_backend_config()
    grid = init_device_mesh(
        device, tuple(axes.values()), mesh_dim_names=tuple(axes), backend_override=dict.fromkeys(axes, backend)
    )
    if ddp:
        copies = grid["replicate", "expert_shard"]._flatten("copies", backend)
        return grid["expert"], DeviceMesh._concatenate([copies, grid["whole"]])
    return grid["expert"], grid[("replicate", "expert_shard") if layout.replicate > 1 else "expert_shard"]
