"""The output folder of a run: it is locked by one run at a time, and contains one branch of a run.

Lock. During a run, every rank holds a lock on `.lock` in the folder (flock, which the kernel releases when the process
ends in any way). A second run is refused at once; the file names the holder of the lock.

Branches. When a run resumes from a checkpoint of its folder, there may be results beyond that step: checkpoints,
exports, metrics. They belong to a branch that is being abandoned. `begin_branch` moves them to `branches/K`, together
with copies of the configuration, metrics and report, so that the folder contains only the new branch; nothing is
deleted. If only metrics lie beyond that step, as after a crash, just these lines are moved, to
`metrics.superseded.jsonl`.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tutti.checkpoint import manifest
from tutti.checkpoint.lineage import Start
from tutti.checkpoint.manager import Checkpointer
from tutti.config import Config
from tutti.config.yamlfile import to_yaml
from tutti.core.dist import World
from tutti.core.files import is_named, replace_file, sync_folder
from tutti.model.lora import listed
from tutti.train.logging.history import METRICS, cut_back, step_range
from tutti.train.logging.html import REPORT, RUN

log = logging.getLogger(__name__)

LOCK, CONFIG, BRANCHES = ".lock", "config.yaml", "branches"


@contextmanager
def claim_output(output: Path, world: World, *, fresh: bool) -> Iterator[None]:
    """Create the folder `output` and keep other runs out of it within this context. A run that wrote nothing leaves no
    trace.

    fresh: the folder must not contain a run yet. Collective; ValueError, on every rank: it does, another run is active
    in it, it cannot be written, or not all ranks see it.
    """
    # Rank 0 decides alone; the others share its lock, which they keep if they outlive it.
    locks: list[int] = []
    made = False

    def first() -> tuple[bool, str]:
        missing = not output.exists()
        try:
            output.mkdir(parents=True, exist_ok=True)
            locks.append(_lock(output / LOCK, first=True))
        except OSError as error:
            raise ValueError(f"train.output_dir {output} cannot be written: {error.strerror}") from error
        if fresh and ((output / METRICS).exists() or manifest.by_age(output / "checkpoints")[0]):
            raise ValueError(
                f"train.output_dir {output} holds a run already: go on with it by --train.load_checkpoint_path auto, "
                "or choose another folder"
            )
        return missing, (output / LOCK).read_text(encoding="utf-8")

    try:
        made, holder = world.broadcast(world.run_on_all_ranks(lambda: first() if world.is_main else None))
        _require_shared(output, holder, world)
        world.run_on_all_ranks(lambda: None if world.is_main else locks.append(_lock(output / LOCK, first=False)))
        yield
    finally:
        if world.is_main and locks:
            (output / LOCK).unlink(missing_ok=True)
            if made and not any(output.iterdir()):
                output.rmdir()
        for lock in locks:
            _LOCKS.discard(lock)
            os.close(lock)


def _require_shared(output: Path, holder: str, world: World) -> None:
    """Raise ValueError on every rank unless all of them find in `output` the lock that rank 0 has just written."""

    def sees() -> bool:
        # A network file system may need a moment to show what another machine has written.
        for _ in range(_PATIENCE):
            try:
                if (output / LOCK).read_text(encoding="utf-8", errors="replace") == holder:
                    return True
            except OSError:
                pass
            time.sleep(0.1)
        return False

    found = world.gather((socket.gethostname(), sees()))
    blind = list(dict.fromkeys(host for host, saw in found if not saw))
    if blind:
        raise ValueError(
            f"train.output_dir {output}, as rank 0 has it on {found[0][0]}, is not there on {listed(blind)}: all "
            "machines must see the same folder"
        )


_PATIENCE = 30
"""In tenths of a second."""

_LOCKS: set[int] = set()
"""Locks that this process holds. A forked child must not keep them alive, and closes its copies."""


def _drop_locks() -> None:
    while _LOCKS:
        os.close(_LOCKS.pop())


os.register_at_fork(after_in_child=_drop_locks)


def _lock(path: Path, *, first: bool) -> int:
    """Lock the file `path`, first exclusively for this process, then shared with the other ranks; returns the
    descriptor that holds the lock.

    Ranks of this job from before a restart, on machines that were cut off, are given time to end.
    """
    deadline = time.monotonic() + _RESTART_SECONDS
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o640)
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_EX if first else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            if first:
                holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
                holder |= {"id": secrets.token_hex(4), "job": _job()}
                os.truncate(descriptor, 0)
                os.write(descriptor, json.dumps(holder).encode())
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                text = os.read(descriptor, 1000).decode(errors="replace")
                os.close(descriptor)
                if _job() and f'"job": {json.dumps(_job())}' in text and time.monotonic() < deadline:
                    time.sleep(0.5)
                    continue
                raise ValueError(
                    f"train.output_dir {path.parent}: another run is going on there ({_named(text)}); stop it first, "
                    "or choose another folder"
                ) from None
            if error.errno not in (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK):
                os.close(descriptor)
                raise
            log.warning("%s: its file system has no locks; see to it that one run at a time writes there", path.parent)
        _LOCKS.add(descriptor)
        if is_named(descriptor, path):
            return descriptor
        # The previous holder has just removed the file, so this lock protects nothing.
        _LOCKS.discard(descriptor)
        os.close(descriptor)


_RESTART_SECONDS = 120.0


def _job() -> str | None:
    """The id that torchrun gives to the job on all its machines, the same before and after a restart."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return None if name == "none" else name


def _named(text: str) -> str:
    try:
        holder = json.loads(text)
        return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (ValueError, KeyError, TypeError):
        return "it has not told its name yet"


@dataclass(frozen=True)
class Branch:
    """A branch that was abandoned, for the report.

    step: the step that the run resumed from. folder: where the rest was moved, relative to the output folder. told: a
    description of what was moved.
    """

    step: int
    folder: str
    told: str


def begin_run(config: Config, output: Path, checkpoints: Checkpointer, world: World) -> Branch | None:
    """Prepare `output` for the run that `checkpoints` resumes, or for a new one: its checkpoints, metrics and
    configuration. Returns the abandoned branch, on rank 0. Collective."""
    start = checkpoints.begin()

    def begin() -> Branch | None:
        branch = begin_branch(output, start)
        replace_file(output / CONFIG, to_yaml(config))
        return branch

    return world.run_on_all_ranks(lambda: begin() if world.is_main else None)


def begin_branch(output: Path, start: Start) -> Branch | None:
    """Keep in `output` what led to `start`, and move the rest away; returns None if that is only metrics."""
    step = start.step
    first, last = step_range(output / METRICS)
    # If the checkpoint is from another folder, all metrics in this folder belong to another run.
    goes_on = start.goes_back or not 0 < first <= step
    checkpoints = [
        folder
        for folder, owner in _checkpoints(output / "checkpoints")
        if not start.owns(manifest.step_of(folder.name), owner)
    ]
    exports = [path for path, of in _exports(output / "hf", last) if of > step or not goes_on]
    if not checkpoints and not exports and goes_on:
        cut_back(output, step)
        return None
    folder = _next_folder(output / BRANCHES)
    folder.mkdir(parents=True)
    for name in (CONFIG, METRICS, RUN, REPORT):
        if (output / name).exists():
            shutil.copyfile(output / name, folder / name)
    for path in (*checkpoints, *exports):
        place = folder / path.parent.name / path.name
        place.parent.mkdir(exist_ok=True)
        path.rename(place)
        sync_folder(place.parent)
    sync_folder(folder)
    cut_back(output, step if goes_on else 0, superseded=False)
    if not goes_on:
        (output / RUN).unlink(missing_ok=True)
    parts = [f"{path.parent.name}/{path.name}" for path in (*checkpoints, *exports)]
    if last > step or not goes_on:
        parts.append(f"metrics up to step {last}")
    branch = Branch(step, f"{BRANCHES}/{folder.name}", ", ".join(parts))
    log.warning("going on from step %d; set aside in %s, since it lay beyond: %s", step, folder, branch.told)
    return branch


def _checkpoints(root: Path) -> Iterator[tuple[Path, str]]:
    """Every folder named like a checkpoint, oldest first, with the id of the start that wrote it, if recorded."""
    found, broken = manifest.by_age(root)
    written = {folder: content.start for folder, content in found}
    for folder in sorted([*written, *broken], key=lambda folder: manifest.step_of(folder.name)):
        yield folder, written.get(folder, "")


def _exports(root: Path, last: int) -> Iterator[tuple[Path, int]]:
    """The exports under `root` with their steps; the final export gets the step `last`."""
    for path in sorted(root.iterdir()) if root.is_dir() else ():
        if path.name == "final":
            yield path, last
        elif manifest.is_folder_name(path.name):
            yield path, manifest.step_of(path.name)


def _next_folder(root: Path) -> Path:
    number = 1
    while (root / str(number)).exists():
        number += 1
    return root / str(number)
