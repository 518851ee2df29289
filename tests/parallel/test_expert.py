"""Experts divided among ranks train as they do on one, whatever else is divided, and are loaded and written right."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from tests.harness import run_ranks
from tests.model.zoo import tiny
from tests.parallel.layouts import assert_same, train_family
from tests.train.runs import run, tiny_config
from tests.train.test_run import train_until
from tutti.config import ConfigError
from tutti.config.layout import Layout
from tutti.parallel.expert import Exchange, check_experts

COMMON = {"micro_batch_size": 1, "global_batch_size": 8, "save_hf_weights": True}
EP2 = {"data_parallel_mode": "fsdp2", "expert_parallel_size": 2}
EP4 = EP2 | {"expert_parallel_size": 4}
HYBRID = {"data_parallel_replicate_size": 2, "data_parallel_shard_size": 4}
REMAT = {"enable_gradient_checkpointing": True, "enable_reentrant": False}
ROUTER = {"output_router_logits": True, "router_aux_loss_coef": 0.1}

LAYOUTS = {
    "remat": (2, EP2 | REMAT),
    "strided": (4, EP2 | {"ep_outside": True, "enable_full_shard": False}),
    "hybrid": (8, EP2 | HYBRID),
    "more ranks than experts": (8, EP2 | REMAT | {"enable_reentrant": True}),
    "within ulysses and context": (4, EP4 | {"ulysses_parallel_size": 2, "context_parallel_size": 2}),
    "built-on-cpu": (4, EP4 | {"init_device": "cpu"}),
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Lines of metrics of a family on one process, its final weights, and the folder of its export."""
    known: dict = {}

    def get(family, **overrides):
        key = (family, *overrides)
        if key not in known:
            folder = tmp_path_factory.mktemp(family)
            lines = train_family(folder, family, overrides=overrides, **COMMON)
            known[key] = lines, weights(folder), str(folder / "out" / "hf" / "final")
        return known[key]

    return get


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "out" / "hf" / "final" / "model.safetensors")


def assert_equal_run(folder, want, family, world, overrides=None, *, loss=1e-5, norm=1e-4, atol=1e-3, **changes):
    lines = train_family(folder, family, world, overrides, **(COMMON | changes))
    assert_same(lines, want[0], loss=loss, norm=norm)
    got = weights(folder)
    assert got.keys() == want[1].keys()
    for name, value in want[1].items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")
    for line, reference in zip(lines, want[0], strict=True):
        for key in ("expert_load_max", "expert_load_min"):
            assert line[key] == pytest.approx(reference[key], rel=5e-2)


@pytest.mark.parametrize(("world", "train"), LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_equals_one_process(tmp_path, alone, world, train):
    assert_equal_run(tmp_path, alone("qwen3_moe"), "qwen3_moe", world, **train)


@pytest.mark.parametrize(
    ("family", "world", "overrides", "kind"),
    [("gpt_oss", 4, {}, "fused"), ("deepseek_v3", 2, {}, "eager"), ("mixtral", 2, ROUTER, "fused")],
)
def test_every_kind_of_experts_equals_one_process(tmp_path, alone, family, world, overrides, kind):
    train = EP2 | {"model.moe_implementation": kind}
    assert_equal_run(tmp_path, alone(family, **overrides), family, world, overrides, **train)


def test_bf16_stays_close_to_fp32(tmp_path, alone):
    lines = train_family(tmp_path, "qwen3_moe", 2, **(COMMON | EP2), compute_dtype="bfloat16")
    assert_same(lines, alone("qwen3_moe")[0], loss=2e-2, norm=2e-2)


def test_resume_on_another_number_of_expert_ranks_goes_on(tmp_path, alone):
    """Saved by two ranks with half of the experts each, resumed by four with an expert each."""
    reference = alone("qwen3_moe")[0]
    config = moe_config(tmp_path, 2, **EP2)
    run_ranks(2, train_until, config, 2)
    got = run(moe_config(tmp_path, 4, **EP4, load_checkpoint_path="auto"), 4)
    assert_same(got, reference)


def moe_config(folder, world, **train):
    tiny("qwen3_moe", vocab_size=2048).save_pretrained(folder / "moe")
    arguments = {f"train.{name}": value for name, value in (COMMON | train).items()}
    return tiny_config(folder, world=world, **{"model.config_path": str(folder / "moe")}, **arguments)


@pytest.mark.parametrize(("world", "broadcast"), [(4, True), (8, False)])
def test_weights_are_read_into_their_parts(tmp_path, alone, world, broadcast):
    """A run on divided experts that starts from an export begins with the loss that one process has with it."""
    exported = alone("qwen3_moe")[2]
    changes = {"model.model_path": exported, "max_steps": 1, "save_hf_weights": False}
    want = train_family(tmp_path / "alone", "qwen3_moe", **(COMMON | changes))
    reading = {"broadcast_model_weights_from_rank0": broadcast}
    assert_same(train_family(tmp_path / "divided", "qwen3_moe", world, **(COMMON | EP2 | changes | reading)), want)


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


@pytest.mark.parametrize(
    ("counts", "expert", "ranks", "message"),
    [
        ([6, 6], 4, 8, "does not divide the 6 experts of a layer; 1 or 2 would"),
        ([8, 12], 8, 8, "does not divide the 8 or 12 experts of a layer; 1, 2 or 4 would"),
        ([], 2, 2, "this model has no experts that can be divided; leave it at 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_those_that_do(counts, expert, ranks, message):
    layout = Layout(ranks, ranks, 1, ranks, 1, 1, 1, 1, expert, ranks, 1)
    with pytest.raises(ValueError, match=message):
        check_experts([SimpleNamespace(num_experts=count) for count in counts], layout)


def test_ddp_is_refused_with_what_would_do(tmp_path):
    with pytest.raises(ConfigError, match="data_parallel_mode to fsdp2"):
        moe_config(tmp_path, 2, expert_parallel_size=2, data_parallel_mode="ddp")
