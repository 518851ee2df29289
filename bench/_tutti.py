"""Tutti's own command, as a process that also notes the processor time: `python -m bench._tutti train ...`.

Writes to the file that the environment variable BENCH_CORES names, as a list of JSON, the seconds of cores that the
process had taken by the end of each step.
"""

from __future__ import annotations

import atexit
import json
import os
import time
from pathlib import Path
from typing import Any


def main() -> None:
    from tutti.core.heap import restart_without_cache

    restart_without_cache()  # as the command does, before torch is imported
    from tutti.__main__ import run
    from tutti.train.step import TrainStep

    ends: list[float] = []
    step = TrainStep.step

    def timed(self: TrainStep, *arguments: Any) -> None:
        step(self, *arguments)
        ends.append(time.process_time())

    TrainStep.step = timed  # type: ignore[method-assign, assignment]
    atexit.register(lambda: Path(os.environ["BENCH_CORES"]).write_text(json.dumps(ends)))
    run()


if __name__ == "__main__":
    main()
