"""A run that is killed at random moments, again and again, gives bit-equal results.

There are 24 kills, 200 with `make soak`. A start takes half a second, as forked ranks have imported everything.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from tests.harness import run_ranks
from tests.train.runs import records, tiny_config, train_quietly
from tutti.config import Config

KILLS, STEPS = 200 if os.environ.get("SOAK") else 24, 60


def config_in(folder: Path, **changes: Any) -> Config:
    settings = {
        "train.data_parallel_mode": "fsdp2",
        "train.max_steps": STEPS,
        "train.lr": 1e-3,
        "train.save_steps": 3,
        "train.save_async": True,
        "train.max_checkpoints": 2,
        "train.save_hf_weights": True,
        "train.load_checkpoint_path": "auto",
        "train.enable_full_determinism": True,
    }
    return tiny_config(folder, world=2, **settings | changes)


def train_and_die(config: Config, rank: int, seconds: float) -> None:
    """Train, and have one rank killed after so many seconds, if it has not ended by then."""
    if int(os.environ["RANK"]) == rank:

        def kill() -> None:
            time.sleep(seconds)
            os.kill(os.getpid(), signal.SIGKILL)

        threading.Thread(target=kill, daemon=True).start()
    train_quietly(config)


def time_training(config: Config) -> float:
    """The seconds that training takes, without the start of processes."""
    began = time.monotonic()
    train_quietly(config)
    return time.monotonic() - began


def outcome(config: Config) -> tuple[dict[str, bytes], list[tuple[int, float, float]]]:
    """The final weights, and step, loss and gradient norm of each step."""
    folder = Path(config.train.output_dir) / "hf" / "final"
    weights = {name: tensor.numpy().tobytes() for name, tensor in load_file(folder / "model.safetensors").items()}
    steps = [line for line in records(config) if "loss" in line]
    return weights, [(line["step"], line["loss"], line["grad_norm"]) for line in steps]


def test_a_run_that_is_killed_at_random_moments_ends_bit_equal(tmp_path):
    straight = config_in(tmp_path / "straight")
    longest = max(run_ranks(2, time_training, straight))
    want, random_source, kills, round_number = outcome(straight), random.Random(0), 0, 0
    while kills < KILLS:
        round_number += 1
        config = config_in(tmp_path / str(round_number))
        while True:
            try:
                # Fractions of the time of a full run: some die while they start, while they save, and near the end.
                run_ranks(
                    2, train_and_die, config, random_source.randrange(2), random_source.uniform(0.1, 0.6) * longest
                )
            except AssertionError as error:
                if "died" not in str(error):
                    raise
                kills += 1
                if kills == KILLS:
                    run_ranks(2, train_quietly, config)
                    break
            else:
                break
        assert outcome(config) == want, f"round {round_number}, after {kills} kills"
    assert kills == KILLS
