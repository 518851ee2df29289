"""Experiment trackers get the same numbers under the same names, and their failures never end a run."""

from __future__ import annotations

import json
import logging
import struct
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import accelerate.tracking
import pytest

from tests.train.logging.test_metrics import MAIN, OTHER, open_metrics, record
from tests.train.runs import tiny_config
from tutti.train.logging import trackers as module
from tutti.train.run import train


class Fake(accelerate.tracking.GeneralTracker):
    """A stand-in for one of accelerate's trackers; `fails` names the methods that raise."""

    name = "swanlab"
    requires_logging_directory = False
    told: list[tuple[str, Any]]
    fails: set[str]

    def __init__(self, run_name: str, **arguments: Any) -> None:
        super().__init__()
        self._tell("made", {"project": run_name} | arguments)

    @property
    def tracker(self) -> None:
        return None

    def _tell(self, method: str, value: Any) -> None:
        self.told.append((method, value))
        if method in self.fails:
            raise ConnectionError(f"{method}: no answer\nand more")

    def start(self) -> None:
        self._tell("start", None)

    def store_init_configuration(self, values: dict) -> None:
        self._tell("config", values)

    def log(self, values: dict, step: int | None = None, **kwargs: Any) -> None:
        self._tell("log", (step, values))

    def finish(self) -> None:
        self._tell("finish", None)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Fake]]:
    monkeypatch.setattr(Fake, "told", [], raising=False)
    monkeypatch.setattr(Fake, "fails", set(), raising=False)
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "swanlab", Fake)
    real = module.importlib.util.find_spec
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: name == "swanlab" or real(name))
    yield Fake


def follow(folder: Path, steps: int = 4, **train: Any) -> None:
    metrics = open_metrics(folder, trackers=("swanlab",), **train)
    for step in range(1, steps + 1):
        metrics.log_step(record(step))
    metrics.log_eval({"step": steps, "eval_loss": 2.5, "eval_tokens": 5})
    metrics.log_text(steps, "Hi", "Hello.")
    metrics.close({"status": "finished"})


def test_a_tracker_is_told_what_metrics_jsonl_holds(tmp_path: Path, fake: type[Fake]) -> None:
    follow(tmp_path / "run", wandb_project="songs", lr=3e-4)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    told = [value for method, value in fake.told if method == "log"]
    assert told == [
        (row["step"], {name: value for name, value in row.items() if name != "step" and value is not None})
        for row in rows
    ]
    values = dict(fake.told)
    assert (values["made"]["project"], values["made"]["experiment_name"]) == ("songs", "run")
    assert (values["config"]["train.lr"], values["config"]["train.trackers"]) == (3e-4, "('swanlab',)")
    assert [method for method, _ in fake.told][-1] == "finish"
    fake.told.clear()
    follow(tmp_path / "named", wandb_name="first")
    assert dict(fake.told)["made"]["experiment_name"] == "first"


@pytest.mark.parametrize("fails", ["made", "start", "config", "log", "finish"])
def test_a_tracker_that_fails_costs_one_warning(
    tmp_path: Path, fake: type[Fake], caplog: pytest.LogCaptureFixture, fails: str
) -> None:
    fake.fails.add(fails)
    with caplog.at_level(logging.WARNING, "tutti"):
        follow(tmp_path, steps=2)
    happens = "fails, the run goes on" if fails in ("log", "finish") else "does not start, the run goes on without it"
    expected = [f"train.trackers: swanlab {happens}: ConnectionError: {fails}: no answer"]
    if fails == "log":
        expected.append("train.trackers: swanlab failed 3 times in a row and is left alone")
    assert [item.getMessage() for item in caplog.records] == expected
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_tracker_that_recovers_is_told_again(tmp_path: Path, fake: type[Fake]) -> None:
    metrics = open_metrics(tmp_path, trackers=("swanlab",))
    for step in range(1, 9):
        fake.fails = {"log"} if step % 3 else set()
        metrics.log_step(record(step))
    metrics.close({})
    assert [value[0] for method, value in fake.told if method == "log"] == list(range(1, 9))


def test_a_run_survives_its_trackers(tmp_path: Path, fake: type[Fake]) -> None:
    fake.fails |= {"log", "finish"}
    train(tiny_config(tmp_path, **{"train.trackers": ["swanlab"], "train.max_steps": 2}))
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 2


def test_tensorboard_has_the_curves_and_a_resumed_run_replaces_what_came_after(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start in (0, 2):
        metrics = open_metrics(tmp_path, start_step=start, trackers=("tensorboard",), wandb_name="first")
        for step in range(start + 1, start + 5):
            metrics.log_step(record(step, loss=start + 1 / step, **{"source_loss/books": 7.0}))
        metrics.log_eval({"step": start + 4, "eval_loss": 2.5, "eval_tokens": 5})
        metrics.close({"status": "finished"})
    events = EventAccumulator(str(tmp_path / "tensorboard" / "first")).Reload()
    assert set(events.Tags()["scalars"]) == set(record(1)) - {"step", "mfu"} | {
        "eval_loss",
        "eval_tokens",
        "source_loss/books",
    }
    losses = [(event.step, event.value) for event in events.Scalars("loss")]
    expected = [(1, 1.0), (2, 0.5), (3, 2 + 1 / 3), (4, 2.25), (5, 2.2), (6, 2 + 1 / 6)]
    assert [step for step, _ in losses] == [step for step, _ in expected]
    assert [value for _, value in losses] == pytest.approx([value for _, value in expected])
    assert [event.step for event in events.Scalars("eval_loss")] == [6]


def test_what_is_missing_is_said_on_every_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = module.importlib.util.find_spec
    for missing, tracker, message in (
        ("mlflow", "mlflow", ": mlflow needs the mlflow package: pip install mlflow, or leave it out"),
        ("comet_ml", "comet", ": comet needs the comet_ml package: pip install comet_ml, or leave it out"),
        ("accelerate", "tensorboard", ' needs the accelerate package: pip install "tutti-train[trackers]"'),
    ):
        with monkeypatch.context() as patch:
            without: Any = lambda name, gone=missing: None if name == gone else real(name)  # noqa: E731
            patch.setattr(module.importlib.util, "find_spec", without)
            for world in (MAIN, OTHER):
                with pytest.raises(ValueError) as caught:
                    open_metrics(tmp_path, world, trackers=(tracker,))
                assert str(caught.value) == f"train.trackers{message}"


def test_wandb_among_the_trackers_is_use_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    from tutti.config import Config, TrainConfig

    def names(**train: Any) -> list[str]:
        return module.tracker_names(Config(train=TrainConfig(**train)))

    assert (
        names(use_wandb=True) == names(trackers=("wandb",)) == names(use_wandb=True, trackers=("wandb",)) == ["wandb"]
    )
    assert names(use_wandb=True, trackers=("mlflow", "wandb", "mlflow")) == ["wandb", "mlflow"]


def test_only_known_trackers() -> None:
    from tutti.config.load import ConfigError, load

    assert load(["--train.trackers", "tensorboard,mlflow"], None).train.trackers == ("tensorboard", "mlflow")
    with pytest.raises(
        ConfigError, match=r"^train.trackers: 'tensorbord' is not one of .*; did you mean tensorboard\?$"
    ):
        load(["--train.trackers", "mlflow,tensorbord"], None)


def scan(path: Path) -> list[Any]:
    """The records of a .wandb file: LevelDB's log format (blocks of 32 KiB) after 7 bytes of its own."""
    from wandb.proto import wandb_internal_pb2

    data, position, part, found = path.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        if position % 32768 > 32768 - 7:
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        part += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            item = wandb_internal_pb2.Record()
            item.ParseFromString(part)
            found.append(item)
            part = b""
    return found


def scan_whole(path: Path) -> list[Any]:
    """The records of a .wandb file, once wandb's own process has written the last one."""
    for _ in range(200):
        found = scan(path)
        if found and found[-1].WhichOneof("record_type") == "exit":
            return found
        time.sleep(0.05)
    raise AssertionError(f"{path} was not finished")


def test_wandb_offline_holds_the_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    options = {"use_wandb": True, "wandb_project": "songs", "wandb_name": "first", "wandb_id": "abc123", "lr": 3e-4}
    for start in (0, 3):
        # Runs of one second share their folder's name, so each gets an output folder of its own.
        metrics = open_metrics(tmp_path / str(start), start_step=start, **options)
        for step in range(start + 1, start + 5):
            metrics.log_step(record(step))
        metrics.log_eval({"step": start + 4, "eval_loss": 2.5, "eval_tokens": 5})
        metrics.log_text(start + 4, "Hi", "Hello.")
        metrics.log_text(start + 4, "Bye", "Goodbye.", right=False)
        metrics.close({"status": "finished", "final_loss": 0.125})
    files = sorted(tmp_path.glob("*/wandb/offline-run-*/run-abc123.wandb"))
    assert files, "no run was recorded"
    records = [item for file in files for item in scan_whole(file)]
    rows = [
        {(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in found.history.item}
        for found in records
        if found.WhichOneof("record_type") == "history"
    ]
    losses = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    assert losses == [(step, 3 / step) for step in (1, 2, 3, 4, 4, 5, 6, 7)]
    assert [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row] == [(4, 2.5), (7, 2.5)]
    tables = [row for row in rows if any(name.startswith("texts") for name in row)]
    assert [row["step"] for row in tables] == [4, 7], "one table for the texts of a step"
    shown = [json.loads(path.read_text()) for path in tmp_path.glob("*/wandb/*/files/media/table/texts_*.json")]
    lines = [line for table in shown for line in table["data"]]
    assert [4, "Hi", "Hello.", None] in lines and [7, "Bye", "Goodbye.", False] in lines
    run = next(found.run for found in records if found.WhichOneof("record_type") == "run")
    assert (run.project, run.display_name, run.run_id) == ("songs", "first", "abc123")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["train"]["lr"] == 3e-4
    summary = {
        item.key or "/".join(item.nested_key): json.loads(item.value_json)
        for found in records
        if found.WhichOneof("record_type") == "summary"
        for item in found.summary.update
    }
    assert summary["final_loss"] == 0.125


def test_missing_wandb_is_an_error_on_every_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    for dist in (MAIN, OTHER):
        with pytest.raises(ValueError, match=r"train.use_wandb needs the wandb package: pip install wandb"):
            open_metrics(tmp_path, dist, use_wandb=True)


def test_wandb_goes_offline_without_a_network(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class NotFound(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), NotFound)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    assert module._unreachable(address) is None
    server.shutdown()
    server.server_close()
    assert "cannot be reached" in (module._unreachable(address) or "")

    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setattr(module, "_unreachable", lambda url: "no network")
    with caplog.at_level(logging.INFO, "tutti"):
        assert module._wandb_mode() == "offline"
    assert [item.getMessage() for item in caplog.records] == [
        "wandb: no network, so the run is recorded offline (`wandb sync` uploads it later)"
    ]
