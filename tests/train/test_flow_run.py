"""Models that draw by diffusion: the loss, layouts, cached latents, resume, exports and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.diffusion import make_folder
from tests.harness import regroup, run_ranks
from tests.train import test_draw_run
from tests.train.runs import train_quietly
from tests.train.test_draw_run import weights_of
from tests.train.test_features_run import lines_of
from tests.train.test_run import assert_same_training
from tutti.config import Config
from tutti.model.diffusion import require_diffusers

SD3 = "SD3Transformer2DModel"
OTHERS = ("FluxTransformer2DModel", "QwenImageTransformer2DModel", "SanaTransformer2DModel", "PixArtTransformer2DModel")


def write_decoder(folder: Path, name: str = SD3) -> str:
    """Write a diffusion decoder of pictures of 16 pixels a side, its transformer's weights left out; its folder."""
    root = folder / name
    if not root.exists():
        make_folder(root, name)
        shutil.rmtree(root / "text_encoder")
        shutil.rmtree(root / "tokenizer")
        config = json.loads((root / "vae/config.json").read_text())
        torch.manual_seed(5)
        getattr(require_diffusers(), config["_class_name"]).from_config(config).save_pretrained(root / "vae")
    return str(root)


def config_of(folder: Path, *, name: str = SD3, world: int = 1, **changes: Any) -> Config:
    """A Qwen3 that draws pictures by diffusion from their captions, names pictures, and chats."""
    folder.mkdir(parents=True, exist_ok=True)
    decoder = {"config_path": write_decoder(folder, name), "tokens": 4, "image_size": 16}
    return test_draw_run.config_of(folder, world=world, **{"model.decoders": {"image": decoder}} | changes)


def exported(folder: Path, **changes: Any) -> None:
    train_quietly(config_of(folder, **{"train.save_steps": 1, "train.save_hf_weights": True}, **changes))


def runs_of_one_process(folder: Path) -> None:
    """Train and export a model, the same resumed after its first step, one that is read from the export and does not
    learn, and one whose latents are made before training; a step with samples by themselves, packed, and one each of
    other classes of transformers."""
    torch.set_num_threads(1)
    exported(folder / "whole")
    start = folder / "whole" / "out"
    final: dict[str, Any] = {"model.model_path": str(start / "hf" / "final"), "model.config_path": None}
    final |= {"model.encoders": {}, "model.decoders": {}, "train.lr": 0.0, "train.lr_min": 0.0}
    others = {
        "resumed": {"train.load_checkpoint_path": str(start / "checkpoints" / "global_step_1")},
        "read": {**final, "model.tokenizer_path": str(start / "hf" / "final")},
        "cached": {"model.encode_target": True},
    }
    for name, changes in others.items():
        regroup()
        exported(folder / name, **changes)
    sizes = {"train.dyn_bsz": False, "train.max_steps": 1}
    for name, samples in (("alone", 1), ("packed", 4)):
        regroup()
        train_quietly(config_of(folder / name, **{**sizes, "train.micro_batch_size": samples}))
    for name in OTHERS:
        regroup()
        train_quietly(config_of(folder / name, name=name, **{"train.max_steps": 1}))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what one process trains."""
    folder = tmp_path_factory.mktemp("made")
    run_ranks(1, runs_of_one_process, folder)
    return folder


def test_both_kinds_of_loss_are_told_of(made: Path) -> None:
    for name in ("whole", *OTHERS):
        first = lines_of(made / name)[0]
        assert first["targets/flow"] > 0 and first["targets/text"] > 0
        assert first["loss"] == pytest.approx(first["loss/text"] + first["loss/flow"], rel=1e-5), name


def test_parts_are_saved_resumed_read_back_and_cached(made: Path) -> None:
    names = ("whole", "resumed", "read", "cached")
    whole, *others = (weights_of(made / name / "out" / "hf" / "final") for name in names)
    parts = {key.partition(":")[0] for key in whole}
    weights = "diffusion_pytorch_model.safetensors"
    assert {f"decoders/image/{part}/{weights}" for part in ("transformer", "vae")} <= parts
    for other in others:
        assert whole.keys() == other.keys() and all(item.equal(other[name]) for name, item in whole.items())
    assert any((made / "cached/out/cache").rglob("*.safetensors"))


def test_packing_changes_nothing(made: Path) -> None:
    assert_same_training(lines_of(made / "packed"), lines_of(made / "alone"))


LAYOUTS: dict[str, dict[str, Any]] = {
    "ddp": {"data_parallel_mode": "ddp"},
    "fsdp2, remat": {"data_parallel_mode": "fsdp2", "enable_gradient_checkpointing": True},
    "ulysses": {"ulysses_parallel_size": 2},
}


def trained_in_turn(configs: list[Config]) -> None:
    torch.set_num_threads(1)
    for config in configs:
        regroup()
        train_quietly(config)


def test_two_ranks_equal_one(tmp_path: Path, made: Path) -> None:
    one, configs = lines_of(made / "whole"), []
    for layout, sizes in LAYOUTS.items():
        changes = {f"train.{name}": value for name, value in sizes.items()}
        configs.append(config_of(tmp_path / layout, world=2, **changes))
    run_ranks(2, trained_in_turn, configs)
    for layout in LAYOUTS:
        got = lines_of(tmp_path / layout)
        assert_same_training(got, one)
        assert [line["targets/flow"] for line in got] == [line["targets/flow"] for line in one]
