"""The device: which one to compute on, how much memory it holds, how fast it multiplies matrices."""

from __future__ import annotations

import logging
import os
import resource
import sys

import torch

log = logging.getLogger(__name__)


def pick_device(init_device: str) -> torch.device:
    """Where to compute: the accelerator if this machine has one, else the CPU, with a log line if that is a surprise.

    `init_device` is `train.init_device`. `cpu` and `meta` say where the model is built, not where it runs.
    """
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        assert kind is not None
        return torch.device(kind.type)
    if init_device in ("cuda", "npu"):
        log.info(
            "train.init_device is %s, which this machine does not have: building and running on the CPU",
            init_device,
        )
    return torch.device("cpu")


def limit_threads(local_world: int) -> None:
    """Share the machine's cores among its `local_world` ranks, unless OMP_NUM_THREADS says otherwise."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world))


def memory_gib(device: torch.device) -> float:
    """Peak memory so far in GiB: allocated on the accelerator, or resident in this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
