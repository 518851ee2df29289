"""A run can stop after any step: the rest of it is bit-equal, for any kind of data.

The runs cover all pairs of values of the data settings. Each saves after every step, and from each checkpoint another
run resumes in a separate folder. Losses, gradient norms, samples and weights after each step must be those of the run
that never stopped. `make soak` tries all combinations, and more steps.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from tests.harness import run_ranks
from tests.train.runs import QUICKSTART, tiny_config, train_quietly
from tests.train.test_media_run import write_model
from tutti.config import Config

SOAK = bool(os.environ.get("SOAK"))
DIMENSIONS: dict[str, tuple[Any, ...]] = {
    "rows": ("chats", "pictures"),
    "datasets_type": ("mapping", "iterable"),
    "sources": (1, 2),
    "dyn_bsz": (True, False),
    "num_workers": (0, 2),
    "accumulation": (1, 2),
    "epochs": (1, 2),
    "log_steps": (1, 3),
}
MEDIA = {
    "data.media_root": str(QUICKSTART),
    "data.row_template": {"user": "<image>What is this?", "assistant": "{caption}"},
}
STEPS = 8 if SOAK else 4
"""Steps of a run, over all its epochs."""


def combinations() -> list[dict[str, Any]]:
    """All of them, or as few as hold each pair of values of two dimensions (greedily)."""
    every = [dict(zip(DIMENSIONS, values, strict=True)) for values in itertools.product(*DIMENSIONS.values())]
    if SOAK:
        return every
    random.Random(1).shuffle(every)
    open_pairs = {pair for one in every for pair in pairs(one)}
    chosen = []
    while open_pairs:
        chosen.append(max(every, key=lambda one: len(open_pairs & pairs(one))))
        open_pairs -= pairs(chosen[-1])
    return chosen


def pairs(one: dict[str, Any]) -> set[Any]:
    return set(itertools.combinations(one.items(), 2))


def named(one: dict[str, Any]) -> str:
    return "-".join(f"{name[:4]}={value}" for name, value in one.items())


def config_of(folder: Path, data: Path, one: dict[str, Any], **changes: Any) -> Config:
    per_epoch = STEPS // one["epochs"]
    batch = 2 * one["accumulation"]
    length, media = 64, {}
    if one["rows"] == "pictures":
        model = str(data / "model")
        length, media = 128, {"model.model_path": model, "model.tokenizer_path": model} | MEDIA
    return tiny_config(
        folder,
        **{
            "data.train_path": str(data / one["rows"] / ("mix.yaml" if one["sources"] == 2 else "one.jsonl")),
            "data.datasets_type": one["datasets_type"],
            "data.multisource_datasets_type": "interleave",
            "data.num_workers": one["num_workers"],
            "data.max_seq_len": length,
            "data.shuffle_buffer_size": 8,
            "data.dyn_bsz_buffer_size": 5,
            "data.train_sample": None if one["dyn_bsz"] else per_epoch * batch,
            "data.train_size": per_epoch * batch * length if one["dyn_bsz"] else None,
            "train.dyn_bsz": one["dyn_bsz"],
            "train.micro_batch_size": 2,
            "train.global_batch_size": batch,
            "train.num_train_epochs": one["epochs"],
            "train.max_steps": None,
            "train.log_steps": one["log_steps"],
            "train.enable_full_determinism": True,
        }
        | media
        | changes,
    )


def watched(configs: list[Config]) -> list[list[Any]]:
    """Train by each of `configs` in turn; of each step its number, samples, norm and what the weights came to."""
    import multiprocessing

    from tutti.core.tensors import local_part
    from tutti.train.step import TrainStep

    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # it has workers
    os.environ.pop("RANK")  # each run makes a group of its own
    steps: list[Any] = []
    original = TrainStep.step

    def step(self: Any, batch: Any, totals: Any) -> None:
        original(self, batch, totals)
        tokens, weights, pictures = hashlib.sha256(), hashlib.sha256(), 0
        for micro in batch.micro_batches:
            tokens.update(micro.input_ids.numpy().tobytes() + micro.labels.numpy().tobytes())
            for _, extra in sorted(micro.extras.items()):
                tokens.update(extra.numpy().tobytes())
                pictures += extra.numel()
        for parameter in self._parameters:
            weights.update(local_part(parameter.detach()).numpy().tobytes())
        seen = (totals.grad_norm.item(), tokens.hexdigest(), weights.hexdigest(), pictures)
        steps.append((batch.step, batch.epoch_end, *seen))

    TrainStep.step = step  # type: ignore[method-assign]
    found = []
    for config in configs:
        steps.clear()
        train_quietly(config)
        found.append(list(steps))
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Short conversations, and pictures with captions among them, in one file, and in two that are drawn from by
    weights; and a model that takes pictures."""
    root = tmp_path_factory.mktemp("data")
    write_model(root / "model", "qwen2_5_vl")
    chats = (QUICKSTART / "chat.jsonl").read_text().splitlines()[:40]
    pictures = (QUICKSTART / "images.jsonl").read_text().splitlines()[:16]
    for name, rows in {"chats": chats, "pictures": [*pictures, *chats[:8]]}.items():
        folder = root / name
        folder.mkdir()
        (folder / "one.jsonl").write_text("\n".join(rows))
        (folder / "a.jsonl").write_text("\n".join(rows[::3]))
        (folder / "b.jsonl").write_text("\n".join(rows[1::3] + rows[2::3]))
        (folder / "mix.yaml").write_text("sources: [a.jsonl, b.jsonl]\nnames: [a, b]\nweights: [1, 2]\n")
    return root


@pytest.mark.parametrize("one", combinations(), ids=named)
def test_every_step_is_a_stop_point(tmp_path, data, one):
    whole = config_of(tmp_path / "whole", data, one, **{"train.save_steps": 1})
    checkpoints = Path(whole.train.output_dir or "") / "checkpoints"
    resumed = [
        config_of(
            tmp_path / str(step), data, one, **{"train.load_checkpoint_path": str(checkpoints / f"global_step_{step}")}
        )
        for step in range(1, STEPS + 1)
    ]
    (expected, *rests) = run_ranks(1, watched, [whole, *resumed])[0]
    assert [step for step, *_ in expected] == list(range(1, STEPS + 1))
    assert sum(ends for _, ends, *_ in expected) == one["epochs"]
    assert any(pictures for *_, pictures in expected) == (one["rows"] == "pictures")
    lines = lines_of(whole)
    for start, (config, rest) in enumerate(zip(resumed, rests, strict=True), start=1):
        assert rest == expected[start:], f"gone on from step {start}"
        assert lines_of(config) == {step: line for step, line in lines.items() if step > start}


def lines_of(config: Config) -> dict[int, dict[str, Any]]:
    path = Path(config.train.output_dir or "") / "metrics.jsonl"
    timed = ("seconds", "per_second", "mfu", "memory")
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {
        line["step"]: {key: value for key, value in line.items() if not any(part in key for part in timed)}
        for line in lines
    }
