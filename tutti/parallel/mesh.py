"""The device mesh: how the ranks are arranged, made once from the configuration and passed along.

The axes, slowest first, are `replicate` (copies of the model: gradients are all-reduced) and `shard` (parameters,
gradients and optimizer state are split: ZeRO). Their product is the data-parallel size. Whether sizes fit the world is
decided before, in `tutti.config.layout`, without torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tutti.config.layout import Layout
from tutti.core.dist import Dist


@dataclass(frozen=True)
class Mesh:
    """The ranks as a grid. `device_mesh` has the axes `replicate` and `shard`; sizes of 1 included."""

    device_mesh: DeviceMesh

    @property
    def dp_size(self) -> int:
        """Number of data-parallel ranks: ranks that see different data."""
        return self.device_mesh.size()

    @property
    def dp_rank(self) -> int:
        """This rank's place among them."""
        return self.device_mesh.get_local_rank("replicate") * self.shard_size + self.device_mesh.get_local_rank("shard")

    @property
    def replicate_size(self) -> int:
        return self.device_mesh["replicate"].size()

    @property
    def shard_size(self) -> int:
        return self.device_mesh["shard"].size()

    @property
    def fsdp(self) -> DeviceMesh:
        """What `fully_shard` takes: (shard,) alone, or (replicate, shard) where there are copies."""
        return self.device_mesh if self.replicate_size > 1 else self.device_mesh["shard"]

    def __str__(self) -> str:
        parts = [f"{name} {self.device_mesh[name].size()}" for name in self.device_mesh.mesh_dim_names or ()]
        return " x ".join(parts)


def build_mesh(layout: Layout, dist: Dist) -> Mesh:
    """Arrange all ranks of `dist` as `layout` says. A collective call."""
    shape = (layout.replicate, layout.shard)
    return Mesh(init_device_mesh(dist.device.type, shape, mesh_dim_names=("replicate", "shard")))
