"""Simulated machines for tests: network namespaces on this machine, joined by a bridge, each with a name and address.

They share the file system, except for private folders. Needs root and iproute2.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.harness import PRELOAD
from tutti.cluster.job import Job

ROOT = Path(__file__).parents[2]
PORT = 29411
ENVIRONMENT = {
    "GLOO_SOCKET_IFNAME": "eth0",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
}


def available() -> bool:
    """True if this process may make namespaces, links between them and mounts in them."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "unshare", "mount", "hostname"))):
        return False
    probe = f"tutti-{os.getpid()}"
    steps = (
        f"ip netns add {probe}",
        f"ip netns exec {probe} unshare -m -u true",
        f"ip link add {probe[:15]} type bridge",
    )
    worked = all(subprocess.run(step.split(), capture_output=True).returncode == 0 for step in steps)
    for step in (f"ip link del {probe[:15]}", f"ip netns del {probe}"):
        subprocess.run(step.split(), capture_output=True)
    return worked


class Nodes:
    """Create `count` machines node1, node2, ... at 10.77.X.1, 10.77.X.2, ...; on exit, remove them and their
    processes."""

    def __init__(self, count: int, folder: Path) -> None:
        self.tag = os.getpid() % 250
        self.folder = folder
        self.names = [f"node{number}" for number in range(1, count + 1)]
        self.processes: dict[str, Any] = {}
        self._cleaner: subprocess.Popen

    def __enter__(self) -> Nodes:
        self._cleaner = subprocess.Popen(["sh", "-c", self._cleaning()], start_new_session=True)
        try:
            self._connect()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for name in self.names:
            self.kill(name)
        self._cleaner.kill()
        self._cleaner.wait()
        for line in self._removal():
            subprocess.run(line.split(), capture_output=True)

    def _removal(self) -> list[str]:
        """Commands that remove all that `_connect` makes. Links come first: a namespace takes its own along some time
        later."""
        links = [f"ip link del tv{self.tag}n{name.removeprefix('node')}" for name in self.names]
        return [*links, *(f"ip netns del {self.space(name)}" for name in self.names), f"ip link del tb{self.tag}"]

    def _cleaning(self) -> str:
        """A script that waits for this process to end and then removes the machines, because a test may be killed."""
        ends = [f"ip netns pids {self.space(name)} | xargs -r kill -9" for name in self.names]
        wait = f"while kill -0 {os.getpid()}; do sleep 1; done"
        return f"exec 2>/dev/null; {'; '.join([wait, *ends, *self._removal()])}"

    def _connect(self) -> None:
        self._ip(f"link add tb{self.tag} type bridge", f"link set tb{self.tag} up")
        for number, name in enumerate(self.names, start=1):
            space, outer, inner = self.space(name), f"tv{self.tag}n{number}", f"tw{self.tag}n{number}"
            self._ip(
                f"netns add {space}",
                f"link add {outer} type veth peer name {inner}",
                f"link set {inner} netns {space}",
                f"link set {outer} master tb{self.tag} up",
                f"-n {space} link set {inner} name eth0",
                f"-n {space} addr add {self.address(name)}/24 dev eth0",
                f"-n {space} link set eth0 up",
                f"-n {space} link set lo up",
            )

    def address(self, name: str) -> str:
        return f"10.77.{self.tag}.{name.removeprefix('node')}"

    def link(self, name: str, state: str) -> None:
        """Disconnect a machine (`down`), or connect it again (`up`)."""
        self._ip(f"link set tv{self.tag}n{name.removeprefix('node')} {state}")

    def slow(self, name: str, shaping: str) -> None:
        """Shape what the machine sends, in tc's words: `tbf rate 8mbit burst 16kbit latency 200ms`."""
        command = [
            "ip",
            "netns",
            "exec",
            self.space(name),
            "tc",
            "qdisc",
            "add",
            "dev",
            "eth0",
            "root",
            *shaping.split(),
        ]
        subprocess.run(command, check=True, capture_output=True)

    def start(self, name: str, nodes: str, arguments: list[str], *, private: Path | None = None) -> None:
        """Make the machine run what `tutti launch` renders for one rank on each: torchrun, and `tutti train` under it.

        nodes: as in a job's YAML. arguments: a configuration, and overrides. private: a folder that this machine does
        not share.
        """
        mount = f"mount -t tmpfs none {private} && " if private is not None else ""
        inside = ["ip", "netns", "exec", self.space(name), "unshare", "-m", "-u", "bash", "-c"]
        with self.log(name).open("a") as log:
            self.processes[name] = subprocess.Popen(
                [*inside, f"hostname {name} && {mount}exec {self._command(name, nodes, arguments)}"],
                cwd=ROOT, env=os.environ | ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def fork(self, name: str, nodes: str, arguments: list[str]) -> None:
        """`start` within a second: torchrun's agent and its ranks are forked from what has imported everything."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        words = shlex.split(self._command(name, nodes, arguments))
        place = f"/var/run/netns/{self.space(name)}"
        process = context.Process(target=_run_agent, args=(words, place, self.log(name)), daemon=False)
        process.start()
        self.processes[name] = process

    def _command(self, name: str, nodes: str, arguments: list[str]) -> str:
        """The command that the machine runs, for a shell."""
        first = self.names[0]
        config, *overrides = arguments
        job = Job(name="test", config=config, overrides=tuple(overrides), nodes=nodes, port=PORT)
        # Shorter timeouts than between real machines.
        timeouts = "last_call_timeout=1,join_timeout=60,keep_alive_interval=1"
        return (
            job.torchrun(self.address(first), str(int(name == first)))
            .replace("is_host=", f"{timeouts},is_host=")
            .replace(" -m tutti ", f" --local-addr={self.address(name)} -m tutti ")
        )

    def log(self, name: str) -> Path:
        """The output of the machine's processes."""
        return self.folder / f"{name}.log"

    def kill(self, name: str) -> None:
        """Simulate a power failure: kill every process in the machine's namespace at once."""
        found = subprocess.run(["ip", "netns", "pids", self.space(name)], capture_output=True, text=True)
        # Stop them first, so that none notices the end of another one and reports it to other machines.
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in found.stdout.split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), number)
        if name in self.processes:
            self.wait(name, 60)
            del self.processes[name]

    def signal(self, name: str, number: signal.Signals) -> None:
        """Signal the machine's torchrun, as a scheduler does before it takes the machine away."""
        os.kill(self.processes[name].pid, number)

    def wait(self, name: str, timeout: float) -> int:
        """Wait for the machine's torchrun to end; returns its exit status."""
        process = self.processes[name]
        if isinstance(process, subprocess.Popen):
            return process.wait(timeout)
        process.join(timeout)
        if process.exitcode is None:
            raise TimeoutError(f"torchrun of {name} has not ended within {timeout} s")
        return process.exitcode

    def space(self, name: str) -> str:
        """The name of the machine's network namespace."""
        return f"tutti{self.tag}-{name}"

    def _ip(self, *commands: str) -> None:
        for command in commands:
            subprocess.run(["ip", *command.split()], check=True, capture_output=True)


def enter_network(place: str) -> None:
    """Put this thread, and those it starts, in the network namespace that is mounted at `place`."""
    with open(place) as space:
        assert ctypes.CDLL(None).setns(space.fileno(), 0) == 0


def _run_agent(words: list[str], place: str, said: Path) -> None:
    """Do in this process, in a network namespace, what torchrun does when it is started by `words`."""
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, parse_args

    os.setsid()
    stream = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    enter_network(place)
    before, after = words[: words.index("torchrun")], words[words.index("torchrun") + 1 :]
    os.environ |= ENVIRONMENT | dict(word.split("=", 1) for word in before if "=" in word)
    config, _, rest = config_from_args(parse_args(after))
    config.start_method = "fork"
    elastic_launch(config, _run_rank)(*rest[rest.index("tutti") + 1 :])


def _run_rank(*words: str) -> None:
    import torch

    from tutti.cli import main

    torch.set_num_threads(1)
    sys.exit(main(list(words)))
