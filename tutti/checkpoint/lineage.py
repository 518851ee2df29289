"""Branches: which checkpoints in an output folder belong to the current branch of the run.

A run may go back: it is restarted from an earlier step, for example with another learning rate. Checkpoints beyond that
step then belong to the abandoned branch, and the newest of them must not be mistaken for the newest of the run, even if
the new branch is killed before it has saved anything. So every start leaves a record, `start.json`, next to the
checkpoints before its first step: an id of its own and the checkpoint that it resumed from. A checkpoint belongs to the
start's branch if that start wrote it, or if it is in the same folder at or before the point that the start resumed
from; everything beyond that point was moved away then (`tutti.train.output`), or still has to be.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tutti.core.files import replace_file

NAME = "start.json"


@dataclass(frozen=True)
class Start:
    """A start of a run. origin: the checkpoint that it resumes from at `step`: the name of a folder next to
    start.json, or the absolute path of one elsewhere; None if it began with step 1."""

    origin: str | None = None
    step: int = 0
    id: str = field(default_factory=lambda: secrets.token_hex(8))

    @property
    def goes_back(self) -> bool:
        """True if it resumes from a checkpoint of its own folder, so that the content up to `step` is its past."""
        return self.origin is not None and not Path(self.origin).is_absolute()

    def owns(self, step: int, start: str) -> bool:
        """True if the checkpoint of `step`, written by the start with this id, belongs to this start's branch."""
        return start == self.id or (self.goes_back and step <= self.step)


def read_start(root: Path) -> Start | None:
    """The record of the last start in the checkpoint folder `root`; None if there is none."""
    path = root / NAME
    try:
        content = json.loads(path.read_bytes())
        start = Start(**content)
        assert isinstance(start.step, int) and isinstance(start.id, str)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, AssertionError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): name the checkpoint to go on from in train.load_checkpoint_path"
        ) from None
    return start


def write_start(root: Path, start: Start) -> None:
    """Record `start` as the last start in the checkpoint folder `root`."""
    root.mkdir(parents=True, exist_ok=True)
    replace_file(root / NAME, json.dumps(asdict(start)) + "\n")
