"""Runs of tiny models on several ranks and on one, for tests of parallel layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.harness import regroup, run_ranks
from tests.model.zoo import tiny
from tests.train.runs import records, run, tiny_config, train_quietly
from tutti.config import Config


def family_config(folder: Path, family: str, world: int = 1, overrides: dict | None = None, **changes: Any) -> Config:
    """Four steps with a tiny model of `family` (see `tests.model.zoo`, changed by `overrides`) on `world` ranks.

    changes: arguments of the train group, or of another by their dotted names.
    """
    path = folder / family
    tiny(family, **({"vocab_size": 2048} | (overrides or {}))).save_pretrained(path)
    arguments = {name if "." in name else f"train.{name}": value for name, value in changes.items()}
    return tiny_config(folder, world=world, **({"model.config_path": str(path)} | arguments))


def train_family(
    folder: Path, family: str, world: int = 1, overrides: dict | None = None, **changes: Any
) -> list[dict]:
    """The metrics lines of the run that `family_config` describes."""
    return run(family_config(folder, family, world, overrides, **changes), world)


def train_all(configs: list[Config], world: int) -> list[list[dict]]:
    """The metrics lines of several runs, one after the other on the same ranks, because starting ranks takes longer."""
    problems = [problem for problem in try_all(configs, world) if problem is not None]
    assert not problems, problems[0]
    return [records(config) for config in configs]


def try_all(configs: list[Config], world: int) -> list[str | None]:
    """Train them all; the error of each run, None where it had none. Those after a failure go on with new ranks."""
    problems: list[str | None] = []
    while len(problems) < len(configs):
        left = configs[len(problems) :]
        try:
            run_ranks(world, _train_each, left, timeout=180 + 60 * len(left))
        except (AssertionError, TimeoutError) as error:
            done = [_mark(config).exists() for config in left].index(False)
            problems += [None] * done + [str(error)]
        else:
            problems += [None] * len(left)
    return problems


def _train_each(configs: list[Config]) -> None:
    for config in configs:
        regroup()
        train_quietly(config)
        _mark(config).touch()


def _mark(config: Config) -> Path:
    """A file that exists after a successful run."""
    return Path(config.train.output_dir or "") / "ended"


def assert_same(got: list[dict], want: list[dict], *, loss: float = 1e-5, norm: float = 1e-4) -> None:
    """Assert equal training: losses and gradient norms within these relative errors, and the same tokens."""
    assert [line["step"] for line in got] == [line["step"] for line in want]
    for ours, theirs in zip(got, want, strict=True):
        where = f"step {ours['step']}"
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=loss), where
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=norm), where
        for key in ("tokens", "trained_tokens", "samples"):
            assert ours[key] == theirs[key], where
        for key in theirs:
            if key.startswith("source_loss/") or key == "router_loss":
                assert ours[key] == pytest.approx(theirs[key], rel=loss), where
