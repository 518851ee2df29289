"""Starting a run again after it has crashed: whether, and how, so that it goes on where it was.

A run that has begun leaves a record of that beside its checkpoints (`tutti.checkpoint.lineage`). Once a new one is
there, `train.load_checkpoint_path auto` means the newest checkpoint of this run, or what it began from. Before that the
command is simply run again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tutti.checkpoint.lineage import read_start

_FAILED, _WRONG = 1, 2
"""Exit statuses: the run failed and said why; the command or the configuration is wrong."""


def restarts(command: Sequence[str], output: Path, most: int) -> Callable[[int], list[str] | None]:
    """A function that gives the command to run after a failure of this exit status, None if that was the end.

    command: that of a rank of the run in the folder `output`. most: restarts. What failed before it began, and said
    why, is not tried again: something must be mended first.
    """
    before, num_done = _start_id(output), 0

    def again(status: int) -> list[str] | None:
        nonlocal num_done
        has_begun = _start_id(output) != before
        if num_done == most or status == _WRONG or (status == _FAILED and not has_begun):
            return None
        num_done += 1
        how = f"going on from the newest checkpoint in {output / 'checkpoints'}" if has_begun else "it had not begun"
        print(f"tutti: restart {num_done} of {most}: {how}", file=sys.stderr, flush=True)
        return [*command, *["--train.load_checkpoint_path=auto"] * has_begun]

    return again


def _start_id(output: Path) -> str | None:
    try:
        start = read_start(output / "checkpoints")
    except ValueError:  # the run itself tells of it, if it is in its way
        return None
    return None if start is None else start.id
