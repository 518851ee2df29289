"""Runs that get signals, fail, or start with errors: their output stays complete, and they can be resumed."""

from __future__ import annotations

import errno
import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.harness import run_ranks
from tests.train.runs import QUICKSTART, records, run, tiny_config, train_or_error, train_quietly, write_model_config
from tutti.config import Config


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def exported(source: Path, out: Path) -> dict[str, Any]:
    import json

    from tutti.kinds.export import export

    logging.disable(logging.INFO)
    export(str(source), str(out))
    return json.loads((out / "config.json").read_text())


def test_a_failed_resume_leaves_everything_as_it_was(tmp_path):
    changes: dict[str, Any] = {"train.max_steps": 2, "train.save_steps": 1}
    config = tiny_config(tmp_path, **changes)
    run(config)
    output = Path(config.train.output_dir)
    before = files_of(output)
    # The same folder with another model and other data: the error in the data is found last.
    write_model_config(tmp_path / "other", rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    wrong = tiny_config(
        tmp_path,
        **changes,
        **{"model.config_path": str(tmp_path / "other"), "train.load_checkpoint_path": "auto", "data.max_seq_len": 64},
    )
    with pytest.raises(AssertionError, match="set it back to go on"):
        run(wrong)
    assert files_of(output) == before
    # An export uses only the checkpoint, whatever happened to the original files.
    want = run_ranks(1, exported, output, tmp_path / "before")[0]
    (output / "config.yaml").write_text("train: {}\n")
    write_model_config(tmp_path / "model", rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    assert run_ranks(1, exported, output, tmp_path / "after")[0] == want
    assert want["rope_parameters"]["rope_theta"] == 10000.0
    assert files_of(tmp_path / "before") == files_of(tmp_path / "after")


def stop_within(config: Config, step: int) -> None:
    from tutti.train.step import TrainStep

    original = TrainStep.step

    def step_and_signal(self: Any, batch: Any, totals: Any) -> None:
        original(self, batch, totals)
        if batch.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    TrainStep.step = step_and_signal  # type: ignore[method-assign]
    train_quietly(config)


@pytest.mark.parametrize("world", [1, 2])
def test_totals_since_the_last_line_are_resumed(tmp_path, world):
    changes: dict[str, Any] = {"train.log_steps": 3, "train.max_steps": 6, "train.enable_full_determinism": True}
    config = tiny_config(tmp_path / "whole", world=world, **changes)
    expected = run(config, world)
    half = tiny_config(tmp_path / "half", world=world, **changes)
    run_ranks(world, stop_within, half, 5)
    resumed = run(
        tiny_config(tmp_path / "half", world=world, **changes, **{"train.load_checkpoint_path": "auto"}), world
    )
    assert [line["step"] for line in resumed] == [3, 6]
    timing = {"step_seconds", "data_seconds", "tokens_per_second", "mfu", "memory_gib"}
    for ours, theirs in zip(resumed, expected, strict=True):
        assert {key: ours[key] for key in ours.keys() - timing} == {key: theirs[key] for key in theirs.keys() - timing}
        assert ours["step_seconds"] > 0


def signalled_while_saving(config: Config) -> str:
    """Two requests to stop within a step, and more of both kinds while its checkpoint is written and after the end."""
    from tutti.checkpoint import dcp
    from tutti.train.step import TrainStep

    original, write = TrainStep.step, dcp.write

    def step_and_signal(self: Any, batch: Any, totals: Any) -> None:
        original(self, batch, totals)
        if batch.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)

    def write_and_signal(*args: Any) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        write(*args)

    TrainStep.step, dcp.write = step_and_signal, write_and_signal  # type: ignore[method-assign, assignment]
    train_quietly(config)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.05)
    return "alive"


def test_any_number_of_signals_is_one_stop(tmp_path):
    config = tiny_config(tmp_path, world=2, **{"train.max_steps": 9})
    assert run_ranks(2, signalled_while_saving, config) == ["alive"] * 2
    assert [line["step"] for line in records(config)] == [1, 2]
    checkpoints = Path(config.train.output_dir) / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["global_step_2", "latest", "start.json"]


def fails_while_saving(config: Config) -> str:
    from tutti.checkpoint import dcp
    from tutti.train.step import TrainStep

    original, write = TrainStep.step, dcp.write

    def step_or_fail(self: Any, batch: Any, totals: Any) -> None:
        if batch.step == 3:
            raise ZeroDivisionError("in step 3")
        original(self, batch, totals)

    def write_slowly(*args: Any) -> None:
        time.sleep(0.5)
        write(*args)

    TrainStep.step, dcp.write = step_or_fail, write_slowly  # type: ignore[method-assign, assignment]
    try:
        train_quietly(config)
    except ZeroDivisionError as error:
        return str(error)
    return "nothing failed"


def test_a_save_under_way_survives_that_training_fails(tmp_path):
    config = tiny_config(tmp_path, **{"train.save_steps": 2, "train.save_async": True})
    assert run_ranks(1, fails_while_saving, config) == ["in step 3"]
    resumed = run(tiny_config(tmp_path, **{"train.load_checkpoint_path": "auto"}))
    assert [line["step"] for line in resumed] == [1, 2, 3, 4]


def fails_in_the_background(config: Config) -> str:
    from tutti.core import files
    from tutti.train.step import TrainStep

    original, write = TrainStep.step, files.write_synced

    def step_slowly(self: Any, batch: Any, totals: Any) -> None:
        time.sleep(0.2)
        original(self, batch, totals)

    def write_or_fail(path: Path, text: str) -> None:
        if path.name == "rng_1.json" and "global_step_4" in path.parent.name:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, text)

    TrainStep.step, files.write_synced = step_slowly, write_or_fail  # type: ignore[method-assign]
    return train_or_error(config)


def test_a_save_that_fails_in_the_background_ends_the_run_on_all_ranks_soon(tmp_path):
    settings: dict[str, Any] = {"train.save_steps": 4, "train.save_async": True, "train.max_steps": 30}
    config = tiny_config(tmp_path, world=2, **settings)
    for message in run_ranks(2, fails_in_the_background, config):
        assert "could not save" in message and "global_step_4" in message
        assert "rng_1.json: No space left on device" in message
    assert records(config)[-1]["step"] in (4, 5, 6, 7), "not only with the next save"
    checkpoints = Path(config.train.output_dir or "") / "checkpoints"
    assert not list(checkpoints.glob("*global_step_*"))


def stopped_in_evaluation(config: Config) -> None:
    """Train, and be asked to stop once the second evaluation has begun."""
    from tutti.parallel.pipeline.executor import SequentialExecutor

    original, seen = SequentialExecutor.evaluate, []

    def evaluate(self: Any, *args: Any, **options: Any) -> Any:
        seen.append(1)
        if len(seen) == 4 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args, **options)

    SequentialExecutor.evaluate = evaluate  # type: ignore[method-assign]
    train_quietly(config)


def test_an_evaluation_that_was_left_is_made_up_for(tmp_path):
    """Evaluations have three batches; the stop comes in the first batch of the second one, on one rank."""
    rows = (QUICKSTART / "chat_eval.jsonl").read_text().splitlines()
    (tmp_path / "eval.jsonl").write_text("\n".join(rows[:24]))
    settings: dict[str, Any] = {
        "data.eval_path": str(tmp_path / "eval.jsonl"), "train.eval_steps": 1, "train.max_steps": 3,
        "train.dyn_bsz": False, "train.enable_full_determinism": True,
    }  # fmt: skip
    whole = run(tiny_config(tmp_path / "whole", world=2, **settings), 2)
    config = tiny_config(tmp_path / "half", world=2, **settings)
    run_ranks(2, stopped_in_evaluation, config)
    assert [line["step"] for line in records(config)] == [1, 1, 2]
    resumed = run(tiny_config(tmp_path / "half", world=2, **settings, **{"train.load_checkpoint_path": "auto"}), 2)
    kept = ("step", "loss", "grad_norm", "eval_loss", "eval_tokens")
    assert [{key: line.get(key) for key in kept} for line in resumed] == [
        {key: line.get(key) for key in kept} for line in whole
    ]


def test_two_runs_in_one_folder(tmp_path):
    """The second run stops, and the first does not notice."""
    config = tiny_config(tmp_path, **{"train.max_steps": 2})
    (message,) = run_ranks(1, starts_a_second, config)
    assert "another run is going on there (process " in message
    assert [line["step"] for line in records(config)] == [1, 2]


def starts_a_second(config: Config) -> str:
    import multiprocessing

    from tutti.train.step import TrainStep

    original, found = TrainStep.step, []

    def step(self: Any, batch: Any, totals: Any) -> None:
        original(self, batch, totals)
        if batch.step == 1:
            parent, child = multiprocessing.Pipe()
            pid = os.fork()
            if pid == 0:
                child.send(second(config))
                os._exit(0)
            found.append(parent.recv())
            os.waitpid(pid, 0)

    TrainStep.step = step  # type: ignore[method-assign]
    train_quietly(config)
    return found[0]


def second(config: Config) -> str:
    import torch

    from tutti.core.dist import World
    from tutti.train.output import claim_output

    try:
        world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
        with claim_output(Path(config.train.output_dir or ""), world, fresh=False):
            return "two at once"
    except ValueError as error:
        return str(error)
