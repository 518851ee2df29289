"""Muon equals torch's own on a matrix; stacks; its choice of parameters; sharded matrices equal full ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import AutoModelForCausalLM

from tests.harness import run_ranks
from tests.model.zoo import tiny
from tests.train.runs import records, run, tiny_config
from tests.train.test_run import train_until
from tutti.config import Config, TrainConfig
from tutti.train.muon import Muon, block_matrices, orthogonalise
from tutti.train.optim import build_optimizer

MUON = {"optimizer": "muon", "lr": 1e-2, "weight_decay": 0.1}


def build(model: nn.Module, dtype: str = "float32") -> torch.optim.Optimizer:
    return build_optimizer(model, Config(train=TrainConfig(**MUON, compute_dtype=dtype)))  # type: ignore[arg-type]


class Blocks(nn.Module):
    """Blocks with matrices of these shapes, and a head."""

    def __init__(self, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Module() for _ in shapes)
        for block, shape in zip(self.blocks, shapes, strict=True):
            block.weight = nn.Parameter(torch.empty(shape))
        self.head = nn.Linear(6, 4)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def set_grads(self, step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        for parameter in self.parameters():
            grad = torch.randn(parameter.shape, generator=generator)
            if isinstance(parameter, DTensor):
                grad = distribute_tensor(grad, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.grad = grad


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_a_matrix_is_stepped_as_torch_steps_it(shape):
    ours, theirs = Blocks(shape), Blocks(shape)
    matrices = torch.optim.Muon(theirs.blocks.parameters(), lr=1e-2, adjust_lr_fn="match_rms_adamw")
    rest = torch.optim.AdamW(theirs.head.parameters(), lr=1e-2, weight_decay=0.1)
    optimizer = build(ours, "bfloat16")
    for step in range(4):
        for model in (ours, theirs):
            model.set_grads(step)
        for each in (optimizer, matrices, rest):
            each.step()
    for (name, parameter), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-6, atol=1e-7, msg=name)


def test_a_step_that_is_refused_on_the_device_changes_nothing():
    told, asked = Blocks((6, 4), (3, 4, 6)), Blocks((6, 4), (3, 4, 6))
    optimizer, other = build(told), build(asked)
    for step, refused in enumerate((1.0, 0.0, 1.0, 0.0)):
        told.set_grads(step)
        if refused:
            for parameter in told.parameters():
                parameter.grad.view(-1)[0] = torch.nan
        optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(refused)
        optimizer.step()
        if not refused:
            asked.set_grads(step)
            other.step()
    for (name, parameter), same in zip(told.named_parameters(), asked.parameters(), strict=True):
        torch.testing.assert_close(parameter, same, rtol=1e-6, atol=1e-7, msg=name)
        for key, value in other.state[same].items():
            torch.testing.assert_close(optimizer.state[parameter][key], value, rtol=1e-6, atol=1e-7, msg=key)


def test_singular_values_end_near_one():
    made = orthogonalise(torch.randn(3, 24, 40, generator=torch.Generator().manual_seed(0)), torch.float32)
    values = torch.linalg.svdvals(made)
    assert values.min() > 0.6 and values.max() < 1.3


def test_each_expert_of_a_stack_is_a_matrix():
    stack, single = Blocks((3, 6, 4)), Blocks((6, 4), (6, 4), (6, 4))
    for block, matrix in zip(single.blocks, stack.blocks[0].weight.detach(), strict=True):
        block.weight.data.copy_(matrix)
    optimizers = build(stack), build(single)
    for step in range(3):
        stack.set_grads(step)
        for block, grad in zip(single.blocks, stack.blocks[0].weight.grad, strict=True):
            block.weight.grad = grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for number, (block, matrix) in enumerate(zip(single.blocks, stack.blocks[0].weight, strict=True)):
        torch.testing.assert_close(matrix, block.weight, rtol=1e-5, atol=1e-6, msg=f"expert {number}")


def test_matrices_of_blocks_alone_are_taken():
    model = AutoModelForCausalLM.from_config(tiny("qwen3_moe"))
    taken = block_matrices(model)
    names = {name.split(".", 3)[-1] for name, parameter in model.named_parameters() if parameter in taken}
    attention = {f"self_attn.{part}_proj.weight" for part in "qkvo"}
    assert names == attention | {"mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    groups = build(model).param_groups
    assert {p for group in groups if group["matrices"] for p in group["params"]} == taken


def step_sharded(shapes: list[tuple[int, ...]], ways: list[tuple[str, int]]) -> list:
    """This rank's model after three steps, its blocks split along each axis of the mesh as `ways` says, in full."""
    model = Blocks(*shapes)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor"))
    splits = dict(ways)
    if "tensor" in splits:
        for block in model.blocks:
            block.weight = nn.Parameter(
                distribute_tensor(block.weight.detach(), mesh["tensor"], [Shard(splits["tensor"])])
            )
    for block in model.blocks if "shard" in splits else ():
        fully_shard(block, mesh=mesh["shard"], shard_placement_fn=lambda _: Shard(splits["shard"]))
    optimizer = build(model)
    for step in range(3):
        model.set_grads(step)
        optimizer.step()
    parameters = [block.weight.detach() for block in model.blocks]
    return [(p.full_tensor() if isinstance(p, DTensor) else p).numpy() for p in parameters]


@pytest.mark.parametrize(
    ("shapes", "ways"),
    [
        ([(7, 5), (7, 5), (7, 5), (4, 9)], [("shard", 0)]),
        ([(8, 6), (8, 6), (12, 4)], [("shard", 0), ("tensor", 0)]),
        ([(8, 6), (8, 6), (12, 4)], [("shard", 0), ("tensor", 1)]),
        ([(6, 8), (6, 8)], [("tensor", 1)]),
        ([(4, 6, 8), (4, 6, 8)], [("shard", 0), ("tensor", 0)]),
        ([(4, 6, 8), (2, 6, 8)], [("shard", 1), ("tensor", 0)]),
    ],
)
def test_sharded_matrices_are_stepped_as_whole_ones(shapes, ways):
    model = Blocks(*shapes)
    optimizer = build(model)
    for step in range(3):
        model.set_grads(step)
        optimizer.step()
    for rank, parts in enumerate(run_ranks(4, step_sharded, shapes, ways)):
        for shape, part, block in zip(shapes, parts, model.blocks, strict=True):
            torch.testing.assert_close(
                torch.from_numpy(part), block.weight.detach(), rtol=1e-5, atol=1e-6, msg=f"rank {rank}, {shape}"
            )


def test_resume_is_bit_equal(tmp_path):
    changes = {f"train.{name}": value for name, value in MUON.items()} | {"train.save_steps": 2}
    whole = tiny_config(tmp_path / "whole", **changes, **{"train.muon_momentum": 0.9})
    expected = run(whole)
    half = tiny_config(tmp_path / "half", **changes, **{"train.muon_momentum": 0.9})
    run_ranks(1, train_until, half, 2)
    assert [line["step"] for line in records(half)] == [1, 2]
    resume = {"train.load_checkpoint_path": "auto", "train.muon_momentum": 0.9}
    resumed = run(tiny_config(tmp_path / "half", **changes, **resume))
    assert [line["loss"] for line in resumed] == [line["loss"] for line in expected]
    assert expected[-1]["loss"] < expected[0]["loss"]
    other = run(tiny_config(tmp_path / "other", **changes))
    assert other[-1]["loss"] != expected[-1]["loss"], "train.muon_momentum had no effect"


def test_it_is_an_adamw_where_there_are_no_blocks():
    model, twin = nn.Linear(4, 4), nn.Linear(4, 4)
    twin.load_state_dict(model.state_dict())
    optimizer = build(model)
    assert isinstance(optimizer, Muon)
    other = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.1)
    for each in (model, twin):
        each(torch.ones(2, 4)).sum().backward()
    optimizer.step(), other.step()
    torch.testing.assert_close(model.weight, twin.weight)
