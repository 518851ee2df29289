"""Restarts after a crash: whether to restart, and with which command, so that the run resumes where it was.

A run that has begun leaves a record next to its checkpoints (`tutti.checkpoint.lineage`). Once there is a new record,
`train.load_checkpoint_path auto` means the newest checkpoint of this run, or the one it started from. Before that, the
same command is simply run again.

A resumed run repeats its steps bit for bit, including whatever made it fail. So a run that fails twice with the same
message, which says where it was, is not restarted again. A process killed by the kernel or a lost machine leaves no
message, and may have been a matter of chance.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tutti.checkpoint.lineage import read_start
from tutti.core.launch import Failure

_FAILED, _WRONG = 1, 2
"""Exit statuses: the run failed and reported why; the command or the configuration is wrong."""


def restarts(command: Sequence[str], output: Path, most: int) -> Callable[[Failure], list[str] | None]:
    """A function that returns the command to run after a failure, or None to give up.

    command: the command of a rank of the run in the folder `output`. most: maximum number of restarts. A failure is not
    retried if it was reported before the run began, or has occurred twice in the same way: something must be fixed
    first.
    """
    before, num_done, told = _start_id(output), 0, ""

    def again(failure: Failure) -> list[str] | None:
        nonlocal num_done, told
        has_begun = _start_id(output) != before
        if num_done == most or failure.status == _WRONG or (failure.status == _FAILED and not has_begun):
            return None
        if failure.words and failure.words == told:
            _say(f"no restart {num_done + 1} of {most}: it failed as it did before the last one, and would again")
            return None
        num_done, told = num_done + 1, failure.words
        how = f"going on from the newest checkpoint in {output / 'checkpoints'}" if has_begun else "it had not begun"
        _say(f"restart {num_done} of {most}: {how}")
        return [*command, *["--train.load_checkpoint_path=auto"] * has_begun]

    return again


def _say(text: str) -> None:
    print(f"tutti: {text}", file=sys.stderr, flush=True)


def _start_id(output: Path) -> str | None:
    try:
        start = read_start(output / "checkpoints")
    except ValueError:  # the run itself reports it if it matters
        return None
    return None if start is None else start.id
