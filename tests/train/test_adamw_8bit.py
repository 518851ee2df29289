"""AdamW with 8-bit state: close to AdamW, and exact in every layout and after a resume."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.harness import run_ranks
from tests.train.runs import records, run, tiny_config, write_model_config
from tutti.train.adamw_8bit import AdamW8bit, block_of

SHAPES = ((96, 192), (3, 64, 128), (80, 576), (700, 40), (64,))
"""Rows of blocks of 64, 128 and 64; rows that are not divided into blocks; a vector."""


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.matrices = nn.ParameterList(torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES)

    def forward(self) -> torch.Tensor:
        return sum((item.float() * (1 + item.float().cos())).square().sum() for item in self.matrices) / 100


def steps(model: Model, optimizer: torch.optim.Optimizer, count: int) -> None:
    for _ in range(count):
        model.zero_grad()
        model().backward()
        optimizer.step()


def test_it_follows_adamw_and_holds_a_quarter_of_its_state() -> None:
    start, ours, theirs = Model(), Model(), Model()
    optimizer = AdamW8bit(ours.parameters(), lr=1e-2, weight_decay=0.1)
    reference = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.1)
    steps(ours, optimizer, 50)
    steps(theirs, reference, 50)
    for begun, got, want in zip(start.parameters(), ours.parameters(), theirs.parameters(), strict=True):
        off = (got - want).norm() / (want - begun).norm()
        assert off < (0.05 if block_of(got) else 1e-5)
    first = next(iter(ours.parameters()))
    state = optimizer.state[first]
    assert state["exp_avg"].dtype == torch.uint8 and state["exp_avg_sq_scale"].shape == (96, 3)
    held = sum(item.nbytes for name, item in state.items() if name != "step")
    assert held <= 1.1 * 2 * first.numel()
    assert [block_of(item) for item in ours.parameters()] == [64, 128, 64, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_state_goes_on_bit_for_bit(dtype: torch.dtype) -> None:
    model = Model(dtype)
    optimizer = AdamW8bit(model.parameters(), lr=1e-2)
    steps(model, optimizer, 3)
    twin = copy.deepcopy(model)
    resumed = AdamW8bit(twin.parameters(), lr=1e-2)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(model, optimizer, 2)
    steps(twin, resumed, 2)
    for got, want in zip(twin.parameters(), model.parameters(), strict=True):
        assert torch.equal(got, want)
        for name, value in optimizer.state[want].items():
            assert torch.equal(resumed.state[got][name], value) and resumed.state[got][name].dtype == value.dtype


def trained(shard: bool) -> list[torch.Tensor]:
    model = Model()
    if shard:
        fully_shard(model)
    steps(model, AdamW8bit(model.parameters(), lr=1e-2), 4)
    return [item.full_tensor() if isinstance(item, DTensor) else item.detach() for item in model.parameters()]


def test_shards_are_stepped_as_the_whole_is() -> None:
    want = trained(False)
    for rank in run_ranks(2, trained_lists, True):  # the mean of two equal gradients is exact
        for got, whole in zip(rank, want, strict=True):
            assert torch.equal(torch.tensor(got), whole)


def trained_lists(shard: bool) -> list[Any]:
    return [item.tolist() for item in trained(shard)]


def test_a_run_resumes_on_other_ranks_as_if_it_had_not_stopped(tmp_path: Any) -> None:
    def config(name: str, world: int, **train: Any) -> Any:
        (tmp_path / name).mkdir()
        model = write_model_config(tmp_path / name / "wide", hidden_size=64, intermediate_size=128)
        arguments = {"optimizer": "adamw_8bit", "data_parallel_mode": "fsdp2" if world > 1 else "ddp"} | train
        named = {f"train.{key}": value for key, value in arguments.items()}
        return tiny_config(tmp_path / name, world=world, **{"model.config_path": model}, **named)

    whole = run(config("whole", 1, save_steps=2))
    saved = str(tmp_path / "whole" / "out" / "checkpoints" / "global_step_2")
    for name, world in (("alone", 1), ("two", 2)):
        resumed = config(name, world, load_checkpoint_path=saved)
        run_lines = run(resumed, world)
        assert [line["step"] for line in run_lines] == [3, 4] and records(resumed)
        for got, want in zip(run_lines, whole[2:], strict=True):
            tolerance = 0 if world == 1 else 1e-5
            assert got["loss"] == pytest.approx(want["loss"], rel=tolerance)
            assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=10 * tolerance)


def test_what_it_needs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="rows of 192 in blocks of 64, which ranks that have 96 of them would cut"):
        monkeypatch.setattr("tutti.train.adamw_8bit.local_part", lambda parameter: parameter[:, :96])
        block_of(torch.empty(96, 192))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r"train\.optimizer: adamw_8bit needs bitsandbytes, which is not installed"):
        AdamW8bit(Model().parameters())
