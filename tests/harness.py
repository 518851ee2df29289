"""Run a test's function on several ranks: real processes, gloo, one thread each.

The processes are forked from a server that has already imported torch and transformers but never run a parallel region,
so starting a rank takes milliseconds, and OpenMP is safe after the fork. A process group has three threads and a layout
about fifteen groups, so a function that trains several layouts calls `regroup` before each.
"""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any

PRELOAD = [
    "torch",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "transformers",
    "tests.preload",
]

_generation = itertools.count()
"""Numbers consecutive process groups."""

DIED = "died"

MAX_THREADS = 120
"""Maximum threads of a rank when its function has ended: those of one layout's groups, and autograd's."""


def run_ranks(world: int, function: Callable[..., Any], *args: Any, timeout: float = 240) -> list[Any]:
    """`function(*args)` on `world` ranks in a gloo group; each rank's return value, in rank order.

    `function` is a module's own (picklable) function. It runs with RANK, WORLD_SIZE and LOCAL_RANK set and the group
    initialised; `tutti.core.dist.init_world` joins it. The first rank to fail fails the test with its traceback.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(world):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_rank, args=(sender, rank, world, folder, function, args), daemon=True)
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        try:
            return _collect(pipes, timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()


def regroup() -> None:
    """Within `run_ranks`: destroy all process groups with their threads, and create a new one of the same ranks."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

    from tutti.core.dist import shutdown_world

    if dist.is_initialized():
        dist.barrier()  # another rank may still be about to connect
    shutdown_world()
    gc.collect()
    for mesh in [item for item in gc.get_objects() if type(item) is DeviceMesh]:
        getattr(mesh, "_pg_registry", {}).clear()  # caches of DTensor hold meshes, and these their groups
    _join()


def num_threads() -> int:
    """The threads of this process, those of C++ too."""
    return len(os.listdir("/proc/self/task"))


def _collect(pipes: list, timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in results}
        ready = wait(list(waiting), timeout)
        if not ready:
            raise TimeoutError(f"ranks {sorted(waiting.values())} did not finish in {timeout} s")
        received = [(waiting[pipe], _receive(pipe)) for pipe in ready]
        # A rank that died comes first: others fail because of it.
        for rank, (ok, value) in sorted(received, key=lambda item: item[1][1] is not DIED):
            if value is DIED:
                raise AssertionError(f"rank {rank} {DIED}")
            if not ok:
                raise AssertionError(f"rank {rank} failed:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _receive(pipe: Any) -> tuple[bool, Any]:
    """True and what a rank returned, or False and why there is nothing."""
    try:
        return pipe.recv()
    except EOFError:
        return False, DIED


def _rank(sender: Any, rank: int, world: int, folder: str, function: Callable[..., Any], args: tuple) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world),
        OMP_NUM_THREADS="1",
        STORE=folder,
    )
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        if os.environ.get("PRETEND_ACCELERATOR"):
            from tests.accelerator import pretend_accelerator

            pretend_accelerator()
        _join()
        result = function(*args)
        gc.collect()
        threads = num_threads()
        assert threads <= MAX_THREADS, f"{threads} threads: groups that were done with have not been ended"
        if dist.is_initialized():
            dist.barrier()
        sender.send((True, result))
    except BaseException:
        sender.send((False, traceback.format_exc()))
    finally:
        sender.close()
        os._exit(0)


def _join() -> None:
    """Create the next process group of the ranks that the environment describes."""
    import torch.distributed as dist

    place = f"file://{os.environ['STORE']}/{next(_generation)}"
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    backend = os.environ.get("TEST_BACKEND", "gloo")
    dist.init_process_group(backend, init_method=place, rank=rank, world_size=world)
