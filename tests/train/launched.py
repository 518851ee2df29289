"""`tutti train --nproc N` for tests: the launcher as a process of its own, and ranks that are forked, not started.

A rank that begins with a new interpreter takes seconds to import torch. Here the launcher is forked from the server of
`tests.harness`, which has imported everything, and forks its ranks from itself; all else is the launcher's own code.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.harness import PRELOAD
from tutti.config import Config
from tutti.config.yamlfile import to_yaml


@dataclass(frozen=True)
class Launcher:
    """A running launcher. output: the run's folder. said: the file with the output of launcher and ranks."""

    process: Any
    output: Path
    said: Path

    def wait(self, timeout: float = 120) -> int:
        """Wait for the end and return the exit status. No rank or worker may be left."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(self.said.read_text()[-4000:])
        deadline = time.monotonic() + 5
        while left := self.ranks() + self.workers():
            assert time.monotonic() < deadline, f"processes {left} are left"
            time.sleep(0.02)
        return self.process.exitcode

    def ranks(self) -> list[int]:
        """The process ids of the ranks."""
        return [process for process in _processes() if _parent(process) == self.process.pid]

    def workers(self) -> list[int]:
        """The process ids of the ranks' children: all other processes with the same output file."""
        mine = {self.process.pid, *self.ranks()}
        return [process for process in _processes() if process not in mine and _prints_to(process, self.said)]


def launch_train(config: Config, nproc: int, *words: str, hook: Callable[..., None] | None = None) -> Launcher:
    """Start `tutti train` with `config` and further `words`. hook: called in each rank before anything else, with the
    run's output folder."""
    output = Path(config.train.output_dir or "")
    output.parent.mkdir(parents=True, exist_ok=True)
    path, said = output.parent / "run.yaml", output.parent / "said"
    path.write_text(to_yaml(config))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    argv = ["train", str(path), f"--nproc={nproc}", *words]
    process = context.Process(target=_launcher, args=(argv, hook, output, said), daemon=False)
    process.start()
    return Launcher(process, output, said)


def _launcher(argv: list[str], hook: Callable[..., None] | None, output: Path, said: Path) -> None:
    from unittest.mock import patch

    from tutti.cli import main

    os.setsid()
    stream = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(stream, 1)
    os.dup2(stream, 2)

    def start(command: Sequence[str], env: dict[str, str], preexec_fn: Callable[[], None], **_: Any) -> Any:
        return _Forked(command, env, preexec_fn, hook and (lambda: hook(output)))

    with patch("tutti.core.launch.subprocess", SimpleNamespace(Popen=start)):
        status = main(argv)
    sys.stderr.flush()
    os._exit(status)


class _Forked:
    """The interface of subprocess.Popen for a function."""

    def __init__(
        self,
        command: Sequence[str],
        env: dict[str, str],
        preexec: Callable[[], None],
        hook: Callable[[], None] | None,
    ) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid:
            return
        status = 1
        try:
            os.setsid()
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
            preexec()
            os.environ.clear()
            os.environ.update(env)
            import torch

            torch.set_num_threads(1)
            if hook:
                hook()
            from tutti.cli import main

            status = main(list(command[command.index("tutti") + 1 :]))
        finally:
            sys.stderr.flush()
            os._exit(status)

    def poll(self) -> int | None:
        return self._ended(os.WNOHANG)

    def wait(self) -> int | None:
        return self._ended(0)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def _ended(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


def _processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _parent(process: int) -> int:
    try:
        state, parent = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return 0
    return 0 if state == "Z" else int(parent)


def _prints_to(process: int, path: Path) -> bool:
    try:
        return os.path.samefile(f"/proc/{process}/fd/2", path)
    except OSError:
        return False
