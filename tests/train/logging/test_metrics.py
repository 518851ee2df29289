"""metrics.jsonl, its truncation on resume, bounded curves, the progress line, Weights & Biases."""

from __future__ import annotations

import itertools
import json
import logging
import math
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tutti.config import Config, TrainConfig
from tutti.core.dist import World
from tutti.train.logging.console import Progress, duration, fit, next_milestone, si
from tutti.train.logging.history import Buckets, cut_back, read_history
from tutti.train.logging.metrics import Metrics

MAIN = World(rank=0, size=2, local_rank=0, device=torch.device("cpu"))
OTHER = World(rank=1, size=2, local_rank=1, device=torch.device("cpu"))


def record(step: int, **changes: Any) -> dict[str, Any]:
    values = {
        "step": step,
        "epoch": 0,
        "loss": 3 / step,
        "grad_norm": 1.0,
        "lr": 1e-4,
        "tokens": 1000,
        "trained_tokens": 800,
        "samples": 10,
        "step_seconds": 0.5,
        "tokens_per_second": 2000.0,
        "mfu": None,
        "memory_gib": 1.5,
        "packing": 0.97,
    }
    return values | changes


def open_metrics(folder: Path, world: World = MAIN, start_step: int = 0, **train: Any) -> Metrics:
    config = Config(train=TrainConfig(output_dir=str(folder), **train))
    return Metrics(config, world, total_steps=10, run_info={"name": "a run"}, start_step=start_step)


def lines(path: Path) -> list[dict[str, Any]]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_lines_keep_every_bit_and_are_flushed(tmp_path: Path) -> None:
    metrics = open_metrics(tmp_path)
    loss = 0.1 + 0.2
    metrics.log_step(record(1, loss=loss, grad_norm=np.float32(0.1), tokens=torch.tensor(7)))
    metrics.log_eval({"step": 1, "eval_loss": 1 / 3, "eval_tokens": 5})
    train, evaluated = lines(tmp_path / "metrics.jsonl")
    assert train["loss"] == loss
    assert train["grad_norm"] == float(np.float32(0.1))
    assert train["tokens"] == 7
    assert train["mfu"] is None
    assert evaluated == {"step": 1, "eval_loss": 1 / 3, "eval_tokens": 5}
    metrics.close({"status": "finished"})
    metrics.close({"status": "failed"})
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "finished"


def test_non_finite_values_are_null_and_named(tmp_path: Path) -> None:
    with open_metrics(tmp_path) as metrics:
        metrics.log_step(record(1, loss=math.nan, grad_norm=-math.inf))
    (line,) = lines(tmp_path / "metrics.jsonl")
    assert line["loss"] is None
    assert line["non_finite"] == {"loss": "nan", "grad_norm": "-inf"}
    assert read_history(tmp_path / "metrics.jsonl").non_finite == [(1, "loss is nan"), (1, "grad_norm is -inf")]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with open_metrics(tmp_path / "run", OTHER) as metrics:
        metrics.log_step(record(1))
        metrics.log_eval({"step": 1, "eval_loss": 1.0, "eval_tokens": 5})
        metrics.log_text(1, "a", "b")
    assert not (tmp_path / "run").exists()


def test_an_exception_closes_as_failed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="too hot"), open_metrics(tmp_path) as metrics:
        metrics.log_step(record(1))
        raise ValueError("too hot")
    run = json.loads((tmp_path / "run.json").read_text())
    assert (run["status"], run["message"]) == ("failed", "ValueError: too hot")


def test_resume_leaves_one_clean_history_and_loses_nothing(tmp_path: Path) -> None:
    first = open_metrics(tmp_path)
    for step in range(1, 6):
        first.log_step(record(step))
    first.log_eval({"step": 3, "eval_loss": 2.0, "eval_tokens": 5})
    first.log_text(2, "early", "text")
    first.log_text(5, "late", "text")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    first._sinks[-1].close({"status": "running"})

    cut_back(tmp_path, 3)
    with open_metrics(tmp_path, start_step=3) as second:
        for step in range(4, 8):
            second.log_step(record(step, loss=0.25))
    kept = lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in kept] == [1, 2, 3, 3, 4, 5, 6, 7]
    assert [line["loss"] for line in kept if line["step"] > 3] == [0.25] * 4
    superseded = (tmp_path / "metrics.superseded.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in superseded[:2]] == [3 / 4, 3 / 5]
    assert superseded[2:] == ['{"step": 6, "lo']
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["resumed"] == [3]
    assert [text["prompt"] for text in run["texts"]] == ["early"]


def test_cut_back_without_anything_to_cut(tmp_path: Path) -> None:
    assert cut_back(tmp_path, 0) == 0
    with open_metrics(tmp_path) as metrics:
        metrics.log_step(record(1))
    assert cut_back(tmp_path, 1) == 0
    assert not (tmp_path / "metrics.superseded.jsonl").exists()


@pytest.mark.parametrize("stride", [1, 7])
def test_buckets_are_bounded_and_keep_sums_and_extremes(stride: int) -> None:
    generator = random.Random(stride)
    values = {step: generator.gauss(0, 1) for step in range(stride, 3000 * stride, stride)}
    values[stride * 1234] = 99.0
    buckets, gaps = Buckets(limit=50), 0
    for step, value in values.items():
        if step % 5 == 0:
            gaps += 1
            buckets.add(step, {"other": 1.0, "x": math.nan})
        else:
            buckets.add(step, {"x": value})
    known = {step: value for step, value in values.items() if step % 5}
    filled = [bucket for bucket in buckets.columns["x"] if bucket]
    assert 25 <= len(buckets.ends) <= 50
    assert all(len(column) == len(buckets.ends) for column in buckets.columns.values())
    assert buckets.ends == sorted(buckets.ends)
    assert buckets.ends[-1] == max(values)
    assert sum(bucket[0] for bucket in filled) == len(known)
    assert sum(bucket[0] for bucket in buckets.columns["other"] if bucket) == gaps
    assert math.isclose(sum(bucket[1] for bucket in filled), sum(known.values()), abs_tol=1e-9)
    assert max(bucket[3] for bucket in filled) == max(known.values())
    assert min(bucket[2] for bucket in filled) == min(known.values())
    for end, bucket in zip(buckets.ends, buckets.columns["x"], strict=True):
        start = (end - 1) // buckets.width * buckets.width
        inside = [value for step, value in known.items() if start < step <= start + buckets.width]
        assert bucket is None or (bucket[0], bucket[3]) == (len(inside), max(inside))


def test_history_sums_over_logged_steps(tmp_path: Path) -> None:
    with open_metrics(tmp_path) as metrics:
        for step in (2, 4, 6):
            metrics.log_step(record(step, **{"source_tokens/a": 500, "source_tokens/b": 300}))
        metrics.log_eval({"step": 4, "eval_loss": 1.5, "eval_tokens": 5, "eval_accuracy": 0.5})
        metrics.log_eval({"step": 6, "eval_loss": 1.75, "eval_tokens": 5, "eval_accuracy": 0.75})
    history = read_history(tmp_path / "metrics.jsonl")
    assert (history.tokens, history.trained_tokens, history.samples) == (3000, 2400, 30)
    assert history.source_tokens == {"a": 1500, "b": 900}
    assert history.best_eval["step"] == 4
    assert history.last_eval["eval_accuracy"] == 0.75
    assert history.seconds == pytest.approx(3 * 1000 / 2000)


def progress_lines(caplog: pytest.LogCaptureFixture, steps: int, seconds: float, **changes: Any) -> list[str]:
    clock = iter(seconds * i for i in range(10 * steps))
    now = [0.0]
    history = read_history(Path("absent"))
    progress = Progress(steps, 0, history, live=False, clock=lambda: now[0])
    with caplog.at_level(logging.INFO, "tutti"):
        for step in range(1, steps + 1):
            now[0] = next(clock) + seconds
            progress.step(record(step, **changes))
    return [item.getMessage() for item in caplog.records]


def test_plain_lines_come_at_1_2_5_and_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    shown = progress_lines(caplog, 333, 0.01)
    steps = [int(line.split("/")[0].removeprefix("step ")) for line in shown]
    assert steps == [1, 2, 5, 10, 20, 50, 100, 200, 333]
    assert shown[0].startswith("step   1/333  loss 3.000  lr 1.0e-04  2.0k tok/s")
    assert "took 0:03" in shown[-1]


def test_plain_lines_come_at_least_every_30_seconds(caplog: pytest.LogCaptureFixture) -> None:
    shown = progress_lines(caplog, 100, 15.0)
    steps = [int(line.split("/")[0].removeprefix("step ")) for line in shown]
    assert max(b - a for a, b in itertools.pairwise(steps)) <= 2
    assert "ETA 20:00" in next(line for line in shown if line.startswith("step  20/100"))


def test_plain_lines_fit_80_columns(caplog: pytest.LogCaptureFixture) -> None:
    shown = progress_lines(caplog, 60, 400_000.0, loss=1234567.0, tokens_per_second=1.25e6, mfu=0.415, memory_gib=640.0)
    assert max(len("12:34:56 I " + line) for line in shown) <= 80
    assert all("loss" in line and "ETA" in line for line in shown[:-1])


def test_live_block_fits_80_columns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    history = read_history(Path("absent"))
    history.add({"step": 1, "eval_loss": 2.125, "eval_tokens": 1})
    progress = Progress(123456, 0, history, live=True)
    for step in range(1, 4):
        progress.step(record(step, mfu=0.42))
    progress.close({})
    shown = capsys.readouterr().err
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown).replace("\r", "\n")
    assert max(len(line.rstrip()) for line in plain.splitlines()) <= 80
    last = plain.strip().splitlines()[-1]
    assert "loss 1.000 avg" in last
    assert "eval 2.125" in last
    assert "MFU 42%" in last
    assert "3/123456" in plain


def test_evaluations_are_lines_of_their_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "tutti"), open_metrics(tmp_path) as metrics:
        metrics.log_eval({"step": 2, "eval_loss": 1.25, "eval_tokens": 5, "eval_accuracy": 0.5})
        metrics.log_eval({"step": 4, "eval_loss": 1.5, "eval_tokens": 5})
    shown = [item.getMessage() for item in caplog.records]
    assert "step 2/10  eval loss 1.250  accuracy 50.00%" in shown
    assert "step 4/10  eval loss 1.500  best 1.250 at step 2" in shown


def test_right_answers_are_counted_in_a_line_and_a_record(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "tutti"), open_metrics(tmp_path) as metrics:
        metrics.log_answers(0, [False] * 8, [])
        assert not (tmp_path / "metrics.jsonl").exists()
        metrics.log_step(record(1))
        metrics.log_eval({"step": 1, "eval_loss": 1.5, "eval_tokens": 5})
        metrics.log_answers(1, [True] * 7 + [False], [True, False])
    shown = [item.getMessage() for item in caplog.records]
    assert "step 0/10  0 of 8 answers are right (0.0%)" in shown
    assert "step 1/10  7 of 8 answers are right (87.5%)" in shown
    assert "step 1/10  1 of 2 answers are right (50.0%), to rows that it is not trained on" in shown
    found = [(line["step"], line.get("sample_accuracy")) for line in lines(tmp_path / "metrics.jsonl")]
    assert found == [(0, 0.0), (1, None), (1, None), (1, 0.875)]
    history = read_history(tmp_path / "metrics.jsonl")
    right = {"sample_accuracy": 0.875, "sample_answers": 8, "unseen_accuracy": 0.5, "unseen_answers": 2}
    assert history.answers == {"step": 1, **right}
    assert (history.last["step"], history.last_eval["eval_loss"], history.evals.ends) == (1, 1.5, [0, 1])


def test_first_texts_are_kept_beside_the_newest(tmp_path: Path) -> None:
    with open_metrics(tmp_path) as metrics:
        for step in range(100):
            metrics.log_text(step, "prompt", f"text {step}")
    texts = json.loads((tmp_path / "run.json").read_text())["texts"]
    assert [text["step"] for text in texts] == [0, *range(50, 100)]


def test_formats() -> None:
    assert [si(value) for value in (0, 950, 1234, 12_345, 999_999, 4.5e6)] == [
        "0",
        "950",
        "1.2k",
        "12.3k",
        "1.0M",
        "4.5M",
    ]
    assert [duration(value) for value in (7, 201, 7384, 273_900)] == ["0:07", "3:21", "2:03:04", "3d 04:05"]
    assert [next_milestone(step) for step in (1, 2, 5, 10, 20, 50)] == [2, 5, 10, 20, 50, 100]
    assert fit([(9, "aaaa"), (1, "bbbb"), (5, "cccc")], 11) == "aaaa  cccc"


def test_rich_and_wandb_are_imported_when_used() -> None:
    code = "import sys, tutti.train.logging.metrics; print({'rich', 'wandb'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "set()"
