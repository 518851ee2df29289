"""train.part_lr: learning rates of parts, for any optimizer and layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForMultimodalLM

from tests.model import gallery
from tutti.config import Config, ConfigError, TrainConfig
from tutti.config.load import from_dict
from tutti.train.optim import build_optimizer, set_lr


def vision_model() -> Any:
    torch.manual_seed(0)
    return AutoModelForMultimodalLM.from_config(gallery.tiny("qwen2_vl"))


def moves(optimizer: str, **train: Any) -> dict[str, float]:
    """The distance that the first step moves a parameter of each part, all of whose gradients are 1."""
    model = vision_model()
    built = build_optimizer(model, Config(train=TrainConfig(optimizer=optimizer, **train)))  # type: ignore[arg-type]
    before = {name: item.detach().clone() for name, item in model.named_parameters()}
    for item in model.parameters():
        item.grad = torch.ones_like(item)
    set_lr(built, train["lr"] / 2)  # as in a warmup
    built.step()
    shown = {"towers": "visual.blocks", "projectors": "visual.merger", "language_model": "language_model.layers"}
    moved = {name: (item - before[name]).abs().mean().item() for name, item in model.named_parameters()}
    return {part: next(far for name, far in moved.items() if text in name) for part, text in shown.items()}


@pytest.mark.parametrize("optimizer", ["adamw", "anyprecision_adamw"])
def test_parts_learn_at_their_own_rates(optimizer: str) -> None:
    plain = moves(optimizer, lr=1e-2)
    assert plain == pytest.approx(dict.fromkeys(plain, 5e-3), rel=1e-3)
    parts = moves(optimizer, lr=1e-2, part_lr={"towers": 1e-3, "projectors": 2e-2})
    assert parts == pytest.approx({"towers": 5e-4, "projectors": 1e-2, "language_model": 5e-3}, rel=1e-3)
    last = moves(optimizer, lr=1e-2, part_lr={"towers": 1e-3, "*visual*": 0})
    assert last == pytest.approx({"towers": 0, "projectors": 0, "language_model": 5e-3}, rel=1e-3)


def test_a_part_that_is_not_there_is_refused_with_the_list() -> None:
    config = Config(train=TrainConfig(part_lr={"tower": 1e-3}))
    with pytest.raises(
        ValueError, match=r"train\.part_lr: this model has no tower; it has towers, projectors, language"
    ):
        build_optimizer(vision_model(), config)
    assert build_optimizer(vision_model(), config, is_complete=False)
    for lr, rates, reason in (
        (1e-3, {"towers": "high"}, "towers must have a learning rate"),
        (0, {"a": 1}, "set train.lr"),
    ):
        with pytest.raises(ConfigError, match=reason):
            from_dict({"train": {"lr": lr, "part_lr": rates}})
