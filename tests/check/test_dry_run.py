"""Predictions of `tutti check` for a step equal the measurements on real ranks, to the byte."""

from __future__ import annotations

import pickle
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.harness import regroup, run_ranks
from tests.parallel.layouts import family_config
from tutti.check.dry_run import Prediction, Unpredictable, full_batch, predict, predict_rank
from tutti.check.run import check
from tutti.config import Config
from tutti.core.batch import Batch
from tutti.train.step import TrainStep

FSDP2 = {"data_parallel_mode": "fsdp2"}
REMAT = {"enable_gradient_checkpointing": True}
DEEP = {"num_hidden_layers": 4}

ONE = {
    "alone": ("qwen3", {}),
    "bf16 with compensation": (
        "qwen3",
        {"optimizer": "anyprecision_adamw", "enable_mixed_precision": False, "compute_dtype": "bfloat16"},
    ),
    "activations offloaded": ("llama", {"enable_activation_offload": True} | REMAT),
}
TWO = {
    "ddp": ("qwen3", {"data_parallel_mode": "ddp"}),
    "fsdp2": ("qwen3", FSDP2 | REMAT | {"compute_dtype": "bfloat16"}),
    "fsdp2, ZeRO-2": ("llama", FSDP2 | {"enable_full_shard": False}),
    "fsdp1": ("llama", {"data_parallel_mode": "fsdp1", "optimizer": "anyprecision_adamw"}),
    "fsdp2, offloaded": ("smollm2", FSDP2 | {"enable_fsdp_offload": True, "enable_reentrant": False} | REMAT),
    "tensor": ("qwen3", {"tensor_parallel_size": 2} | REMAT),
    "pipeline": ("qwen3", {"pipeline_parallel_size": 2}),
    "zero bubble": ("llama", {"pipeline_parallel_size": 2, "pipeline_schedule": "zero_bubble"}),
    "ulysses": ("llama", FSDP2 | {"ulysses_parallel_size": 2, "async_enabled": True}),
    "context": ("gemma3", FSDP2 | {"context_parallel_size": 2}),
    "adapters": ("llama", FSDP2 | {"architecture": "lora"}),
    "muon": ("llama", FSDP2 | {"optimizer": "muon"}),
}
FOUR = {
    "hybrid": ("qwen3", FSDP2 | {"data_parallel_replicate_size": 2, "data_parallel_shard_size": 2}),
    "fsdp2 x tensor": ("qwen3", FSDP2 | {"tensor_parallel_size": 2}),
    "fsdp2 x pipeline, interleaved": (
        "llama",
        FSDP2 | {"pipeline_parallel_size": 2, "pipeline_schedule": "interleaved", "pipeline_stages_per_rank": 2},
    ),
    "context x ulysses": ("llama", FSDP2 | {"context_parallel_size": 2, "ulysses_parallel_size": 2} | REMAT),
}
EXPERTS = {
    "experts": ("qwen3_moe", FSDP2 | {"expert_parallel_size": 2} | REMAT),
    "experts, apart": ("mixtral", FSDP2 | {"expert_parallel_size": 2, "ep_outside": True}),
}


def configs_of(folder, cases: dict, world: int) -> list[Config]:
    deep = {"interleaved"}
    return [
        family_config(
            folder / str(number),
            family,
            world,
            DEEP if any(word in name for word in deep) else None,
            **{"global_batch_size": 8} | changes,
        )
        for number, (name, (family, changes)) in enumerate(cases.items())
    ]


def real_steps(configs: list[Config]) -> bytes:
    """The measured needs of the first step of each configuration on this rank, and its micro batches; pickled, since
    tensors sent to another process would be freed with this one."""
    import logging

    from tutti.core.dist import init_world
    from tutti.train.process import prepare_process

    device = prepare_process(configs[0])
    logging.disable(logging.WARNING)
    steps = []
    for config in configs:
        regroup()
        steps.append(real_step(config, init_world(device)))
    return pickle.dumps(steps)


def real_step(config: Config, ranks: Any) -> tuple[Prediction, list[Batch]]:
    from tutti.check.comm_volume import count_traffic
    from tutti.train.optim import build_optimizer
    from tutti.train.placement import load_parameters, make_executor
    from tutti.train.run import assemble
    from tutti.train.step import Totals, TrainStep

    run = assemble(config, ranks)
    placed, objective = run.placed, run.placed.objective
    load_parameters(config, placed, run.mesh, ranks)
    executor = make_executor(config.train, placed, run.mesh, ranks.device)
    optimizer = build_optimizer(placed.model, config, is_complete=placed.is_complete)
    grads: list[int] = []

    def measure() -> None:
        grads.append(num_bytes(parameter.grad for parameter in objective.parameters()))

    trainer = TrainStep(objective, optimizer, executor, run.mesh, 1.0, inspect_gradients=measure)
    batch = next(iter(run.data.train()))
    with count_traffic(run.mesh) as traffic:
        trainer.step(batch, Totals.zero(objective.sizes, ranks.device))
    seen = Prediction(
        rank=ranks.rank,
        parameters=num_bytes(objective.parameters()),
        gradients=grads[0],
        optimizer=num_bytes(value for state in optimizer.state.values() for value in state.values()),
        gathered=0,
        activations=0,
        peak=0,
        sent=traffic.sent,
    )
    return seen, list(batch.micro_batches)


def num_bytes(tensors) -> int:
    from tutti.core.tensors import local_part

    parts = [local_part(tensor) for tensor in tensors if isinstance(tensor, Tensor)]
    return sum(part.numel() * part.element_size() for part in parts)


def model_of(config: Config):
    from tutti.kinds import language

    return language.build(config, torch.device("cpu"))[1]


def pairs(folder, cases: dict, world: int):
    """For each case, on the first rank (and the last, with stages): the place, the prediction, and the measurement."""
    configs = configs_of(folder, cases, world)
    by_rank = [pickle.loads(seen) for seen in run_ranks(world, real_steps, configs, timeout=400)]
    for number, name in enumerate(cases):
        model = model_of(configs[number])
        for rank in sorted({0, world - 1 if configs[number].train.pipeline_parallel_size > 1 else 0}):
            seen, batches = by_rank[rank][number]
            yield f"{name}, rank {rank}", predict_rank(configs[number], model, world, rank, batches), seen


@pytest.mark.parametrize(("cases", "world"), [(ONE, 1), (TWO, 2), (FOUR, 4)])
def test_what_is_predicted_is_what_a_step_takes(tmp_path, cases, world):
    for where, predicted, seen in pairs(tmp_path, cases, world):
        sizes = ("parameters", "gradients", "optimizer")
        assert [getattr(predicted, size) for size in sizes] == [getattr(seen, size) for size in sizes], where
        assert predicted.sent == seen.sent, where
        assert predicted.peak >= predicted.parameters + predicted.optimizer + predicted.gathered, where
        assert (predicted.sent == {}) == (world == 1), where


def test_experts_are_predicted_as_if_chosen_evenly(tmp_path):
    for where, predicted, seen in pairs(tmp_path, EXPERTS, 4):
        sizes = ("parameters", "gradients", "optimizer")
        assert [getattr(predicted, size) for size in sizes] == [getattr(seen, size) for size in sizes], where
        assert {axis: sent.messages for axis, sent in predicted.sent.items()} == {
            axis: sent.messages for axis, sent in seen.sent.items()
        }, where
        for axis, sent in seen.sent.items():
            share = 0.4 if axis == "expert" else 0.0
            assert predicted.sent[axis].bytes == pytest.approx(sent.bytes, rel=share), (where, axis)


@pytest.mark.parametrize(
    ("world", "changes"),
    [
        (4, FSDP2 | REMAT),
        (4, FSDP2 | {"enable_full_shard": False}),
        (8, FSDP2 | {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}),
        (4, {"pipeline_parallel_size": 4}),
        (2, {"pipeline_parallel_size": 2, "pipeline_schedule": "zero_bubble"}),
        (
            4,
            FSDP2 | {"pipeline_parallel_size": 2, "pipeline_schedule": "interleaved", "pipeline_stages_per_rank": 2},
        ),
    ],
)
def test_a_long_step_is_told_from_short_ones(tmp_path, world, changes):
    stages = changes.get("pipeline_parallel_size", 1)
    batches = 2 * 8 * world // (stages * changes.get("tensor_parallel_size", 1))
    deep = DEEP if stages * changes.get("pipeline_stages_per_rank", 1) > 2 else None
    config = family_config(tmp_path, "llama", world, deep, global_batch_size=batches, **changes)
    model = model_of(config)
    for rank in {0, world - 1} if stages > 1 else {0}:
        told = predict_rank(config, model, world, rank)
        whole = predict_rank(config, model, world, rank, [full_batch(config, model)] * 8)
        assert told == whole, f"rank {rank}"


@pytest.mark.parametrize(("world", "on_cpu", "steps"), [(1, False, [2]), (2, False, [2, 1]), (2, True, [2])])
def test_steps_are_rehearsed_as_often_as_needed(tmp_path, monkeypatch, world, on_cpu, steps):
    """A second, shorter step, which shows how traffic grows, runs only if there is traffic and it is requested."""
    ran, step = [], TrainStep.step

    def noted(self: TrainStep, batch: Any, totals: Any) -> None:
        ran.append(len(batch.micro_batches))
        step(self, batch, totals)

    monkeypatch.setattr(TrainStep, "step", noted)
    config = family_config(tmp_path, "llama", world, global_batch_size=8 * world, **FSDP2)
    found = predict(config, model_of(config), world, on_cpu=on_cpu)
    assert ran == steps and bool(found.sent) == (world > 1 and not on_cpu)
    if on_cpu:
        batches = [full_batch(config, model_of(config))] * 4
        assert found == replace(predict_rank(config, model_of(config), world, 0, batches, on_cpu=True), sent={})


def test_the_fullest_rank_is_told_of(tmp_path):
    config = family_config(tmp_path, "llama", 4, DEEP, pipeline_parallel_size=4, global_batch_size=16)
    model = model_of(config)
    peaks = [predict_rank(config, model, 4, rank).peak for rank in range(4)]
    found = predict(config, model, 4)
    assert len(set(peaks)) > 1 and found.peak == max(peaks) == peaks[found.rank]


def test_fused_kernels_keep_less_than_what_they_replace(tmp_path):
    config = family_config(tmp_path, "llama", 1, global_batch_size=4)
    compiled = replace(config, train=replace(config.train, enable_compile=True))  # in which we fuse no operations
    fused, plain = (predict(item, model_of(config), 1).activations for item in (config, compiled))
    assert 0 < fused < 0.95 * plain


def test_check_shows_it(tmp_path, capsys):
    config = family_config(tmp_path, "llama", 8, tensor_parallel_size=2, global_batch_size=8, **FSDP2)
    check(config, 8)
    shown = capsys.readouterr().out
    found = predict(config, model_of(config), 8)
    _, memory = shown.split("Memory per rank")
    memory, sent = memory.split("Sent per rank and step")
    for name in ("parameters", "gradients", "optimizer", "gathered", "activations"):
        assert f"{getattr(found, name) / 2**20:.3f} MiB" in memory
    assert f"{found.peak / 2**20:.3f} MiB of device memory" in memory
    ((total, unit, program, other),) = re.findall(
        r"on this CPU +([\d.]+) (.iB) resident, of which ([\d.]+) (.iB)", memory
    )
    units = {"MiB": 2**20, "GiB": 2**30}
    here = predict(config, model_of(config), 8, on_cpu=True)
    assert float(total) * units[unit] == pytest.approx(float(program) * units[other] + here.peak, abs=2**20)
    assert set(found.sent) == {"fsdp", "tensor"}
    for axis, volume in found.sent.items():
        (line,) = (line for line in sent.splitlines() if axis in line)
        assert f"{volume.bytes / 2**20:.3f} MiB in {volume.messages} messages" in line


def test_a_model_that_goes_by_values_is_told_of_and_not_predicted(tmp_path, capsys, monkeypatch):
    config = family_config(tmp_path, "llama", 2)
    model = model_of(config)
    monkeypatch.setattr(type(model.model.norm), "forward", lambda self, hidden: hidden[hidden > 0])
    with pytest.raises(Unpredictable, match="LlamaForCausalLM goes by values"):
        predict(config, model, 2)
    check(config, 2)
    assert "not known before a run" in capsys.readouterr().out
