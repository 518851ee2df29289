"""Experts divided among ranks: rows travel to them and back, and runs read, save and resume them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.harness import run_ranks
from tests.parallel.layouts import assert_same, family_config, train_all
from tutti.parallel.expert import Exchange

COMMON = {"micro_batch_size": 1, "global_batch_size": 8, "save_hf_weights": True, "save_steps": 2}
FSDP2 = {"data_parallel_mode": "fsdp2"}
EP2, EP4 = FSDP2 | {"expert_parallel_size": 2}, FSDP2 | {"expert_parallel_size": 4}
TP2 = {"tensor_parallel_size": 2}
REMAT = {"enable_gradient_checkpointing": True, "enable_reentrant": False}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of a run on one process, and its metrics lines."""
    folder = tmp_path_factory.mktemp("alone")
    (lines,) = train_all([family_config(folder, "qwen3_moe", **COMMON)], 1)
    return folder, lines


def exported(folder: Path) -> Path:
    return folder / "out" / "hf" / "final"


def saved(folder: Path) -> dict:
    return {"load_checkpoint_path": str(folder / "out" / "checkpoints" / "global_step_2")}


def test_runs_go_on_with_experts_divided_otherwise(tmp_path, alone):
    """From one process to four ranks with an expert each, along both axes, and back to two with half of them each."""
    divided = COMMON | EP4 | TP2 | REMAT
    whole = family_config(tmp_path / "whole", "qwen3_moe", 4, **divided)
    four = family_config(tmp_path / "four", "qwen3_moe", 4, **(divided | saved(alone[0])))
    two = family_config(tmp_path / "two", "qwen3_moe", 2, **(COMMON | EP2 | saved(tmp_path / "whole")))
    lines = train_all([whole, four], 4) + train_all([two], 2)
    assert_same(lines[0], alone[1])
    assert_same(lines[1], alone[1][2:])
    assert_same(lines[2], alone[1][2:])


def test_weights_are_read_into_their_parts(tmp_path, alone):
    """A run on divided experts that starts from an export begins with the loss of one process."""
    changes = {"model.model_path": str(exported(alone[0])), "max_steps": 1, "save_hf_weights": False}

    def config(number, world, **train):
        return family_config(tmp_path / str(number), "qwen3_moe", world, **(COMMON | changes | train))

    (want,) = train_all([config(0, 1)], 1)
    own = {"broadcast_model_weights_from_rank0": False}
    layouts = (EP2, EP2 | own, EP4 | TP2, EP2 | TP2 | own)
    for got in train_all([config(number, 4, **train) for number, train in enumerate(layouts, 1)], 4):
        assert_same(got, want)


def exchanged(dtype):
    """Rows through an exchange of three ranks with two experts each, and their gradient."""
    import torch.distributed as dist

    rank, generator = dist.get_rank(), torch.Generator().manual_seed(dist.get_rank())
    # No rank has rows for experts 2 and 3, and rank 1 has no rows at all.
    experts = torch.tensor([0, 1, 4, 5])[torch.randint(4, (0 if rank == 1 else 20,), generator=generator)].sort().values
    rows = torch.randn(len(experts), 3, generator=generator).to(dtype).requires_grad_()
    scales = torch.tensor([2.0, 3.0]).requires_grad_()

    def compute(received, local, counts):
        assert local.equal(local.sort().values) and counts.equal(local.bincount(minlength=2))
        return received * ((1 + rank) * scales[local, None]).to(dtype)

    group = dist.group.WORLD
    assert group is not None
    out = Exchange(group)(rows, experts.bincount(minlength=6), compute)
    out.sum().backward()
    factor = ((1 + experts // 2) * torch.tensor([2.0, 3.0])[experts % 2]).to(dtype)[:, None]
    assert rows.grad is not None and scales.grad is not None
    return {
        "forward": torch.equal(out, rows * factor),
        "backward": torch.equal(rows.grad, factor.expand_as(rows)),
        "weights": scales.grad.tolist(),
        "sums": [[rows[experts == 2 * owner + i].sum().item() * (1 + owner) for i in (0, 1)] for owner in range(3)],
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_come_back_in_place_and_experts_see_all_of_them(dtype):
    results = run_ranks(3, exchanged, dtype)
    for owner, result in enumerate(results):
        assert result["forward"] and result["backward"]
        want = [sum(other["sums"][owner][i] for other in results) for i in (0, 1)]
        assert result["weights"] == pytest.approx(want, rel=1e-5 if dtype == torch.float32 else 5e-2, abs=0.05)
