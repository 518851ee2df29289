"""A chat template that writes the date: a run keeps the date on which it began, whenever it resumes."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest

from tests.harness import run_ranks
from tests.train.runs import records, tiny_config
from tests.train.test_run import train_until
from tutti.config import Config

DATED = (
    "{{ '<|im_start|>system\\nToday is ' + strftime_now('%A, %d %B %Y') + '.<|im_end|>\\n' }}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def config_of(folder: Path, world: int = 1, **changes: Any) -> Config:
    folder.mkdir(exist_ok=True)
    (folder / "dated.jinja").write_text(DATED)
    common = {
        "data.chat_template": str(folder / "dated.jinja"),
        "train.max_steps": 3,
        "train.save_steps": 2,
        "train.data_parallel_mode": "fsdp2" if world > 1 else "ddp",
        "train.enable_full_determinism": True,
    }
    return tiny_config(folder, world=world, **(common | changes))


def train_on(day: str, config: Config, last: int) -> None:
    """Train on a day until step `last`."""
    from tutti.train import inputs

    class Day(datetime.date):
        @classmethod
        def today(cls) -> Any:
            return cls.fromisoformat(day)

    inputs.date = Day  # type: ignore[attr-defined]
    train_until(config, last)


@pytest.mark.parametrize(("world", "kind"), [(1, "mapping"), (2, "iterable")])
def test_a_run_goes_on_with_the_date_it_began_with(tmp_path: Path, world: int, kind: str) -> None:
    changes = {"data.datasets_type": kind, "data.train_sample": 96, "data.train_size": 3000}
    config = config_of(tmp_path, world, **changes)
    run_ranks(world, train_on, "2026-01-31", config, 3)
    expected = records(config)
    half = config_of(tmp_path / "half", world, **changes)
    run_ranks(world, train_on, "2026-01-31", half, 2)
    state = json.loads(next(Path(half.train.output_dir or "").glob("checkpoints/*2/state.json")).read_text())
    assert state["state"]["data"]["settings"]["data.chat_date"] == "2026-01-31"
    again = config_of(tmp_path / "half", world, **changes, **{"train.load_checkpoint_path": "auto"})
    run_ranks(world, train_on, "2026-02-28", again, 3)
    for ours, theirs in zip(records(again), expected, strict=True):
        assert (ours["loss"], ours["tokens"]) == (theirs["loss"], theirs["tokens"])


def test_another_date_than_the_checkpoint_s_is_refused(tmp_path: Path) -> None:
    run_ranks(1, train_on, "2026-01-31", config_of(tmp_path), 2)
    other = {"train.load_checkpoint_path": "auto", "data.chat_date": "2026-02-28"}
    with pytest.raises(AssertionError, match=r"data.chat_date is 2026-02-28 but was 2026-01-31"):
        run_ranks(1, train_on, "2026-03-01", config_of(tmp_path, **other), 3)


def test_the_date_that_is_asked_for_is_written(tmp_path: Path) -> None:
    """And the day that it is otherwise."""
    found = []
    for name, day, changes in (("asked", "2026-03-01", {"data.chat_date": "2026-01-31"}), ("same", "2026-01-31", {})):
        config = config_of(tmp_path / name, **changes, **{"train.max_steps": 1})
        run_ranks(1, train_on, day, config, 1)
        found.append([line["loss"] for line in records(config)])
    config = config_of(tmp_path / "other", **{"train.max_steps": 1})
    run_ranks(1, train_on, "2026-03-01", config, 1)
    assert found[0] == found[1] != [line["loss"] for line in records(config)]
