"""The run: everything that `tutti train` does, in the order in which it happens.

configuration -> process group -> mesh -> model on the meta device -> data -> parallelize -> weights -> optimizer ->
checkpoint -> loop. What can be wrong with the user's input is looked at before anything costly, on all ranks. State is
passed along as arguments; what runs (which kernel, which layout) was decided when the parts were built.
"""

from __future__ import annotations

import gc
import logging
from functools import partial
from pathlib import Path

import torch

from tutti.checkpoint.adapter import base_of, require_base
from tutti.checkpoint.export import export_trained
from tutti.checkpoint.manager import Checkpointer
from tutti.config import Config
from tutti.core.batch import GlobalBatch
from tutti.core.dist import World, init_world, shutdown_world
from tutti.model.lora import lora_of, require_gradients
from tutti.train.evaluate import evaluate
from tutti.train.logging.metrics import Metrics
from tutti.train.logging.step_logger import Reporter
from tutti.train.lr_schedule import learning_rate
from tutti.train.optim import build_optimizer, set_lr
from tutti.train.output import begin_run, claim_output
from tutti.train.profile import make_profiler
from tutti.train.samples import Samples
from tutti.train.setup import Parts, assemble, load_parameters, prepare_process
from tutti.train.stages import make_executor
from tutti.train.step import TrainStep
from tutti.train.stop import StopSignal
from tutti.train.tasks.reference import make_reference

log = logging.getLogger(__name__)


def train(config: Config) -> None:
    """Train as `config` says, on this rank; every rank of the job calls it.

    ValueError and OSError: what the user can mend, the same on every rank. SIGTERM and SIGINT end the run normally
    once a checkpoint is saved.
    """
    world = init_world(prepare_process(config))
    output = Path(config.train.output_dir or "")
    try:
        with claim_output(output, world, fresh=config.train.load_checkpoint_path is None):
            _run(config, world)
    finally:
        shutdown_world()


def _run(config: Config, world: World) -> None:
    output = Path(config.train.output_dir or "")
    parts = assemble(config, world)
    samples = world.run_on_all_ranks(lambda: Samples(config, parts))
    load_parameters(config, parts, world)
    executor = make_executor(config.train, parts.objective, parts.mesh, parts.pipeline, world.device)
    with_reference = make_reference(config, parts, executor, world)
    optimizer = build_optimizer(parts.model, config, whole=parts.whole is None)
    checkpoints = Checkpointer(
        output,
        world,
        save_async=config.train.save_async,
        max_checkpoints=config.train.max_checkpoints,
        facts=parts.facts(config),
        documents=parts.documents(config),
    )
    state = checkpoints.resume(config.train.load_checkpoint_path, parts.model, optimizer)
    step = state["step"] if state else 0
    base = base_of(config, world)
    if state:
        require_base(state.get("base"), base)
        parts.data.load_state_dict(state["data"])
    trainer = TrainStep(
        parts.objective,
        optimizer,
        executor,
        parts.mesh,
        config.train.max_grad_norm,
        inspect_gradients=partial(require_gradients, parts.model, world),
    )
    # From here on the output folder is this run's: all that it was given is good.
    branch = begin_run(config, output, checkpoints, world)
    run_info = parts.describe(world) | {"branch": branch}
    with (
        checkpoints,
        Metrics(config, world, total_steps=parts.data.total_steps, run_info=run_info, start_step=step) as metrics,
        make_profiler(config.train, world, start_step=step) as profiler,
        StopSignal(world) as stop,
    ):
        report = Reporter(config, parts, world, metrics)
        report.load_state_dict(state.get("totals", {}) if state else {})
        for batch in with_reference(report.clock.waiting(parts.data.train()), "train"):
            step = batch.step
            set_lr(optimizer, learning_rate(step - 1, parts.data.total_steps, config.train))
            trainer.step(batch, report.totals)
            report.after_step(batch, optimizer.param_groups[0]["lr"])
            profiler.step()
            housekeeping(step, config)
            report.clock.pause()
            if config.data.eval_path and due(batch, config.train.eval_steps, config.train.eval_epochs):
                held_out = with_reference(parts.data.evaluate(), "eval")
                found = evaluate(parts.objective, held_out, executor, world)
                metrics.log_eval({"step": step, **found})
                samples.show(step, metrics, executor, world)
            stopping = stop.requested()
            if stopping or due(batch, config.train.save_steps, config.train.save_epochs):
                state = {"step": step, "epoch": batch.epoch, "data": parts.data.state_dict(), "base": base}
                state["totals"] = report.state_dict()
                checkpoints.save(step, parts.model, optimizer, state)
            if due(batch, config.train.hf_save_steps, config.train.hf_save_epochs):
                _export(config, parts, output / "hf" / f"global_step_{step}", world)
            if stopping:
                break
            report.clock.go_on()
        checkpoints.wait()
        if step < parts.data.total_steps:
            metrics.close({"status": "stopped", "message": f"asked to stop after step {step}"})
            log.info("stopped after step %d; go on with --train.load_checkpoint_path auto", step)
            return
        samples.show(step, metrics, executor, world)
        if config.train.save_hf_weights:
            _export(config, parts, output / "hf" / "final", world)
        metrics.close({"status": "finished", "data": parts.data.report})
    log.info("report: %s", output / "report.html")


def due(batch: GlobalBatch, steps: int, epochs: int) -> bool:
    """Whether something that happens every `steps` steps or `epochs` epochs (0: never) happens after `batch`."""
    by_step = steps > 0 and batch.step % steps == 0
    return by_step or (epochs > 0 and batch.epoch_end and (batch.epoch + 1) % epochs == 0)


def housekeeping(step: int, config: Config) -> None:
    """Collect garbage and empty the device's cache when it is time, which is at the same step on all ranks."""
    if config.train.gc_steps > 0 and step % config.train.gc_steps == 0:
        gc.collect()
    empty_every = config.train.empty_cache_steps if torch.accelerator.is_available() else 0
    if empty_every > 0 and step % empty_every == 0:
        torch.accelerator.empty_cache()


def _export(config: Config, parts: Parts, folder: Path, world: World) -> None:
    export_trained(config, parts.model, parts.tokenizer, folder, world, whole=parts.whole)
    log.info("wrote the %s to %s", "model" if lora_of(parts.model) is None else "adapter", folder)
