"""Batch inference: answers the rows of a JSONL file into another one, `--input FILE.jsonl --output FILE.jsonl`.

Rows are answered longest first and in batches that fit together, so they finish in another order than in the file. Each
answer is appended at once to a journal, `OUTPUT.partial`. The journal's first line identifies the job: digests of the
input, the prompts' tokens and the weights, and the settings. After an interruption, the next run reuses the journal's
answers and does the rest. A row's sampling is seeded by its position in the file, so the result is the same. When all
rows are answered, the output is written in the input's order, under a temporary name and then renamed, and the journal
is removed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from PIL import Image
from rich import progress
from rich.console import Console

from tutti.config import Config
from tutti.config.nouns import counted
from tutti.core.files import replacing
from tutti.data.formats import BadRow, JsonLines
from tutti.data.media import identity
from tutti.data.rows import RowError
from tutti.infer.drawing import PictureCollector
from tutti.infer.generate import Generator, Request, Token, whole_answers
from tutti.infer.load import LoadedModel
from tutti.infer.prompts import PromptFormat, row_request, to_draw

log = logging.getLogger(__name__)

PICTURES = "pictures"
"""The column for the images of an answer."""

RESPONSE = "response"
"""The column for the answer."""

_PARTS = {
    "input": "input",
    "weights": "model",
    "infer": "setting of infer.*",
    "prompts": "chat template or tokenizer",
}
"""The fields of a journal's header, and their names in messages."""

_LISTED = 5
_LOG_SECONDS = 15.0


Rows = dict[int, dict[str, Any]]
"""Rows by line number, from 1."""


def read_rows(path: Path) -> Rows:
    """The rows of a JSONL file. ValueError: the file does not exist, has no rows, or has a line that is not a JSON
    object."""
    if not path.is_file():
        raise ValueError(f"--input: there is no file {path}")
    rows: Rows = {}
    for row in JsonLines(str(path)).stream():
        if isinstance(row, BadRow):
            raise ValueError(str(row))
        rows[row.line] = row.value
    if not rows:
        raise ValueError(f"--input: {path} has no rows")
    return rows


def answer_rows(
    config: Config,
    loaded: LoadedModel,
    generator: Generator,
    rows: Rows,
    source: Path,
    output: Path,
    *,
    draw: bool = False,
) -> None:
    """Answer `rows` (of the file `source`) into `output`, continuing an interrupted run. Collective.

    draw: each answer begins with an image. Images are written to a folder next to the output, and named in their row.
    ValueError, on all ranks: rows that cannot be answered, with their line numbers; an output that belongs to another
    job.
    """
    world = generator.world
    journal = output.with_name(output.name + ".partial")
    if world.run_on_all_ranks(lambda: _is_done(output, rows)):
        log.info(
            "%s has the answers to all of %s already; delete it to have them anew", output, counted(len(rows), "row")
        )
        if world.is_main:
            journal.unlink(missing_ok=True)  # the previous run ended between its last two actions
        return
    day = world.broadcast(world.run_on_all_ranks(lambda: _date(journal)))
    form = loaded.form.dated(day)
    requests = world.run_on_all_ranks(lambda: _requests(config, form, rows, source, draw=draw))
    header = _header(config, loaded, rows, requests) | {"date": day}
    answers: dict[int, str] = world.run_on_all_ranks(lambda: _read_journal(journal, header))
    if answers:
        log.info("going on from %s: %d of %s answered", journal, len(answers), counted(len(rows), "row"))
    left = sorted((item for item in requests if item.number not in answers), key=lambda item: -len(item.ids))
    folder = output.with_name(f"{output.stem}_pictures")

    def keep(number: int, place: int, picture: Image.Image) -> None:
        if world.is_main:
            folder.mkdir(exist_ok=True)
            picture.save(folder / f"{number}_{place}.png")

    pictures = PictureCollector(generator.drawing, keep)
    world.barrier()
    with _writing(journal, header, active=world.is_main) as write, _Progress(len(left), active=world.is_main) as bar:
        try:
            for number, text in whole_answers(pictures.watch(bar.watch(generator.stream(left))), left, form.tokenizer):
                answers[number] = text
                write({"line": number, RESPONSE: text})
        except KeyboardInterrupt:
            log.info(
                "stopped with %d of %s answered; the same command goes on", len(answers), counted(len(rows), "row")
            )
            raise

    def finish() -> None:
        if world.is_main:
            with replacing(output) as file:
                for number, row in rows.items():
                    drawn = {} if generator.drawing is None else {PICTURES: _pictures(folder, number)}
                    file.write(_line({**row, RESPONSE: answers[number], **drawn}))
            journal.unlink()

    world.run_on_all_ranks(finish)
    log.info("wrote %d answers to %s", len(rows), output)


def _pictures(folder: Path, number: int) -> list[dict[str, str]]:
    """The images of the answer to a row, in order, as message parts, with paths relative to the output."""
    files = sorted(folder.glob(f"{number}_*.png"), key=lambda file: int(file.stem.partition("_")[2]))
    return [{"type": "image", "path": f"{folder.name}/{file.name}"} for file in files]


def _date(journal: Path) -> str:
    """The date for chat templates: that of the run that began `journal`, or else today's."""
    try:
        return str(json.loads(_whole_lines(journal)[0])["date"])
    except (IndexError, ValueError, KeyError, TypeError):
        return date.today().isoformat()


def _requests(config: Config, form: PromptFormat, rows: Rows, source: Path, *, draw: bool) -> list[Request]:
    requests, problems = [], []
    for number, row in rows.items():
        try:
            request = row_request(form, row, number, config.infer.max_tokens, str(source.parent))
            requests.append(to_draw(form, request) if draw else request)
        except RowError as error:
            problems.append(f"{source}:{number}: {error}")
    if problems:
        more = f" (and {len(problems) - _LISTED} more rows)" if len(problems) > _LISTED else ""
        raise ValueError("\n".join(problems[:_LISTED]) + more)
    return requests


def _is_done(output: Path, rows: Rows) -> bool:
    """True if `output` contains answers to exactly these rows, False if it does not exist. ValueError: it contains
    others."""
    if not output.exists():
        if not output.absolute().parent.is_dir():
            raise ValueError(f"--output: there is no folder {output.absolute().parent}")
        return False
    try:
        there = [json.loads(line) for line in output.read_bytes().splitlines() if line.strip()]
        there = [{name: value for name, value in row.items() if name != PICTURES} for row in there]
        asked = [[_line({**row, RESPONSE: ""}) for row in part] for part in (there, rows.values())]
        same = asked[0] == asked[1] and all(isinstance(row.get(RESPONSE), str) for row in there)
    except (ValueError, TypeError, AttributeError, OSError):
        same = False
    if not same:
        raise ValueError(f"--output: {output} exists and is not the answers to this input; choose another name")
    return True


def _header(config: Config, loaded: LoadedModel, rows: Rows, requests: Sequence[Request]) -> dict[str, Any]:
    """The journal's first line: everything that answers depend on. `infer.batch_tokens` and paths are not included."""
    settings = asdict(config.infer)
    for name in ("batch_tokens", "model_path", "tokenizer_path"):
        del settings[name]
    return {
        "input": _digest(list(rows.items())),
        "weights": loaded.weights,
        "infer": settings | {"stop_ids": sorted(loaded.stop_ids), "stop": list(config.infer.stop)},
        "prompts": _digest([_identity(item) for item in requests]),
    }


def _identity(request: Request) -> list[Any]:
    media = [hashlib.sha256(identity(medium)).hexdigest() for medium in request.media]
    return [request.number, list(request.ids), request.limit, *media]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _read_journal(journal: Path, header: Mapping[str, Any]) -> dict[int, str]:
    """The answers of an interrupted run. ValueError: they belong to other prompts, or to another model."""
    lines = _whole_lines(journal) or [_line(header).encode()]
    try:
        first, *answers = map(json.loads, lines)
        differing = [reason for part, reason in _PARTS.items() if first.get(part) != header[part]]
    except (ValueError, AttributeError):
        raise ValueError(f"--output: {journal} is damaged; delete it, or choose another output") from None
    if differing:
        raise ValueError(
            f"--output: {journal} is what a run with another {differing[0]} left; delete it, or choose another output"
        )
    return {answer["line"]: answer[RESPONSE] for answer in answers}


def _whole_lines(journal: Path) -> list[bytes]:
    """The complete lines of `journal`, if it exists."""
    return journal.read_bytes().split(b"\n")[:-1] if journal.exists() else []


def _line(entry: Mapping[str, Any]) -> str:
    """`entry` as a line of JSON; an unpaired surrogate, which has no UTF-8 encoding, is escaped."""
    return json.dumps(entry, ensure_ascii=False).encode("utf-8", "backslashreplace").decode() + "\n"


@contextmanager
def _writing(
    journal: Path, header: Mapping[str, Any], *, active: bool
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A function that appends an entry to the journal and flushes it to the system."""
    if not active:
        yield lambda entry: None
        return
    with journal.open("ab") as file:

        def write(entry: Mapping[str, Any]) -> None:
            file.write(_line(entry).encode())
            file.flush()

        whole = _whole_lines(journal)
        file.truncate(sum(len(line) + 1 for line in whole))
        if not whole:
            write(header)
        yield write


class _Progress:
    """Shows progress: a bar on a terminal, otherwise occasional log lines."""

    def __init__(self, rows: int, *, active: bool, console: Console | None = None) -> None:
        console = console or Console(stderr=True)
        self._active = active
        self._live = active and console.is_terminal
        self._bar = progress.Progress(
            progress.TextColumn("{task.completed} of {task.total} rows"),
            progress.BarColumn(),
            progress.TextColumn("{task.fields[speed]}"),
            progress.TextColumn("about"),
            progress.TimeRemainingColumn(),
            progress.TextColumn("left"),
            console=console,
            disable=not self._live,
        )
        self._task = self._bar.add_task("", total=rows, speed="")
        self._rows, self._done, self._tokens = rows, 0, 0
        self._begun = self._shown = time.monotonic()

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._update()
        self._bar.stop()
        if self._active and not self._live and not any(error):
            self._log()

    def watch(self, tokens: Iterable[Token]) -> Iterator[Token]:
        """Count `tokens` while passing them through."""
        for token in tokens:
            self._tokens += 1
            self._done += token.end is not None
            if time.monotonic() - self._shown > (0.2 if self._live else _LOG_SECONDS):
                self._shown = time.monotonic()
                self._update()
                if self._active and not self._live:
                    self._log()
            yield token

    def _update(self) -> None:
        self._bar.update(self._task, completed=self._done, speed=f"{self._speed():.0f} tokens/s")

    def _speed(self) -> float:
        return self._tokens / max(1e-9, time.monotonic() - self._begun)

    def _log(self) -> None:
        line = f"{self._done} of {self._rows} rows, {self._speed():.0f} tokens/s"
        if 0 < self._done < self._rows:
            left = (time.monotonic() - self._begun) / self._done * (self._rows - self._done)
            line += f", about {left / 60:.0f} min left" if left >= 90 else f", about {left:.0f} s left"
        log.info("%s", line)
