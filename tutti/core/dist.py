"""This process among the others: ranks, the process group, and collectives over plain Python objects.

`World` is made once and passed along; there is no global state of ours. Outside torchrun it is one process with a
process group of one, so that the same code (FSDP2, DTensor, distributed checkpoints) runs on a laptop and on a cluster.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from tutti.core.files import describe_error


class OtherRankError(ValueError):
    """A user's mistake that another rank has found and reported; this rank ends silently."""

    reported = True


@dataclass(frozen=True)
class World:
    """rank, size: this process's index among all, and their number. local_rank: its index on this machine. device:
    where this rank computes. group: the process group of the collectives, which contains every rank; None is the
    default group."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    group: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value` (any picklable object), in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value` on every rank."""
        if self.size == 1:
            return value
        box = [value]
        device = self.device if self.device.type != "cpu" and self.group is None else None
        dist.broadcast_object_list(box, src=0, group=self.group, device=device)
        return box[0]

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(group=self.group)

    def on_own_group(self) -> World:
        """A copy with a gloo group of its own, whose collectives may run in another thread. Collective."""
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup)
        return replace(self, group=group)

    def run_on_all_ranks(self, action: Callable[[], Any]) -> Any:
        """Run `action` on every rank; if it raises on any, raise the first such rank's error on all of them.

        This keeps bad input from hanging a run: no rank enters a collective that a failed rank never joins. Every rank
        must call it, and `action` must not itself contain a collective that others may miss.
        """
        if self.size == 1:
            return action()
        result, error = None, None
        try:
            result = action()
        except Exception as caught:
            error = caught
        described = None if error is None else (isinstance(error, (ValueError, OSError)), describe_error(error))
        try:
            for rank, failed in enumerate(self.gather(described)):
                if failed is None:
                    continue
                if error is not None and rank == self.rank:
                    raise error
                is_users, message = failed
                raise OtherRankError(message) if is_users else RuntimeError(f"rank {rank}: {message}")
            return result
        finally:
            # Its traceback holds this frame: a cycle, with all that the frames hold (a loader's workers and queues,
            # which can't be ended in order by the garbage collector).
            del error


def init_world(device: torch.device, *, timeout_seconds: float = 0) -> World:
    """Join the process group that torchrun's environment describes, or create one of a single process.

    On CUDA, collectives over host tensors use gloo, the others NCCL. A collective fails after half an hour, and not
    earlier than a minute after `timeout_seconds`, when the watchdog has reported why. For its report, recent
    collectives are recorded (TORCH_FR_BUFFER_SIZE, how many).
    """
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    backend = {"cuda": "cpu:gloo,cuda:nccl", "npu": "cpu:gloo,npu:hccl"}.get(device.type, "gloo")
    if device.type != "cpu":
        device = torch.device(device.type, local_rank)
        torch.accelerator.set_device_index(local_rank)
    if not dist.is_initialized():
        timeout = datetime.timedelta(seconds=max(1800, timeout_seconds + 60))
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    return World(rank=rank, size=world, local_rank=local_rank, device=device)


def shutdown_world() -> None:
    """Leave the process group, if there is one, and destroy all others of this process."""
    if dist.is_initialized():
        from tutti.core.compat import clear_sharding_cache  # this import loads torch's compiler

        dist.destroy_process_group()
        # The cache refers to meshes of groups that have ended: it would keep their threads alive, and be used for
        # new groups.
        clear_sharding_cache()
