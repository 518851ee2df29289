"""The device: which one to compute on, how much memory it holds, how fast it multiplies matrices."""

from __future__ import annotations

import ctypes
import logging
import os
import resource
import sys
import time

import torch

log = logging.getLogger(__name__)


def pick_device(init_device: str) -> torch.device:
    """Where to compute: the accelerator if this machine has one, else the CPU, with a log line if that is a surprise.

    `init_device` is `train.init_device`. `cpu` and `meta` say where the model is built, not where it runs.
    """
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        assert kind is not None
        if init_device in ("cuda", "npu") and init_device != kind.type:
            log.info("train.init_device is %s, but this machine has %s: building and running there", init_device, kind)
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


def keep_freed_memory() -> None:
    """Have glibc keep the memory of freed tensors for the next ones, rather than give it back to the kernel.

    Large tensors are otherwise mapped anew each time, and a step on the CPU spends much of its time on page faults.
    Does nothing where the C library is another one.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)


_PEAK_TFLOPS = {  # dense bf16, from the vendors' data sheets
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "B200": 2250.0,
    "A100": 312.0,
    "L40S": 362.0,
    "A10": 125.0,
    "4090": 165.0,
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Floating-point operations a second of one device in matrix products; None where it is not known.

    Known GPUs: the data sheet's figure for bf16. CPU: measured, which takes about a tenth of a second.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((peak * 1e12 for key, peak in _PEAK_TFLOPS.items() if key in name), None)
    if device.type != "cpu":
        return None
    size = 1536
    left, right = torch.ones(2, size, size, dtype=dtype)  # drawing at random would change the run
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
