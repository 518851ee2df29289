"""Stop signals, to any process and at any phase of the run: no step is lost, and no process is left.

By default three cases run, which cover each value of each dimension; `make soak` runs all 36.
"""

from __future__ import annotations

import itertools
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.train.launched import Launcher, launch_train
from tests.train.runs import QUICKSTART, records
from tests.train.test_killed import config_in, outcome
from tutti.config import Config

SECONDS = 10
"""A run that was told to stop leaves within these and the step."""
ALL = list(
    itertools.product(("SIGTERM", "SIGINT"), ("launcher", "rank", "group"), ("step", "save", "evaluation"), (0, 2))
)
FEW = [("SIGTERM", "launcher", "step", 2), ("SIGINT", "group", "save", 0), ("SIGTERM", "rank", "evaluation", 2)]


def config_of(folder: Path, **changes: Any) -> Config:
    rows = (QUICKSTART / "chat_eval.jsonl").read_text().splitlines()[:16]
    folder.mkdir(exist_ok=True)
    (folder / "eval.jsonl").write_text("\n".join(rows))
    settings: dict[str, Any] = {
        "train.max_steps": 6, "data.eval_path": str(folder / "eval.jsonl"), "train.eval_steps": 2,
        "train.hang_timeout": 60, "data.max_seq_len": 64, "train.max_checkpoints": 0,
    }  # fmt: skip
    return config_in(folder, **settings | changes)


def wait_there(module: Any, name: str, output: Path, place: str, number: int) -> None:
    """Make the call with this number of a function leave a file named after `place` in rank 1, and wait a little."""
    original, calls = getattr(module, name), itertools.count(1)

    def waiting(*args: Any, **options: Any) -> Any:
        if next(calls) == number and os.environ["RANK"] == "1":
            (output.parent / place).touch()
            time.sleep(0.4)
        return original(*args, **options)

    setattr(module, name, waiting)


def wait_in_step(output: Path) -> None:
    from tutti.train.step import TrainStep

    wait_there(TrainStep, "step", output, "step", 3)


def wait_in_save(output: Path) -> None:
    from tutti.checkpoint import dcp

    wait_there(dcp, "write", output, "save", 1)


def wait_in_evaluation(output: Path) -> None:
    from tutti.parallel.pipeline.executor import SequentialExecutor

    wait_there(SequentialExecutor, "evaluate", output, "evaluation", 1)


HOOKS = {"step": wait_in_step, "save": wait_in_save, "evaluation": wait_in_evaluation}


def send(number: signal.Signals, target: str, launcher: Launcher) -> None:
    ranks = launcher.ranks()
    assert len(ranks) == 2
    processes = {"launcher": [], "rank": ranks[:1], "group": [*ranks, *launcher.workers()]}[target]
    for process in [*processes, *[launcher.process.pid] * (target != "rank")]:
        os.kill(process, number)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The outcome of the run that nobody stops."""
    config = config_of(tmp_path_factory.mktemp("straight"))
    launcher = launch_train(config, 2)
    assert launcher.wait() == 0, launcher.said.read_text()
    return outcome(config)


@pytest.mark.parametrize(
    ("name", "target", "moment", "workers"), ALL if os.environ.get("SOAK") else FEW, ids=lambda value: str(value)
)
def test_a_signal_stops_the_run_in_good_order(tmp_path, straight, name, target, moment, workers):
    config = config_of(tmp_path, **{"data.num_workers": workers})
    launcher = launch_train(config, 2, hook=HOOKS[moment])
    deadline = time.monotonic() + 120
    while not (tmp_path / moment).exists():
        assert time.monotonic() < deadline and launcher.process.is_alive(), launcher.said.read_text()
        time.sleep(0.01)
    began = time.monotonic()
    send(signal.Signals[name], target, launcher)
    assert launcher.wait() == 0, launcher.said.read_text()
    assert time.monotonic() - began < SECONDS
    assert "Traceback" not in launcher.said.read_text(), launcher.said.read_text()
    (step,) = {line["step"] for line in records(config)[-1:]}
    assert step < 6, "the signal came too late to show anything"
    assert (tmp_path / "out/checkpoints/latest").read_text() == f"global_step_{step}\n"
    resumed = launch_train(config, 2)
    assert resumed.wait() == 0, resumed.said.read_text()
    assert outcome(config) == straight
