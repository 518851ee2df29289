"""`--max-restarts`: a run that crashes resumes from its newest checkpoint and ends as if it had not crashed."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.train.launched import launch_train
from tests.train.runs import records, tiny_config
from tests.train.test_killed import config_in, outcome
from tutti.config import Config


def at_step(action: Any) -> None:
    """Call `action(step)` in this process before each step."""
    from tutti.train.step import TrainStep

    original = TrainStep.step

    def step(self: Any, batch: Any, totals: Any) -> None:
        action(batch.step)
        original(self, batch, totals)

    TrainStep.step = step  # type: ignore[method-assign]


def crash_twice(output: Path) -> None:
    """Crash by SIGKILL in step 4 on rank 1, and by an error in step 6 on rank 0."""
    rank = os.environ["RANK"]

    def crash(step: int) -> None:
        seen = output.parent / f"crashed-{step}"
        if seen.exists():
            return
        if step == 4 and rank == "1":
            seen.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if step == 6 and rank == "0":
            seen.touch()
            raise ZeroDivisionError("by chance")

    at_step(crash)


def test_a_run_that_crashes_goes_on_from_its_newest_checkpoint_and_ends_bit_equal(tmp_path):
    settings: dict[str, Any] = {
        "train.max_steps": 8,
        "train.load_checkpoint_path": None,
        "train.save_async": False,
    }
    straight, crashed = (config_in(tmp_path / name, **settings) for name in ("straight", "crashed"))
    plain = launch_train(straight, 2)
    assert plain.wait() == 0, plain.said.read_text()
    launcher = launch_train(crashed, 2, "--max-restarts=2", hook=crash_twice)
    assert launcher.wait() == 0, launcher.said.read_text()
    assert outcome(crashed) == outcome(straight)
    said = launcher.said.read_text()
    assert "tutti: error: rank 1 was ended by SIGKILL (out of memory?)\ntutti: restart 1 of 2: going on from" in said
    assert "ZeroDivisionError: by chance\n(in step 6, after loading the next batch)\n" in said
    assert "tutti: restart 2 of 2: going on from" in said and "\ntutti: restart 3" not in said
    assert said.count("global_step_3, saved by 2 ranks") == 2, "what was saved last is gone on from"


def fails_in_step_3(output: Path) -> None:
    def fail(step: int) -> None:
        if step == 3:
            raise RuntimeError("shapes do not fit")

    at_step(fail)


def fails_later_each_time(output: Path) -> None:
    starts = output.parent / "starts"
    starts.mkdir(exist_ok=True)
    last = 2 + len(list(starts.iterdir()))
    (starts / str(last)).touch()

    def fail(step: int) -> None:
        if step == last:
            raise RuntimeError("the network is gone")

    at_step(fail)


@pytest.mark.parametrize(("hook", "restarts"), [(fails_in_step_3, 1), (fails_later_each_time, 2)])
def test_what_fails_twice_at_the_same_place_is_not_started_a_third_time(tmp_path, hook, restarts):
    config = tiny_config(tmp_path, **{"train.max_steps": 9, "train.save_steps": 1})
    launcher = launch_train(config, 1, "--max-restarts=2", hook=hook)
    assert launcher.wait() == 1
    said = launcher.said.read_text()
    assert said.count("tutti: restart ") == restarts
    assert ("tutti: no restart 2 of 2: it failed as it did before the last one" in said) == (restarts == 1)
    assert records(config)[-1]["step"] == (2 if restarts == 1 else 3)


def mistaken(tmp_path: Path) -> Config:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": 3}\n')
    return tiny_config(tmp_path, **{"data.train_path": str(rows)})


def test_a_mistake_of_the_user_is_no_crash(tmp_path):
    launcher = launch_train(mistaken(tmp_path), 2, "--max-restarts=3")
    assert launcher.wait() == 1
    said = launcher.said.read_text()
    assert "restart" not in said and said.count("tutti: error:") == 1
