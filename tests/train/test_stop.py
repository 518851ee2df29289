"""Which ranks continue after a stop on several machines."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace
from typing import Any

import pytest

from tutti.train import stop
from tutti.train.stop import MachineLeftError, StopSignal

STAYS, LEAVES = ("0", False, True), ("1", True, True)
CASES: dict[str, tuple[list[tuple[str, bool, bool]], set[str]]] = {
    "one machine leaves": ([STAYS, STAYS, LEAVES, LEAVES], {"0"}),
    "all are told": ([("0", True, True), LEAVES], set()),
    "one rank is told": ([STAYS, STAYS, LEAVES, ("1", False, True)], set()),
    "no restart is left": ([("0", False, False), LEAVES], set()),
    "two of three stay": ([STAYS, LEAVES, ("2", False, True)], {"0", "2"}),
    "no restart is left on one that stays": ([("0", False, False), ("1", True, True), ("2", False, True)], set()),
}
"""Of each rank its machine, whether it was told, and whether torchrun would start it again; and who goes on."""


@pytest.mark.parametrize(("ranks", "go_on"), CASES.values(), ids=CASES)
def test_machines_go_on_without_one_that_leaves(monkeypatch, ranks, go_on):
    monkeypatch.setattr(stop, "_AGENT_SECONDS", 0.0)
    monkeypatch.setenv("GROUP_WORLD_SIZE", str(len({machine for machine, *_ in ranks})))
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    for machine, told, again in ranks:
        monkeypatch.setenv("GROUP_RANK", machine)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0" if again else "3")
        given: list[Any] = []
        world: Any = SimpleNamespace(gather=lambda mine, given=given: given.append(mine) or ranks)
        with StopSignal(world) as asked:
            if told:
                os.kill(os.getpid(), signal.SIGTERM)
            if machine in go_on:
                with pytest.raises(MachineLeftError):
                    asked.require_no_restart()
            else:
                asked.require_no_restart()
        assert given == [(machine, told, again)]
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def test_on_one_machine_nothing_is_waited_for(monkeypatch):
    monkeypatch.delenv("GROUP_WORLD_SIZE", raising=False)
    world: Any = SimpleNamespace(gather=None)
    StopSignal(world).require_no_restart()
