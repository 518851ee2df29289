"""Job files have the format that each scheduler documents, and run torchrun on each machine with the right arguments.

The shapes below are written down from the schedulers' documentation: sbatch(1) of Slurm, the TrainJob of Kubeflow
Trainer 2.2 (trainer.kubeflow.org/v1alpha1) with the parts of Kubernetes that it takes, and SkyPilot's YAML.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tutti.cli import main
from tutti.cluster.job import read_job
from tutti.cluster.render import RENDER
from tutti.config import ConfigError

JOB = """\
name: chat-8b
config: run.yaml
overrides: [--train.lr=1e-5, "--train.sample_prompts=How's that?"]
nodes: 2-4
gpus: 8
gpu_type: H100
cpus: 64
memory_gib: 512
time: 24:00:00
image: registry.example.com/tutti:1
workdir: here
setup: |
  export PREPARED=yes
env: {NCCL_SOCKET_IFNAME: eth0, OMP_NUM_THREADS: 8, GREETING: "it's $HOME"}
secrets: [HF_TOKEN]
slurm: {partition: gpu, exclusive: true}
k8s: {namespace: nlp, secret: tokens, claim: shared, mount: /shared, queue: gpu}
sky: {infra: kubernetes, use_spot: true}
"""
TRAIN = ["--shutdown-timeout=120", "-m", "tutti", "train", "run.yaml", "--train.lr=1e-5"]
TRAIN += ["--train.sample_prompts=How's that?", "--train.load_checkpoint_path=auto"]
TORCHRUN = ["torchrun", "--nnodes=2:4", "--nproc-per-node=8", "--max-restarts=3", "--rdzv-backend=c10d"]
TORCHRUN += ["--rdzv-id=chat-8b", "--rdzv-endpoint=node1:29400"]

SBATCH = {
    "job-name": r"\S+",
    "nodes": r"\d+(-\d+)?",
    "ntasks-per-node": r"\d+",
    "gpus-per-node": r"(\w+:)?\d+",
    "cpus-per-task": r"\d+",
    "mem": r"\d+[KMGT]?",
    "time": r"(\d+-)?\d+(:\d+){0,2}",
    "output": r"\S+",
    "open-mode": "append|truncate",
    "requeue": "",
    "no-kill": "",
    "exclusive": "",
    "signal": r"([RB]+:)?\w+(@\d+)?",
    "partition": r"\S+",
}


class Many:
    """A list of values of one shape, or with `names` a mapping to them from any names."""

    def __init__(self, shape: Any, names: bool = False) -> None:
        self.shape, self.names = shape, names


ENV = {"name!": str, "value": str, "valueFrom": {"secretKeyRef": {"name!": str, "key!": str, "optional": bool}}}
QUANTITIES = Many((int, str), names=True)
POD = {
    "containers": Many({"name!": str, "env": Many(ENV), "volumeMounts": Many({"name!": str, "mountPath!": str})}),
    "volumes": Many({"name!": str, "persistentVolumeClaim": {"claimName!": str, "readOnly": bool}}),
}
POD_TEMPLATE = {"template": {"spec": POD}}
PATCH = {"template": {"spec": {"replicatedJobs": Many({"name!": str, "template": {"spec": POD_TEMPLATE}})}}}
TRAIN_JOB = {
    "apiVersion!": "trainer.kubeflow.org/v1alpha1",
    "kind!": "TrainJob",
    "metadata!": {"name!": str, "namespace": str, "labels": Many(str, names=True)},
    "spec!": {
        "runtimeRef!": {"name!": str, "apiGroup": str, "kind": str},
        "suspend": bool,
        "trainer": {
            "image": str,
            "command": Many(str),
            "args": Many(str),
            "env": Many(ENV),
            "numNodes": int,
            "numProcPerNode": int,
            "resourcesPerNode": {"limits": QUANTITIES, "requests": QUANTITIES},
        },
        "runtimePatches": Many({"manager!": str, "trainingRuntimeSpec": PATCH}),
    },
}
SKY = {
    "name": str,
    "workdir": str,
    "num_nodes": int,
    "resources": {
        "infra": str,
        "accelerators": str,
        "cpus": str,
        "memory": str,
        "image_id": str,
        "use_spot": bool,
        "job_recovery": {"strategy": str, "max_restarts_on_errors": int},
    },
    "envs": Many(str, names=True),
    "secrets": Many((str, type(None)), names=True),
    "setup": str,
    "run": str,
}


def misfits(value: Any, shape: Any, place: str = "") -> list[str]:
    """Where `value` is not of `shape`: a type or several, a constant, `Many`, or a mapping of the known names, of which
    those with ! must be there."""
    if isinstance(shape, Many):
        wanted = dict if shape.names else list
        if not isinstance(value, wanted):
            return [place]
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        return [misfit for name, item in entries for misfit in misfits(item, shape.shape, f"{place}.{name}")]
    if isinstance(shape, dict):
        known = {name.rstrip("!"): (inner, name.endswith("!")) for name, inner in shape.items()}
        if not isinstance(value, dict):
            return [place]
        found = [f"{place}.{name}: unknown" for name in value.keys() - known.keys()]
        found += [f"{place}.{name}: missing" for name, (_, needed) in known.items() if needed and name not in value]
        return found + [
            misfit
            for name, item in value.items()
            if name in known
            for misfit in misfits(item, known[name][0], f"{place}.{name}")
        ]
    fits = isinstance(value, shape) if isinstance(shape, (type, tuple)) else value == shape
    return [] if fits else [place]


@pytest.fixture
def render(tmp_path, capsys):
    """The output of `tutti launch` for a job file with these text replacements."""

    def rendered(kind: str, *changes: tuple[str, str]) -> str:
        text = JOB
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        (tmp_path / "job.yaml").write_text(text)
        assert main(["launch", str(tmp_path / "job.yaml"), f"--{kind}"]) == 0
        return capsys.readouterr().out

    return rendered


@pytest.fixture
def machine(tmp_path):
    """Run a script with stand-ins for `torchrun` and Slurm's programs; returns torchrun's arguments and environment."""
    programs = tmp_path / "programs"
    programs.mkdir()
    (tmp_path / "here").mkdir()
    for name, text in {
        "torchrun": 'printf "%s\\0" torchrun "$@" > "$SEEN/words"; pwd > "$SEEN/pwd"; env -0 > "$SEEN/env"\n',
        "scontrol": '[ "$*" = "show hostnames node[1-2]" ] && printf "node%d\\n" {1..99999}\n',
        "srun": '[ "$1" = --kill-on-bad-exit=0 ] && shift && exec "$@"\n',
    }.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}")
        (programs / name).chmod(0o755)

    def run(script: str, **environment: str) -> tuple[list[str], dict[str, str]]:
        path = f"{programs}:{os.environ['PATH']}"
        env = {"PATH": path, "HOME": "/root", "SEEN": str(tmp_path), **environment}
        subprocess.run(["bash", "-c", script], cwd=tmp_path, env=env, check=True)
        assert (tmp_path / "pwd").read_text().strip() == str(tmp_path / "here")
        entries = (tmp_path / "env").read_text().rstrip("\0").split("\0")
        seen = dict(entry.split("=", 1) for entry in entries)
        assert seen["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
        return (tmp_path / "words").read_text().rstrip("\0").split("\0"), seen

    return run


def test_slurm(render, machine):
    script = render("slurm")
    head, *rest = script.splitlines()
    assert head == "#!/bin/bash"
    options = [re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(.*))?", line) for line in rest if line.startswith("#SBATCH")]
    given = {option[1]: option[2] or "" for option in options if option}
    assert len(given) == len(options) == len(SBATCH)
    for name, value in given.items():
        assert re.fullmatch(SBATCH[name], value), f"--{name}={value}"
    assert given["nodes"] == "2-4" and given["time"] == "24:00:00" and given["partition"] == "gpu"
    slurm = {"SLURM_JOB_NODELIST": "node[1-2]", "HF_TOKEN": "here"}
    for node in ("0", "1"):
        words, environment = machine(script, SLURM_NODEID=node, **slurm)
        assert words == [*TORCHRUN, f"--rdzv-conf=is_host={int(node == '0')}", *TRAIN]
        assert environment["PREPARED"] == "yes" and environment["GREETING"] == "it's $HOME"
        assert environment["OMP_NUM_THREADS"] == "8"
    with pytest.raises(subprocess.CalledProcessError):
        machine(script, SLURM_NODEID="0", SLURM_JOB_NODELIST="node[1-2]")


def test_kubeflow(render, machine):
    tree = yaml.safe_load(render("k8s"))
    assert misfits(tree, TRAIN_JOB) == []
    trainer = tree["spec"]["trainer"]
    assert trainer["numNodes"] == 4 and trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == 8
    secret = {"secretKeyRef": {"name": "tokens", "key": "HF_TOKEN"}}
    assert trainer["env"][-1] == {"name": "HF_TOKEN", "valueFrom": secret}
    assert trainer["env"][1] == {"name": "OMP_NUM_THREADS", "value": "8"}
    bash, option, script = trainer["command"]
    assert (bash, option) == ("bash", "-c")
    words, environment = machine(script, PET_MASTER_ADDR="node1", PET_NODE_RANK="2")
    assert words == [*TORCHRUN, "--rdzv-conf=is_host=0", *TRAIN] and environment["PREPARED"] == "yes"


def test_skypilot(render, machine):
    tree = yaml.safe_load(render("sky"))
    assert misfits(tree, SKY) == []
    assert tree["secrets"] == {"HF_TOKEN": None} and tree["resources"]["accelerators"] == "H100:8"
    assert tree["setup"] == "export PREPARED=yes\n" and tree["envs"]["GREETING"] == "it's $HOME"
    words, _ = machine(
        tree["run"], SKYPILOT_NODE_IPS="\n".join(f"node{number}" for number in range(1, 9999)), SKYPILOT_NODE_RANK="0"
    )
    assert words == [*TORCHRUN, "--rdzv-conf=is_host=1", *TRAIN]


def test_shapes_refuse_what_is_not_theirs(render):
    tree = yaml.safe_load(render("k8s"))
    tree["spec"]["trainer"]["numNode"] = tree["spec"]["trainer"].pop("numNodes")
    del tree["spec"]["runtimeRef"]["name"]
    tree["spec"]["trainer"]["env"][1]["value"] = 8
    assert sorted(misfits(tree, TRAIN_JOB)) == [
        ".spec.runtimeRef.name: missing", ".spec.trainer.env.1.value", ".spec.trainer.numNode: unknown"
    ]  # fmt: skip


@pytest.mark.parametrize("kind", RENDER)
def test_a_small_job_without_gpus(render, kind, tmp_path):
    (tmp_path / "job.yaml").write_text("name: small\nconfig: run.yaml\nranks: 2\nimage: tutti\n")
    text = RENDER[kind](read_job(str(tmp_path / "job.yaml")))
    assert "--nnodes=1 --nproc-per-node=2" in text and "gpu" not in text and "secret" not in text
    if kind != "slurm":
        assert misfits(yaml.safe_load(text), {"k8s": TRAIN_JOB, "sky": SKY}[kind]) == []


@pytest.mark.parametrize(
    ("changes", "place", "problem"),
    [
        (("nodes:", "nodse:"), ":4: nodse", "there is no such key; did you mean nodes?"),
        (("name: chat-8b", "name: Chat 8B"), ":1: name", "small letters"),
        (("config: run.yaml\n", ""), ": config", "is required"),
        (("nodes: 2-4", "nodes: 4-2"), ":4: nodes", "the fewest come first"),
        (("nodes: 2-4", "nodes: many"), ":4: nodes", "a number of machines"),
        (("gpus: 8", "gpus: eight"), ":5: gpus", "expects a whole number, got 'eight'"),
        (("24:00:00", "a day"), ":9: time", "hours:minutes:seconds"),
        (("GREETING: ", "HF_TOKEN: "), ":14: env.HF_TOKEN", "looks like a secret"),
        (('"it\'s $HOME"', "hf_" + "a" * 34), ":14: env.GREETING", "looks like a secret"),
        (("PREPARED=yes", "KEY=hf_" + "a" * 34), ":12: setup", "holds what looks like a secret"),
        (("[HF_TOKEN]", "[HF TOKEN]"), ":15: secrets", "'HF TOKEN' is no variable's name"),
        (("[HF_TOKEN]", "HF_TOKEN"), ":15: secrets", "expects a list of texts"),
    ],
)
def test_what_is_wrong_with_a_job(tmp_path, changes, place, problem):
    path = tmp_path / "job.yaml"
    path.write_text(JOB.replace(*changes))
    with pytest.raises(ConfigError) as error:
        read_job(str(path))
    (line,) = error.value.problems
    assert line.startswith(f"{path}{place}: ") and problem in line


def test_what_a_scheduler_misses(tmp_path):
    (tmp_path / "job.yaml").write_text("name: a\nconfig: b\ngpus: 1\nsecrets: [T]\nk8s: {claim: c, queu: d}\n")
    job = read_job(str(tmp_path / "job.yaml"))
    with pytest.raises(ConfigError) as error:
        RENDER["k8s"](job)
    assert len(error.value.problems) == 4
    with pytest.raises(ConfigError, match="gpu_type"):
        RENDER["sky"](job)


def test_one_scheduler_is_asked_for(tmp_path, capsys):
    assert main(["launch", "job.yaml"]) == 2
    assert capsys.readouterr().err.startswith("tutti: error: launch: takes JOB.yaml and one of --slurm, --k8s, --sky")
    assert main(["launch", "job.yaml", "--sky", "--k8s"]) == 2


def test_the_page_shows_what_is_printed(tmp_path):
    """The YAML in docs/cluster.md is valid, and each file shown there is what it renders to."""
    page = (Path(__file__).parents[2] / "docs/cluster.md").read_text()
    blocks = re.findall(r"```(yaml|bash)\n(.*?)```", page, re.DOTALL)
    (tmp_path / "job.yaml").write_text(blocks[0][1])
    job = read_job(str(tmp_path / "job.yaml"))
    for kind, (_, shown) in zip(RENDER, blocks[1:], strict=True):
        assert shown == RENDER[kind](job), kind
