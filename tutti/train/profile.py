"""torch's profiler over the steps [train.profile_start_step, train.profile_end_step), as Chrome traces.

    with make_profiler(config.train, world, start_step=step) as profiler:
        for ...:
            one training step
            profiler.step()

Steps are numbered from 1, as in metrics.jsonl. The profiler is set up one step before the first profiled one (if this
process runs it), so that the set-up is not measured. In the trace each step is a span named `ProfilerStep#<step>`,
which viewers recognize. Each rank writes rank<r>_steps<first>-<last>.json to train.profile_trace_dir when the last
profiled step, or training, ends. Open it with chrome://tracing or Perfetto.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Protocol

import torch
from torch.profiler import ProfilerActivity, record_function

from tutti.config import TrainConfig
from tutti.core.dist import World

log = logging.getLogger(__name__)


class Profiler(Protocol):
    """A context manager whose `step` is called after every training step."""

    def __enter__(self) -> Profiler: ...
    def __exit__(self, *_: object) -> None: ...
    def step(self) -> None: ...


def make_profiler(train: TrainConfig, world: World, *, start_step: int = 0) -> Profiler:
    """The profiler that `train.profile_*` describe for this rank, or one that does nothing.

    start_step: the step that training resumes from. ValueError: [start, end) contains no step.
    """
    if not train.enable_profiling:
        return _NoProfiler()
    if train.profile_end_step <= max(1, train.profile_start_step):
        raise ValueError(
            f"train.profile_end_step ({train.profile_end_step}) must be above train.profile_start_step "
            f"({train.profile_start_step}) and 1: the steps [start, end) are profiled, and the first step is 1"
        )
    if start_step + 1 >= train.profile_end_step:
        log.warning(
            "train.enable_profiling has no effect: training goes on after step %d, and train.profile_end_step is %d",
            start_step,
            train.profile_end_step,
        )
        return _NoProfiler()
    if train.profile_rank0_only and not world.is_main:
        return _NoProfiler()
    return _TorchProfiler(train, world, start_step)


class _NoProfiler:
    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def step(self) -> None:
        pass


class _TorchProfiler:
    """Profiles the requested steps. `_next` is the step that runs next."""

    def __init__(self, train: TrainConfig, world: World, start_step: int) -> None:
        self._next = start_step + 1
        self._first = max(self._next, train.profile_start_step)
        self._last = train.profile_end_step - 1
        self._folder, self._rank = Path(train.profile_trace_dir), world.rank
        self._span: record_function | None = None
        self._prepared = False
        activities = [ProfilerActivity.CPU]
        if world.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profile = torch.profiler.profile(
            activities=activities,
            record_shapes=train.profile_record_shapes,
            profile_memory=train.profile_profile_memory,
            with_stack=train.profile_with_stack,
        )

    def __enter__(self) -> Profiler:
        self._begin_step()
        return self

    def step(self) -> None:
        self._end_step()
        self._next += 1
        self._begin_step()

    def __exit__(self, *raised: object) -> None:
        if raised[0] is None and self._next <= self._first:
            log.warning(
                "train.enable_profiling had no effect: training ended before step %d (train.profile_start_step)",
                self._first,
            )
        self._end_step(leaving=True)

    def _begin_step(self) -> None:
        if not self._prepared and self._first - 1 <= self._next <= self._last:
            self._profile.prepare_trace()
            self._prepared = True
        if self._next == self._first:
            self._profile.start_trace()
        if self._first <= self._next <= self._last:
            self._span = record_function(f"ProfilerStep#{self._next}")
            self._span.__enter__()

    def _end_step(self, *, leaving: bool = False) -> None:
        if self._span is None:
            return
        self._span.__exit__(None, None, None)
        self._span = None
        if leaving or self._next == self._last:
            self._profile.stop_trace()
            # A step that was interrupted is incomplete, but the ones before it are worth keeping.
            last = self._next if not leaving else max(self._first, self._next - 1)
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / f"rank{self._rank}_steps{self._first}-{last}.json"
            self._profile.export_chrome_trace(str(path))
            log.info("profiled steps %d to %d: %s", self._first, last, path)
