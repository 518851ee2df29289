"""Processes that train as the ranks of a layout and count the data that they send.

A job runs a configuration with the building blocks of `tutti train`, without logs and checkpoints: warm-up steps, in
the last of which communication is counted, then timed steps between barriers. Each job has its own processes, forked
from a server that has imported torch and transformers but never computed anything.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import wait
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ByAxis = dict[str, tuple[float, float]]
"""Bytes and messages of one step by axis of the mesh."""


@dataclass(frozen=True)
class Job:
    """arguments: the configuration, by dotted names. warmup: number of untimed steps, at least one, before the `steps`
    timed ones. threads: per rank, of which there are `world`."""

    arguments: dict[str, Any]
    world: int
    warmup: int
    steps: int
    threads: int = 1


@dataclass(frozen=True)
class Report:
    """One rank's seconds per timed step, tokens per step over all ranks, data sent in one step, and loss."""

    seconds: list[float]
    tokens: int
    sent: ByAxis
    loss: float


_PRELOAD = ["tutti.train.run", "tutti.train.step", "tutti.check.comm_volume", "bench._ranks"]


def run(job: Job) -> list[Report]:
    """The reports of all ranks, in rank order. Exits the program if a rank fails."""
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    with TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(job.world):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_report, args=(theirs, job, rank, folder), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            return _collect(job, pipes)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(job: Job, pipes: list[Any]) -> list[Report]:
    reports: dict[int, Report] = {}
    while len(reports) < len(pipes):
        for pipe in wait([pipe for rank, pipe in enumerate(pipes) if rank not in reports]):
            rank = pipes.index(pipe)
            try:
                received: Any = pipes[rank].recv()
            except EOFError:
                received = "it died"
            if isinstance(received, str):
                sys.exit(f"rank {rank} of {job.world} failed with {job.arguments}:\n{received}")
            reports[rank] = received
    return [reports[rank] for rank in range(len(pipes))]


def _report(pipe: Any, job: Job, rank: int, folder: str) -> None:
    try:
        pipe.send(_run(job, rank, Path(folder)))
    except BaseException:
        pipe.send(traceback.format_exc())


def _run(job: Job, rank: int, folder: Path) -> Report:
    import logging

    import torch
    import torch.distributed as dist

    from tutti.check.comm_volume import count_traffic
    from tutti.config.layout import resolve_sizes
    from tutti.config.load import from_dict
    from tutti.core.compute_dtype import settle_compute_dtype
    from tutti.core.dist import init_world, shutdown_world
    from tutti.train.optim import build_optimizer, set_lr
    from tutti.train.placement import load_parameters, make_executor
    from tutti.train.process import prepare_process
    from tutti.train.run import assemble
    from tutti.train.step import Totals, TrainStep

    logging.disable(logging.WARNING)
    torch.set_num_threads(job.threads)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(job.world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(job.world))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=job.world)
    tree: dict[str, Any] = {}
    for name, value in job.arguments.items():
        group, _, leaf = name.partition(".")
        tree.setdefault(group, {})[leaf] = value
    config = resolve_sizes(from_dict(tree), job.world)
    ranks = init_world(prepare_process(config))
    try:
        config = settle_compute_dtype(config, ranks)
        run = assemble(config, ranks)
        placed, objective = run.placed, run.placed.objective
        load_parameters(config, placed, run.mesh, ranks)
        executor = make_executor(config.train, placed, run.mesh, ranks.device)
        optimizer = build_optimizer(placed.model, config, is_complete=placed.is_complete)
        set_lr(optimizer, config.train.lr)
        trainer = TrainStep(objective, optimizer, executor, run.mesh, config.train.max_grad_norm)
        totals = Totals.zero(objective.sizes, ranks.device)
        batches = iter(run.data.train())
        for batch in islice(batches, job.warmup - 1):
            trainer.step(batch, totals)
        with count_traffic(run.mesh) as traffic:
            trainer.step(next(batches), totals)
        seconds, tokens = [], 0
        for batch in islice(batches, job.steps):
            ranks.barrier()
            start = time.perf_counter()
            trainer.step(batch, totals)
            ranks.barrier()
            seconds.append(time.perf_counter() - start)
            tokens = batch.num_tokens
        assert len(seconds) == job.steps, "the data is too short"
        sent = {axis: (float(sent.bytes), float(sent.messages)) for axis, sent in traffic.sent.items()}
        return Report(seconds, tokens, sent, totals.reduce(ranks).sums["loss"] / totals.num_targets)
    finally:
        shutdown_world()
