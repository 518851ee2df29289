"""Metrics of a run: one record per step, sent to every place that shows it.

The loop passes plain dicts to `Metrics`, which forwards them to its *sinks*: metrics.jsonl (from which everything else
can be made), the progress line on the terminal, report.html, and the requested services. A sink is anything with the
five methods of `Sink`. Only rank 0 has sinks; on other ranks every call does nothing.

A training record has `step, epoch, loss, grad_norm, lr, tokens, trained_tokens, samples, step_seconds,
tokens_per_second, mfu, memory_gib, packing`, with several sources `source_loss/<name>` and `source_tokens/<name>`, and
with experts `expert_load_max`, `expert_load_min` (as multiples of an even share) and possibly `router_loss`. If a
record covers several steps (train.log_steps), tokens, trained_tokens, samples and source_tokens are sums over them, and
the others are means, or the last value. mfu is the ratio of the model's operations to the rate that products of large
matrices reach on this device in the faster of bf16 and fp32. An evaluation record has `step, eval_loss, eval_tokens`,
with several sources `eval_source_loss/<name>`, and `eval_accuracy` for classification. For preference pairs the losses
are means over pairs, eval_accuracy is the share whose chosen answer wins, and a training record has `rewards/chosen`,
`rewards/rejected`, `rewards/margin` and `rewards/accuracy`. Records may have more fields. If prompts have an expected
answer (train.sample_prompts_path), a separate record has `step, sample_accuracy, sample_answers`: the share of right
answers, and the number of expected ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol

from tutti.config import Config
from tutti.core.dist import World
from tutti.train.logging.console import Progress
from tutti.train.logging.history import METRICS, History, encode, read_history
from tutti.train.logging.html import Report
from tutti.train.logging.trackers import open_trackers, require_trackers

Record = Mapping[str, Any]


class Sink(Protocol):
    """A place that shows a run."""

    def step(self, record: Record) -> None: ...
    def evaluation(self, record: Record) -> None: ...
    def text(self, record: Record) -> None: ...
    def close(self, summary: Record) -> None: ...


class Metrics:
    """Receives all metrics of a run; use it as a context manager, or call `close`.

    total_steps: of the whole run. start_step: the step that training resumes from; metrics.jsonl contains the steps up
    to it (see `tutti.train.output.begin_branch`). run_info: what the report shows next to the curves, all optional:
    `name`, `model` (one line), `parameters` (int), `trainable_parameters` (int), `device`, `layout` and `versions`
    (dicts of name to value), `data` (a function that returns the current data summary: a dict or dataclass),
    `steps_reason`, `branch` (a branch abandoned at the start: `tutti.train.output.Branch`). Leaving the `with` block
    with an exception closes with the status `failed` and its message.
    """

    def __init__(
        self, config: Config, world: World, *, total_steps: int, run_info: dict[str, Any], start_step: int = 0
    ) -> None:
        require_trackers(config)
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
            *open_trackers(config, folder, run_info, start_step),
        ]

    def log_step(self, record: Record) -> None:
        """Log a training record."""
        record = _plain(record)
        for sink in self._sinks:
            sink.step(record)

    def log_eval(self, record: Record) -> None:
        """Log an evaluation record."""
        record = _plain(record)
        for sink in self._sinks:
            sink.evaluation(record)

    def log_text(
        self, step: int, prompt: str, text: str, right: bool | None = None, pictures: Sequence[str] = ()
    ) -> None:
        """Log a text that the model generated after `step`. right: whether it is the expected answer; None if none
        was expected. pictures: in the prompt, as data URLs."""
        seen = {"pictures": list(pictures)} if pictures else {}
        for sink in self._sinks:
            sink.text({"step": step, "prompt": prompt, "text": text, "right": right, **seen})

    def log_answers(self, step: int, known: Sequence[bool], unseen: Sequence[bool]) -> None:
        """Log the shares of right answers after `step`: to prompts, and to those of the evaluation data. Each
        element says whether an answer was right."""
        record: dict[str, Any] = {"step": step}
        for name, found in (("sample", known), ("unseen", unseen)):
            if found:
                record |= {f"{name}_accuracy": sum(found) / len(found), f"{name}_answers": len(found)}
        if len(record) > 1:
            self.log_eval(record)

    def close(self, summary: Record) -> None:
        """Close every sink, once; later calls do nothing.

        summary: `status` (finished, stopped or failed), `message` (why it stopped or failed), and other values to show.
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
    """The record with numbers of numpy and torch converted to plain ones."""
    return {key: value.item() if hasattr(value, "item") else value for key, value in record.items()}


class _JsonLines:
    """metrics.jsonl, flushed line by line; keeps `history`, which the other sinks read, up to date."""

    def __init__(self, path: Path, history: History) -> None:
        self._path, self._history = path, history
        self._file: IO[str] | None = None
        self._before: list[str] = []

    def step(self, record: Record) -> None:
        self._history.add(record)
        self._before.append(encode(record) + "\n")
        # Opened at the first step: a run that fails before it leaves no history for the next one to trip over.
        if record["step"] == 0:
            return
        self._file = self._file or self._path.open("a", encoding="utf-8")
        self._file.writelines(self._before)
        self._file.flush()
        self._before = []

    evaluation = step

    def text(self, record: Record) -> None:
        pass

    def close(self, summary: Record) -> None:
        if self._file is not None:
            self._file.close()
