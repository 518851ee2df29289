"""Pictures that `tutti infer` draws."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.diffusion import make_data, make_folder
from tests.harness import run_ranks
from tests.train.runs import run
from tests.train.test_diffusion_parts import LORA, drawn_net
from tests.train.test_diffusion_run import config_of
from tutti.checkpoint.denoiser_adapter import ADAPTERS
from tutti.config.load import load
from tutti.infer.run import InferenceJob, infer


def drawn(
    model: Path, output: Path, *settings: str, prompts: tuple[str, ...] = ("a cat", "a dog"), world: int = 1
) -> Any:
    run_ranks(world, _infer, [f"infer.model_path={model}", "infer.image_steps=2", *settings], prompts, str(output))
    return [np.asarray(Image.open(path)) for path in sorted(output.iterdir())]


def _infer(settings: list[str], prompts: tuple[str, ...], output: str) -> None:
    infer(load(settings, "infer"), InferenceJob(prompts, output=output))


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
    with pytest.raises(AssertionError, match=r"infer.image_size: 16x80 is beyond the 64 pixels a side"):
        drawn(trained, tmp_path / "odd", "infer.image_size=16x80")


def test_parts_that_are_missing_may_lie_elsewhere(tmp_path: Path, trained: Path) -> None:
    whole, folder = trained / "hf/final", tmp_path / "folder"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "text_encoder")
    (want,) = drawn(whole, tmp_path / "want", prompts=("a cat",))
    (got,) = drawn(folder, tmp_path / "got", f"model.condition_model_path={whole}", prompts=("a cat",))
    assert (got == want).all()
    with pytest.raises(AssertionError, match=r"infer\.model_path: .* has no text_encoder"):
        drawn(folder, tmp_path / "none", prompts=("a cat",))


def test_videos_have_frames(tmp_path: Path) -> None:
    make_folder(tmp_path / "diffusion", "WanTransformer3DModel")
    make_data(tmp_path / "pictures")
    changes = {"train.num_train_epochs": 1, "train.save_hf_weights": True}
    run(config_of(tmp_path, "WanTransformer3DModel", **changes))
    asked = ("data.max_seq_len=8", "infer.video_frames=4", "infer.image_size=16x16")
    drawn(tmp_path / "out", tmp_path / "drawn", *asked, prompts=("a cat",))
    assert Image.open(tmp_path / "drawn/1.webp").n_frames == 3


def test_adapters_draw_on_the_base_that_they_name(tmp_path: Path) -> None:
    changes = {"train.num_train_epochs": 1, "train.lr": 0.1, "train.save_hf_weights": True, "train.save_steps": 2}
    config = config_of(tmp_path, **LORA, **changes)
    base = tmp_path / "diffusion"
    drawn_net().save_pretrained(base / "transformer")
    run(replace(config, model=replace(config.model, config_path=None, model_path=str(base))))
    prompts, length = ("a cat",), "data.max_seq_len=8"
    adapter = tmp_path / "out/hf/final"
    (plain,) = drawn(base, tmp_path / "plain", length, prompts=prompts)
    (want,) = drawn(tmp_path / "out", tmp_path / "checkpoint", prompts=prompts)
    (found,) = drawn(adapter, tmp_path / "adapter", length, prompts=prompts)
    assert (found == want).all()
    assert (found != plain).any()
    # As other programs write it: without its base, and alpha.
    tensors = load_file(adapter / ADAPTERS)
    other = tmp_path / "other"
    other.mkdir()
    save_file({name: item * 3**0.5 for name, item in tensors.items()}, other / ADAPTERS)
    with pytest.raises(AssertionError, match=r"does not name the model .*; name it in model\.model_path"):
        drawn(other, tmp_path / "none", length, prompts=prompts)
    (again,) = drawn(other, tmp_path / "again", length, f"model.model_path={base}", prompts=prompts)
    assert np.abs(again.astype(int) - found.astype(int)).max() <= 1
    save_file({name.replace("to_q", "to_x"): item for name, item in tensors.items()}, other / ADAPTERS)
    with pytest.raises(AssertionError, match=r"infer\.model_path: .* adapts .*to_x, which this model does not have"):
        drawn(other, tmp_path / "none", length, f"model.model_path={base}", prompts=prompts)


def test_what_does_not_draw_and_what_does_not_write(tmp_path: Path, trained: Path) -> None:
    with pytest.raises(AssertionError, match="which draws: give --prompt TEXT"):
        run_ranks(1, _infer, [f"infer.model_path={trained}"], (), str(tmp_path / "none"))
