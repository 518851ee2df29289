"""Models that draw: pictures of the assistant are trained on as codes, in any layout, saved and exchanged by parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.model.composed import write_foundation, write_tower
from tests.train.runs import QUICKSTART, records, run, tiny_config, train_quietly
from tests.train.tasks.test_image import write_net
from tests.train.test_run import assert_same_training
from tutti.config import Config
from tutti.model.autoencoder import make_net
from tutti.model.vq import WEIGHTS


def write_tokenizer(folder: Path) -> str:
    """Write a random tokenizer of pictures of 8 pixels a side, of 16 codes each; its folder."""
    path = write_net(folder, "VQModel")
    torch.manual_seed(3)
    net = make_net(json.loads((Path(path) / "config.json").read_text()))
    torch.nn.init.normal_(net.quantize.embedding.weight)
    save_file(net.state_dict(), Path(path) / WEIGHTS)
    return path


def config_of(folder: Path, *, world: int = 1, **changes: Any) -> Config:
    """A Qwen3 that draws pictures from their captions, names pictures, and chats."""
    rows = [json.loads(line) for line in (QUICKSTART / "images.jsonl").read_text().splitlines()[:24]]
    lines = []
    for number, row in enumerate(rows):
        says = [f"Draw: {row['caption']}", "Here: <image>"] if number % 3 else ["<image>What?", row["caption"]]
        chat = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), says, strict=True)]
        lines.append(json.dumps({"messages": chat, "image": row["image"]}))
    folder.mkdir(parents=True, exist_ok=True)
    lines += (QUICKSTART / "chat.jsonl").read_text().splitlines()[:4]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    values = {
        "model.config_path": write_foundation(folder, "qwen3"),
        "model.decoders": {"image": {"model_path": write_tokenizer(folder)}},
        "model.encoders": {"image": {"config_path": write_tower(folder, "siglip")}},
        "data.train_path": str(folder / "rows.jsonl"),
        "data.media_root": str(QUICKSTART),
        "train.lr": 3e-3,
        "train.cfg_dropout": 0.3,
        "train.num_train_epochs": 2,
        "train.max_steps": 2,
    }
    return tiny_config(folder, world=world, **values | changes)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What one process makes of it."""
    return run(config_of(tmp_path_factory.mktemp("one")))


def test_both_kinds_of_loss_are_told_of_and_fall(one: list[dict[str, Any]]) -> None:
    for kind in ("text", "code"):
        assert one[-1][f"loss/{kind}"] < one[0][f"loss/{kind}"] and one[0][f"targets/{kind}"] > 0
    assert one[0]["loss"] == pytest.approx(one[0]["loss/text"] + one[0]["loss/code"], rel=1e-5)
