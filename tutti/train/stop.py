"""Ending a run in good order: SIGTERM and SIGINT are noted, agreed on by all ranks, and acted on at the step's end."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from tutti.core.dist import World

log = logging.getLogger(__name__)


class StopSignal:
    """Within its `with` block the first SIGTERM or SIGINT asks the run to stop; a second one acts as it always does."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, world: World) -> None:
        self._world = world
        self._seen = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def requested(self) -> bool:
        """Whether any rank was asked to stop. A collective call, over host memory: it does not wait for the device."""
        if self._world.size == 1:
            return self._seen
        flag = torch.tensor(int(self._seen))
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)

    def _note(self, number: int, _: FrameType | None) -> None:
        self._seen = True
        self._restore()
        log.warning("%s: stopping after this step, once a checkpoint is saved", signal.Signals(number).name)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
