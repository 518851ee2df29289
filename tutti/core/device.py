"""The device: which one to compute on, how much memory it holds, how fast it multiplies matrices."""

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
    """The device to compute on: the accelerator if there is one, else the CPU, with a log line if that is a surprise.

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
    """True if work on `tensor` should suit an accelerator, rather than a CPU and its caches."""
    return _presumed or tensor.device.type != "cpu"


@contextmanager
def presume_accelerator() -> Iterator[None]:
    """Make `on_accelerator` hold for all tensors: of interest is what a run on an accelerator takes."""
    global _presumed
    before, _presumed = _presumed, True
    try:
        yield
    finally:
        _presumed = before


def limit_threads(local_world: int) -> None:
    """Share the machine's cores among its `local_world` ranks, unless OMP_NUM_THREADS says otherwise."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, num_cores() // local_world))


def memory_gib(device: torch.device) -> float:
    """Peak memory so far in GiB: allocated on the accelerator, or resident in this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def resident_bytes() -> int:
    """The memory that is resident in this process now (at its peak so far, where the kernel tells no more)."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return int(memory_gib(torch.device("cpu")) * 2**30)


def keep_freed_memory() -> None:
    """Make glibc keep the memory of freed tensors for the next ones, rather than give it back to the kernel.

    Large tensors are otherwise mapped anew each time, and a step on the CPU spends much of its time on page faults.
    Does nothing where the C library is another one.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)


_PRODUCTS = 256
"""Matrix products whose kernels are kept: those of a step of packed samples, which differ in length."""

KERNELS_BYTES = _PRODUCTS * 400 * 1024
"""The memory that so many kernels take: up to 0.6 MiB each of large matrices, 0.1 MiB of attention's small ones."""


def keep_few_kernels() -> None:
    """Make oneDNN, which multiplies matrices in bf16 on CPUs, keep `_PRODUCTS` kernels rather than its 1,024.

    It makes one for each shape that it meets, torch keeps a table of them, and packed batches bring new shapes at every
    step. To be called before the first product; the user's own settings stay.
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
"""Rows of the square matrices by which dtypes are compared: on one core, a product takes 0.2 to 11 ms."""


@cache
def product_rates(*dtypes: torch.dtype) -> dict[torch.dtype, float]:
    """Floating-point operations a second of matrix products on one core of this CPU, by dtype; takes 5 to 50 ms.

    The dtypes take turns and the best of ten products counts (of three where they are slow, since the first one sets
    up its kernel), so that other processes don't decide between them.
    """
    times: dict[torch.dtype, list[float]] = {dtype: [] for dtype in dtypes}
    with _threads(1):
        for _ in range(10):
            for dtype, taken in times.items():
                if len(taken) < 3 or sum(taken) < 10e-3:
                    taken.append(_seconds_of_product(_PROBE, dtype, torch.device("cpu")))
    return {dtype: 2 * _PROBE**3 / min(taken) for dtype, taken in times.items()}


def faster_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 or float32, whichever `device` multiplies matrices faster in."""
    if device.type == "cpu":
        rates = product_rates(torch.float32, torch.bfloat16)
        return max(rates, key=lambda dtype: rates[dtype])
    lacks_bf16 = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.float32 if lacks_bf16 else torch.bfloat16


def peak_flops(device: torch.device) -> float:
    """Floating-point operations a second that each rank of this machine can reach, in products of large matrices in
    the faster dtype. Call it on one rank while the others wait.

    Known GPUs: the data sheet's figure. Else measured, which takes some tenths of a second; on a CPU, on all the cores
    that the ranks' threads can have together.
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
    left, right = torch.ones(2, size, size, dtype=dtype, device=device)  # drawing at random would change the run
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
