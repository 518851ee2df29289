"""Runs of tiny models on several ranks beside the same on one, for tests of parallel layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.harness import run_ranks
from tests.model.zoo import tiny
from tests.train.runs import records, run, tiny_config, train_quietly
from tutti.config import Config


def family_config(folder: Path, family: str, world: int = 1, overrides: dict | None = None, **changes: Any) -> Config:
    """Four steps with a tiny model of `family` (see `tests.model.zoo`, changed by `overrides`) on `world` ranks.

    changes: arguments of the train group, or of another by their dotted names.
    """
    path = folder / family
    tiny(family, vocab_size=2048, **(overrides or {})).save_pretrained(path)
    arguments = {name if "." in name else f"train.{name}": value for name, value in changes.items()}
    return tiny_config(folder, world=world, **({"model.config_path": str(path)} | arguments))


def train_family(
    folder: Path, family: str, world: int = 1, overrides: dict | None = None, **changes: Any
) -> list[dict]:
    """Lines of metrics of the run that `family_config` describes."""
    return run(family_config(folder, family, world, overrides, **changes), world)


def train_all(configs: list[Config], world: int) -> list[list[dict]]:
    """The lines of metrics of several runs, one after the other on the same ranks: starting ranks takes longer."""
    run_ranks(world, _train_each, configs, timeout=600)
    return [records(config) for config in configs]


def _train_each(configs: list[Config]) -> None:
    import tutti.train.run

    tutti.train.run.shutdown_dist = lambda: None  # type: ignore[assignment]  # the next run is in the same group
    for config in configs:
        try:
            train_quietly(config)
        except Exception as error:
            error.add_note(f"in {config.train.output_dir}")
            raise


def assert_same(got: list[dict], want: list[dict], *, loss: float = 1e-5, norm: float = 1e-4) -> None:
    """The same training: losses and gradient norms within these relative errors, and the same tokens."""
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
