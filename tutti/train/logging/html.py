"""report.html: one page that shows a whole run, without a server or a network.

The page is a template with the style, the script and the data written into it, so that it can be opened from disk,
mailed, or kept beside a model. The script draws the charts from the data; nothing is fetched. While the run goes on the
page is replaced at most every `WRITE_EVERY` seconds (and reloads itself); a write costs a few hundredths of a second
and the file stays under 1 MB however long the run is, because curves are kept in a bounded number of buckets.

    run.json       what is known of the run beside its metrics: configuration, versions, data, status, sample texts
    metrics.jsonl  the records
    report.html    made from these two, by the run as it goes
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import html
import json
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from tutti.config import ARGUMENTS, Config, away_from_default, get
from tutti.core.files import replace_file
from tutti.train.logging.history import Buckets, History

log = logging.getLogger(__name__)

WRITE_EVERY = 10.0
MAX_SOURCES = 12
"""Number of sources with their own curves; smaller ones are combined."""
MAX_TEXTS = 50
"""Number of newest texts to keep; those of the first samples are kept too."""
MAX_PICTURES = 400_000
"""Maximum characters of all pictures next to texts."""
RUN, REPORT = "run.json", "report.html"
BANDED = ("loss", "grad_norm", "tokens_per_second")
"""Columns whose extremes are drawn in addition to means."""


class Report:
    """Keeps run.json and report.html of `folder` up to date; a sink of `Metrics`. run_info: see `Metrics`."""

    def __init__(
        self,
        folder: Path,
        history: History,
        config: Config,
        *,
        total_steps: int,
        run_info: Mapping[str, Any],
        start_step: int = 0,
    ) -> None:
        before = _read_run(folder) if start_step else {}
        self._folder, self._history = folder, history
        self._began, self._seconds_before = time.time(), before.get("seconds", 0.0)
        self._written = 0.0
        self._data = run_info.get("data", lambda: None)
        info = {key: _plain(value) for key, value in run_info.items() if key != "data"}
        branches = [*before.get("branches", []), *filter(None, [info.pop("branch", None)])]
        texts = [text for text in before.get("texts", []) if text["step"] <= start_step]
        self._run: dict[str, Any] = {
            "name": folder.resolve().name,
            "started": before.get("started", self._began),
            "resumed": [*before.get("resumed", []), start_step] if start_step else [],
            "total_steps": total_steps,
            "config": config_rows(config),
            **info,
            "branches": branches,
            "texts": texts,
            "pictures": before.get("pictures", {}),
            "status": "running",
        }
        self._write()

    def step(self, record: Mapping[str, Any]) -> None:
        if time.monotonic() - self._written >= WRITE_EVERY:
            self._write()

    evaluation = step

    def text(self, record: Mapping[str, Any]) -> None:
        texts = [*self._run["texts"], {**record, **self._keep_pictures(record.get("pictures", ()))}]
        first = [text for text in texts[:-MAX_TEXTS] if text["step"] == texts[0]["step"]]
        self._run["texts"] = first + texts[len(first) :][-MAX_TEXTS:]
        self.step(record)

    def _keep_pictures(self, pictures: Sequence[str]) -> dict[str, list[str]]:
        """Keep data URLs if there is room, each only once; returns their keys."""
        kept: dict[str, str] = self._run["pictures"]
        keys = []
        for picture in pictures:
            key = hashlib.sha256(picture.encode()).hexdigest()[:12]
            if key in kept or sum(map(len, kept.values())) + len(picture) <= MAX_PICTURES:
                kept[key] = picture
                keys.append(key)
        return {"pictures": keys} if keys else {}

    def close(self, summary: Mapping[str, Any]) -> None:
        figures = {key: _plain(value) for key, value in summary.items() if key not in ("status", "message")}
        self._run |= {
            "status": summary.get("status", "finished"),
            "message": summary.get("message"),
            "summary": figures,
        }
        self._write()

    def _write(self) -> None:
        """Replace both files. A full disk must not stop a run because of its report."""
        now = time.time()
        self._run |= {"data": _plain(self._data()), "updated": now, "seconds": self._seconds_before + now - self._began}
        try:
            replace_file(self._folder / RUN, json.dumps(self._run, ensure_ascii=False, indent=1), durable=False)
            replace_file(self._folder / REPORT, render(self._run, self._history), durable=False)
        except OSError as error:
            log.warning("the report could not be written: %s", error)
        self._written = time.monotonic()


def render(run: Mapping[str, Any], history: History) -> str:
    """Render the page from the content of run.json and the records."""
    parts = {
        "TITLE": html.escape(str(run.get("name", "run"))),
        "STYLE": _asset("report.css"),
        "FORMAT": _asset("format.js"),
        "CHART": _asset("chart.js"),
        "SCRIPT": _asset("report.js"),
        "DATA": _object(_payload(run, history)),
    }
    before, *rest = _asset("report.html").split("{{")
    return before + "".join(parts[name] + text for name, _, text in (piece.partition("}}") for piece in rest))


@functools.cache
def _asset(name: str) -> str:
    return (resources.files("tutti.train.logging") / "assets" / name).read_text(encoding="utf-8")


def config_rows(config: Config) -> list[dict[str, Any]]:
    """Every argument of a training run: its name, value, documentation, and whether it was set."""
    return [
        {"name": name, "value": _plain(get(config, name)), "doc": argument.doc, "set": away_from_default(config, name)}
        for name, argument in ARGUMENTS.items()
        if argument.group != "infer"
    ]


def _payload(run: Mapping[str, Any], history: History) -> dict[str, str]:
    """The page's data as JSON texts by name."""
    ranked = sorted(history.source_tokens, key=lambda name: -history.source_tokens[name])
    sources = [{"name": name, "tokens": history.source_tokens[name]} for name in ranked[:MAX_SOURCES]]
    small, rest = ranked[MAX_SOURCES:], ""
    if small:
        rest = f"{len(small)} smaller sources"
        sources.append({"name": rest, "tokens": sum(history.source_tokens[name] for name in small), "rest": True})
    figures = {
        "last": history.last,
        "last_eval": history.last_eval,
        "best_eval": history.best_eval,
        "answers": history.answers,
        "tokens": history.tokens,
        "trained_tokens": history.trained_tokens,
        "samples": history.samples,
        "skipped": history.skipped,
        "train_seconds": history.seconds,
        "non_finite": history.non_finite,
    }
    return {
        "run": _script_json(run),
        "figures": _script_json(figures),
        "sources": _script_json(sources),
        "train": _table(history.train, set(small), rest),
        "evals": _table(history.evals),
    }


def _table(buckets: Buckets, small: Collection[str] = (), rest: str = "") -> str:
    """`buckets` as JSON: {width, step, columns: {name: {mean, low?, high?} or {sum}}}, exact if width is 1.

    The sources in `small` get no columns; their tokens are summed under the name `rest`.
    """
    exact = buckets.width == 1
    arrays: dict[str, dict[str, list[float | None]]] = {}
    others = [0.0] * len(buckets.ends)
    for name, column in buckets.columns.items():
        kind, _, source = name.partition("/")
        if kind == "source_tokens":
            sums = [0.0 if bucket is None else bucket[1] for bucket in column]
            if source in small:
                others = [a + b for a, b in zip(others, sums, strict=True)]
            else:
                arrays[name] = {"sum": [*sums]}
        elif source not in small:
            arrays[name] = {"mean": [None if bucket is None else bucket[1] / bucket[0] for bucket in column]}
            if name in BANDED and not exact:
                arrays[name]["low"] = [None if bucket is None else bucket[2] for bucket in column]
                arrays[name]["high"] = [None if bucket is None else bucket[3] for bucket in column]
    if rest:
        arrays[f"source_tokens/{rest}"] = {"sum": [*others]}
    columns = {
        name: _object({kind: _numbers(values, exact) for kind, values in kinds.items()})
        for name, kinds in arrays.items()
    }
    return _object({"width": str(buckets.width), "step": str(buckets.ends), "columns": _object(columns)})


def _object(members: Mapping[str, str]) -> str:
    """A JSON object from members that are already JSON, which for many numbers is faster than `json.dumps`."""
    return "{" + ",".join(f"{_script_json(name)}:{text}" for name, text in members.items()) + "}"


def _numbers(values: list[float | None], exact: bool) -> str:
    form = repr if exact else "{:.6g}".format
    return "[" + ",".join("null" if value is None else form(value) for value in values) + "]"


def _script_json(value: Any) -> str:
    """JSON for a script element: without `<`, so that no text can end it; NaN and infinity become null."""
    return json.dumps(_plain(value), ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")


def _plain(value: Any) -> Any:
    """Convert `value` to JSON types: dataclasses and mappings to dicts, sequences to lists, anything else to text."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, int | float):
        return value if abs(value) < float("inf") else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    return str(value)


def _read_run(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
