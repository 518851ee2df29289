"""The device mesh: coordinates, groups and the axes that split parameters, for layouts of up to 16 ranks."""

import pytest
import torch

from tests.harness import run_ranks
from tutti.config.layout import Layout
from tutti.core.dist import World
from tutti.parallel.mesh import build_mesh

ONES = {axis: 1 for axis in ("replicate", "shard", "tensor", "pipeline", "ulysses", "context", "expert")}


def describe(sizes, options):
    import torch.distributed as dist

    sizes = ONES | sizes
    world = dist.get_world_size()
    data = sizes["replicate"] * sizes["shard"]
    layout = Layout(world=world, data=data, global_batch_size=data, accumulation=1, **sizes)
    mesh = build_mesh(layout, World(dist.get_rank(), world, 0, torch.device("cpu")), **options)
    return {
        "dp_rank": mesh.dp_rank,
        "dp_size": mesh.dp_size,
        "fsdp": mesh.fsdp.mesh.tolist(),
        "shards": (mesh.num_shards, mesh.num_expert_shards),
        "expert": mesh.expert.mesh.tolist(),
        "expert_fsdp": mesh.expert_fsdp.mesh.tolist(),
        "text": str(mesh),
    }


@pytest.mark.parametrize(
    ("world", "sizes", "options", "rank", "expected"),
    [
        (1, {}, {}, 0, {"dp_size": 1, "fsdp": [0], "shards": (1, 1), "text": "one rank"}),
        (4, {"shard": 4}, {}, 3, {"dp_rank": 3, "fsdp": [0, 1, 2, 3], "shards": (4, 4)}),
        (4, {"replicate": 4}, {"ddp": True}, 2, {"dp_rank": 2, "fsdp": [[0], [1], [2], [3]]}),
        (4, {"replicate": 2, "shard": 2}, {}, 2, {"dp_rank": 2, "text": "replicate 2 x shard 2"}),
        (4, {"shard": 2, "ulysses": 2}, {}, 3, {"dp_rank": 1, "dp_size": 2, "fsdp": [0, 1, 2, 3]}),
        (4, {"replicate": 2, "context": 2}, {"ddp": True}, 1, {"dp_rank": 0, "fsdp": [[0], [1], [2], [3]]}),
        (4, {"shard": 2, "tensor": 2}, {}, 1, {"dp_rank": 0, "fsdp": [1, 3]}),
        (4, {"pipeline": 2, "shard": 2}, {}, 3, {"dp_rank": 1, "fsdp": [2, 3]}),
        (4, {"shard": 4, "expert": 2}, {}, 1, {"expert": [0, 1], "expert_fsdp": [1, 3], "shards": (4, 2)}),
        (4, {"shard": 4, "expert": 2}, {"ep_outside": True}, 1, {"expert": [1, 3], "expert_fsdp": [0, 1]}),
        (4, {"shard": 2, "tensor": 2, "expert": 4}, {}, 1, {"expert": [0, 1, 2, 3], "expert_fsdp": [1]}),
        (4, {"tensor": 4, "expert": 2}, {"ep_outside": True}, 1, {"expert": [1, 3], "expert_fsdp": [0, 1]}),
        (4, {"replicate": 2, "tensor": 2, "expert": 2}, {}, 1, {"expert": [0, 1], "expert_fsdp": [[1], [3]]}),
        (4, {"tensor": 4, "expert": 2}, {"ddp": True}, 1, {"expert": [0, 1], "expert_fsdp": [[1], [3]]}),
    ],
)  # fmt: skip
def test_coordinates_and_groups(world, sizes, options, rank, expected):
    got = run_ranks(world, describe, sizes, options)[rank]
    assert {key: got[key] for key in expected} == expected
