"""Answers to the rows of a JSONL file, into another one: `--input FILE.jsonl --output FILE.jsonl`.

Rows are answered longest first and as they fit together, so they are finished in another order than they stand in.
Each answer is kept at once in a journal beside the output (`OUTPUT.partial`), whose first line says what the answers
are to: the input's digest, the model and the settings. A run that was interrupted takes the journal's answers and does
the rest; the seed of a row's sampling is its place in the file, so the outcome is the same. When all are there the
output is written in the input's order, under a temporary name that is then changed, and the journal is removed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from tutti.config import Config
from tutti.data.rows import RowError
from tutti.infer.generate import Generator, Request
from tutti.infer.load import Speaker
from tutti.infer.prompts import request, row_ids
from tutti.infer.stream import answer_text

log = logging.getLogger(__name__)

RESPONSE = "response"
"""The column that the answer is put in."""

_LISTED = 5
_LOG_SECONDS = 15.0


Rows = dict[int, dict[str, Any]]
"""Rows by the line they stand in, from 1."""


def read_rows(path: Path) -> Rows:
    """The rows of a JSONL file. ValueError: the file is not there, or has no rows, or which line is no JSON object."""
    if not path.is_file():
        raise ValueError(f"--input: there is no file {path}")
    rows: Rows = {}
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{number}: must be a JSON object, not {type(row).__name__}")
            rows[number] = row
    if not rows:
        raise ValueError(f"--input: {path} has no rows")
    return rows


def answer_rows(config: Config, speaker: Speaker, generator: Generator, rows: Rows, source: Path, output: Path) -> None:
    """Answer `rows`, which are those of `source`, into `output`, going on from what an earlier run left. Collective.

    ValueError, on all ranks: rows that can't be asked, with their places; an output that belongs to something else.
    """
    ranks = generator.dist
    if ranks.run_on_all_ranks(lambda: _is_done(output, rows)):
        log.info("%s has the answers to all %d rows already; delete it to have them anew", output, len(rows))
        return
    requests = ranks.run_on_all_ranks(lambda: _requests(config, speaker, rows, source))
    journal = output.with_name(output.name + ".partial")
    header = {"input": _digest(rows), "infer": asdict(config.infer)}
    answers: dict[int, str] = ranks.run_on_all_ranks(lambda: _read_journal(journal, header))
    if answers:
        log.info("going on from %s: %d of %d rows are answered", journal, len(answers), len(rows))
    left = sorted((item for item in requests if item.number not in answers), key=lambda item: -len(item.ids))
    tokens: dict[int, list[int]] = {}
    ranks.barrier()
    with _writing(journal, header, active=ranks.is_main) as write, _Progress(len(left), active=ranks.is_main) as bar:
        try:
            for token in generator.stream(left):
                made = tokens.setdefault(token.number, [])
                if token.end != "stop":
                    made.append(token.id)
                bar.token()
                if token.end:
                    answers[token.number] = answer_text(speaker.tokenizer, tokens.pop(token.number))
                    write({"line": token.number, RESPONSE: answers[token.number]})
                    bar.row()
        except KeyboardInterrupt:
            log.info("stopped with %d of %d rows answered; the same command goes on", len(answers), len(rows))
            raise
    ranks.run_on_all_ranks(lambda: _finish(output, rows, answers, journal) if ranks.is_main else None)
    log.info("wrote %d answers to %s", len(rows), output)


def _requests(config: Config, speaker: Speaker, rows: Rows, source: Path) -> list[Request]:
    requests, problems = [], []
    for number, row in rows.items():
        try:
            requests.append(request(speaker, row_ids(speaker, row), number, config.infer.max_tokens))
        except RowError as error:
            problems.append(f"{source}:{number}: {error}")
    if problems:
        more = f" (and {len(problems) - _LISTED} more rows)" if len(problems) > _LISTED else ""
        raise ValueError("\n".join(problems[:_LISTED]) + more)
    return requests


def _is_done(output: Path, rows: Rows) -> bool:
    """Whether `output` holds answers to just these rows. ValueError: it holds something else."""
    if not output.exists():
        if not output.absolute().parent.is_dir():
            raise ValueError(f"--output: there is no folder {output.absolute().parent}")
        return False
    try:
        there = [json.loads(line) for line in output.read_bytes().splitlines() if line.strip()]
        asked = [{key: value for key, value in row.items() if key != RESPONSE} for row in there]
        same = asked == [{key: value for key, value in row.items() if key != RESPONSE} for row in rows.values()]
        same = same and all(RESPONSE in row for row in there)
    except (ValueError, AttributeError, OSError):
        same = False
    if not same:
        raise ValueError(f"--output: {output} exists and is not the answers to this input; choose another name")
    return True


def _digest(rows: Rows) -> str:
    return hashlib.sha256(json.dumps(list(rows.items()), sort_keys=True).encode()).hexdigest()


def _read_journal(journal: Path, header: Mapping[str, Any]) -> dict[int, str]:
    """The answers that an interrupted run left. A line that it did not finish writing counts for nothing."""
    if not journal.exists():
        return {}
    entries = []
    for line in journal.read_bytes().splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            break
    if entries and entries[0] != json.loads(json.dumps(header)):
        raise ValueError(
            f"--output: {journal} is what a run with another input or other infer.* settings left; delete it, or "
            "choose another output"
        )
    return {entry["line"]: entry[RESPONSE] for entry in entries[1:]}


@contextmanager
def _writing(journal: Path, header: Mapping[str, Any], *, active: bool) -> Iterator[Any]:
    """A function that adds an entry to the journal; each is on its way to the disk when it returns."""
    if not active:
        yield lambda entry: None
        return
    whole = [line for line in journal.read_bytes().splitlines() if _is_json(line)] if journal.exists() else []
    with journal.open("wb") as file:

        def write(entry: Mapping[str, Any]) -> None:
            file.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
            file.flush()

        file.writelines(line + b"\n" for line in whole)
        if not whole:
            write(header)
        yield write


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
        return True
    except ValueError:
        return False


def _finish(output: Path, rows: Rows, answers: Mapping[int, str], journal: Path) -> None:
    partial = output.with_name(f".{output.name}.tmp")
    with partial.open("w", encoding="utf-8") as file:
        for number, row in rows.items():
            file.write(json.dumps({**row, RESPONSE: answers[number]}, ensure_ascii=False) + "\n")
    os.replace(partial, output)
    journal.unlink()


class _Progress:
    """A line of how far the rows are: rewritten in a terminal, else a log line now and then."""

    def __init__(self, rows: int, *, active: bool, stream: TextIO | None = None) -> None:
        self._rows = rows
        self._stream = stream or sys.stderr
        self._live = active and self._stream.isatty()
        self._every = 0.2 if self._live else _LOG_SECONDS
        self._active = active
        self._done = self._tokens = 0
        self._begin = self._shown = time.monotonic()

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self._live:
            self._show()
            self._stream.write("\n")
        elif self._active and not any(error):
            log.info("%s", self._line())

    def token(self) -> None:
        self._tokens += 1
        if self._active and time.monotonic() - self._shown > self._every:
            self._show()

    def row(self) -> None:
        self._done += 1

    def _show(self) -> None:
        self._shown = time.monotonic()
        if self._live:
            self._stream.write(f"\r\x1b[K{self._line()}")
            self._stream.flush()
        else:
            log.info("%s", self._line())

    def _line(self) -> str:
        seconds = max(1e-9, time.monotonic() - self._begin)
        line = f"{self._done} of {self._rows} rows, {self._tokens / seconds:.0f} tokens/s"
        if 0 < self._done < self._rows:
            left = seconds / self._done * (self._rows - self._done)
            line += f", about {left / 60:.0f} min left" if left >= 90 else f", about {left:.0f} s left"
        return line
