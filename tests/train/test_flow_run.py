"""Models that draw by diffusion: the loss, layouts, cached latents, resume, exports and errors."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image
from torch import Tensor

from tests.diffusion import TRANSFORMERS, make_folder
from tests.harness import regroup, run_ranks
from tests.infer.models import ONE, open_model
from tests.train import test_draw_run
from tests.train.runs import QUICKSTART, train_quietly
from tests.train.test_draw_run import weights_of
from tests.train.test_features_run import lines_of, trained_on_two_ranks
from tests.train.test_run import assert_same_training
from tutti.config import Config, ModelConfig
from tutti.core.keyed_random import generator
from tutti.data import media_processor
from tutti.infer.prompts import prompt_request, to_draw
from tutti.kinds import language
from tutti.model.conditions import Conditions
from tutti.model.denoiser import DenoiserConfig, random_net
from tutti.model.diffusion import flow_time, predict, require_diffusers
from tutti.model.flow_decoder import FlowDecoder, read_flow
from tutti.train.tasks import make_task
from tutti.train.tasks.draw_continuous import flow_losses

SD3 = "SD3Transformer2DModel"
TEMPLATE = {"user": "Draw: {caption}", "assistant": "<image>"}
FLUX = "FluxTransformer2DModel"
CLASSES = (SD3, FLUX, "QwenImageTransformer2DModel", "SanaTransformer2DModel", "PixArtTransformer2DModel")


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
    learn, and one whose latents are made before training; a step with another class, and one without learning."""
    torch.set_num_threads(1)
    data = {"data.eval_path": str(folder / "two.jsonl"), "train.eval_epochs": 1, "data.row_template": TEMPLATE}
    two = (QUICKSTART / "images.jsonl").read_text().splitlines()[:2]
    (folder / "two.jsonl").write_text("\n".join(two))
    exported(folder / "whole", **data)
    start = folder / "whole" / "out"
    final: dict[str, Any] = {"model.model_path": str(start / "hf" / "final"), "model.config_path": None}
    final |= {"model.encoders": {}, "model.decoders": {}, "train.lr": 0.0, "train.lr_min": 0.0}
    others = {
        "resumed": {"train.load_checkpoint_path": str(start / "checkpoints" / "global_step_1")},
        "read": {**final, "model.tokenizer_path": str(start / "hf" / "final")},
        "cached": {"model.encode_target": True, **data},
    }
    for name, changes in others.items():
        regroup()
        exported(folder / name, **changes)
    regroup()
    train_quietly(config_of(folder / FLUX, name=FLUX, **{"train.max_steps": 1}))
    regroup()
    exported(folder / "still", **still(folder))


def still(folder: Path) -> dict[str, Any]:
    """Changes by which a model takes a step on two rows, and stays as it is."""
    return {
        "data.train_path": str(folder / "two.jsonl"),
        "data.row_template": TEMPLATE,
        "train.dyn_bsz": False,
        "train.micro_batch_size": 2,
        "train.global_batch_size": 2,
        "train.max_steps": 1,
        "train.num_train_epochs": 1,
        "train.cfg_dropout": 0.0,
        "train.lr": 0.0,
        "train.lr_min": 0.0,
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what one process trains."""
    folder = tmp_path_factory.mktemp("made")
    run_ranks(1, runs_of_one_process, folder)
    return folder


def test_both_kinds_of_loss_are_told_of(made: Path) -> None:
    for name in ("whole", FLUX):
        first = lines_of(made / name)[0]
        assert first["targets/flow"] > 0 and first["targets/text"] > 0
        assert first["loss"] == pytest.approx(first["loss/text"] + first["loss/flow"], rel=1e-5), name


def states_of(model: Any, ids: list[int]) -> Tensor:
    """The last hidden states [1, Q, H] of the queries after a prompt, which is run at once."""
    config = model.config
    row = torch.tensor([[*ids, *range(config.first_code, config.first_code + config.num_codes)]])
    return model.outer(row).last_hidden_state[:, len(ids) :]


@torch.no_grad()
def test_the_loss_is_that_of_the_definition(made: Path) -> None:
    """The mean over two pictures of the squared error of the velocity, at the time and with the noise of their keys."""
    _, loaded = open_model(str(made / "still" / "out" / "hf" / "final"))
    model, flow = loaded.model, loaded.model.flow_decoder
    model.set_attn_implementation("sdpa")
    conditions = Conditions(model.flow.folder, torch.device("cpu"), torch.float32, max_length=0, seed=0)
    losses = []
    for name, line in enumerate((made / "two.jsonl").read_text().splitlines()):
        row, seed = json.loads(line), config_of(made / "still").train.seed
        request = to_draw(loaded.form, prompt_request(loaded.form, f"Draw: {row['caption']}", 0, 4))
        picture = model.flow.codes.size.cut(Image.open(QUICKSTART / row["image"]).convert("RGB"))
        latents = conditions.encode_pixels(torch.tensor(np.asarray(picture)).permute(2, 0, 1))
        key = ("train", 1, name, 0)
        noise = torch.randn(latents.shape, generator=generator(seed, *key, "noise"))
        uniform = torch.rand((), dtype=torch.float64, generator=generator(seed, *key, "time")).item()
        time = flow_time(uniform, 0.0, 1.0, 1.0)
        noisy = ((1 - time) * latents + time * noise)[None]
        text = flow.text(states_of(model, list(request.ids)))
        found = predict(flow.family, flow.net, noisy, torch.tensor([1000 * time]), text)[0]
        losses.append((found - (noise - latents)).square().mean().item())
    assert lines_of(made / "still")[0]["loss/flow"] == pytest.approx(sum(losses) / 2, rel=1e-5)


def test_parts_are_saved_resumed_read_back_and_cached(made: Path) -> None:
    names = ("whole", "resumed", "read", "cached")
    whole, *others = (weights_of(made / name / "out" / "hf" / "final") for name in names)
    parts = {key.partition(":")[0] for key in whole}
    weights = "diffusion_pytorch_model.safetensors"
    assert {f"decoders/image/{part}/{weights}" for part in ("transformer", "vae")} <= parts
    for other in others:
        assert whole.keys() == other.keys() and all(item.equal(other[name]) for name, item in whole.items())
    assert any((made / "cached/out/cache").rglob("*.safetensors"))
    evals = [[line["eval_loss"] for line in lines_of(made / name, "eval_loss")] for name in ("whole", "cached")]
    assert evals[0] == evals[1] and evals[0][0] > 0


@pytest.mark.parametrize("name", CLASSES)
def test_each_class_is_led_by_the_states_of_queries(name: str) -> None:
    config = {"_class_name": name, **TRANSFORMERS[name]}
    decoder = FlowDecoder(config, 100, 4, 32)
    decoder.net = random_net(DenoiserConfig(net=config), 0)
    eps = DPMSolverMultistepScheduler() if decoder.family.prediction == "eps" else None
    states = torch.randn(2, 4, 32, requires_grad=True)
    latents, noise, times = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.7])
    losses = flow_losses(decoder, eps, latents, noise, times, decoder.text(states))
    losses[0].backward()
    assert losses.isfinite().all() and states.grad is not None
    assert states.grad[0].abs().max() > 0 and states.grad[1].abs().max() == 0


def test_two_ranks_equal_one(tmp_path: Path, made: Path) -> None:
    one = lines_of(made / "whole")
    for got in trained_on_two_ranks(tmp_path, config_of):
        assert_same_training(got, one)
        assert [line["targets/flow"] for line in got] == [line["targets/flow"] for line in one]


REFUSED = {
    "a key": ({"steps": 3}, "model.decoders.image.steps: a diffusion decoder has no such key"),
    "a size": ({"image_size": 15}, "model.decoders.image.image_size: 15 must be a multiple of 4"),
    "no queries": ({"tokens": 0}, "model.decoders.image.tokens: must be a number above 0, got 0"),
}
ELSEWHERE = {
    "features": ({"model.output_encoder": "encoder"}, r"draws from queries \(from features is not available yet\)"),
    "seen by queries": ({"model.input_encoder": "decoder"}, "model.input_encoder: the queries"),
    "kinds": ({"train.loss_weights": {"code": 1.0}}, "train.loss_weights: this model has losses of text and flow"),
    "noise for codes": (
        {"model.decoders": {}, "train.flow_shift": 2.0, "train.cfg_dropout": None},
        "train.flow_shift: is about pictures that are drawn by diffusion",
    ),
    "stages": ({"train.pipeline_parallel_size": 2}, "train.pipeline_parallel_size: a model that draws"),
}


@pytest.mark.parametrize("case", [*REFUSED, *ELSEWHERE])
def test_what_cannot_be_done_is_refused_by_name(tmp_path: Path, case: str) -> None:
    changes, message = REFUSED.get(case) or ELSEWHERE[case]
    if case in REFUSED:
        decoder = {"config_path": write_decoder(tmp_path), "tokens": 4, "image_size": 16}
        changes = {"model.decoders": {"image": decoder | changes}}
    config = config_of(tmp_path, world=changes.get("train.pipeline_parallel_size", 1), **changes)
    with pytest.raises(ValueError, match=message):
        language.build(config, torch.device("cpu"))
        make_task(config)


def test_parts_that_cannot_be_used_are_refused_by_name(tmp_path: Path) -> None:
    video = ModelConfig(decoders={"image": {"config_path": write_decoder(tmp_path, "WanTransformer3DModel")}})
    with pytest.raises(ValueError, match="WanTransformer3DModel draws videos"):
        read_flow(video)
    folder = Path(write_decoder(tmp_path))
    next((folder / "vae").glob("*.safetensors")).unlink()
    with pytest.raises(ValueError, match="has no weights; it is used as it is"):
        read_flow(ModelConfig(decoders={"image": {"config_path": str(folder)}}))


def test_pictures_whose_latents_are_known_are_not_decoded(tmp_path: Path, made: Path) -> None:
    """Training continues unchanged after they are deleted."""
    config = config_of(tmp_path, **{"model.encode_target": True, "train.max_steps": 1, "train.num_train_epochs": 1})
    run_ranks(1, _train_twice, config, str(tmp_path / "again"))
    first, second = (lines_of(tmp_path / name)[0]["loss"] for name in (".", "again"))
    assert first == second


def _train_twice(config: Config, again: str) -> None:
    train_quietly(config)
    regroup()
    with pytest.MonkeyPatch.context() as patch:
        decoded: list[str] = []
        load = media_processor.load_image

        def counted(medium: Any) -> Any:
            decoded.append(medium.kind)
            return load(medium)

        patch.setattr(media_processor, "load_image", counted)
        shutil.copytree(Path(config.train.output_dir or "") / "cache", Path(again) / "out/cache")
        train_quietly(replace(config, train=replace(config.train, output_dir=str(Path(again) / "out"))))
        assert "drawn" not in decoded and "image" in decoded


def test_a_new_decoder_is_led_by_states_of_some_size(tmp_path: Path) -> None:
    """Otherwise pictures would be learned without their captions."""
    config = config_of(tmp_path)
    _, model = language.build(config, torch.device("cpu"))
    language.load(config, model, world=ONE, device=torch.device("cpu"))
    text = model.flow_decoder.text(torch.randn(8, 4, model.config.text_config.hidden_size))
    assert 0.2 < float(text.embeds.std(0).mean()) < 2 and 0.05 < float(text.pooled.std(0).mean()) < 2
