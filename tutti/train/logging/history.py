"""The recorded history of a run: the lines of metrics.jsonl, and a summary of them in bounded memory.

Lines. Every record is one JSON object with floats in full precision (`repr`). JSON has no NaN or infinity, so such a
value is written as null and named in `non_finite`: `{"step": 7, "loss": null, "non_finite": {"loss": "nan"}}`.

Going back. A run that resumes at step N repeats the steps after N. `cut_back` moves the lines that the interrupted run
wrote for them to metrics.superseded.jsonl, so that metrics.jsonl is always one consistent history and nothing is lost.

Bounded. The report draws at most `LIMIT` points however long the run is. `Buckets` has one bucket (count, sum, lowest,
highest per column) per step range of equal width; when there are too many, the width doubles and neighbors merge. The
bucket of a step only depends on its number, so a resumed run draws the same picture. Spikes stay visible because a
bucket keeps its extremes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tutti.core.files import read_jsonl, replacing, synced

LIMIT = 1000
"""Maximum number of buckets of a table."""

METRICS, SUPERSEDED = "metrics.jsonl", "metrics.superseded.jsonl"


def encode(record: Mapping[str, Any]) -> str:
    """`record` as one line of JSON, without the newline."""
    strange = {key: repr(v) for key, v in record.items() if isinstance(v, float) and not math.isfinite(v)}
    if strange:
        record = {**record, **dict.fromkeys(strange), "non_finite": strange}
    return json.dumps(record, ensure_ascii=False, allow_nan=False)


def cut_back(folder: Path, step: int, *, superseded: bool = True) -> int:
    """Keep the lines of metrics.jsonl in `folder` up to `step`; append the others to metrics.superseded.jsonl.

    superseded: false drops the others, which were copied elsewhere. Returns the number of lines that were cut. Being
    killed in between loses nothing: lines are appended before they are removed.
    """
    path, count = folder / METRICS, 0
    if not path.exists():
        return 0
    with replacing(path) as kept, synced(folder / SUPERSEDED, "a") as cut:
        for line, record in read_jsonl(path):
            stays = _is_record(record) and record["step"] <= step
            count += not stays
            if stays or superseded:
                (kept if stays else cut).write(line.removesuffix("\n") + "\n")
    if (folder / SUPERSEDED).stat().st_size == 0:
        (folder / SUPERSEDED).unlink()
    return count


def step_range(path: Path) -> tuple[int, int]:
    """The lowest and the highest step in a metrics.jsonl; 0 and 0 if it does not exist."""
    low = high = 0
    for record in _records(path):
        low, high = min(low or record["step"], record["step"]), max(high, record["step"])
    return low, high


def _is_record(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("step"), int)


class Buckets:
    """Columns of numbers over steps, in at most `limit` buckets of equal width.

    A bucket spans steps (i * width, (i + 1) * width]. `ends` is the last step seen in each; `columns[name][bucket]` is
    [count, sum, lowest, highest], or None where the bucket has no such value. Steps are added in ascending order.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit, self.width = limit, 1
        self.ends: list[int] = []
        self.columns: dict[str, list[list[float] | None]] = {}

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Add the finite numbers among `values`."""
        if not self.ends or self._index(self.ends[-1]) != self._index(step):
            self.ends.append(step)
            for column in self.columns.values():
                column.append(None)
            while len(self.ends) > self.limit:
                self._widen()
        self.ends[-1] = step
        for name, value in values.items():
            if not math.isfinite(value):
                continue
            column = self.columns.setdefault(name, [None] * len(self.ends))
            column[-1] = _merge(column[-1], [1, value, value, value])

    def _index(self, step: int) -> int:
        return (step - 1) // self.width

    def _widen(self) -> None:
        self.width *= 2
        groups: list[list[int]] = []
        for position, end in enumerate(self.ends):
            if groups and self._index(self.ends[groups[-1][0]]) == self._index(end):
                groups[-1].append(position)
            else:
                groups.append([position])
        self.ends = [self.ends[group[-1]] for group in groups]
        for name, column in self.columns.items():
            self.columns[name] = [
                column[group[0]] if len(group) == 1 else _merge(column[group[0]], column[group[1]]) for group in groups
            ]


def _merge(a: list[float] | None, b: list[float] | None) -> list[float] | None:
    if a is None or b is None:
        return b if a is None else a
    return [a[0] + b[0], a[1] + b[1], min(a[2], b[2]), max(a[3], b[3])]


class History:
    """Statistics of all records so far, for the report and the closing line.

    train, evals: the curves. last, last_eval: the newest records. best_eval: the one with the lowest loss. answers: the
    newest record of prompts with an expected answer. tokens, trained_tokens, samples: sums. seconds: time in training
    steps (without evaluation, saving and start-up). source_tokens: trained tokens per source. skipped: steps without an
    update. non_finite: (step, name) of non-finite values, the first 100.
    """

    def __init__(self) -> None:
        self.train, self.evals = Buckets(), Buckets()
        self.last: dict[str, Any] = {}
        self.last_eval: dict[str, Any] = {}
        self.best_eval: dict[str, Any] = {}
        self.answers: dict[str, Any] = {}
        self.tokens = self.trained_tokens = self.samples = self.skipped = 0
        self.seconds = 0.0
        self.source_tokens: dict[str, int] = {}
        self.non_finite: list[tuple[int, str]] = []

    def add(self, record: Mapping[str, Any]) -> None:
        """Add a record of training, evaluation or answers, as logged or as read back."""
        values = {
            key: value
            for key, value in record.items()
            if isinstance(value, int | float) and key not in ("step", "epoch")
        }
        self._note_non_finite(record, values)
        step = int(record["step"])
        if not record.keys().isdisjoint(("sample_accuracy", "unseen_accuracy")):
            self.evals.add(step, values)
            self.answers = dict(record)
            return
        if "eval_loss" in record:
            self.evals.add(step, values)
            self.last_eval = dict(record)
            loss, best = values.get("eval_loss", math.nan), self.best_eval.get("eval_loss", math.inf)
            if loss < best:
                self.best_eval = dict(record)
            return
        self.train.add(step, values)
        self.last = dict(record)
        self.tokens += int(values.get("tokens", 0))
        self.trained_tokens += int(values.get("trained_tokens", 0))
        self.samples += int(values.get("samples", 0))
        self.skipped += int(values.get("skipped_steps", 0))
        rate = values.get("tokens_per_second", 0.0)
        self.seconds += values.get("tokens", 0) / rate if rate > 0 else values.get("step_seconds", 0.0)
        for key, value in values.items():
            if key.startswith("source_tokens/"):
                name = key.partition("/")[2]
                self.source_tokens[name] = self.source_tokens.get(name, 0) + int(value)

    def _note_non_finite(self, record: Mapping[str, Any], values: Mapping[str, float]) -> None:
        found = dict(record.get("non_finite", {}))
        found |= {key: repr(value) for key, value in values.items() if not math.isfinite(value)}
        if len(self.non_finite) < 100:
            self.non_finite += [(int(record["step"]), f"{key} is {what}") for key, what in found.items()]


def read_history(path: Path) -> History:
    """The history in a metrics.jsonl; empty if it does not exist."""
    history = History()
    for record in _records(path):
        history.add(record)
    return history


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a metrics.jsonl, without an incomplete last line."""
    if path.exists():
        yield from (value for _, value in read_jsonl(path) if _is_record(value))
