"""Experiment trackers: Weights & Biases, and those that accelerate supports (TensorBoard, MLflow, ...).

All of them get the records of metrics.jsonl, with the same names. None may break a run: missing packages are reported
before the run begins, and later failures are warnings. A service that fails several times in a row is no longer called,
so that a run does not wait for each of its time-outs.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from tutti.config import Config

log = logging.getLogger(__name__)

Record = Mapping[str, Any]

MAX_FAILURES = 3
"""Number of consecutive failures after which a tracker is no longer called."""

_PACKAGES = {"comet": "comet_ml"}
"""The names of a tracker's package, and of its class in accelerate, if they differ from its own."""


class Tracker(Protocol):
    """A service that receives a run's records; any of its methods may raise anything."""

    def record(self, record: Record) -> None: ...
    def text(self, record: Record) -> None: ...
    def close(self, summary: Record) -> None: ...


class GuardedTracker:
    """A sink that forwards everything to a tracker, and survives its failures. start: creates the tracker."""

    def __init__(self, name: str, start: Callable[[], Tracker]) -> None:
        self._name = name
        self._tracker: Tracker | None = None
        self._failures, self._warned = 0, False
        try:
            self._tracker = start()
        except Exception as error:
            log.warning("train.trackers: %s does not start, the run goes on without it: %s", name, _line(error))

    def step(self, record: Record) -> None:
        self._try(lambda tracker: tracker.record(record))

    evaluation = step

    def text(self, record: Record) -> None:
        self._try(lambda tracker: tracker.text(record))

    def close(self, summary: Record) -> None:
        self._try(lambda tracker: tracker.close(summary))

    def _try(self, action: Callable[[Tracker], None]) -> None:
        if self._tracker is None:
            return
        try:
            action(self._tracker)
            self._failures = 0
        except Exception as error:
            self._failures += 1
            if not self._warned:
                log.warning("train.trackers: %s fails, the run goes on: %s", self._name, _line(error))
                self._warned = True
            if self._failures == MAX_FAILURES:
                log.warning("train.trackers: %s failed %d times in a row and is left alone", self._name, MAX_FAILURES)
                self._tracker = None


def require_trackers(config: Config) -> None:
    """Raise ValueError unless the packages of all trackers in `config` are installed."""
    for name in tracker_names(config):
        if name != "wandb" and importlib.util.find_spec("accelerate") is None:
            raise ValueError('train.trackers needs the accelerate package: pip install "tutti-train[trackers]"')
        package = _PACKAGES.get(name, name)
        if importlib.util.find_spec(package) is None:
            argument = "train.use_wandb" if config.train.use_wandb and name == "wandb" else f"train.trackers: {name}"
            raise ValueError(f"{argument} needs the {package} package: pip install {package}, or leave it out")


def tracker_names(config: Config) -> list[str]:
    """The names of the trackers in `config`, each once."""
    return list(dict.fromkeys([*(["wandb"] if config.train.use_wandb else []), *config.train.trackers]))


def open_trackers(config: Config, folder: Path, run_info: Record, start_step: int) -> list[GuardedTracker]:
    """Start the trackers in `config`. folder: the run's. start_step: the step that it resumes from."""

    def starter(name: str) -> Callable[[], Tracker]:
        if name == "wandb":
            return lambda: _Wandb(config, folder, run_info)
        return lambda: _Accelerate(name, config, folder, start_step)

    return [GuardedTracker(name, starter(name)) for name in tracker_names(config)]


class _Accelerate:
    """One of accelerate's trackers, with project train.wandb_project, and run name train.wandb_name or the run's
    folder name."""

    def __init__(self, name: str, config: Config, folder: Path, start_step: int) -> None:
        import torch
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        # accelerate logs through a global state, which must not claim the device or the threads.
        threads = torch.get_num_threads()
        PartialState(cpu=True)
        torch.set_num_threads(threads)
        project, run = config.train.wandb_project, config.train.wandb_name or folder.absolute().name
        kind = LOGGER_TYPE_TO_CLASS[_PACKAGES.get(name, name)]
        self._tracker = kind(**_arguments(name, project, run, folder, start_step))
        self._tracker.main_process_only = False
        self._tracker.start()
        self._tracker.store_init_configuration(_flat(config))

    def record(self, record: Record) -> None:
        numbers = {key: value for key, value in record.items() if key != "step" and isinstance(value, (int, float))}
        self._tracker.log(numbers, step=record["step"])

    def text(self, record: Record) -> None:
        """Does nothing: texts are in the report, and few services have a place for them."""

    def close(self, summary: Record) -> None:
        self._tracker.finish()


def _arguments(name: str, project: str, run: str, folder: Path, start_step: int) -> dict[str, Any]:
    """The arguments of accelerate's class for a service, which name project and run differently."""
    if name == "tensorboard":
        again = {"purge_step": start_step + 1} if start_step else {}  # removes what an interrupted run wrote after it
        return {"run_name": run, "logging_dir": folder / "tensorboard", **again}
    if name == "aim":
        return {"run_name": run, "logging_dir": folder}
    if name == "mlflow":
        return {"experiment_name": project, "run_name": run}
    named: dict[str, dict[str, Any]] = {
        "trackio": {"name": run},
        "swanlab": {"experiment_name": run, "logdir": str(folder / "swanlab")},
        "clearml": {"task_name": run},
        "dvclive": {"dir": str(folder / "dvclive")},
    }
    return {"run_name": project, **named.get(name, {})}


def _flat(config: Config) -> dict[str, Any]:
    """The configuration by dotted names, as values that every service accepts."""
    values: dict[str, Any] = {}
    for group, tree in dataclasses.asdict(config).items():
        for leaf, value in tree.items() if isinstance(tree, dict) else ():
            if value is not None:
                values[f"{group}.{leaf}"] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return values


class _Wandb:
    """A Weights & Biases run, in `folder`/wandb; offline if there is no network or no login.

    Every row contains its `step`, which is the x axis of all charts. The service's own step only counts rows, so that a
    resumed run can go back to an earlier step: rows with a lower service step would be dropped.
    """

    def __init__(self, config: Config, folder: Path, run_info: Record) -> None:
        import wandb

        values = dataclasses.asdict(config)
        values.pop("explicit", None)
        train = config.train
        self._run = wandb.init(
            project=train.wandb_project,
            name=train.wandb_name,
            id=train.wandb_id,
            resume="allow" if train.wandb_id else None,
            dir=folder,
            config={**values, "run": {key: run_info[key] for key in ("model", "parameters") if key in run_info}},
            mode=_wandb_mode(),
            settings=wandb.Settings(console="off", silent=True),
        )
        self._run.define_metric("*", step_metric="step")
        self._texts: list[Record] = []

    def record(self, record: Record) -> None:
        self._log_texts()
        self._run.log({key: value for key, value in record.items() if value is not None})

    def text(self, record: Record) -> None:
        self._texts.append(record)

    def _log_texts(self) -> None:
        """Log the texts since the last record as a table."""
        import wandb

        if self._texts:
            table = wandb.Table(columns=["step", "prompt", "text", "right"])
            for text in self._texts:
                table.add_data(*(text[str(name)] for name in table.columns))
            self._run.log({"step": self._texts[-1]["step"], "texts": table})
            self._texts = []

    def close(self, summary: Record) -> None:
        self._log_texts()
        self._run.summary.update({key: value for key, value in summary.items() if value is not None})
        self._run.finish(exit_code=int(summary.get("status") == "failed"))


def _wandb_mode() -> Literal["offline"] | None:
    """The wandb mode: offline if its server cannot be reached or nobody is logged in; None leaves the choice to
    wandb."""
    import wandb

    if "WANDB_MODE" in os.environ:
        return None
    reason = _unreachable(wandb.setup().settings.base_url)
    if reason is None and not wandb.login(verify=False, prompt=False):
        reason = "nobody is logged in"
    if reason is None:
        return None
    log.info("wandb: %s, so the run is recorded offline (`wandb sync` uploads it later)", reason)
    return "offline"


def _unreachable(url: str) -> str | None:
    """The reason why `url` cannot be reached; None if anything answers."""
    import urllib.error
    import urllib.request

    try:
        urllib.request.urlopen(url, timeout=5).close()
    except urllib.error.HTTPError:
        return None
    except OSError as error:
        return f"{url} cannot be reached ({getattr(error, 'reason', error)})"
    return None


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
