"""What a run tells about itself: one record a step, sent to every place that shows it.

The loop hands plain dicts to `Metrics`, which passes them on to its *sinks*: metrics.jsonl (the record that everything
else can be made from), the progress line on the terminal, report.html, and Weights & Biases if asked for. A sink is
anything with the five methods of `Sink`. Rank 0 alone has sinks; on the other ranks every call does nothing.

A training record has `step, epoch, loss, grad_norm, lr, tokens, trained_tokens, samples, step_seconds,
tokens_per_second, mfu, memory_gib, packing`, with several sources `source_loss/<name>` and `source_tokens/<name>`, and
with experts `expert_load_max`, `expert_load_min` (as multiples of an even share) and maybe `router_loss`.
Where a record stands for several steps (train.log_steps), tokens, trained_tokens, samples and source_tokens are sums
over them and the rest are means, or the last value. mfu is the share that the model's operations are of what products
of large matrices reach on this device in the faster of bf16 and fp32. An evaluation record has `step, eval_loss,
eval_tokens`, with several sources `eval_source_loss/<name>`, and `eval_accuracy` for classification. Of pairs of
answers the losses are means over pairs, eval_accuracy is the share whose chosen answer wins, and a training record has
`rewards/chosen`, `rewards/rejected`, `rewards/margin` and `rewards/accuracy`. Either may hold more.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Protocol

from tutti.config import Config
from tutti.core.dist import World
from tutti.train.logging.console import Progress
from tutti.train.logging.history import METRICS, History, encode, read_history
from tutti.train.logging.html import Report

log = logging.getLogger(__name__)

Record = Mapping[str, Any]


class Sink(Protocol):
    """A place that shows a run."""

    def step(self, record: Record) -> None: ...
    def evaluation(self, record: Record) -> None: ...
    def text(self, record: Record) -> None: ...
    def close(self, summary: Record) -> None: ...


class Metrics:
    """The run's one outlet for figures; use it as a context manager, or call `close`.

    total_steps: of the whole run. start_step: the step that training goes on from; metrics.jsonl holds the steps up to
    it (see `tutti.train.output.begin_branch`). run_info: what the report shows beside the curves, all of
    it optional: `name`, `model` (one line), `parameters` (int), `trainable_parameters` (int), `device`, `layout` and
    `versions` (dicts of name to value), `data` (gives the data report as it is by now: a dict or dataclass),
    `steps_reason`, `branch` (a branch that was left at the start: `tutti.train.output.Branch`).
    Leaving the `with` block by an exception closes with the status `failed` and its message.
    """

    def __init__(
        self, config: Config, world: World, *, total_steps: int, run_info: dict[str, Any], start_step: int = 0
    ) -> None:
        if config.train.use_wandb and importlib.util.find_spec("wandb") is None:
            raise ValueError('train.use_wandb needs the wandb package: pip install "tutti[wandb]", or set it to false')
        self._sinks: list[Sink] = []
        self._closed = False
        if not world.is_main:
            return
        folder = Path(config.train.output_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        history = read_history(folder / METRICS)
        self._sinks = [
            _JsonLines(folder / METRICS, history),
            Progress(total_steps, start_step, history),
            Report(folder, history, config, total_steps=total_steps, run_info=run_info, start_step=start_step),
        ]
        if config.train.use_wandb:
            self._sinks.append(_Wandb(config, folder, run_info))

    def log_step(self, record: Record) -> None:
        """A training record."""
        record = _plain(record)
        for sink in self._sinks:
            sink.step(record)

    def log_eval(self, record: Record) -> None:
        """An evaluation record."""
        record = _plain(record)
        for sink in self._sinks:
            sink.evaluation(record)

    def log_text(self, step: int, prompt: str, text: str) -> None:
        """A text that the model generated after `step`."""
        for sink in self._sinks:
            sink.text({"step": step, "prompt": prompt, "text": text})

    def close(self, summary: Record) -> None:
        """Finish every sink, once; later calls do nothing.

        summary: `status` (finished, stopped or failed), `message` (why it stopped or failed), and any further figures
        to show.
        """
        if self._closed:
            return
        self._closed = True
        for sink in self._sinks:
            sink.close(summary)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            self.close({"status": "finished"})
        else:
            status = "failed" if isinstance(error, Exception) else "stopped"
            self.close({"status": status, "message": f"{type(error).__name__}: {error}"})


def _plain(record: Record) -> dict[str, Any]:
    """The record with plain numbers for those of numpy and torch."""
    return {key: value.item() if hasattr(value, "item") else value for key, value in record.items()}


class _JsonLines:
    """metrics.jsonl, flushed line by line; keeps `history`, which the other sinks read, up to date."""

    def __init__(self, path: Path, history: History) -> None:
        self._path, self._history = path, history
        self._file: IO[str] | None = None

    def step(self, record: Record) -> None:
        # Opened at the first record: a run that fails before it leaves no history for the next one to trip over.
        self._file = self._file or self._path.open("a", encoding="utf-8")
        self._file.write(encode(record) + "\n")
        self._file.flush()
        self._history.add(record)

    evaluation = step

    def text(self, record: Record) -> None:
        pass

    def close(self, summary: Record) -> None:
        if self._file is not None:
            self._file.close()


class _Wandb:
    """A Weights & Biases run, in `folder`/wandb; offline where there is no network or no login.

    Every row carries its `step`, which is the x axis of all charts. The service's own step only counts rows, so that
    a resumed run can go back to an earlier step: its rows are appended, where rows of a lower service step are dropped.
    """

    def __init__(self, config: Config, folder: Path, run_info: dict[str, Any]) -> None:
        import dataclasses

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

    def step(self, record: Record) -> None:
        self._log_texts()
        self._run.log({key: value for key, value in record.items() if value is not None})

    evaluation = step

    def text(self, record: Record) -> None:
        self._texts.append(record)

    def _log_texts(self) -> None:
        """Log the texts that have come since the last record, as a table."""
        import wandb

        if self._texts:
            table = wandb.Table(columns=["step", "prompt", "text"])
            for text in self._texts:
                table.add_data(text["step"], text["prompt"], text["text"])
            self._run.log({"step": self._texts[-1]["step"], "texts": table})
            self._texts = []

    def close(self, summary: Record) -> None:
        self._log_texts()
        self._run.summary.update({key: value for key, value in summary.items() if value is not None})
        self._run.finish(exit_code=int(summary.get("status") == "failed"))


def _wandb_mode() -> Literal["offline"] | None:
    """None leaves the choice to wandb; offline where its server cannot be reached or nobody is logged in."""
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
    """Why `url` cannot be reached, or None where anything answers."""
    import urllib.error
    import urllib.request

    try:
        urllib.request.urlopen(url, timeout=5).close()
    except urllib.error.HTTPError:
        return None
    except OSError as error:
        return f"{url} cannot be reached ({getattr(error, 'reason', error)})"
    return None
