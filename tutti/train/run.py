"""`tutti train`, from top to bottom.

configuration -> process group -> layout -> tokenizer and model (on the meta device) -> structure -> mesh -> data ->
task -> stages -> parallelize and weights -> executor -> optimizer -> checkpoint -> loop. Mistakes in the user's input
are looked for on all ranks before anything expensive starts. State is passed as arguments. Choices (which kernel, which
layout) are made once, when the parts are built.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from torch.optim import Optimizer

from tutti.checkpoint.adapter import base_of, require_base
from tutti.checkpoint.hub import with_local_paths
from tutti.checkpoint.manager import Checkpointer, preview_resume
from tutti.checkpoint.state import require_finite, trained_parts
from tutti.config import Config
from tutti.config.layout import fit
from tutti.config.nouns import counted
from tutti.config.rules import warnings_on_length
from tutti.core.batch import GlobalBatch
from tutti.core.compute_dtype import settle_compute_dtype
from tutti.core.dist import World, init_world, shutdown_world
from tutti.core.watchdog import Watchdog
from tutti.kinds import kind_of
from tutti.kinds.export import export_trained
from tutti.model.lora import lora_of, require_gradients
from tutti.parallel.mesh import build_mesh
from tutti.parallel.pipeline.executor import Executor
from tutti.train.ema import averaged, keep_average
from tutti.train.evaluate import evaluate
from tutti.train.inputs import open_data
from tutti.train.logging.metrics import Metrics
from tutti.train.logging.step_logger import StepLogger
from tutti.train.lr_schedule import learning_rate
from tutti.train.optim import build_optimizer, decay_groups, room_for_state, set_lr
from tutti.train.output import begin_run, claim_output
from tutti.train.placement import load_parameters, make_executor, place_model
from tutti.train.process import housekeeping, prepare_process, require_one_configuration
from tutti.train.profile import make_profiler
from tutti.train.run_parts import Run
from tutti.train.spike_guard import SpikeGuard
from tutti.train.step import TrainStep
from tutti.train.stop import EarlyStopping, StopSignal
from tutti.train.tasks import SampleDisplay, make_task

log = logging.getLogger(__name__)


def train(config: Config) -> None:
    """Train as `config` says, on this rank; every rank of the job calls it.

    ValueError and OSError: a mistake that the user can fix, the same on every rank. SIGTERM and SIGINT end the run
    normally after a checkpoint is saved.
    """
    world = init_world(prepare_process(config), timeout_seconds=config.train.hang_timeout)
    output = Path(config.train.output_dir or "")
    try:
        require_one_configuration(config, world)
        with claim_output(output, world, fresh=config.train.load_checkpoint_path is None):
            before = preview_resume(config.train.load_checkpoint_path, output).facts.get("compute_dtype")
            settled = settle_compute_dtype(config, world, before=before)
            _run(with_local_paths(settled, world), world, asked=config)
    finally:
        shutdown_world()


def assemble(config: Config, world: World) -> Run:
    """Build everything that `config` and its data describe, with parameters still on the meta device. A collective
    call.

    ValueError, on all ranks: the model's or the data's files are wrong, or do not fit the layout.
    """
    layout = fit(config, world.size)
    kind = kind_of(config)
    tokenizer, model = world.run_on_all_ranks(lambda: kind.build(config, world.device))
    structure = world.run_on_all_ranks(lambda: kind.inspect(config, layout, model))
    world.run_on_all_ranks(lambda: decay_groups(model, config.train))
    ddp = config.train.data_parallel_mode == "ddp"
    mesh = build_mesh(layout, world, ddp=ddp, ep_outside=config.train.ep_outside)
    inputs = world.run_on_all_ranks(lambda: kind.read_inputs(config, tokenizer, structure))
    data = open_data(config, inputs, model, world, mesh.dp_rank, mesh.dp_size)
    log.info("%s", data.steps_reason)
    for warning in warnings_on_length(config, data.total_steps) if world.is_main else ():
        log.warning("%s", warning)
    task = make_task(config, max(len(data.sources), len(data.evaluation_sources)))
    task.check(config, data)
    placed = place_model(config, model, structure, task, layout, mesh)
    return Run(config, world, layout, mesh, inputs, data, placed)


def _run(config: Config, world: World, *, asked: Config) -> None:
    """Train as `config` says. asked: the configuration before names were resolved to local paths and defaults to
    values, which is what checkpoints and config.yaml record."""
    output = Path(config.train.output_dir or "")
    run = assemble(config, world)
    data, placed, model, task = run.data, run.placed, run.placed.model, run.placed.objective.task
    samples = world.run_on_all_ranks(lambda: task.make_samples(run))
    load_parameters(config, placed, run.mesh, world)
    executor = make_executor(config.train, placed, run.mesh, world.device)
    prepare = task.prepare(run, executor)
    optimizer = build_optimizer(model, config, is_complete=placed.is_complete)
    keep_average(optimizer, config.train.ema_decay)
    checkpoints = _checkpointer(run, output, asked)
    state = checkpoints.resume(config.train.load_checkpoint_path, model, optimizer)
    step = state["step"] if state else 0
    base = base_of(config, world)
    if state:
        require_base(state.get("base"), base)
    guard, early = SpikeGuard(config.train, world), EarlyStopping(config.train)
    resumed: dict[str, Stateful] = {"data": data, "guard": guard, "early_stopping": early}
    load_states(resumed, state)
    if state and world.is_main:
        _say_what_is_left(step, data.total_steps, before=state.get("total_steps", data.total_steps))
    room = [] if state else room_for_state(optimizer)

    def inspect_gradients() -> None:
        require_gradients(model, world)
        room.clear()

    train_step = TrainStep(
        placed.objective,
        optimizer,
        executor,
        run.mesh,
        config.train.max_grad_norm,
        guard=guard,
        inspect_gradients=inspect_gradients,
    )
    # All input is valid; from here on the output folder belongs to this run.
    shown = replace(config, model=asked.model)  # the name of the model, not the local path
    run_info = run.describe() | {"branch": begin_run(asked, output, checkpoints, world)}
    with (
        checkpoints,
        Metrics(shown, world, total_steps=data.total_steps, run_info=run_info, start_step=step) as metrics,
        make_profiler(config.train, world, start_step=step) as profiler,
        StopSignal(world, checkpoints.has_failed) as stop,
        Watchdog(world, config.train.hang_timeout) as watchdog,
    ):
        logger = StepLogger(run, metrics)
        load_states({"totals": logger}, state)
        loop = _Loop(
            run, executor, optimizer, train_step, checkpoints, samples, prepare, logger, metrics, early, stop, watchdog,
            resumed=resumed | {"totals": logger}, base=base,
        )  # fmt: skip
        if not step:
            samples.show(step, metrics, executor)
        elif not (state or {}).get("evaluated", True) and loop.evaluate(step) is None:
            loop.end_stopped(step)
            return
        loop.run_from(step, profiler)


class Stateful(Protocol):
    """A part of a run whose state a checkpoint holds as plain data, the same on every rank."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class _Loop:
    """The loop over the steps of a run, and everything it uses.

    prepare: adds to batches what the task needs from another model. resumed: the parts whose state a checkpoint holds
    as plain data. base: identifies the base model of adapters.
    """

    run: Run
    executor: Executor
    optimizer: Optimizer
    train_step: TrainStep
    checkpoints: Checkpointer
    samples: SampleDisplay
    prepare: Callable[[Iterable[GlobalBatch], Literal["train", "eval"]], Iterator[GlobalBatch]]
    logger: StepLogger
    metrics: Metrics
    early: EarlyStopping
    stop: StopSignal
    watchdog: Watchdog
    resumed: Mapping[str, Stateful]
    base: dict[str, str] | None

    def run_from(self, step: int, profiler: Any) -> None:
        """Run the steps after `step` until the run ends or is asked to stop, with logging, evaluation, saving and
        exports."""
        config, data, early, logger = self.run.config, self.run.data, self.early, self.logger
        placed = self.run.placed
        batches = () if early.reason else self.prepare(logger.clock.waiting(data.train()), "train")
        is_evaluated = True
        for batch in self.watchdog.during(batches, "loading the next batch"):
            step = batch.step
            self.watchdog.enter(f"step {step}")
            rate = learning_rate(step - 1, data.total_steps, config.train)
            set_lr(self.optimizer, rate)
            self.train_step.step(batch, logger.totals)
            placed.objective.task.after_step(placed.model, batch, self.run.world)
            logger.after_step(batch, rate)
            profiler.step()
            housekeeping(step, config)
            logger.clock.pause()
            loss = None
            if config.data.eval_path and due(batch, config.train.eval_steps, config.train.eval_epochs):
                loss = self.evaluate(step)
                is_evaluated = loss is not None
            stopping = self.stop.requested() or early.reason is not None
            if stopping or due(batch, config.train.save_steps, config.train.save_epochs):
                self.save(batch, loss, is_evaluated)
            if due(batch, config.train.hf_save_steps, config.train.hf_save_epochs):
                self.export(f"global_step_{step}", step)
            if stopping:
                break
            logger.clock.go_on()
        self.watchdog.enter("the end of the last checkpoint")
        self.checkpoints.wait()
        data.close()
        if (step < data.total_steps and early.reason is None) or not is_evaluated:
            self.end_stopped(step)
            return
        self.show_samples(step)
        if config.train.save_hf_weights:
            self.export("final", step)
        self.metrics.close({"status": "finished", "message": early.reason})
        log.info("report: %s", Path(config.train.output_dir or "") / "report.html")

    def end_stopped(self, step: int) -> None:
        """End a run that was asked to stop after `step`."""
        self.metrics.close({"status": "stopped", "message": f"asked to stop after step {step}"})
        log.info("stopped after step %d; go on with --train.load_checkpoint_path auto", step)
        self.watchdog.enter("the wait for what other machines were told")
        self.stop.require_no_restart()

    def evaluate(self, step: int) -> float | None:
        """Evaluate after `step`. Returns the loss, or None if the run was asked to stop meanwhile."""
        batches = self.prepare(self.run.data.evaluate(), "eval")
        found = evaluate(
            self.run.placed.objective,
            self.watchdog.during(batches, f"the evaluation after step {step}"),
            self.executor,
            self.run.world,
            interrupted=self.stop.requested,
        )
        if found is None:
            return None
        self.metrics.log_eval({"step": step, **found})
        self.early.add(step, found["eval_loss"])
        self.show_samples(step)
        return found["eval_loss"]

    def show_samples(self, step: int) -> None:
        """Show the model's answers or pictures after `step`, using the averaged weights if there are any."""
        with averaged(self.run.placed.objective, self.optimizer):
            self.samples.show(step, self.metrics, self.executor)

    def save(self, batch: GlobalBatch, eval_loss: float | None, is_evaluated: bool) -> None:
        """Save a checkpoint after `batch`. is_evaluated: no evaluation that was due is still missing."""
        self.watchdog.enter(f"the checkpoint of step {batch.step}")
        state = {"step": batch.step, "epoch": batch.epoch, "base": self.base, "evaluated": is_evaluated}
        state["total_steps"] = self.run.data.total_steps
        state |= {name: part.state_dict() for name, part in self.resumed.items()}
        self.checkpoints.save(batch.step, self.run.placed.model, self.optimizer, state, eval_loss)

    def export(self, name: str, step: int) -> None:
        """Write the model after `step` as a Hugging Face folder of this name."""
        self.watchdog.enter(f"the export hf/{name}")
        run, placed = self.run, self.run.placed
        run.world.run_on_all_ranks(lambda: require_finite(trained_parts(placed.model, self.optimizer), step))
        folder = Path(run.config.train.output_dir or "") / "hf" / name
        tokenizer = run.inputs.processor or run.inputs.tokenizer
        with averaged(placed.objective, self.optimizer):
            export_trained(run.config, placed.model, tokenizer, folder, run.world, placed.full_model)
        log.info("wrote the %s to %s", "model" if lora_of(placed.model) is None else "adapter", folder)


def _checkpointer(run: Run, output: Path, asked: Config) -> Checkpointer:
    """The writer and reader of the run's checkpoints. A collective call."""
    train = run.config.train
    return Checkpointer(
        output,
        run.world,
        save_async=train.save_async,
        max_checkpoints=train.max_checkpoints,
        keep_best=train.keep_best,
        facts=run.facts(asked),
        documents=run.documents(asked),
    )


def _say_what_is_left(step: int, total: int, before: int) -> None:
    """Log that nothing is left to train after `step` of `total` steps, or that the run had `before` steps when it was
    saved."""
    if step >= total:
        log.info("nothing is left to train after step %d, which the checkpoint is of", step)
    elif total != before:
        log.warning(
            "the run has %s now, and had %d when the checkpoint was made: from step %d the learning rate "
            "follows the schedule of %d",
            counted(total, "step"), before, step + 1, total,
        )  # fmt: skip


def load_states(parts: Mapping[str, Stateful], state: Mapping[str, Any] | None) -> None:
    """Restore each of `parts` from a checkpoint's state; an older checkpoint may lack a part."""
    for name in parts.keys() & (state or {}).keys():
        parts[name].load_state_dict(state[name])  # type: ignore[index]  # None has no keys


def due(batch: GlobalBatch, steps: int, epochs: int) -> bool:
    """True if something that is due every `steps` steps or `epochs` epochs (0: never) is due after `batch`."""
    by_step = steps > 0 and batch.step % steps == 0
    return by_step or (epochs > 0 and batch.epoch_end and (batch.epoch + 1) % epochs == 0)
