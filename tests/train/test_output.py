"""The output folder: it has one run at a time, and one branch of checkpoints and metrics."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from tests.checkpoint.tiny import build, checkpointer, names, train
from tests.harness import run_ranks
from tutti.core.dist import init_world, shutdown_world
from tutti.train.logging.history import METRICS, read_history
from tutti.train.output import LOCK, begin_branch, claim_output

HOLD = """
import sys, time, os
from pathlib import Path
import torch
from tutti.core.dist import World
from tutti.train.output import claim_output
with claim_output(Path(sys.argv[1]), World(0, 1, 0, torch.device("cpu")), fresh=False):
    if os.fork() == 0:
        print(os.getpid(), flush=True)
        time.sleep(60)
        os._exit(0)
    time.sleep(60)
"""


@pytest.fixture
def one_rank():
    yield init_world(torch.device("cpu"))
    shutdown_world()


def test_a_second_run_is_refused_and_told_of_the_first(tmp_path, one_rank):
    output = tmp_path / "out"
    with claim_output(output, one_rank, fresh=True):
        (output / "metrics.jsonl").touch()
        with (
            pytest.raises(ValueError, match=rf"another run is going on there \(process {os.getpid()} on .*, since 20"),
            claim_output(output, one_rank, fresh=False),
        ):
            raise AssertionError("two at once")
    with claim_output(output, one_rank, fresh=False):
        pass
    assert not (output / LOCK).exists()


def test_a_start_that_fails_leaves_no_folder(tmp_path, one_rank):
    output = tmp_path / "a" / "out"
    with pytest.raises(ZeroDivisionError), claim_output(output, one_rank, fresh=True):
        raise ZeroDivisionError
    assert not output.exists()


def test_a_folder_that_holds_a_run_is_refused_to_a_new_one(tmp_path, one_rank):
    model, optimizer = build("plain")
    checkpointer(tmp_path, one_rank).save(1, model, optimizer, {})
    with pytest.raises(ValueError, match="holds a run already"), claim_output(tmp_path, one_rank, fresh=True):
        pass


def test_a_killed_run_leaves_no_lock_though_its_children_live(tmp_path, one_rank):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    try:
        with pytest.raises(ValueError, match=f"process {holder.pid}"), claim_output(tmp_path, one_rank, fresh=False):
            pass
        holder.kill()
        holder.wait()
        os.kill(child, 0)
        with claim_output(tmp_path, one_rank, fresh=False):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        holder.stdout.close()


def claim_while_the_first_rank_dies(output: Path) -> str:
    world = init_world(torch.device("cpu"))
    claim = claim_output(output, world, fresh=False)
    claim.__enter__()
    if world.is_main:
        os.close(os.open(output / "released", os.O_CREAT))
        from tutti.train import output as module

        os.close(module._LOCKS.pop())  # what the end of the process does
    world.barrier()
    alone = type(world)(0, 1, 0, world.device)
    try:
        with claim_output(output, alone, fresh=False):
            message = "free"
    except ValueError as error:
        message = str(error)
    world.barrier()
    return message


def test_every_rank_holds_the_lock(tmp_path):
    """The ranks of a run that lost its first one may still write: the folder stays closed until they are gone."""
    for message in run_ranks(2, claim_while_the_first_rank_dies, tmp_path):
        assert "another run is going on there" in message


def test_a_restart_waits_for_the_ranks_before_it(tmp_path, one_rank, monkeypatch):
    """This holds for the same job; another job is refused immediately."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    threading.Timer(1.5, holder.kill).start()
    began = time.monotonic()
    with claim_output(tmp_path, one_rank, fresh=False):
        assert time.monotonic() - began > 1
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another")
        with pytest.raises(ValueError, match="another run"), claim_output(tmp_path, one_rank, fresh=False):
            pass
    assert time.monotonic() - began < 5
    os.kill(child, signal.SIGKILL)
    holder.wait()
    holder.stdout.close()


def claim_where_folders_differ(folder: Path) -> str:
    world = init_world(torch.device("cpu"))
    output = folder / ("first" if world.is_main else "other")
    socket.gethostname = lambda: f"node{world.rank}"
    try:
        with claim_output(output, world, fresh=True):
            return "claimed"
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("stale", [False, True])
def test_machines_that_see_other_folders_are_named(tmp_path, stale):
    """Also where a folder of the same name, with the lock of a run before, lies on their own disks."""
    if stale:
        (tmp_path / "other").mkdir()
        (tmp_path / "other/.lock").write_text('{"pid": 1, "host": "node1", "since": "yesterday"}')
    for message in run_ranks(3, claim_where_folders_differ, tmp_path):
        assert message.startswith(f"train.output_dir {tmp_path}/")
        assert message.endswith(
            ", as rank 0 has it on node0, is not there on node1, node2: all machines must see the same folder"
        )


class Run:
    """A run of the tiny model in a folder: `go` takes steps with a checkpoint and a metrics line for each."""

    def __init__(self, output: Path, world, load: str | None = None, **settings):
        self.output, self.world = output, world
        self.keeper = checkpointer(output, world, **settings)
        self.model, self.optimizer = build("plain", seed=3)
        state = self.keeper.resume(load, self.model, self.optimizer)
        self.step = state["step"] if state else 0
        self.branch = begin_branch(output, self.keeper.begin())

    def go(self, *steps: int, save: bool = True) -> "Run":
        for step in steps:
            train(self.model, self.optimizer, 1)
            with (self.output / METRICS).open("a") as file:
                file.write(json.dumps({"step": step, "loss": float(step)}) + "\n")
            if save:
                self.keeper.save(step, self.model, self.optimizer, {"step": step})
        self.keeper.wait()
        return self

    def export(self, name: str) -> "Run":
        (self.output / "hf" / name).mkdir(parents=True)
        (self.output / "hf" / name / "of").write_text(name)
        return self


def steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / METRICS).read_text().splitlines()]


@pytest.mark.parametrize("settings", [{}, {"save_async": True}, {"max_checkpoints": 3}], ids=["", "async", "retention"])
@pytest.mark.parametrize("origin", [2, 4, 6])
@pytest.mark.parametrize("saves", [False, True], ids=["killed-before-a-save", "killed-after"])
def test_auto_follows_the_branch_of_the_last_start(tmp_path, one_rank, settings, origin, saves):
    first = Run(tmp_path, one_rank, **settings).go(1, save=False).go(2, save=True).go(3, save=False).go(4)
    first.go(5, save=False).go(6).go(7, save=False).export("global_step_4").export("global_step_6").export("final")
    (tmp_path / "config.yaml").write_text("first")
    branch = Run(tmp_path, one_rank, load=str(tmp_path / f"checkpoints/global_step_{origin}"), **settings)
    branch.go(origin + 1, save=saves)
    assert branch.branch is not None and branch.branch.step == origin
    auto = Run(tmp_path, one_rank, load="auto", **settings)
    assert auto.step == (origin + 1 if saves else origin)
    assert steps(tmp_path) == list(range(1, auto.step + 1))
    left = tmp_path / branch.branch.folder
    assert steps(left) == [1, 2, 3, 4, 5, 6, 7]
    assert (left / "config.yaml").read_text() == "first"
    beyond = [f"global_step_{step}" for step in (4, 6) if step > origin]
    assert sorted(path.name for path in (left / "hf").iterdir()) == ["final", *beyond]
    assert (not beyond and not (left / "checkpoints").exists()) or names(left) == beyond
    assert all((tmp_path / "hf" / f"global_step_{step}").exists() == (step <= origin) for step in (4, 6))
    # The branch that was set aside is complete, and can be resumed.
    for name in beyond:
        model, optimizer = build("plain", seed=5)
        assert checkpointer(tmp_path / "else", one_rank).resume(str(left / "checkpoints" / name), model, optimizer)


def test_manifests_name_their_parents(tmp_path, one_rank):
    Run(tmp_path, one_rank).go(1, 2)
    Run(tmp_path, one_rank, load=str(tmp_path / "checkpoints/global_step_1")).go(3)
    elsewhere = tmp_path / "else"
    Run(elsewhere, one_rank, load=str(tmp_path)).go(4)

    def parent(folder: Path) -> str | None:
        found = json.loads((folder / "manifest.json").read_text())["parent"]
        return found and found["path"]

    assert parent(tmp_path / "checkpoints/global_step_1") is None
    assert parent(tmp_path / "branches/1/checkpoints/global_step_2") == "global_step_1"
    assert parent(tmp_path / "checkpoints/global_step_3") == "global_step_1"
    assert parent(elsewhere / "checkpoints/global_step_4") == str(tmp_path / "checkpoints/global_step_3")


def test_a_start_from_elsewhere_is_followed_before_its_first_save(tmp_path, one_rank):
    Run(tmp_path / "a", one_rank).go(1, 2)
    run = Run(tmp_path / "b", one_rank, load=str(tmp_path / "a")).go(3, 4, save=False)
    assert run.branch is None
    again = Run(tmp_path / "b", one_rank, load="auto")
    assert (again.step, again.branch) == (2, None)
    assert not (tmp_path / "b" / METRICS).read_text()
    assert steps_of(tmp_path / "b/metrics.superseded.jsonl") == [3, 4]


def steps_of(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_run_from_elsewhere_sets_aside_the_run_that_was_there(tmp_path, one_rank):
    Run(tmp_path / "a", one_rank).go(1, 2)
    Run(tmp_path / "b", one_rank).go(1, 2, 3)
    run = Run(tmp_path / "b", one_rank, load=str(tmp_path / "a"))
    assert names(tmp_path / "b") == ["start.json"]
    assert steps(tmp_path / "b/branches/1") == [1, 2, 3] and not steps(tmp_path / "b")
    assert run.branch is not None and "checkpoints/global_step_3" in run.branch.told
    assert Run(tmp_path / "b", one_rank, load="auto").step == 2


def test_setting_aside_that_was_interrupted_is_finished(tmp_path, one_rank, monkeypatch):
    Run(tmp_path, one_rank).go(1, 2, 3)
    moves = []

    def rename(self: Path, target: Path) -> Path:
        moves.append(self.name)
        if len(moves) == 2:
            raise KeyboardInterrupt
        return original(self, target)

    original = Path.rename
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with pytest.raises(KeyboardInterrupt):
            Run(tmp_path, one_rank, load=str(tmp_path / "checkpoints/global_step_1"))
    assert names(tmp_path) == ["global_step_1", "global_step_3", "latest", "start.json"]
    auto = Run(tmp_path, one_rank, load="auto")
    assert auto.step == 1
    assert names(tmp_path / "branches/1") == ["global_step_2"] and names(tmp_path / "branches/2") == ["global_step_3"]


def test_only_lines_beyond_are_no_branch(tmp_path, one_rank):
    Run(tmp_path, one_rank).go(1, 2).go(3, 4, save=False)
    assert Run(tmp_path, one_rank, load="auto").branch is None
    assert steps(tmp_path) == [1, 2]
    assert read_history(tmp_path / "metrics.superseded.jsonl").last["step"] == 4


def test_all_checkpoints_damaged_is_an_error_and_no_fresh_start(tmp_path, one_rank):
    Run(tmp_path, one_rank).go(1, 2)
    for step in (1, 2):
        (tmp_path / f"checkpoints/global_step_{step}/state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no whole checkpoint; 2 were passed over, global_step_2: .*state\.json"):
        Run(tmp_path, one_rank, load="auto")
