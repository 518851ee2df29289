"""Complete runs of models with video or audio input, on the quickstart tables mixed with text-only chats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.checkpoint.test_speech import write_whole
from tests.data.processors import PROCESSORS
from tests.harness import regroup, run_ranks
from tests.model.test_media import build
from tests.train.runs import QUICKSTART, records, tiny_config
from tests.train.test_run import assert_same_training
from tutti.config import Config

TABLES: dict[str, tuple[str, str, dict[str, str]]] = {
    "video": ("qwen2_5_vl", "video.jsonl", {"user": "<video>What is this?", "assistant": "{caption}"}),
    "audio": ("qwen2_audio", "audio.jsonl", {"user": "<audio>", "assistant": "{answer}"}),
}
"""The family, the table and the template of its rows, by kind of media."""

LAYOUTS: tuple[dict[str, Any], ...] = (
    {"data_parallel_mode": "fsdp2"},
    {"data_parallel_mode": "ddp"},
    {"ulysses_parallel_size": 2},
)


def config_of(folder: Path, kind: str, model: str, rows: str, world: int, number: int = 0, **changes: Any) -> Config:
    options = {
        "model.model_path": model, "model.tokenizer_path": model, "data.train_path": rows, "data.max_seq_len": 256,
        "data.media_root": str(QUICKSTART), "data.row_template": TABLES[kind][2], "data.video_max_frames": 4,
        "train.lr": 1e-2, "train.global_batch_size": 4, "train.num_train_epochs": 2, "train.max_steps": 2,
        "train.output_dir": str(folder / f"out{number}"),
    }  # fmt: skip
    if kind != "video":
        del options["data.video_max_frames"]
    return tiny_config(folder, world=world, **options | changes)


def train_all(configs: list[Config]) -> None:
    """Train by each of these configurations, one after the other."""
    import logging

    from tutti.train.run import train

    logging.disable(logging.INFO)
    for number, config in enumerate(configs):
        if number:
            regroup()
        train(config)


def test_a_model_that_speaks_is_trained_as_its_thinker_and_exported_whole(tmp_path: Path) -> None:
    _, before = write_whole("qwen2_5_omni", tmp_path / "model")
    processor = PROCESSORS["qwen2_5_omni"]()
    processor.chat_template = processor.tokenizer.chat_template
    processor.save_pretrained(tmp_path / "model")
    table = str(QUICKSTART / "audio.jsonl")
    options = {"train.max_steps": 1, "train.num_train_epochs": 1, "train.save_hf_weights": True}
    config = config_of(tmp_path, "audio", str(tmp_path / "model"), table, 1, **options)
    run_ranks(1, train_all, [config])
    after = load_file(Path(config.train.output_dir) / "hf" / "final" / "model.safetensors")
    assert after.keys() == before.keys()
    same = {key for key in before if after[key].equal(before[key])}
    assert {"talker.model.norm.weight", "token2wav.bias"} <= same and "thinker.lm_head.weight" not in same
    assert not any("audio_tower.layers" in key and key.endswith("fc1.weight") for key in same)


@pytest.mark.parametrize("kind", TABLES)
def test_layouts_equal_one_process(tmp_path: Path, kind: str) -> None:
    family, table, _ = TABLES[kind]
    processor = PROCESSORS[family]()
    build(family, processor)[0].save_pretrained(tmp_path / "model")
    processor.chat_template = processor.tokenizer.chat_template
    processor.save_pretrained(tmp_path / "model")
    rows = tmp_path / "rows.jsonl"
    lines = (QUICKSTART / table).read_text().splitlines()[:16]
    lines += (QUICKSTART / "chat.jsonl").read_text().splitlines()[:10]
    rows.write_text("\n".join(lines))
    alone = config_of(tmp_path, kind, str(tmp_path / "model"), str(rows), 1)
    together = [
        config_of(tmp_path, kind, str(tmp_path / "model"), str(rows), 2, number,
                  **{f"train.{name}": value for name, value in layout.items()})
        for number, layout in enumerate(LAYOUTS, start=1)
    ]  # fmt: skip
    run_ranks(1, train_all, [alone])
    run_ranks(2, train_all, together)
    want = records(alone)
    assert len(want) > 2 and want[-1]["loss"] < want[0]["loss"]
    for config in together:
        assert_same_training(records(config), want)
