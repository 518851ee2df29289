"""Counted bytes equal formulas: for each kind of call and each axis, on real and on simulated ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.harness import regroup, run_ranks
from tutti.attention.ring import ring_attention
from tutti.attention.spec import AttentionSpec
from tutti.check.comm_volume import Sent, count_traffic
from tutti.config.layout import Layout
from tutti.core.collectives import all_to_all, gather_rows, scatter_rows
from tutti.core.dist import World
from tutti.parallel.mesh import Mesh, build_mesh


def mesh_of(world: int, *, ddp: bool = False, **sizes: int) -> Mesh:
    """The mesh of this rank among `world` with axes of these sizes."""
    axes = dict.fromkeys(("replicate", "shard", "tensor", "pipeline", "ulysses", "context", "expert"), 1) | sizes
    data = axes["replicate"] * axes["shard"]
    layout = Layout(world=world, data=data, global_batch_size=data, accumulation=1, **axes)
    rank = dist.get_rank()
    return build_mesh(layout, World(rank, world, rank, torch.device("cpu")), ddp=ddp)


def every_call() -> dict[tuple[str, str], Sent]:
    """Calls of each kind by three ranks that are the tensor axis; rank r gives r + 1 rows to each in an all-to-all."""
    mesh = mesh_of(3, tensor=3)
    group, rank = mesh.group("tensor"), mesh.rank("tensor")
    rows, whole = torch.ones(2, 5), torch.ones(6, 5)
    with count_traffic(mesh) as traffic:
        dist.all_gather([torch.empty(2, 5) for _ in range(3)], rows, group=group)
        dist.all_gather_into_tensor(torch.empty(6, 5), rows, group=group)
        dist.reduce_scatter_tensor(torch.empty(2, 5), whole, group=group)
        dist.all_reduce(whole.bfloat16(), group=group)
        dist.all_to_all_single(torch.empty(6, 5), whole, group=group)
        given, taken = [rank + 1] * 3, [1, 2, 3]
        dist.all_to_all_single(torch.empty(6, 5), torch.ones(sum(given), 5), taken, given, group=group)
        works = [dist.isend(rows, group=group, group_dst=(rank + 1) % 3)]
        works.append(dist.irecv(torch.empty(2, 5), group=group, group_src=(rank - 1) % 3))
        for work in works:
            assert work is not None
            work.wait()
        dist.broadcast(whole, group=group, group_src=0)
        dist.barrier(group=group)
        dist.all_reduce(whole)
        dist.all_reduce(whole, group=mesh.group("context"))
        DTensor.from_local(whole, mesh.grid["tensor"], [Partial()]).redistribute(placements=[Replicate()])
    return dict(traffic.by_kind)


def test_kinds_of_calls():
    row = 5 * 4
    for rank, counted in enumerate(run_ranks(3, every_call)):
        assert counted == {
            ("tensor", "all-gather"): Sent(2 * 2 * 2 * row, 2),
            ("tensor", "reduce-scatter"): Sent(2 * 2 * row, 1),
            ("tensor", "all-reduce"): Sent(2 * 2 * (2 * row // 2 + 2 * row), 2),
            ("tensor", "all-to-all"): Sent(2 * 2 * row + 2 * (rank + 1) * row, 2),
            ("tensor", "send"): Sent(2 * row, 1),
            ("tensor", "broadcast"): Sent(2 * 2 * row, 1),
            ("tensor", "barrier"): Sent(0, 1),
            ("other", "all-reduce"): Sent(2 * 2 * 2 * row, 1),
        }, f"rank {rank}"


def own_operators(mesh: Mesh) -> dict[tuple[str, str], Sent]:
    """Our operators forward and backward, on whatever the mesh's groups are: [4, 6] fp32 along tensor and ulysses, and
    attention over 16 tokens of one sample along context, with 2 heads of 8 channels."""
    tensor, ulysses, context = (mesh.group(axis).group_name for axis in ("tensor", "ulysses", "context"))
    borders = torch.tensor([0, 16], dtype=torch.int32)
    fake = FakeTensorMode(allow_non_fake_inputs=True) if dist.get_backend() == "fake" else nullcontext()
    with fake, count_traffic(mesh) as traffic:
        rows = torch.ones(4, 6, requires_grad=True)
        gathered = gather_rows(rows, tensor, mesh.size("tensor"))
        all_to_all(scatter_rows(gathered, tensor, mesh.size("tensor")), [], [], ulysses).sum().backward()
        heads = torch.ones(2, 16 // mesh.size("context"), 8, requires_grad=True)
        ring_attention(heads, heads, heads, borders, AttentionSpec(scale=1.0), None, context).sum().backward()
    return dict(traffic.by_kind)


def own_operators_by_axis() -> dict[str, dict[tuple[str, str], Sent]]:
    """The counts with two ranks along each of the three axes in turn."""
    return {axis: own_operators(mesh_of(2, **{axis: 2})) for axis in ("tensor", "ulysses", "context")}


@contextmanager
def imagined_ranks(world: int) -> Iterator[None]:
    """This process as rank 1 of `world` in a group that sends nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_operators_of_our_own():
    first, second = run_ranks(2, own_operators_by_axis)
    block = 4 * 6 * 4
    split = {("tensor", "all-gather"): Sent(2 * block, 2), ("tensor", "reduce-scatter"): Sent(2 * block, 2)}
    assert first["tensor"] == second["tensor"] == split
    assert first["ulysses"] == second["ulysses"] == {("ulysses", "all-to-all"): Sent(2 * block // 2, 2)}
    # Of chunks 0 and 3 on rank 0 and 1 and 2 on rank 1: chunk 3 sees both of rank 1's, and these see chunk 0 alone.
    chunk = 2 * 4 * (8 + 8) * 4
    there, back = 2, 1  # keys travel in both passes, their gradients travel back in one
    assert first["context"] == {("context", "send"): Sent((there * 1 + back * 2) * chunk, there + back)}
    assert second["context"] == {("context", "send"): Sent((there * 2 + back * 1) * chunk, there + back)}
    with imagined_ranks(2):
        assert own_operators_by_axis() == second


LAYOUTS: list[dict[str, Any]] = [
    {"ulysses": 2, "context": 2, "expert": 2},
    {"shard": 2, "pipeline": 2},
    {"replicate": 2, "shard": 2},
    {"replicate": 2, "tensor": 2, "ddp": True},
    {"shard": 4, "expert": 4},
]


def calls_along_axes() -> list[dict[str, Sent]]:
    """For each of LAYOUTS, the traffic of all-reducing eight numbers once along each axis of each submesh, between
    pipeline stages, and over all ranks."""
    counted = []
    for sizes in LAYOUTS:
        regroup()
        mesh = mesh_of(4, **sizes)
        meshes = (mesh.grid, mesh.fsdp, mesh.expert, mesh.expert_fsdp)
        groups = {part.get_group(dim).group_name: part.get_group(dim) for part in meshes for dim in range(part.ndim)}
        wires = dist.new_group(dist.get_process_group_ranks(mesh.group("pipeline")), use_local_synchronization=True)
        with count_traffic(mesh) as traffic:
            for group in (*groups.values(), wires, None):
                dist.all_reduce(torch.ones(8), group=group)
        counted.append(traffic.sent)
    return counted


def test_axes():
    two, four = Sent(32, 1), Sent(2 * 3 * 32 // 4, 1)
    for sent in run_ranks(4, calls_along_axes):
        assert sent == [
            {"ulysses": two, "context": two, "fsdp": four, "expert": two, "expert_shard": two, "other": four},
            {"fsdp": two + two, "expert_shard": two, "pipeline": two + two, "other": four},
            {"replicate": two + two, "fsdp": two + two, "expert_shard": two, "other": four},
            {"replicate": two + two + four, "tensor": two, "other": four},
            {"fsdp": four + four, "expert": four, "other": four},
        ]


def a_step_of_linear_layers(world: int, sizes: dict[str, int]) -> dict[tuple[str, str], Sent]:
    """Forward and backward of three layers [64, 32] in FSDP2 units of their own, gathered in bf16, reduced in fp32."""
    mesh = mesh_of(world, **sizes)
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    with FakeTensorMode() if dist.get_backend() == "fake" else nullcontext():
        model = nn.Sequential(
            nn.Linear(32, 64, bias=False), nn.Linear(64, 32, bias=False), nn.Linear(32, 64, bias=False)
        )
        for layer in model:
            fully_shard(layer, mesh=mesh.fsdp, mp_policy=precision, reshard_after_forward=True)
        with count_traffic(mesh) as traffic:
            model(torch.ones(4, 32, dtype=torch.bfloat16)).sum().backward()
    return dict(traffic.by_kind)


def step_by_formula(shards: int, copies: int) -> dict[tuple[str, str], Sent]:
    weights = 3 * 64 * 32
    share = weights // shards
    return {
        ("fsdp", "all-gather"): Sent(2 * 2 * (shards - 1) * share, 6),  # units of their own, each freed after forward
        ("fsdp", "reduce-scatter"): Sent(4 * (shards - 1) * share, 3),
        ("replicate", "all-reduce"): Sent(2 * 4 * (copies - 1) * share // copies, 3),
    }


def test_ranks_that_are_not_there_count_the_same():
    real = run_ranks(4, a_step_of_linear_layers, 4, {"replicate": 2, "shard": 2})
    assert real == [step_by_formula(2, 2)] * 4
    for world, copies, shards in ((4, 2, 2), (2048, 64, 32)):
        with imagined_ranks(world):
            imagined = a_step_of_linear_layers(world, {"replicate": copies, "shard": shards})
        assert imagined == step_by_formula(shards, copies), world
