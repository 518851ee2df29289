"""Ending a run before its last step: on request, or because it no longer improves.

SIGTERM and SIGINT are recorded, agreed on by all ranks, and acted on at the end of a step.

One request to stop often arrives as several signals. Slurm, systemd and a terminal signal every process of a job, and a
launcher that is signaled forwards its own signal, so that a rank gets two or more, the last ones while it saves. All of
them mean the same stop. To end without waiting for the checkpoint, use SIGQUIT (Ctrl-\\) or SIGKILL.

With torchrun on several machines, the signal may mean that one machine has to leave, or that all have to stop because
another one joins. Each machine's agent learns this on its own, within about two seconds, and an agent whose ranks exit
successfully in the meantime considers the run finished. So ranks wait for their own signal after everything is saved.
If a machine gets none, it is not meant to leave: its ranks fail, and its agent restarts them on the remaining machines.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from tutti.config import TrainConfig
from tutti.core.dist import World

log = logging.getLogger(__name__)

_AGENT_SECONDS = 5.0


class MachineLeftError(RuntimeError):
    """The run has stopped because another machine leaves, and is to be restarted on the remaining ones."""

    reported = True


class StopSignal:
    """Within its `with` block, SIGTERM and SIGINT ask the run to stop, once, however many arrive.

    failed: returns True if this rank has another reason to end the run, such as a failed background save.

    After a stop was requested the signals stay ignored: the process is about to end, and a late signal must not change
    its exit status 0.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, world: World, failed: Callable[[], bool] = lambda: False) -> None:
        self._world, self._failed = world, failed
        self._seen = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if self._seen else handler)

    def requested(self) -> bool:
        """True if any rank was asked to stop, or has failed. A collective call on host memory, which does not wait for
        the device."""
        stops = self._seen or self._failed()
        if self._world.size == 1:
            return stops
        flag = torch.tensor(int(stops))
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)

    def require_no_restart(self) -> None:
        """Raise MachineLeftError on the machines that the stop was not meant for, if torchrun restarts them. A
        collective call of the ranks that have stopped."""
        if int(os.environ.get("GROUP_WORLD_SIZE", 1)) == 1:
            return
        deadline = time.monotonic() + _AGENT_SECONDS
        while not self._seen and time.monotonic() < deadline:
            time.sleep(0.05)
        told: dict[str, list[bool]] = {}
        machine = os.environ["GROUP_RANK"]
        restarted = int(os.environ["TORCHELASTIC_RESTART_COUNT"]) < int(os.environ["TORCHELASTIC_MAX_RESTARTS"])
        ranks = self._world.gather((machine, self._seen, restarted))
        for name, seen, _ in ranks:
            told.setdefault(name, []).append(seen)
        stays = {name for name, seen in told.items() if not any(seen)}
        goes_on = any(map(all, told.values())) and all(again for name, _, again in ranks if name in stays)
        if goes_on and machine in stays:
            log.warning("another machine was told to leave: the run goes on without it")
            raise MachineLeftError

    def _note(self, number: int, _: FrameType | None) -> None:
        if not self._seen:
            log.warning("%s: stopping after this step, once a checkpoint is saved", signal.Signals(number).name)
        self._seen = True


class EarlyStopping:
    """Ends a run whose evaluation loss has not fallen for train.early_stopping_patience evaluations in a row."""

    def __init__(self, train: TrainConfig) -> None:
        self._patience, self._min_delta = train.early_stopping_patience, train.early_stopping_min_delta
        self._best, self._best_step, self._in_vain = math.inf, 0, 0

    def add(self, step: int, loss: float) -> None:
        """Add the evaluation loss after `step`, which is the same on every rank."""
        if loss < self._best - self._min_delta:
            self._best, self._best_step, self._in_vain = loss, step, 0
        else:
            self._in_vain += 1
        if self.reason is not None:
            log.info("the run ends with step %d: %s", step, self.reason)

    @property
    def reason(self) -> str | None:
        """The reason to end the run; None to continue."""
        if not 0 < self._patience <= self._in_vain:
            return None
        return (
            f"the evaluation loss has not fallen for {self._in_vain} evaluations: it was lowest, {self._best:.4g}, "
            f"after step {self._best_step}"
        )

    def state_dict(self) -> dict[str, Any]:
        """The evaluations seen so far, as plain data."""
        best = None if self._best == math.inf else self._best
        return {"best": best, "best_step": self._best_step, "in_vain": self._in_vain}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._best = math.inf if state["best"] is None else state["best"]
        self._best_step, self._in_vain = state["best_step"], state["in_vain"]
