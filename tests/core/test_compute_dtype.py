"""The compute dtype of a run is the faster one, measured once and equal on all ranks, also if bf16 is slow."""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.harness import run_ranks
from tests.train.runs import QUICKSTART, write_model_config
from tutti.config.load import from_dict, load
from tutti.core import compute_dtype as module
from tutti.core import device
from tutti.core.compute_dtype import compute_dtype, settle_compute_dtype, slow_dtypes
from tutti.core.dist import World, init_world

ONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
SLOW_BF16 = {torch.float32: 80e9, torch.bfloat16: 1.25e9, torch.float16: 1e9}
FAST_BF16 = {torch.float32: 80e9, torch.bfloat16: 200e9, torch.float16: 1e9}
WITHOUT_BF16 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
"""Makes a newer x86 processor multiply like one without bf16 instructions."""


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("tutti"), "propagate", True)
    caplog.set_level(logging.INFO, logger="tutti")
    return caplog


def pretend(monkeypatch: pytest.MonkeyPatch, rates: dict[torch.dtype, float]) -> None:
    for place in (module, device):
        monkeypatch.setattr(place, "product_rates", lambda *dtypes: {dtype: rates[dtype] for dtype in dtypes})


@pytest.mark.parametrize(
    ("rates", "train", "before", "expected"),
    [
        (SLOW_BF16, {}, None, "float32"),
        (FAST_BF16, {}, None, "bfloat16"),
        (SLOW_BF16, {"compute_dtype": "bfloat16"}, None, "bfloat16"),
        (FAST_BF16, {"compute_dtype": "float32"}, None, "float32"),
        (FAST_BF16, {"compute_dtype": "float32"}, "bfloat16", "float32"),
        (SLOW_BF16, {"enable_mixed_precision": False}, None, "bfloat16"),
        (SLOW_BF16, {"enable_mixed_precision": False, "compute_dtype": "float32"}, None, "float32"),
        # A checkpoint's dtype is kept if both are about as fast, but not if it is far slower.
        (SLOW_BF16 | {torch.bfloat16: 70e9}, {}, "bfloat16", "bfloat16"),
        (SLOW_BF16 | {torch.bfloat16: 90e9}, {}, "float32", "float32"),
        (SLOW_BF16, {}, "bfloat16", "float32"),
        (FAST_BF16, {}, "float32", "bfloat16"),
    ],
)
def test_the_faster_dtype_unless_another_is_asked_for(monkeypatch, lines, rates, train, before, expected) -> None:
    pretend(monkeypatch, rates)
    config = settle_compute_dtype(from_dict({"train": train}), ONE, before=before)
    assert config.train.compute_dtype == expected
    assert compute_dtype(config.train) == getattr(torch, expected)
    warned = [record.getMessage() for record in lines.records if record.levelno == logging.WARNING]
    assert bool(warned) == (expected == "bfloat16" and rates[torch.bfloat16] < 10e9)
    for line in warned:
        assert "80 GFLOP/s in float32" in line and "1.25 GFLOP/s in bfloat16" in line and "train.compute_dtype" in line
        assert ("train.enable_mixed_precision" in line) == ("enable_mixed_precision" in train)


def test_both_rates_are_told_in_one_line(monkeypatch, lines) -> None:
    pretend(monkeypatch, FAST_BF16)
    settle_compute_dtype(from_dict({}), ONE)
    (line,) = [record.getMessage() for record in lines.records]
    assert (
        line == "computing in bfloat16: a core multiplies matrices at 80 GFLOP/s in float32 and 200 GFLOP/s in bfloat16"
    )


def test_all_ranks_compute_in_what_rank_0_found() -> None:
    assert run_ranks(2, _choice_of_ranks_that_differ) == [("bfloat16", set()), ("bfloat16", set())]


def _choice_of_ranks_that_differ() -> tuple[str, set[str]]:
    ranks = init_world(torch.device("cpu"))
    rates = FAST_BF16 if ranks.is_main else SLOW_BF16
    with pytest.MonkeyPatch.context() as monkeypatch:
        pretend(monkeypatch, rates)
        slow = {str(dtype) for dtype in slow_dtypes(ranks)} - {"torch.float16"}
        return settle_compute_dtype(from_dict({}), ranks).train.compute_dtype, slow


def test_what_is_slower_than_fp32_is_slow(monkeypatch) -> None:
    pretend(monkeypatch, FAST_BF16)
    assert slow_dtypes(ONE) == {torch.float16}


def test_measured_rates_and_threads_that_stay() -> None:
    before = torch.get_num_threads()
    rates = device.product_rates(torch.float32, torch.bfloat16)
    assert all(rate > 1e7 for rate in rates.values())
    assert device.faster_dtype(ONE.device) == max(rates, key=lambda dtype: rates[dtype])
    # A large product on all cores is no slower than a small one on one core (but for what else runs meanwhile).
    assert device.peak_flops(ONE.device) > max(rates.values()) / 5
    assert torch.get_num_threads() == before


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the variables are those of x86 processors")
def test_a_run_on_a_processor_without_bf16(tmp_path: Path) -> None:
    """From the command line: trains in fp32, says why, records it, and writes the configuration as requested."""
    model = write_model_config(tmp_path / "model")
    arguments = {
        "model.config_path": model,
        "model.tokenizer_path": QUICKSTART,
        "data.train_path": QUICKSTART / "chat.jsonl",
        "data.max_seq_len": 128,
        "data.num_workers": 0,
        "train.output_dir": tmp_path / "out",
        "train.max_steps": 2,
        "train.save_hf_weights": False,
    }
    command = [sys.executable, "-m", "tutti", "train", *(f"{name}={value}" for name, value in arguments.items())]
    done = subprocess.run(command, env=os.environ | WITHOUT_BF16, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (told,) = [line for line in done.stderr.splitlines() if "computing in" in line]
    assert "computing in float32: a core multiplies matrices at" in told and "GFLOP/s in bfloat16" in told
    manifest = json.loads((tmp_path / "out/checkpoints/global_step_2/manifest.json").read_text())
    assert manifest["facts"]["compute_dtype"] == "float32"
    assert load([str(tmp_path / "out/config.yaml")]).train.compute_dtype == "auto"
    steps = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert all(0 < step["mfu"] <= 1 for step in steps)


def test_few_kernels_of_products_are_kept_unless_the_user_says_how_many(monkeypatch) -> None:
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "7")
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "")
    monkeypatch.delenv("LRU_CACHE_CAPACITY")
    device.keep_few_kernels()
    assert (os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"], os.environ["LRU_CACHE_CAPACITY"]) == ("7", "256")
