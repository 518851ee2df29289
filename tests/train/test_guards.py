"""Automatic reactions of runs: to spikes, to non-finite gradients, early stopping, and the best checkpoint."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.conftest import one_rank
from tests.checkpoint.tiny import build, checkpointer, names, saved
from tests.harness import run_ranks
from tests.train.runs import QUICKSTART, records, run, tiny_config, train_or_error, train_quietly
from tutti.config import Config, TrainConfig
from tutti.config.nouns import counted
from tutti.core.dist import World
from tutti.core.tensors import local_part
from tutti.train.spike_guard import SpikeGuard
from tutti.train.stop import EarlyStopping

__all__ = ["one_rank"]
ONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
EVALUATED: dict[str, Any] = {"data.eval_path": str(QUICKSTART / "chat_eval.jsonl"), "train.eval_steps": 1}


def guard(**train: Any) -> SpikeGuard:
    return SpikeGuard(TrainConfig(spike_sigma=4.0, spike_window=8, **train), ONE)


def spikes(guard: SpikeGuard, *losses: float, norm: float = 1.0) -> list[bool]:
    return [bool(guard.is_spike(torch.tensor(loss), torch.tensor(norm))) for loss in losses]


def test_a_spike_is_far_above_the_last_steps():
    steady = [2.0, 2.1, 1.9, 2.0, 2.05, 1.95]
    assert spikes(guard(), *steady, 2.2, 9.0, 2.0) == [False] * 7 + [True, False]
    assert spikes(guard(), 9.0, *steady) == [False] * 7, "not before half of the window is known"
    one = guard()
    assert spikes(one, *steady) == [False] * 6
    assert spikes(one, 2.0, norm=50.0) == [True], "a gradient norm is one as well"
    assert not any(spikes(guard(), *steady, 0.1)), "nothing is too good"


def test_what_is_not_finite_is_no_spike_and_does_not_count():
    one = guard()
    assert not any(spikes(one, 2.0, 2.1, 1.9, 2.0, math.nan, math.inf))
    assert spikes(one, 2.05, 9.0) == [False, True]


def test_a_loss_that_stays_high_is_soon_the_usual_one():
    found = spikes(guard(), *[2.0, 2.1, 1.9, 2.0] * 2, *[9.0, 9.1, 8.9, 9.0] * 3)
    assert found[8] and not any(found[10:])


@pytest.mark.parametrize("steps", [3, 8, 11])
def test_the_history_is_resumed(steps):
    losses = [2.0, 2.1, 1.9, 2.0, 2.05, 1.95, 2.02, 1.98, 2.0, 2.1, 1.9, 2.2, 7.0, 2.0, 2.0]
    whole, half, rest = guard(), guard(), guard()
    expected = spikes(whole, *losses)
    before = spikes(half, *losses[:steps])
    rest.load_state_dict(json.loads(json.dumps(half.state_dict())))
    assert before + spikes(rest, *losses[steps:]) == expected
    assert rest.state_dict() == whole.state_dict()


def spike_on_one_rank(config: Config) -> list[tuple[float, float]]:
    """Train with a loss on the last rank that is 50 times as high in step 8; each step's weights before and after."""
    from tutti.train import step as module

    original, seen = module.TrainStep.step, []

    def step(self: Any, batch: Any, totals: Any) -> None:
        add = module.add_sums

        def raised(total: Any, sums: Any) -> None:
            factor = 50 if batch.step == 8 and torch.distributed.get_rank() == 1 else 1
            add(total, {name: value * factor for name, value in sums.items()})

        weight = self._parameters[0].detach()
        before = local_part(weight).double().sum().item()
        module.add_sums = raised
        original(self, batch, totals)
        module.add_sums = add
        seen.append((before, local_part(weight).double().sum().item()))

    module.TrainStep.step = step  # type: ignore[method-assign]
    train_quietly(config)
    return seen


@pytest.mark.parametrize("skips", [False, True])
def test_a_spike_on_one_rank_is_one_for_all(tmp_path, skips):
    changes = {"train.spike_sigma": 6.0, "train.spike_window": 6, "train.skip_spikes": skips, "train.max_steps": 9}
    layout = {"train.data_parallel_mode": "fsdp2", "train.data_parallel_shard_size": 2, "train.lr": 1e-3}
    config = tiny_config(tmp_path, world=2, **changes, **layout)
    for seen in run_ranks(2, spike_on_one_rank, config):
        moved = [before != after for before, after in seen]
        assert moved == [step != 8 or not skips for step in range(1, 10)]
    lines = records(config)
    assert [line.get("spikes") for line in lines] == [None] * 7 + [1, None]
    assert lines[7].get("skipped_steps") == (1 if skips else None)


def poisoned(config: Config) -> str:
    """Train while the gradients of the last rank are NaN from step 2 on."""
    from tutti.parallel.pipeline.executor import SequentialExecutor

    original = SequentialExecutor.gradient_norm

    def gradient_norm(self: Any, parameters: Any) -> Any:
        gradient_norm.calls += 1  # type: ignore[attr-defined]
        if gradient_norm.calls >= 2 and torch.distributed.get_rank() == 1:  # type: ignore[attr-defined]
            next(item for item in parameters if item.grad is not None).grad.mul_(math.nan)
        return original(self, parameters)

    gradient_norm.calls = 0  # type: ignore[attr-defined]
    SequentialExecutor.gradient_norm = gradient_norm  # type: ignore[method-assign]
    return train_or_error(config)


@pytest.mark.parametrize(("limit", "steps"), [(0, 2), (2, 4)])
def test_steps_that_are_not_finite_on_one_rank_end_the_run_on_all(tmp_path, limit, steps):
    changes = {"train.max_nonfinite_steps": limit, "train.max_steps": 8, "train.save_steps": 1}
    config = tiny_config(tmp_path, world=2, **changes, **{"train.data_parallel_mode": "fsdp2"})
    for message in run_ranks(2, poisoned, config):
        assert f"not finite for the last {counted(limit + 1, 'step')}" in message
    assert [line["step"] for line in records(config)] == list(range(1, steps + 1))


def spoiled(config: Config) -> str:
    """Train while a moment of the last rank's optimizer becomes NaN in step 2."""
    from tutti.train.step import TrainStep

    original = TrainStep.step

    def step(self: Any, batch: Any, totals: Any) -> None:
        original(self, batch, totals)
        if batch.step == 2 and torch.distributed.get_rank() == 1:
            moments = [local_part(state["exp_avg"]) for state in self._optimizer.state.values()]
            next(moment for moment in moments if moment.numel()).flatten()[0] = math.nan

    TrainStep.step = step  # type: ignore[method-assign]
    return train_or_error(config)


@pytest.mark.parametrize("kind", ["save_steps", "hf_save_steps"])
def test_what_is_not_finite_is_neither_saved_nor_exported_and_told_on_all_ranks(tmp_path, kind):
    changes = {"train.save_async": True, "train.max_steps": 40, f"train.{kind}": 2, "train.max_nonfinite_steps": 40}
    config = tiny_config(tmp_path, world=2, **changes, **{"train.data_parallel_mode": "fsdp2"})
    for message in run_ranks(2, spoiled, config):
        assert message.startswith("step 2 left numbers that are not finite in optimizer.")
    assert not list((tmp_path / "out").glob("*/global_step_*"))
    assert len(records(config)) <= 4


def test_the_loss_must_fall_within_patience():
    early = EarlyStopping(TrainConfig(early_stopping_patience=2, early_stopping_min_delta=0.1))
    for step, loss in enumerate([3.0, 2.0, 1.95, 1.8, 1.75]):
        early.add(step, loss)
        assert early.reason is None
    resumed = EarlyStopping(TrainConfig(early_stopping_patience=2, early_stopping_min_delta=0.1))
    resumed.load_state_dict(json.loads(json.dumps(early.state_dict())))
    resumed.add(5, math.nan)
    assert resumed.reason is not None and "was lowest, 1.8, after step 3" in resumed.reason
    never = EarlyStopping(TrainConfig())
    for step in range(9):
        never.add(step, 1.0)
    assert never.reason is None


def test_a_run_ends_early_and_resumes_as_ended(tmp_path):
    changes: dict[str, Any] = {
        **EVALUATED, "train.early_stopping_patience": 2, "train.early_stopping_min_delta": 100.0, "train.max_steps": 9,
        "train.save_hf_weights": True, "train.save_steps": 2,
    }  # fmt: skip
    config = tiny_config(tmp_path, **changes)
    steps = [line["step"] for line in run(config) if "loss" in line]
    assert steps == [1, 2, 3], "the first evaluation is the lowest there is, and two more are not lower"
    output = Path(config.train.output_dir or "")
    report = json.loads((output / "run.json").read_text())
    assert report["status"] == "finished" and "has not fallen for 2 evaluations" in report["message"]
    assert (output / "hf/final/config.json").exists() and (output / "checkpoints/global_step_3").exists()
    again = run(tiny_config(tmp_path, **changes, **{"train.load_checkpoint_path": "auto"}))
    assert [line["step"] for line in again if "loss" in line] == [1, 2, 3]
    changes["train.early_stopping_patience"] = 3
    longer = run(tiny_config(tmp_path, **changes, **{"train.load_checkpoint_path": "auto"}))
    assert [line["step"] for line in longer if "loss" in line] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("keep_best", "kept"),
    [(False, ["global_step_5", "global_step_6"]), (True, ["global_step_2", "global_step_5", "global_step_6"])],
)
def test_retention_spares_the_best_of_those_evaluated(tmp_path, one_rank, keep_best, kept):
    model, optimizer = build("plain")
    keeper = checkpointer(tmp_path, one_rank, max_checkpoints=2, keep_best=keep_best)
    for step, loss in enumerate([3.0, 1.0, None, 2.0, None, 1.5], start=1):
        keeper.save(step, model, optimizer, {"step": step}, loss)
    assert names(tmp_path) == [*kept, "latest"]


def test_the_best_checkpoint_is_replaced_by_a_better_one(tmp_path, one_rank):
    model, optimizer, _ = saved(tmp_path, one_rank)
    keeper = checkpointer(tmp_path, one_rank, max_checkpoints=1, keep_best=True)
    for step, loss in enumerate([3.0, 2.0, 4.0, 1.0, 5.0, 5.0], start=1):
        keeper.save(step, model, optimizer, {"step": step}, loss)
    assert names(tmp_path) == ["global_step_4", "global_step_6", "latest"]


def test_a_run_keeps_its_best_checkpoint(tmp_path):
    """With a learning rate so high that the model keeps getting worse, the first checkpoint stays the best."""
    changes = {**EVALUATED, "train.keep_best": True, "train.max_checkpoints": 1, "train.save_steps": 1}
    config = tiny_config(tmp_path, **changes, **{"train.lr": 3.0, "train.lr_decay_style": "constant"})
    losses = {line["step"]: line["eval_loss"] for line in run(config) if "eval_loss" in line}
    best = min(losses, key=lambda step: losses[step])
    held = {path.name for path in (Path(config.train.output_dir or "") / "checkpoints").glob("global_step_*")}
    assert best < 4 and held == {f"global_step_{best}", "global_step_4"}
