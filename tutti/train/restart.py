"""Starting a run again after it has crashed: whether, and how, so that it goes on where it was.

A run that has begun leaves a record of that beside its checkpoints (`tutti.checkpoint.lineage`). Once a new one is
there, `train.load_checkpoint_path auto` means the newest checkpoint of this run, or what it began from. Before that the
command is simply run again.

A run that is gone on with repeats its steps bit for bit, and with them whatever in these steps or rows made it fail. So
one that fails twice with the same words, which say where it was, is not started a third time. What the kernel or a
machine ended left no words, and may have met it by chance.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tutti.checkpoint.lineage import read_start
from tutti.core.launch import Failure

_FAILED, _WRONG = 1, 2
"""Exit statuses: the run failed and said why; the command or the configuration is wrong."""


def restarts(command: Sequence[str], output: Path, most: int) -> Callable[[Failure], list[str] | None]:
    """A function that gives the command to run after a failure, None if that was the end.

    command: that of a rank of the run in the folder `output`. most: restarts. What failed before it began, and said
    why, is not tried again, nor what failed twice in the same way: something must be mended first.
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
    except ValueError:  # the run itself tells of it, if it is in its way
        return None
    return None if start is None else start.id
