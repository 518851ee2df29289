"""The device: which one to compute on, how much memory it has, how fast it multiplies matrices."""

from __future__ import annotations

import ctypes
import logging
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from tutti.core.launch import num_cores

log = logging.getLogger(__name__)


def pick_device(init_device: str) -> torch.device:
    """The device to compute on: the accelerator if there is one, else the CPU, with a log line if that is unexpected.

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


_presumed = False


def on_accelerator(tensor: Tensor) -> bool:
    """True if code should be optimized for an accelerator rather than for a CPU's caches."""
    return _presumed or tensor.device.type != "cpu"


@contextmanager
def presume_accelerator() -> Iterator[None]:
    """Make `on_accelerator` true for all tensors, to predict what a run on an accelerator takes."""
    global _presumed
    before, _presumed = _presumed, True
    try:
        yield
    finally:
        _presumed = before


def limit_threads(local_world: int) -> None:
    """Divide the machine's cores among its `local_world` ranks, unless OMP_NUM_THREADS is set."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, num_cores() // local_world))


def memory_gib(device: torch.device) -> float:
    """Peak memory so far in GiB: allocated on the accelerator, or resident in this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def resident_bytes() -> int:
    """Resident memory of this process in bytes (its peak, on kernels that report nothing else)."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return int(memory_gib(torch.device("cpu")) * 2**30)


def keep_freed_memory() -> None:
    """Make glibc keep the memory of freed tensors for reuse, rather than return it to the kernel.

    Otherwise large tensors are mapped again each time, and a step on the CPU spends much of its time on page faults.
    Does nothing with another C library.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)


_PRODUCTS = 256
"""Number of matrix product kernels to keep: those of a step of packed samples, whose lengths differ."""

KERNELS_BYTES = _PRODUCTS * 400 * 1024
"""Memory of that many kernels: up to 0.6 MiB each for large matrices, 0.1 MiB for attention's small ones."""


def keep_few_kernels() -> None:
    """Make oneDNN, which multiplies bf16 matrices on CPUs, keep `_PRODUCTS` kernels instead of 1,024.

    It compiles one for each shape, torch caches them, and packed batches bring new shapes at every step. Call this
    before the first product; the user's own settings take precedence.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(_PRODUCTS))


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

_PROBE = 256
"""Rows of the square matrices for comparing dtypes: on one core, a product takes 0.2 to 11 ms."""


@cache
def product_rates(*dtypes: torch.dtype) -> dict[torch.dtype, float]:
    """Floating-point operations per second of matrix products on one core of this CPU, by dtype; takes 5 to 50 ms.

    The dtypes alternate and the best of ten products counts (of three if they are slow, since the first one compiles
    the kernel), so that other processes do not affect the comparison.
    """
    times: dict[torch.dtype, list[float]] = {dtype: [] for dtype in dtypes}
    with _threads(1):
        for _ in range(10):
            for dtype, taken in times.items():
                if len(taken) < 3 or sum(taken) < 10e-3:
                    taken.append(_seconds_of_product(_PROBE, dtype, torch.device("cpu")))
    return {dtype: 2 * _PROBE**3 / min(taken) for dtype, taken in times.items()}


def faster_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 or float32, whichever has the faster matrix products on `device`."""
    if device.type == "cpu":
        rates = product_rates(torch.float32, torch.bfloat16)
        return max(rates, key=lambda dtype: rates[dtype])
    lacks_bf16 = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.float32 if lacks_bf16 else torch.bfloat16


def peak_flops(device: torch.device) -> float:
    """Floating-point operations per second that each rank of this machine can reach in products of large matrices in
    the faster dtype. Call it on one rank while the others wait.

    For known GPUs this is the data sheet's value. Otherwise it is measured, which takes some tenths of a second; on a
    CPU with all the cores that the ranks' threads share.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = next((peak for key, peak in _PEAK_TFLOPS.items() if key in name), None)
        if known is not None:
            return known * 1e12
    dtype = faster_dtype(device)
    sizes = (512, 1024) if device.type == "cpu" else (8192,)
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if device.type == "cpu" else 1
    with _threads(min(num_cores(), torch.get_num_threads() * sharing)):
        rates = [2 * size**3 / _seconds_of_product(size, dtype, device) for size in sizes for _ in range(4)]
    return max(rates) / sharing


def _seconds_of_product(size: int, dtype: torch.dtype, device: torch.device) -> float:
    left, right = torch.ones(2, size, size, dtype=dtype, device=device)  # random numbers would change the run
    _wait_for(device)
    start = time.perf_counter()
    left @ right
    _wait_for(device)
    return time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Compute with `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
