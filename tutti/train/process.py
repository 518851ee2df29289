"""Set-up of a run's process before anything is built, and housekeeping between steps."""

from __future__ import annotations

import gc
import hashlib
import logging
import os

import torch
from transformers.utils.logging import disable_progress_bar

from tutti.config import ARGUMENTS, Config, get
from tutti.config.rules import warnings_on_cpu
from tutti.core.compat import untested
from tutti.core.device import keep_few_kernels, keep_freed_memory, limit_threads, pick_device
from tutti.core.dist import World
from tutti.core.files import close_new_files_to_others
from tutti.core.log import setup_logging

log = logging.getLogger(__name__)


def prepare_process(config: Config) -> torch.device:
    """Set up logging, file modes, threads, memory, seeds and determinism of this process; returns the device to compute
    on."""
    rank, local_world = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    setup_logging(rank)
    close_new_files_to_others()
    disable_progress_bar()
    limit_threads(local_world)
    keep_freed_memory()
    keep_few_kernels()
    if config.train.enable_full_determinism:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    if config.train.gc_steps > 0:
        gc.disable()
    # Dropout differs from rank to rank; nothing else draws from these generators.
    torch.manual_seed(config.train.seed + rank)
    device = pick_device(config.train.init_device)
    for problem in untested() if rank == 0 else ():
        log.warning("%s", problem)
    if device.type == "cpu" and rank == 0:
        for warning in warnings_on_cpu(config):
            log.warning("%s", warning)
    return device


def require_one_configuration(config: Config, world: World) -> None:
    """Raise ValueError on every rank if ranks were started with different arguments, since their weights would then
    diverge.

    Paths may differ between machines; only their presence is compared. A collective call.
    """
    given = {name: get(config, name) for name in ARGUMENTS}
    mine = {name: bool(value) if ARGUMENTS[name].path else repr(value) for name, value in given.items()}
    digest = hashlib.sha256(repr(mine).encode()).hexdigest()
    digests = world.gather(digest)
    odd = next((rank for rank, other in enumerate(digests) if other != digests[0]), None)
    if odd is None:
        return
    everyone = world.gather(mine)
    names = [name for name in ARGUMENTS if everyone[odd][name] != everyone[0][name]]
    shown = ", ".join(f"{name} {everyone[odd][name]} instead of {everyone[0][name]}" for name in names)

    def refuse() -> None:
        raise ValueError(f"rank {odd} was started with other arguments than rank 0 ({shown}): give all ranks the same")

    world.run_on_all_ranks(refuse)


def housekeeping(step: int, config: Config) -> None:
    """Collect garbage and empty the device's cache when due, at the same step on all ranks."""
    if config.train.gc_steps > 0 and step % config.train.gc_steps == 0:
        gc.collect()
    empty_every = config.train.empty_cache_steps if torch.accelerator.is_available() else 0
    if empty_every > 0 and step % empty_every == 0:
        torch.accelerator.empty_cache()
