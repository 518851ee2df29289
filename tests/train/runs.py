"""Tiny runs for tests: a random Qwen3 of two layers on the quickstart chats, in fp32 unless a test asks otherwise."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

from tests.harness import run_ranks
from tutti.config import Config
from tutti.config.layout import resolve_sizes
from tutti.config.load import from_dict

QUICKSTART = Path(__file__).parents[2] / "data" / "quickstart"

TINY = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 2048,
    "tie_word_embeddings": True,
}


def write_model_config(folder: Path, **changes: Any) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(TINY | changes))
    return str(folder)


def tiny_config(folder: Path, *, world: int = 1, **changes: Any) -> Config:
    """A configuration for `world` ranks with its output in `folder`/out; `changes` by dotted name."""
    values: dict[str, Any] = {
        "model.config_path": write_model_config(folder / "model") if "model.model_path" not in changes else None,
        "model.tokenizer_path": str(QUICKSTART),
        "data.train_path": str(QUICKSTART / "chat.jsonl"),
        "data.max_seq_len": 128,
        "data.num_workers": 0,
        "train.output_dir": str(folder / "out"),
        "train.compute_dtype": "float32",
        "train.dyn_bsz": True,
        "train.micro_batch_size": 2,
        "train.global_batch_size": 8,
        "train.lr": 1e-2,
        "train.max_steps": 4,
        "train.init_device": "meta",
        "train.enable_gradient_checkpointing": False,
        "train.save_epochs": 0,
        "train.save_hf_weights": False,
    } | changes
    tree: dict[str, Any] = {}
    for name, value in values.items():
        group, _, leaf = name.partition(".")
        if value is not None:
            tree.setdefault(group, {})[leaf] = value
    return resolve_sizes(from_dict(tree), world)


def write_pairs(path: Path, count: int, longest: int) -> str:
    """Write rows of quickstart's answers, which are preferred to their words in reverse; the path of the file."""
    lines = []
    chats = (json.loads(line)["messages"] for line in (QUICKSTART / "chat.jsonl").read_text().splitlines())
    for *prompt, answer in islice((chat for chat in chats if len(str(chat)) < longest), count):
        rejected = " ".join(reversed(answer["content"].split()))
        lines.append(json.dumps({"prompt": prompt, "chosen": answer["content"], "rejected": f"Well, {rejected}"}))
    path.write_text("\n".join(lines))
    return str(path)


def records(config: Config) -> list[dict[str, Any]]:
    """The lines of the run's metrics.jsonl."""
    lines = (Path(config.train.output_dir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def run(config: Config, world: int = 1) -> list[dict[str, Any]]:
    """Train on `world` ranks, each a process of its own; the metrics lines."""
    run_ranks(world, train_quietly, config)
    return records(config)


def train_quietly(config: Config) -> None:
    import logging

    from tutti.train.run import train

    logging.disable(logging.INFO)
    train(config)


def train_or_error(config: Config) -> str:
    """Train, and return the ValueError that ended it, or that it went on."""
    try:
        train_quietly(config)
    except ValueError as error:
        return str(error)
    return "went on"
