"""Several ranks on this machine without torchrun: `tutti train --nproc N`.

One process is started per rank, with the environment that torchrun would give it. The launcher then only watches:
1. SIGINT and SIGTERM are forwarded once to every rank. Ranks have their own sessions, so that a Ctrl-C in the terminal
   reaches them only through the launcher, and they can save and exit.
2. When a rank fails, the others get a moment to fail on their own (most do, in their next collective). Then they are
   killed together with the processes that they started.
3. Ranks write their error messages to files (`ERROR_FILE`) instead of the terminal. The earliest one is the cause and
   is shown once; the launcher exits with that rank's status. If the kernel killed a rank (out of memory), it left no
   message and is the cause itself; the messages of the others are only about lost connections.
4. On request, a failed command is restarted, unless the launcher itself was told to end.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

ERROR_FILE = "TUTTI_ERROR_FILE"
"""Environment variable: the file to which a rank writes its final error, for the launcher to show."""

_GRACE_SECONDS = 5.0
_POLL_SECONDS = 0.05
_PR_SET_PDEATHSIG = 1
_BY_KERNEL = (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)


@dataclass(frozen=True)
class Failure:
    """The failure of a rank, which ended the others. status: its exit status, or 128 + the number of the signal that
    killed it. words: its error message, if any."""

    status: int
    words: str


def launch(
    command: Sequence[str], nproc: int, again: Callable[[Failure], Sequence[str] | None] = lambda failure: None
) -> int:
    """Run `command` as `nproc` ranks and wait for them; returns the exit status of the first that failed, else 0.

    again: called with a failure, returns the command to run next, or None to give up; not called if this process was
    told to end. Must be called from the main thread.
    """
    with _noting_signals() as signals:
        following: Sequence[str] | None = command
        while following is not None:
            failure = _run_once(following, nproc, signals)
            following = again(failure) if failure and not signals else None
    return failure.status if failure else 0


def _run_once(command: Sequence[str], nproc: int, signals: list[int]) -> Failure | None:
    with tempfile.TemporaryDirectory(prefix="tutti-") as folder:
        notes = [Path(folder, f"rank{rank}") for rank in range(nproc)]
        ranks: list[subprocess.Popen] = []
        port = _free_port()
        try:
            for rank in range(nproc):
                environment = _environment(rank, nproc, port) | {ERROR_FILE: str(notes[rank])}
                ranks.append(
                    subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=_end_with_parent)
                )
            failed = _watch(ranks, signals)
        finally:
            _kill(ranks)
        return None if failed is None else _explain(ranks, notes, failed)


def _environment(rank: int, nproc: int, port: int) -> dict[str, str]:
    """The environment that torchrun gives a rank, with an equal share of the cores."""
    threads = max(1, num_cores() // nproc)
    return {
        "OMP_NUM_THREADS": str(threads),
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def num_cores() -> int:
    """The number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _end_with_parent() -> None:
    """Make the kernel signal this new process (so that it saves and exits) if the launcher is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def _noting_signals() -> Iterator[list[int]]:
    """A list of the signals that arrive, which are forwarded once all ranks exist, so that no rank misses one."""
    arrived: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        arrived.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield arrived
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(ranks: list[subprocess.Popen], signals: list[int]) -> int | None:
    """Forward `signals` as they arrive until all ranks have ended, or one has failed and the others had their
    moment; returns the rank that failed first."""
    first: int | None = None
    deadline, num_passed = float("inf"), 0
    while _running(ranks) and time.monotonic() < deadline:
        while num_passed < len(signals):
            number, num_passed = signals[num_passed], num_passed + 1
            for process in ranks:
                with suppress(ProcessLookupError):
                    process.send_signal(number)
        if first is None and (first := _failed(ranks)) is not None:
            deadline = time.monotonic() + _GRACE_SECONDS
        time.sleep(_POLL_SECONDS)
    return _failed(ranks) if first is None else first


def _running(ranks: list[subprocess.Popen]) -> list[subprocess.Popen]:
    return [process for process in ranks if process.poll() is None]


def _failed(ranks: list[subprocess.Popen]) -> int | None:
    """A rank that has failed; preferably one that the kernel killed, which the other ranks cannot have caused."""
    failed = [rank for rank, process in enumerate(ranks) if process.returncode]
    return min(failed, key=lambda rank: -ranks[rank].returncode not in _BY_KERNEL, default=None)


def _kill(ranks: list[subprocess.Popen]) -> None:
    """Kill the ranks that still run, with everything they started."""
    for process in _running(ranks):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _explain(ranks: list[subprocess.Popen], notes: list[Path], failed: int) -> Failure:
    """Print once why the ranks ended: the earliest error message of any rank, else how rank `failed` ended.

    failed: the first rank that was seen to end.
    """
    written = [rank for rank, note in enumerate(notes) if note.exists()]
    if -ranks[failed].returncode in _BY_KERNEL and failed not in written:
        written = []
    if written:
        failed = min(written, key=lambda rank: notes[rank].stat().st_mtime_ns)
    code = ranks[failed].returncode
    words = notes[failed].read_text(encoding="utf-8") if written else ""
    if written:
        sys.stderr.write(words)
    elif code < 0:
        hint = " (out of memory?)" if -code == signal.SIGKILL else ""
        sys.stderr.write(f"tutti: error: rank {failed} was ended by {signal.Signals(-code).name}{hint}\n")
    else:
        sys.stderr.write(f"tutti: error: rank {failed} ended with exit status {code}\n")
    return Failure(code if code >= 0 else 128 - code, words)
