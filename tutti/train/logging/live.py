"""The live block of a run's progress on a terminal; separate from `console`, so that rich is only loaded if needed."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator

from rich import progress
from rich.console import Console, RenderableType
from rich.text import Text


class LiveBlock(progress.Progress):
    """A bar and a line of metrics at the bottom of the terminal, above which log lines scroll by."""

    def __init__(self, total: int) -> None:
        console = Console(stderr=True, highlight=False)
        self._figures = Text()
        super().__init__(
            progress.TextColumn(" {task.completed}/{task.total}", style="bold"),
            progress.BarColumn(max(10, min(60, console.width - 42)), complete_style="cyan", finished_style="green"),
            progress.TextColumn("{task.percentage:.0f}%"),
            progress.TextColumn("{task.fields[clock]}", style="cyan"),
            console=console,
            auto_refresh=False,
        )
        self._bar = self.add_task("", total=total, clock="")
        self.start()
        # Existing handlers must write to the stream that scrolls above the block.
        self._handlers = [
            (handler, handler.setStream(sys.stderr))
            for handler in logging.getLogger("tutti").handlers
            if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler)
        ]

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield self._figures

    @property
    def width(self) -> int:
        return min(self.console.width, 100)

    def draw(self, step: int, clock: str, figures: str) -> None:
        """Show that `step` is done. clock: the time left. figures: a line that fits `width`."""
        self._figures = Text(f" {figures}", style="dim")
        self.update(self._bar, completed=step, clock=clock, refresh=True)

    def close(self) -> None:
        self.stop()
        for handler, stream in self._handlers:
            if stream is not None:
                handler.setStream(stream)
