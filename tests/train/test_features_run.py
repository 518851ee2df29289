"""The assistant's pictures as features (model.output_encoder encoder): any layout; parts are saved and loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness import regroup, run_ranks
from tests.model.composed import write_tower
from tests.train import test_draw_run
from tests.train.runs import train_quietly
from tests.train.test_draw_run import weights_of
from tests.train.test_run import assert_same_training
from tutti.config import Config
from tutti.kinds import language
from tutti.model.feature_head import feature_losses, normalised
from tutti.train.tasks import make_task


def config_of(folder: Path, *, world: int = 1, **changes: Any) -> Config:
    """A Qwen3 that says pictures as features of the tower that it sees by, names pictures, and chats."""
    values = {"model.decoders": {}, "model.output_encoder": "encoder", "train.cfg_dropout": None}
    return test_draw_run.config_of(folder, world=world, **values | changes)


def exported(folder: Path, **changes: Any) -> None:
    train_quietly(config_of(folder, **{"train.save_steps": 1, "train.save_hf_weights": True}, **changes))


def runs_of_one_process(folder: Path) -> None:
    """Train and export a model, the same resumed after its first step, and one that is read from the export and does
    not learn, and one with a tower of patches and another weight; a step with samples by themselves, and packed."""
    torch.set_num_threads(1)
    exported(folder / "whole")
    start = folder / "whole" / "out"
    final: dict[str, Any] = {"model.model_path": str(start / "hf" / "final"), "model.config_path": None}
    final |= {"model.encoders": {}, "model.output_encoder": None, "train.lr": 0.0, "train.lr_min": 0.0}
    others = {
        "resumed": {"train.load_checkpoint_path": str(start / "checkpoints" / "global_step_1")},
        "read": {**final, "model.tokenizer_path": str(start / "hf" / "final")},
    }
    for name, changes in others.items():
        regroup()
        exported(folder / name, **changes)
    sizes = {"train.dyn_bsz": False, "train.max_steps": 1}
    steps = {
        "alone": {**sizes, "train.micro_batch_size": 1},
        "packed": {**sizes, "train.micro_batch_size": 4},
        "patches": {
            "train.loss_weights": {"feature": 0.5},
            "model.encoders": {"image": {"config_path": write_tower(folder, "qwen2_vl")}},
            "data.max_seq_len": 256,
        },
    }
    for name, changes in steps.items():
        regroup()
        train_quietly(config_of(folder / name, **changes))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what one process trains."""
    folder = tmp_path_factory.mktemp("made")
    run_ranks(1, runs_of_one_process, folder)
    return folder


def lines_of(folder: Path, kind: str = "loss") -> list[dict[str, Any]]:
    """The metrics lines that have a figure of this name."""
    lines = (json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if kind in line]


def test_both_kinds_of_loss_are_told_of_and_fall(made: Path) -> None:
    one, patches = lines_of(made / "whole"), lines_of(made / "patches")
    for kind in ("text", "feature"):
        assert one[-1][f"loss/{kind}"] < one[0][f"loss/{kind}"] and one[0][f"targets/{kind}"] > 0
    assert one[0]["targets/feature"] % 16 == 0  # of a tower of 4 x 4 patches
    assert one[0]["loss"] == pytest.approx(one[0]["loss/text"] + one[0]["loss/feature"], rel=1e-5)
    assert patches[0]["loss"] == pytest.approx(patches[0]["loss/text"] + 0.5 * patches[0]["loss/feature"], rel=1e-5)
    assert patches[-1]["loss/feature"] < patches[0]["loss/feature"]


def test_parts_are_saved_resumed_and_read_back(made: Path) -> None:
    whole, *others = (weights_of(made / name / "out" / "hf" / "final") for name in ("whole", "resumed", "read"))
    assert "encoders/image/features.safetensors: layers.2.weight" in whole
    for other in others:
        assert whole.keys() == other.keys() and all(item.equal(other[name]) for name, item in whole.items())


def test_packing_changes_nothing(made: Path) -> None:
    assert_same_training(lines_of(made / "packed"), lines_of(made / "alone"))


LAYOUTS: dict[str, dict[str, Any]] = {
    "ddp": {"data_parallel_mode": "ddp"},
    "fsdp2, remat": {"data_parallel_mode": "fsdp2", "enable_gradient_checkpointing": True},
    "ulysses": {"ulysses_parallel_size": 2},
    "tensor": {"tensor_parallel_size": 2},
}


def trained_in_turn(configs: list[Config]) -> None:
    torch.set_num_threads(1)
    for config in configs:
        regroup()
        train_quietly(config)


def trained_on_two_ranks(folder: Path, config_of: Callable[..., Config]) -> list[list[dict[str, Any]]]:
    """The metrics lines of a training of `config_of` in each layout."""
    configs = []
    for layout, sizes in LAYOUTS.items():
        changes = {f"train.{name}": value for name, value in sizes.items()}
        configs.append(config_of(folder / layout, world=2, **changes))
    run_ranks(2, trained_in_turn, configs)
    return [lines_of(folder / layout) for layout in LAYOUTS]


def test_two_ranks_equal_one(tmp_path: Path, made: Path) -> None:
    for got in trained_on_two_ranks(tmp_path, config_of):
        assert_same_training(got, lines_of(made / "whole"))


def test_the_loss_is_that_of_the_definition() -> None:
    predicted, features = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]])
    assert feature_losses(predicted, features).item() == pytest.approx((1 - 3 / 5) + (4 + 16) / 2)
    assert normalised(torch.tensor([[1.0, 3.0]])).tolist() == [pytest.approx([-1.0, 1.0], rel=1e-4)]


REFUSED = {
    "no tower": ({"model.encoders": {}}, "model.output_encoder: encoder takes pictures of the assistant's as features"),
    "codes": ({"model.decoders": "vq"}, "model.output_encoder: this decoder draws by codes"),
    "seen by codes": ({"model.input_encoder": "decoder"}, "model.input_encoder: is about codes"),
    "kinds": ({"train.loss_weights": {"code": 1.0}}, "train.loss_weights: this model has losses of text and feature"),
    "pairs": ({"data.data_type": "dpo"}, "not trained with data.data_type dpo"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_by_name(tmp_path: Path, case: str) -> None:
    changes, message = REFUSED[case]
    if changes.get("model.decoders") == "vq":
        changes = {"model.decoders": {"image": {"model_path": test_draw_run.write_tokenizer(tmp_path)}}}
    config = config_of(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        language.build(config, torch.device("cpu"))
        make_task(config)
