"""Job files: a script for Slurm's sbatch, a TrainJob for Kubeflow Trainer (2.2 or later), a task for SkyPilot.

Each of them determines on the machines, with the scheduler's means, which machine is the first, and runs the command of
`tutti.cluster.job` on all of them.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Any

import yaml

from tutti.cluster.job import Job
from tutti.config import ConfigError

_HEAD = "# Made by `tutti launch --{}`; change the YAML that it was made from instead."


class _Dumper(yaml.SafeDumper):
    """Writes multi-line texts as blocks, and never uses aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def slurm(job: Job) -> str:
    """The script for `sbatch`, which runs one torchrun on each machine. job.slurm: further options of sbatch by their
    long names, such as `partition: gpu`; true for one without a value."""
    options: dict[str, Any] = {
        "job-name": job.name,
        "nodes": job.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": job.gpus or None,
        "cpus-per-task": job.cpus,
        "mem": job.memory_gib and f"{job.memory_gib}G",
        "time": job.time,
        "output": "%x-%j.out",
        "open-mode": "append",
        "requeue": True,
        "no-kill": True,  # torchrun handles a failed machine
        "signal": "TERM@180",  # before the time limit, so that the run is saved
        **job.slurm,
    }
    lines = ["#!/bin/bash", _HEAD.format("slurm")]
    lines += [
        f"#SBATCH --{name}" + ("" if value is True else f"={value}")
        for name, value in options.items()
        if value is not None and value is not False
    ]
    lines += ["set -euo pipefail", *(f': "${{{name}:?set it before sbatch}}"' for name in job.secrets)]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in job.env.items()]
    if job.workdir:
        lines.append(f"cd {shlex.quote(job.workdir)}")
    if job.setup:
        lines.append(job.setup.rstrip())
    command = job.torchrun("$TUTTI_HOST", "$((SLURM_NODEID == 0))")
    lines += [
        'TUTTI_HOST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)',
        "export TUTTI_HOST",
        f"exec srun --kill-on-bad-exit=0 bash -c {shlex.quote(f'exec {command}')}",
    ]
    return "\n".join(lines) + "\n"


def k8s(job: Job) -> str:
    """The TrainJob. job.k8s: `namespace`; `runtime`, the ClusterTrainingRuntime (torch-distributed); `secret`, the
    Secret that holds job.secrets by their names; `claim` and `mount`, a volume that all machines share and its path;
    `queue`, of Kueue. ConfigError: something is missing."""
    known = {"namespace", "runtime", "secret", "claim", "mount", "queue"}
    settings = dict(job.k8s)
    problems = [
        f"k8s.{name}: there is no such key; there are {', '.join(sorted(known))}" for name in {*settings} - known
    ]
    if job.image is None:
        problems.append("image: is required, since every machine is a container")
    if job.secrets and "secret" not in settings:
        problems.append("k8s.secret: is required with secrets, as the name of the Secret that holds them")
    if ("claim" in settings) != ("mount" in settings):
        problems.append("k8s.claim and k8s.mount belong together")
    if problems:
        raise ConfigError(problems)
    env: list[dict[str, Any]] = [{"name": name, "value": value} for name, value in job.env.items()]
    held = settings.get("secret")
    env += [{"name": name, "valueFrom": {"secretKeyRef": {"name": held, "key": name}}} for name in job.secrets]
    # Kubeflow's torch runtimes name the first machine in the variables of torchrun's own options.
    script = _script(job, job.torchrun("$PET_MASTER_ADDR", "$((PET_NODE_RANK == 0))"))
    resources = {
        "nvidia.com/gpu": job.gpus or None,
        "cpu": job.cpus and str(job.cpus),
        "memory": job.memory_gib and f"{job.memory_gib}Gi",
    }
    given = {name: value for name, value in resources.items() if value}
    trainer = {
        "image": job.image,
        "numNodes": job.num_nodes,
        "command": ["bash", "-c", script],
        "env": env or None,
        "resourcesPerNode": {"limits": given, "requests": given} if given else None,
    }
    spec: dict[str, Any] = {
        "runtimeRef": {"name": settings.get("runtime", "torch-distributed")},
        "trainer": {name: value for name, value in trainer.items() if value is not None},
    }
    if "claim" in settings:
        pod = {
            "containers": [{"name": "node", "volumeMounts": [{"name": "shared", "mountPath": settings["mount"]}]}],
            "volumes": [{"name": "shared", "persistentVolumeClaim": {"claimName": settings["claim"]}}],
        }
        jobs = [{"name": "node", "template": {"spec": {"template": {"spec": pod}}}}]
        patch = {"manager": "tutti.dev/launch", "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": jobs}}}}
        spec["runtimePatches"] = [patch]
    metadata: dict[str, Any] = {"name": job.name}
    if "namespace" in settings:
        metadata["namespace"] = settings["namespace"]
    if "queue" in settings:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": settings["queue"]}
    tree = {"apiVersion": "trainer.kubeflow.org/v1alpha1", "kind": "TrainJob", "metadata": metadata, "spec": spec}
    return _yaml("k8s", tree)


def sky(job: Job) -> str:
    """The task for `sky jobs launch`. job.sky: further entries of its resources, such as `infra: aws`."""
    if job.gpus and not job.gpu_type:
        raise ConfigError(["gpu_type: is required by SkyPilot with gpus, such as H100"])
    resources: dict[str, Any] = {
        "accelerators": f"{job.gpu_type}:{job.gpus}" if job.gpus else None,
        "cpus": job.cpus and f"{job.cpus}+",
        "memory": job.memory_gib and f"{job.memory_gib}+",
        "image_id": job.image and f"docker:{job.image}",
        # A preempted machine is replaced, and the run resumes from its newest checkpoint.
        "job_recovery": {"max_restarts_on_errors": job.restarts},
        **job.sky,
    }
    host = '$(echo "$SKYPILOT_NODE_IPS" | sed -n 1p)'
    tree = {
        "name": job.name,
        "num_nodes": job.num_nodes,
        "resources": {name: value for name, value in resources.items() if value is not None},
        "envs": dict(job.env) or None,
        "secrets": dict.fromkeys(job.secrets) or None,
        "setup": job.setup or None,
        "run": _script(
            job, job.torchrun("$TUTTI_HOST", "$((SKYPILOT_NODE_RANK == 0))"), f"TUTTI_HOST={host}", setup=False
        ),
    }
    return _yaml("sky", {name: value for name, value in tree.items() if value is not None})


RENDER: dict[str, Callable[[Job], str]] = {"slurm": slurm, "k8s": k8s, "sky": sky}


def _script(job: Job, command: str, *before: str, setup: bool = True) -> str:
    lines = ["set -euo pipefail", *before]
    if job.workdir:
        lines.append(f"cd {shlex.quote(job.workdir)}")
    if setup and job.setup:
        lines.append(job.setup.rstrip())
    return "\n".join([*lines, f"exec {command}"]) + "\n"


def _yaml(kind: str, tree: dict[str, Any]) -> str:
    return _HEAD.format(kind) + "\n" + yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=4096)
