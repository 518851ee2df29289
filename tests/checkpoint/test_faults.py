"""A save that is ended, or meets an error, at any of its file operations: the next start finds the old or new state."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.checkpoint.faults import Died, Faults
from tests.checkpoint.tiny import assert_same, checkpointer, everything
from tutti.core.dist import World

Arrays = dict[str, np.ndarray]


def small(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Linear(2, 1, bias=False)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def trained_to(step: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    model, optimizer = small()
    for number in range(step):
        model(torch.full((1, 2), float(number + 1))).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def save(root: Path, world: World, step: int, *, begin: bool = False, **settings: bool | int) -> None:
    """Save the state after `step` steps as a run does that goes on there."""
    model, optimizer = trained_to(step)
    keeper = checkpointer(root, world, documents={"config.yaml": "train: {}"}, **settings)
    if begin:
        keeper.begin()
    keeper.save(step, model, optimizer, {"step": step})
    keeper.wait()


def found(root: Path, world: World) -> int:
    """The step that the next start goes on from, 0 for afresh; its state is verified to be that of the step."""
    model, optimizer = small(seed=9)
    state = checkpointer(root, world).resume("auto", model, optimizer)
    if state is None:
        return 0
    assert_same(everything(model, optimizer), everything(*trained_to(state["step"])))
    return state["step"]


SCENARIOS: dict[str, tuple[tuple[int, ...], int, dict[str, bool | int]]] = {
    "fresh": ((), 1, {}),
    "again": ((1,), 1, {}),
    "retention": ((1, 2), 3, {"max_checkpoints": 2}),
    "async": ((1,), 2, {"save_async": True}),
}
"""The steps saved before, the step whose save is disturbed, and settings."""
ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES)
if os.environ.get("SOAK"):
    SCENARIOS |= {"again-beside": ((1, 2), 2, {}), "keep-one": ((1,), 2, {"max_checkpoints": 1})}


@pytest.fixture(params=SCENARIOS)
def scenario(request, tmp_path, one_rank):
    """A function that gives a folder as it is before the save, the save, and the number of its operations."""
    before, step, settings = SCENARIOS[request.param]
    for number in before:
        save(tmp_path / "before", one_rank, number)
    counted = tmp_path / "counted"
    folder(tmp_path, counted)
    with Faults(counted) as faults:
        save(counted, one_rank, step, **settings)
    assert found(counted, one_rank) == step
    return max(before, default=0), step, settings, faults.done


def folder(tmp_path: Path, copy: Path) -> Path:
    shutil.rmtree(copy, ignore_errors=True)
    if (tmp_path / "before").exists():
        shutil.copytree(tmp_path / "before", copy)
    else:
        copy.mkdir()
    return copy


def disturbed(root: Path, at: int, error: int | None, action: Callable[[], None]) -> BaseException | None:
    """The exception or exit that ended `action`, of whose file operations under `root` number `at` failed."""
    with Faults(root, at, error) as faults:
        try:
            action()
            raised = None
        except (Died, Exception) as caught:
            raised = caught
    assert len(faults.done) > at
    assert raised is None or not faults.dead or isinstance(raised, Died) or "Died" in str(raised)
    return raised


def test_a_crash_at_any_operation_leaves_the_old_state_or_the_new(tmp_path, one_rank, scenario):
    old, new, settings, operations = scenario
    outcomes = []
    for at in range(len(operations)):
        root = folder(tmp_path, tmp_path / "crashed")
        disturbed(root, at, None, lambda root=root: save(root, one_rank, new, **settings))
        outcomes.append(found(root, one_rank))
        assert outcomes[-1] in (old, new), f"after the end in {operations[at]}"
        save(root, one_rank, new + 1)
        assert found(root, one_rank) == new + 1
    assert outcomes == sorted(outcomes), "once it is there, it stays"
    assert outcomes[0] == old and outcomes[-1] == new


@pytest.mark.parametrize("shift", range(len(ERRORS) if os.environ.get("SOAK") else 1))
def test_an_error_at_any_operation_is_told_in_a_line_and_loses_nothing(tmp_path, one_rank, scenario, shift):
    old, new, settings, operations = scenario
    for at, (kind, name) in enumerate(operations):
        error = ERRORS[(at + shift) % len(ERRORS)]
        root = folder(tmp_path, tmp_path / "failed")
        raised = disturbed(root, at, error, lambda root=root: save(root, one_rank, new, **settings))
        at_hand = found(root, one_rank)
        assert at_hand in (old, new), f"after {kind} of {name}"
        if raised is None:
            assert at_hand == new, "an error that is not told must not cost the checkpoint"
        else:
            assert isinstance(raised, ValueError)
            assert re.fullmatch(rf"could not save {root}/checkpoints/global_step_{new}: .*", str(raised)), raised
            assert os.strerror(error) in str(raised) and str(root) in str(raised).partition(": ")[2], raised
        save(root, one_rank, new + 1)
        assert found(root, one_rank) == new + 1


def test_a_crash_at_any_operation_of_a_start_loses_no_checkpoint(tmp_path, one_rank):
    """Going back to step 1 where 2 and 3 were saved: `auto` then means the old branch or the new one."""
    from tutti.train.output import begin_branch

    for number in (1, 2, 3):
        save(tmp_path / "before", one_rank, number)
    (tmp_path / "before/metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in (1, 2, 3)))

    def go_back(root: Path) -> None:
        model, optimizer = small()
        keeper = checkpointer(root, one_rank)
        keeper.resume(str(root / "checkpoints/global_step_1"), model, optimizer)
        begin_branch(root, keeper.begin())

    with Faults(folder(tmp_path, tmp_path / "counted")) as faults:
        go_back(tmp_path / "counted")
    outcomes = []
    for at in range(len(faults.done)):
        root = folder(tmp_path, tmp_path / "crashed")
        disturbed(root, at, None, lambda root=root: go_back(root))
        outcomes.append(found(root, one_rank))
        kept = [path for path in root.rglob("global_step_*") if path.is_dir()]
        assert sorted(path.name for path in kept) == [f"global_step_{step}" for step in (1, 2, 3)], faults.done[at]
        lines = "".join(path.read_text() for path in root.rglob("metrics*.jsonl"))
        assert all(f'{{"step": {step}}}' in lines for step in (1, 2, 3))
    assert set(outcomes) == {1, 3} and outcomes == sorted(outcomes, reverse=True)
