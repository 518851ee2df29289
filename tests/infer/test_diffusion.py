"""Pictures that `tutti infer` draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.diffusion import make_data, make_folder
from tests.harness import run_ranks
from tests.train.runs import run
from tests.train.test_diffusion_run import config_of
from tutti.config.load import load
from tutti.infer.run import Job, infer


def drawn(
    model: Path, output: Path, *settings: str, prompts: tuple[str, ...] = ("a cat", "a dog"), world: int = 1
) -> Any:
    run_ranks(world, _infer, [f"infer.model_path={model}", "infer.image_steps=2", *settings], prompts, str(output))
    return [np.asarray(Image.open(path)) for path in sorted(output.iterdir())]


def _infer(settings: list[str], prompts: tuple[str, ...], output: str) -> None:
    infer(load(settings, "infer"), Job(prompts, output=output))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    changes = {
        "train.num_train_epochs": 1,
        "train.save_hf_weights": True,
        "train.save_steps": 2,
        "train.ema_decay": 0.5,
    }
    run(config_of(folder, **changes))
    return folder / "out"


def test_pictures_follow_the_settings(tmp_path: Path, trained: Path) -> None:
    first = drawn(trained, tmp_path / "first", "data.max_seq_len=8")
    assert [picture.shape for picture in first] == [(16, 16, 3)] * 2
    assert (first[0] != first[1]).any()
    again = drawn(trained / "hf/final", tmp_path / "again", "data.max_seq_len=8", world=2)
    assert all((one == other).all() for one, other in zip(first, again, strict=True))
    for number, setting in enumerate(("infer.seed=1", "infer.image_steps=3", "infer.image_guidance=1")):
        other = drawn(trained, tmp_path / f"{number}", "data.max_seq_len=8", setting, prompts=("a cat",))
        assert (other[0] != first[0]).any(), setting
    (wide,) = drawn(trained, tmp_path / "wide", "data.max_seq_len=8", "infer.image_size=20x8", prompts=("a cat",))
    assert wide.shape == (8, 20, 3)


def test_a_checkpoint_draws_what_its_export_draws(tmp_path: Path, trained: Path) -> None:
    of_export = drawn(trained, tmp_path / "export", "data.max_seq_len=8")
    of_checkpoint = drawn(trained / "checkpoints/global_step_2", tmp_path / "checkpoint")
    assert all((one == other).all() for one, other in zip(of_export, of_checkpoint, strict=True))


def test_a_size_between_latents_is_refused(tmp_path: Path, trained: Path) -> None:
    with pytest.raises(AssertionError, match=r"infer.image_size: 17x16 must be .* of 4 each"):
        drawn(trained, tmp_path / "odd", "infer.image_size=17x16")


def test_videos_have_frames(tmp_path: Path) -> None:
    make_folder(tmp_path / "diffusion", "WanTransformer3DModel")
    make_data(tmp_path / "pictures")
    changes = {"train.num_train_epochs": 1, "train.save_hf_weights": True}
    run(config_of(tmp_path, "WanTransformer3DModel", **changes))
    asked = ("data.max_seq_len=8", "infer.video_frames=4", "infer.image_size=16x16")
    drawn(tmp_path / "out", tmp_path / "drawn", *asked, prompts=("a cat",))
    assert Image.open(tmp_path / "drawn/1.webp").n_frames == 3


def test_what_does_not_draw_and_what_does_not_write(tmp_path: Path, trained: Path) -> None:
    with pytest.raises(AssertionError, match="which draws: give --prompt TEXT"):
        run_ranks(1, _infer, [f"infer.model_path={trained}"], (), str(tmp_path / "none"))
