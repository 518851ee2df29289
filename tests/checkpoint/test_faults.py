"""A save that is killed or fails in any of its file operations: the next start finds the old or the new state."""

from __future__ import annotations

import errno
import multiprocessing
import os
import re
import shutil
import signal
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.checkpoint.faults import Died, Faults
from tests.checkpoint.tiny import assert_same, checkpointer, everything
from tests.harness import PRELOAD
from tutti.core.dist import World, init_world

Arrays = dict[str, np.ndarray]


def small(seed: int = 0, *, sharded: bool = False) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Linear(2, 2, bias=False)
    if sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for number in range(steps):
        model(torch.full((1, 2), float(number + 1))).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def trained_to(step: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    model, optimizer = small()
    train(model, optimizer, step)
    return model, optimizer


def save(root: Path, world: World, step: int, *, begin: bool = False, **settings: bool | int) -> None:
    """Save the state after `step` steps, as a run that continues from there does."""
    model, optimizer = trained_to(step)
    keeper = checkpointer(root, world, documents={"config.yaml": "train: {}"}, **settings)
    if begin:
        keeper.begin()
    keeper.save(step, model, optimizer, {"step": step})
    keeper.wait()


def found(root: Path, world: World) -> int:
    """The step from which the next start resumes (0: from scratch); checks that its state is that of the step."""
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
"""The steps saved before, the step whose save is interrupted, and settings."""
ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES)
SOAK = bool(os.environ.get("SOAK"))
_DEAD = 9
"""Exit status of a rank that dies."""
if SOAK:
    SCENARIOS |= {"again-beside": ((1, 2), 2, {}), "keep-one": ((1,), 2, {"max_checkpoints": 1})}


@pytest.fixture(params=SCENARIOS)
def scenario(request, tmp_path, one_rank):
    """A function that returns a folder prepared for the save, the save itself, and the number of its operations."""
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


def save_as_two(copy: Path, step: int, settings: dict[str, bool | int], rank: int, at: int | None) -> None:
    """Be one of two ranks that save their shards to `copy`, and die in file operation `at`; never returns."""
    signal.alarm(60)
    status = 1
    try:
        dist.init_process_group("gloo", init_method=f"file://{copy}.store", rank=rank, world_size=2)
        world = init_world(torch.device("cpu"))
        model, optimizer = small(sharded=True)
        train(model, optimizer, step)
        keeper = checkpointer(copy, world, **settings)
        with Faults(copy, at, die=lambda: os._exit(_DEAD)) as faults:
            keeper.save(step, model, optimizer, {"step": step})
            keeper.wait()
        copy.with_name(f"operations-{rank}").write_text(str(len(faults.done)))
        status = 0
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(status)


def sweep(folder: Path, step: int, settings: dict[str, bool | int], points: list[tuple[int, int | None]]) -> None:
    """For each of `points` (a rank, and the number of the file operation in which it dies) have two ranks save into
    `folder`/crashed-RANK-NUMBER, and see that this rank died and that the other has ended too."""
    os.environ |= {"WORLD_SIZE": "2"}
    for rank, at in points:
        ranks = []
        for one in range(2):
            ranks.append(os.fork())
            if not ranks[-1]:
                os.environ["RANK"] = str(one)
                save_as_two(folder / f"crashed-{rank}-{at}", step, settings, one, at if one == rank else None)
        ended = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]
        assert ended[rank] == (0 if at is None else _DEAD), ended
        assert ended[1 - rank] in (0, 1), ended


def swept(
    folder: Path, before: int, step: int, settings: dict[str, bool | int], points: list[tuple[int, int | None]]
) -> None:
    for rank, at in points:
        target = folder / f"crashed-{rank}-{at}"
        shutil.copytree(folder / "before", target) if before else target.mkdir()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=sweep, args=(folder, step, settings, points))
    process.start()
    process.join(20 + 3 * len(points))
    process.kill()
    assert process.exitcode == 0


@pytest.mark.parametrize("name", SCENARIOS if SOAK else ["retention"])
def test_a_rank_of_two_that_dies_at_any_operation_leaves_the_old_state_or_the_new(tmp_path, one_rank, name):
    """By default, only every eighth operation is tried."""
    before, step, settings = SCENARIOS[name]
    for number in before:
        save(tmp_path / "before", one_rank, number)
    old = max(before, default=0)
    swept(tmp_path, old, step, settings, [(0, None)])
    assert found(tmp_path / "crashed-0-None", one_rank) == step
    counts = [int((tmp_path / f"operations-{rank}").read_text()) for rank in range(2)]
    points = [(rank, at) for rank in range(2) for at in range(0, counts[rank], 1 if SOAK else 8)]
    swept(tmp_path, old, step, settings, points)
    for rank, at in points:
        root = tmp_path / f"crashed-{rank}-{at}"
        assert found(root, one_rank) in (old, step), f"after the end of rank {rank} in operation {at}"
        save(root, one_rank, step + 1)
        assert found(root, one_rank) == step + 1


@pytest.mark.parametrize("shift", range(len(ERRORS) if SOAK else 1))
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
    """Resume from step 1 although steps 2 and 3 were saved: `auto` then finds either the old branch or the new one."""
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
