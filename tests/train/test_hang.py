"""A rank that hangs is reported with its phase and stack within five seconds after the timeout; then all ranks end."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.harness import run_ranks
from tests.train.runs import tiny_config, train_quietly
from tutti.config import Config
from tutti.core.launch import ERROR_FILE
from tutti.core.watchdog import Place, describe

TIMEOUT = 3


def hang_in_step_2(config: Config, folder: Path, how: str) -> None:
    """Train, while the last rank never ends its second step."""
    from tutti.train.step import TrainStep

    rank, last = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]) - 1
    os.environ[ERROR_FILE] = str(folder / f"rank{rank}")
    original = TrainStep.step

    def step(self: Any, batch: Any, totals: Any) -> None:
        if batch.step == 2 and rank == last:
            (folder / "began").touch()
            if how == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            wait_for_a_dead_disk()
        original(self, batch, totals)

    TrainStep.step = step  # type: ignore[method-assign]
    train_quietly(config)


def wait_for_a_dead_disk() -> None:
    time.sleep(600)


@pytest.mark.parametrize("how", ["waits", "stopped"])
def test_a_hung_rank_is_named(tmp_path, how):
    config = tiny_config(tmp_path, world=2, **{"train.hang_timeout": TIMEOUT})
    with pytest.raises(AssertionError, match="died"):
        run_ranks(2, hang_in_step_2, config, tmp_path, how)
    (note,) = [path for path in tmp_path.glob("rank*") if path.read_text()]
    assert note.stat().st_mtime - (tmp_path / "began").stat().st_mtime < TIMEOUT + 5
    *details, told = note.read_text().splitlines()
    assert told.startswith("tutti: error: no progress for ") and "(train.hang_timeout): " in told
    if how == "stopped":
        assert told.endswith("rank 1 does not answer")
        assert "rank 0 (" in details[0] and "in step 2 for" in details[0]
    else:
        assert "): rank 1 (" in told and " hangs in step 2, at " in told and "rank 0" not in told
        assert told.endswith("in wait_for_a_dead_disk")
        assert any("wait_for_a_dead_disk" in line for line in details)
    assert any("waits in gloo:" in line for line in details), "rank 0 waits in a collective, which is named"
    assert len(details) < 40


def place(rank: int, **changes: Any) -> Place:
    known = {"phase": "step 3", "count": 7, "seconds": 10.0, "stack": ["a.py:1 in step"], "waits": []}
    return Place(rank=rank, host=f"node{rank}", **(known | changes))


def test_who_hangs() -> None:
    waiting = {"waits": ["nccl:all_reduce [[3]] in default_pg"]}
    assert describe([place(0, **waiting), place(1)], 2).endswith("rank 1 (node1) hangs in step 3, at a.py:1 in step")
    text = describe([place(0, **waiting, count=8), place(1, **waiting, phase="step 2")], 2)
    assert text.endswith("(train.hang_timeout): rank 1 (node1) hangs in step 2, at a.py:1 in step")
    assert "    waits in nccl:all_reduce [[3]] in default_pg\n" in text
    in_torch = place(0, stack=["/x/torch/distributed/distributed_c10d.py:9 in all_reduce"])
    assert describe([in_torch, place(1)], 2).count("hangs") == 1
    silent = "; ".join(f"rank {rank} does not answer" for rank in (1, 2, 3))
    assert describe([place(0)], 9).endswith(f"{silent}; and 5 more")
