"""Experts divided among ranks train as they do on one, whatever else is divided, and are loaded and written right."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.harness import run_ranks
from tests.parallel.layouts import assert_same, family_config, train_all
from tutti.parallel.expert import Exchange

COMMON = {"micro_batch_size": 1, "global_batch_size": 8, "save_hf_weights": True, "save_steps": 2}
FSDP2 = {"data_parallel_mode": "fsdp2"}
EP2, EP4 = FSDP2 | {"expert_parallel_size": 2}, FSDP2 | {"expert_parallel_size": 4}
TP2, TP4 = {"tensor_parallel_size": 2}, {"tensor_parallel_size": 4}
PP2, ULYSSES2 = {"pipeline_parallel_size": 2}, {"ulysses_parallel_size": 2}
STRIDED = {"ep_outside": True, "enable_full_shard": False}
REMAT = {"enable_gradient_checkpointing": True, "enable_reentrant": False}
ROUTER = {"output_router_logits": True, "router_aux_loss_coef": 0.1}

FAMILIES = {
    "qwen3_moe": ("qwen3_moe", {}),
    "with router loss": ("qwen3_moe", ROUTER),
    "mixtral": ("mixtral", ROUTER),
    "gpt_oss": ("gpt_oss", {}),
    "deepseek_v3": ("deepseek_v3", {}),
}

LAYOUTS = {
    "remat": ("qwen3_moe", 2, EP2 | REMAT),
    "router loss": ("mixtral", 2, EP2),
    "shared experts, eager products": ("deepseek_v3", 2, EP2 | {"model.moe_implementation": "eager"}),
    "tensor": ("mixtral", 2, EP2 | TP2),
    "tensor, ddp": ("deepseek_v3", 2, TP2 | {"expert_parallel_size": 2}),
    "strided": ("qwen3_moe", 4, EP2 | STRIDED),
    "biases": ("gpt_oss", 4, EP2),
    "ulysses and context": ("qwen3_moe", 4, EP4 | ULYSSES2 | {"context_parallel_size": 2}),
    "ulysses, ddp": ("qwen3_moe", 4, ULYSSES2 | {"expert_parallel_size": 2}),
    "built on the cpu": ("qwen3_moe", 4, EP4 | {"init_device": "cpu"}),
    "over shard and tensor, remat": ("qwen3_moe", 4, EP4 | TP2 | REMAT),
    "beside tensor, strided": ("deepseek_v3", 4, EP2 | TP2 | STRIDED),
    "more tensor than expert ranks": ("qwen3_moe", 4, EP2 | TP4),
    "biases and sinks over tensor": ("gpt_oss", 4, EP4 | TP2),
    "tensor and ulysses": ("mixtral", 4, EP4 | TP2 | ULYSSES2),
    "tensor and pipeline": ("with router loss", 4, EP2 | TP2 | PP2),
    "hybrid": ("qwen3_moe", 8, EP2 | {"data_parallel_replicate_size": 2, "data_parallel_shard_size": 4}),
    "hybrid and tensor": (
        "qwen3_moe",
        8,
        EP4 | TP2 | {"data_parallel_replicate_size": 2, "data_parallel_shard_size": 2, "ep_outside": True},
    ),
    "more ranks than experts": ("qwen3_moe", 8, EP2 | REMAT | {"enable_reentrant": True}),
    "tensor, pipeline and data": ("with router loss", 8, EP4 | TP2 | PP2 | {"pipeline_schedule": "zero_bubble"}),
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Of each family: the folder of a run on one process, and its lines of metrics."""
    folders = {name: tmp_path_factory.mktemp(name.split()[0]) for name in FAMILIES}
    configs = [
        family_config(folders[name], family, overrides=overrides, **COMMON)
        for name, (family, overrides) in FAMILIES.items()
    ]
    return dict(zip(FAMILIES, zip(folders.values(), train_all(configs, 1), strict=True), strict=True))


@pytest.fixture(scope="module")
def divided(tmp_path_factory, alone):
    """The same of a run on a layout; all layouts of as many ranks are run together, when the first is asked for."""
    known: dict = {}

    def get(name):
        if name not in known:
            world = LAYOUTS[name][1]
            together = {other: layout for other, layout in LAYOUTS.items() if layout[1] == world}
            folders = [tmp_path_factory.mktemp(other.split()[0].strip(",")) for other in together]
            configs = [
                family_config(folder, FAMILIES[family][0], world, FAMILIES[family][1], **(COMMON | train))
                for folder, (family, _, train) in zip(folders, together.values(), strict=True)
            ]
            known.update(zip(together, zip(folders, train_all(configs, world), strict=True), strict=True))
        return known[name]

    return get


def exported(folder: Path) -> Path:
    return folder / "out" / "hf" / "final"


def assert_equal_run(got, want):
    """The same losses, norms and loads of experts at each step, and the same weights in the end."""
    (folder, lines), (other_folder, other_lines) = got, want
    assert_same(lines, other_lines)
    for line, other_line in zip(lines, other_lines, strict=True):
        for key in ("expert_load_max", "expert_load_min"):
            # Padding, of which layouts differ in a few tokens, counts too.
            assert line[key] == pytest.approx(other_line[key], rel=5e-2, abs=1e-2)
    weights, others = (load_file(exported(each) / "model.safetensors") for each in (folder, other_folder))
    assert weights.keys() == others.keys()
    for name, value in others.items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-3, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_equals_one_process(alone, divided, name):
    assert_equal_run(divided(name), alone[LAYOUTS[name][0]])


def test_bf16_stays_close_to_fp32(tmp_path, alone):
    configs = [
        family_config(tmp_path / str(number), "qwen3_moe", 2, **(COMMON | train), compute_dtype="bfloat16")
        for number, train in enumerate((EP2, EP2 | TP2))
    ]
    for lines in train_all(configs, 2):
        assert_same(lines, alone["qwen3_moe"][1], loss=2e-2, norm=2e-2)


def saved(folder: Path) -> dict:
    return {"load_checkpoint_path": str(folder / "out" / "checkpoints" / "global_step_2")}


def test_runs_go_on_with_experts_divided_otherwise(tmp_path, alone, divided):
    """From one process to four ranks with an expert each, along both axes, and back to two with half of them each."""
    middle = {"four": saved(alone["qwen3_moe"][0]), "two": saved(divided("over shard and tensor, remat")[0])}
    four = family_config(tmp_path / "four", "qwen3_moe", 4, **(COMMON | EP4 | TP2 | middle["four"]))
    two = family_config(tmp_path / "two", "qwen3_moe", 2, **(COMMON | EP2 | middle["two"]))
    for config, world in ((four, 4), (two, 2)):
        (lines,) = train_all([config], world)
        assert_same(lines, alone["qwen3_moe"][1][2:])


def test_weights_are_read_into_their_parts(tmp_path, alone):
    """A run on divided experts that starts from an export begins with the loss that one process has with it."""
    changes = {"model.model_path": str(exported(alone["qwen3_moe"][0])), "max_steps": 1, "save_hf_weights": False}

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
    # Nobody has rows for experts 2 and 3, and rank 1 has none at all.
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
