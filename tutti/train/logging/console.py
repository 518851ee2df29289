"""The progress of a run on stderr: a live block on a terminal, occasional lines in a log file.

On a terminal two lines are redrawn in place, a bar with the time left and the newest metrics, and log lines scroll by
above them. Elsewhere a line is written after 1, 2, 5, 10, 20, 50 ... steps and then at least every 30 seconds, so that
a log of any length stays readable. Both fit into 80 columns: if there is no room, the least important metrics are left
out. The time left includes everything between steps (evaluation, saving), but not the first step, which compiles.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from tutti.train.logging.history import History

if TYPE_CHECKING:
    from tutti.train.logging.live import LiveBlock

log = logging.getLogger(__name__)

WIDTH = 80
PREFIX = len("12:34:56 I ")
PLAIN_EVERY = 30.0
"""Maximum seconds between two lines, if a step finishes in that time."""
REDRAW_EVERY = 0.1
SMOOTHING = 0.95


class Progress:
    """A sink of `Metrics` that shows training records as they arrive.

    clock: returns seconds; for tests. live: redraw in place, rather than write lines; by default if stderr is a
    terminal.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int,
        history: History,
        *,
        live: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._start, self._history, self._clock = total_steps, start_step, history, clock
        self._average = _Average()
        self._began = clock()
        self._first: tuple[int, float] | None = None
        self._milestone = 1
        self._shown = -1e9
        self._record: Mapping[str, Any] = {}
        self._block: LiveBlock | None = None
        if sys.stderr.isatty() if live is None else live:
            from tutti.train.logging.live import LiveBlock

            self._block = LiveBlock(total_steps)

    def step(self, record: Mapping[str, Any]) -> None:
        now, step = self._clock(), record["step"]
        self._first = self._first or (step, now)
        self._average.add(record.get("loss"))
        self._record = record
        done = step - self._start
        if self._block is not None:
            if now - self._shown >= REDRAW_EVERY or step == self._total:
                self._shown = now
                self._draw(self._block)
        elif done >= self._milestone or now - self._shown >= PLAIN_EVERY or step == self._total:
            self._shown = now
            while self._milestone <= done:
                self._milestone = next_milestone(self._milestone)
            counted = (100, f"step {step:>{len(str(self._total))}}/{self._total}")
            log.info("%s", fit([counted, *self._figures(), (70, self._clock_line())], WIDTH - PREFIX))

    def evaluation(self, record: Mapping[str, Any]) -> None:
        shares = [(name, record[f"{name}_accuracy"], record[f"{name}_answers"]) for name in ("sample", "unseen")
                  if f"{name}_accuracy" in record]  # fmt: skip
        for name, share, count in shares:
            right = f"{round(share * count)} of {count} answers are right ({share:.1%})"
            of = ", to rows that it is not trained on" if name == "unseen" else ""
            log.info("step %s/%s  %s%s", record["step"], self._total, right, of)
        if shares:
            return
        best = self._history.best_eval
        parts = [f"step {record['step']}/{self._total}", f"eval loss {number(record.get('eval_loss'))}"]
        if "eval_accuracy" in record:
            parts.append(f"accuracy {record['eval_accuracy']:.2%}")
        if best and best["step"] != record["step"]:
            parts.append(f"best {number(best['eval_loss'])} at step {best['step']}")
        log.info("%s", "  ".join(parts))

    def text(self, record: Mapping[str, Any]) -> None:
        pass

    def close(self, summary: Mapping[str, Any]) -> None:
        if self._block is not None:
            if self._record:
                self._draw(self._block)
            self._block.close()

    def _clock_line(self) -> str:
        """The time left as `ETA 3:21`, or the total time at the end."""
        now, step = self._clock(), self._record["step"]
        if step >= self._total:
            return f"took {duration(now - self._began)}"
        first_step, first_time = self._first or (step, now)
        if step == first_step:
            seconds = (now - self._began) / max(1, step - self._start)
        else:
            seconds = (now - first_time) / (step - first_step)
        return f"ETA {duration(seconds * (self._total - step))}"

    def _draw(self, block: LiveBlock) -> None:
        block.draw(self._record["step"], self._clock_line(), fit(self._figures(), block.width - 1))

    def _figures(self) -> list[tuple[int, str]]:
        """The importance and the text of each metric, in display order."""
        record, evaluated = self._record, self._history.last_eval
        loss = f"loss {number(record.get('loss'))}"
        if self._average.count > 1:
            loss += f" avg {number(self._average.value)}"
        figures = [(90, loss)]
        if evaluated and self._block is not None:
            figures.append((50, f"eval {number(evaluated.get('eval_loss'))}"))
        if record.get("lr") is not None:
            figures.append((60, f"lr {record['lr']:.1e}"))
        if record.get("tokens_per_second") is not None:
            figures.append((80, f"{si(record['tokens_per_second'])} tok/s"))
        if record.get("mfu") is not None:
            figures.append((40, f"MFU {record['mfu']:.0%}"))
        if record.get("memory_gib") is not None:
            figures.append((30, f"{record['memory_gib']:.1f} GiB"))
        return figures


class _Average:
    """Exponential average of the finite values, without initialization bias."""

    def __init__(self) -> None:
        self.count, self._sum, self._weight = 0, 0.0, 0.0

    def add(self, value: float | None) -> None:
        if value is None or value != value or abs(value) == float("inf"):
            return
        self.count += 1
        self._sum = SMOOTHING * self._sum + value
        self._weight = SMOOTHING * self._weight + 1

    @property
    def value(self) -> float:
        return self._sum / self._weight if self._weight else float("nan")


def next_milestone(step: int) -> int:
    """The number after `step` in 1, 2, 5, 10, 20, 50 ..."""
    return step * 5 // 2 if str(step).startswith("2") else step * 2


def fit(parts: list[tuple[int, str]], width: int) -> str:
    """The texts of `parts` (importance, text) in order, without the least important ones that do not fit `width`."""
    parts = list(parts)
    while len(parts) > 1 and len("  ".join(text for _, text in parts)) > width:
        parts.remove(min(parts))
    return "  ".join(text for _, text in parts)


def number(value: float | None) -> str:
    """Format a loss with about four digits."""
    if value is None:
        return "-"
    return f"{value:.3f}" if 0.1 <= abs(value) < 1000 else f"{value:.3g}"


def si(value: float) -> str:
    """Format a number with few digits: 123, 1.2k, 12.3k, 4.5M."""
    for unit in ("", "k", "M", "G"):
        if abs(value) < 999.5 or unit == "G":
            break
        value /= 1000
    return f"{value:.0f}{unit}" if not unit or value >= 100 else f"{value:.1f}{unit}"


def duration(seconds: float) -> str:
    """Format a duration: 0:07, 3:21, 2:03:04, 3d 04:05."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    if hours >= 48:
        return f"{hours // 24}d {hours % 24:02}:{minutes:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
