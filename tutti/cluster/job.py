"""The description of a job: the resources it needs, and the command of each machine.

Secrets are referred to by name only: schedulers have their own place for them, and job files are copied, shown and
kept. An entry of `env` that looks like a secret is refused.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from tutti.config import ConfigError
from tutti.config.coerce import nearest
from tutti.config.yamlfile import read_file


@dataclass(frozen=True)
class Job:
    """A job, as described in its YAML.

    config: the training configuration, a path on the machines. overrides: of its arguments. nodes: number of machines,
    or the minimum and maximum, `2-4`. gpus: per machine; ranks: per machine without GPUs. gpu_type: SkyPilot's name for
    it. cpus, memory_gib: per machine. time: time limit, `days-hours:minutes:seconds`, for Slurm. restarts: after
    crashes. port: of the rendezvous, on the first machine. image: of the containers. workdir: where the command runs.
    setup: shell commands before it. env: variables. secrets: names of variables that the scheduler sets. slurm, k8s,
    sky: options of that scheduler.
    """

    name: str
    config: str
    overrides: tuple[str, ...] = ()
    nodes: str = "1"
    gpus: int = 0
    ranks: int = 1
    gpu_type: str | None = None
    cpus: int | None = None
    memory_gib: int | None = None
    time: str | None = None
    restarts: int = 3
    port: int = 29400
    image: str | None = None
    workdir: str | None = None
    setup: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    secrets: tuple[str, ...] = ()
    slurm: Mapping[str, Any] = field(default_factory=dict)
    k8s: Mapping[str, Any] = field(default_factory=dict)
    sky: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_nodes(self) -> int:
        """The maximum number of machines of the job."""
        return int(self.nodes.rpartition("-")[2])

    def torchrun(self, host: str, is_host: str) -> str:
        """The shell command of one machine. host, is_host: shell expressions for the address of the first machine,
        and for 1 on it and 0 elsewhere."""
        words = [
            "env",
            # Otherwise the remaining machines would reuse the store of an earlier round, which a new machine cannot
            # find.
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
            "torchrun",
            f"--nnodes={self.nodes.replace('-', ':')}",
            f"--nproc-per-node={self.gpus or self.ranks}",
            f"--max-restarts={self.restarts}",
            "--rdzv-backend=c10d",
            f"--rdzv-id={self.name}",
        ]
        expressions = [f'--rdzv-endpoint="{host}:{self.port}"', f'--rdzv-conf="is_host={is_host}"']
        # A rank that is told to end saves first, which may take longer than torchrun's 30 seconds.
        rest = ["--shutdown-timeout=120", "-m", "tutti", "train", self.config]
        rest += [*self.overrides, "--train.load_checkpoint_path=auto"]
        return " ".join([*map(shlex.quote, words), *expressions, *map(shlex.quote, rest)])


_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,48}[a-z0-9])?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|PRIVATE|(API|ACCESS)_?KEY", re.IGNORECASE)
_SECRET_VALUE = re.compile(
    r"\b(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|AKIA[A-Z0-9]{12,})"
)
_PATTERNS = {
    "name": (_NAME, "small letters, digits and -, at most 50"),
    "nodes": (re.compile(r"[1-9]\d*(-[1-9]\d*)?"), "a number of machines, or the fewest and the most: 2-4"),
    "time": (re.compile(r"(\d+-)?\d+(:\d+){0,2}"), "minutes, hours:minutes:seconds, or days-hours:minutes:seconds"),
}


def read_job(path: str) -> Job:
    """The job in a YAML file. ConfigError: lists what is wrong, with line numbers."""
    tree, lines = read_file(path, "keys such as `nodes:`")
    values, problems = _values(tree)
    problems |= {name: "is required" for name in ("name", "config") if name not in tree}
    problems |= _faults(values)
    if problems:
        places = {name: f"{path}:{lines[name]}" if name in lines else path for name in problems}
        raise ConfigError([f"{places[name]}: {name}: {problem}" for name, problem in problems.items()])
    return Job(**values)


def _values(tree: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The values of the keys converted to their types, and by name what is wrong with the others."""
    kinds = get_type_hints(Job)
    values: dict[str, Any] = {}
    problems: dict[str, str] = {}
    for name, value in tree.items():
        if name not in kinds:
            guess = nearest(str(name), list(kinds))
            problems[str(name)] = f"there is no such key; {f'did you mean {guess}?' if guess else ', '.join(kinds)}"
            continue
        try:
            values[name] = _coerce(value, kinds[name])
        except ValueError as error:
            problems[name] = str(error)
    return values, problems


def _faults(values: Mapping[str, Any]) -> dict[str, str]:
    """By name, what is wrong with values of the right types."""
    problems = {}
    for name, (pattern, expects) in _PATTERNS.items():
        if values.get(name) is not None and not pattern.fullmatch(values[name]):
            problems[name] = f"expects {expects}, got {values[name]!r}"
    fewest, _, most = values.get("nodes", "1").partition("-")
    if most.isdecimal() and fewest.isdecimal() and int(fewest) > int(most):
        problems["nodes"] = f"the fewest come first, got {values['nodes']}"
    env = values.get("env", {})
    names = {f"env.{name}": name for name in env} | dict.fromkeys(["secrets"] * bool(values.get("secrets")), "")
    for place, name in names.items():
        odd = [one for one in ([name] if name else values["secrets"]) if not _VARIABLE.fullmatch(one)]
        if odd:
            problems[place] = f"{odd[0]!r} is no variable's name"
        elif name and (_SECRET_NAME.search(name) or _SECRET_VALUE.search(env[name])):
            problems[place] = "looks like a secret: list its name under secrets, and leave the value out"
    for name in ("overrides", "setup"):
        if _SECRET_VALUE.search(str(values.get(name, ""))):
            problems[name] = "holds what looks like a secret: list its variable under secrets, and leave the value out"
    return problems


def _coerce(value: Any, kind: Any) -> Any:
    """Convert `value` from a YAML to the type of its key. ValueError: it has another type."""
    if kind == tuple[str, ...]:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ValueError("expects a list of texts")
        return tuple(value)
    if kind == Mapping[str, str]:
        if not isinstance(value, dict) or not all(isinstance(item, (str, int, float)) for item in value.values()):
            raise ValueError("expects names and texts")
        return {str(name): str(item).lower() if isinstance(item, bool) else str(item) for name, item in value.items()}
    if kind == Mapping[str, Any]:
        if not isinstance(value, dict):
            raise ValueError("expects names and values")
        return value
    if kind in (int, int | None):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"expects a whole number, got {value!r}")
        return value
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise ValueError(f"expects a text, got {value!r}")
    return str(value)
