"""From totals to metrics records: reads the device's totals every train.log_steps steps."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tutti.config.nouns import counted
from tutti.core.batch import GlobalBatch
from tutti.core.device import memory_gib, peak_flops
from tutti.model.experts import ExpertLoad
from tutti.train.logging.metrics import Metrics
from tutti.train.run_parts import Run
from tutti.train.step import Reduced, Totals, losses_by_source

log = logging.getLogger(__name__)


class Clock:
    """Measures training time since the last lap, without evaluations and saves, and the time spent waiting for data."""

    def __init__(self) -> None:
        self._running_since: float | None = time.perf_counter()
        self._seconds = self._waited = 0.0

    def pause(self) -> None:
        if self._running_since is not None:
            self._seconds += time.perf_counter() - self._running_since
        self._running_since = None

    def go_on(self) -> None:
        self._running_since = time.perf_counter()

    def waiting(self, batches: Iterable[GlobalBatch]) -> Iterator[GlobalBatch]:
        """Yield the batches, counting the time it takes to get each one."""
        iterator = iter(batches)
        while True:
            start = time.perf_counter()
            batch = next(iterator, None)
            self._waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def state(self) -> tuple[float, float]:
        """Returns (seconds, seconds waited for data) since the last lap, without starting another."""
        running = self._running_since is not None
        self.pause()
        if running:
            self.go_on()
        return self._seconds, self._waited

    def go_back(self, seconds: float, waited: float) -> None:
        """Add these seconds to this lap."""
        self._seconds += seconds
        self._waited += waited

    def lap(self) -> tuple[float, float]:
        """Returns (seconds, seconds waited for data) since the last lap, and starts another."""
        self.pause()
        result = self._seconds, self._waited
        self._seconds = self._waited = 0.0
        self.go_on()
        return result


class StepLogger:
    """Holds the totals of the steps since the last metrics record, and writes the record when it is due."""

    def __init__(self, run: Run, metrics: Metrics) -> None:
        self._run, self._config, self._world, self._metrics = run, run.config, run.world, metrics
        measured = peak_flops(run.world.device) if run.world.is_main else 0.0
        self._peak = run.world.size * run.world.broadcast(measured)
        self._expert_load = ExpertLoad(
            run.placed.objective,
            run.placed.structure.experts,
            run.mesh,
            run.world.device,
            by_sample=run.config.train.enable_batch_invariant_mode,
        )
        self.clock = Clock()
        self.totals = self._fresh()

    def _fresh(self) -> Totals:
        return Totals.zero(self._run.placed.objective.sizes, self._world.device)

    def state_dict(self) -> dict[str, Any]:
        """The totals since the last metrics record, as plain data, the same on every rank. A collective call."""
        return {"clock": self._world.broadcast(self.clock.state()), **self.totals.state_dict(self._world)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the totals in `state`."""
        self.clock.go_back(*state["clock"])
        self.totals.load_state_dict(state, self._world)

    def after_step(self, batch: GlobalBatch, lr: float) -> None:
        """Write the record if one is due after `batch`. ValueError: training has broken down."""
        if batch.step % self._config.train.log_steps and not batch.epoch_end:
            return
        totals, reduced = self.totals, self.totals.reduce(self._world)
        seconds, waited = self.clock.lap()
        record: dict[str, Any] = {
            "step": batch.step,
            "epoch": batch.epoch,
            "loss": reduced.sums["loss"] / totals.num_targets,
            "grad_norm": reduced.grad_norm,
            "lr": lr,
            "tokens": totals.num_tokens,
            "trained_tokens": totals.trained_tokens,
            "samples": totals.num_samples,
            "step_seconds": seconds / totals.num_steps,
            "data_seconds": waited / totals.num_steps,
            "tokens_per_second": totals.num_tokens / seconds,
            "mfu": self._mfu(reduced.flops, seconds),
            "memory_gib": memory_gib(self._world.device),
            "packing": totals.num_tokens / totals.num_slots,
        }
        record |= self._by_source(reduced) | self._expert_load.take()
        record |= self._run.placed.objective.task.metrics(reduced.sums, totals.num_targets)
        if router_loss := reduced.sums.get("router_loss"):
            record["router_loss"] = router_loss / totals.num_tokens
        steps = counted(totals.num_steps, "step")
        if reduced.spikes:
            record["spikes"] = reduced.spikes
            log.warning("step %d: %d of the last %s were spikes", batch.step, reduced.spikes, steps)
        if reduced.skipped:
            record["skipped_steps"] = reduced.skipped
            log.warning("step %d: %d of the last %s skipped", batch.step, reduced.skipped, steps)
        self._metrics.log_step(record)
        if (skips := reduced.consecutive_skips) > self._config.train.max_nonfinite_steps:
            raise ValueError(
                f"the gradient was not finite for the last {counted(skips, 'step')} and nothing was learned "
                "from them: lower train.lr, raise train.lr_warmup_ratio, or look at the data of these steps"
            )
        self.totals = self._fresh()
        self.totals.consecutive_skips = totals.consecutive_skips

    def _mfu(self, flops: float, seconds: float) -> float:
        """The model's operations as a share of what all ranks' devices can do in that time."""
        rate = flops / seconds
        if rate > self._peak:
            log.warning(
                "training reached %.4g GFLOP/s, more than the %.4g that matrix products reached before it, when the "
                "machine must have been busy: mfu is against the former from now on",
                rate / 1e9,
                self._peak / 1e9,
            )
            self._peak = rate
        return rate / self._peak

    def _by_source(self, reduced: Reduced) -> dict[str, float]:
        """Loss and tokens of each source, if there are several, or the user has named the only one."""
        names, tokens, targets = self._run.data.sources, self.totals.source_tokens, self.totals.source_targets
        if len(names) == 1:
            label = self._config.data.source_name
            return (
                {
                    f"source_tokens/{label}": tokens[names[0]],
                    f"source_loss/{label}": reduced.sums["loss"] / self.totals.num_targets,
                }
                if label
                else {}
            )
        record: dict[str, float] = {f"source_tokens/{name}": tokens[name] for name in names}
        losses = losses_by_source(reduced.sums["source_loss"], {name: targets[name] for name in names})
        return record | {f"source_loss/{name}": loss for name, loss in losses.items()}
