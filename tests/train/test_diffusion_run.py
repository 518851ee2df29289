"""Diffusion training: the loss, caches, layouts, resume, averages, sizes of pictures, exports and the report."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from tests.data.recordings import video
from tests.diffusion import make_data, make_folder, write_json
from tests.harness import run_ranks
from tests.train.runs import run, tiny_config
from tests.train.test_run import assert_same_training
from tutti.checkpoint.denoiser import load_denoiser
from tutti.checkpoint.manager import read_model
from tutti.checkpoint.net_files import WEIGHTS
from tutti.config import Config
from tutti.config.layout import resolve_sizes
from tutti.config.load import load
from tutti.core.batch import Frames, Grid, Media
from tutti.core.dist import init_world
from tutti.core.keyed_random import generator
from tutti.data.captions import LATENT, PIXELS, CaptionEncoder, captions_of
from tutti.data.source import BadRow, Row, text_columns
from tutti.data.video import load_video
from tutti.kinds import denoiser
from tutti.kinds.export import export
from tutti.model.conditions import Conditions, read_grid
from tutti.model.denoiser import DenoiserConfig, build_denoiser, random_net
from tutti.model.denoiser_parallel import check_shares
from tutti.model.diffusion import EncodedText, Guided, flow_time, predict, sample
from tutti.model.pipeline_folder import PipelineFolder, open_folder, read_folder, read_scheduler
from tutti.train.ema import averaged, keep_average
from tutti.train.tasks.diffusion import make_task

SD3 = "SD3Transformer2DModel"
NAMES = (SD3, "FluxTransformer2DModel", "QwenImageTransformer2DModel", "WanTransformer3DModel")


def config_of(folder: Path, name: str = SD3, *, world: int = 1, **changes: Any) -> Config:
    model, data = folder / "diffusion", folder / "pictures"
    if not model.exists():
        make_folder(model, name)
        make_data(data)
    values = {
        "model.config_path": str(model),
        "model.tokenizer_path": None,
        "data.train_path": str(data / "data.jsonl"),
        "data.data_type": "diffusion",
        "data.max_seq_len": 8,
        "train.dyn_bsz": None,
        "train.micro_batch_size": 1,
        "train.global_batch_size": 4,
        "train.num_train_epochs": 2,
        "train.max_steps": None,
        "train.lr": 3e-3,
        "data.drop_last": False,
    }
    return tiny_config(folder, world=world, **values | changes)


def losses(lines: list[dict[str, Any]], name: str = "loss") -> list[float]:
    return [line[name] for line in lines if name in line]


def by_hand(
    folder: PipelineFolder, config: Config, step: int, names: list[int], videos: Sequence[Tensor] = ()
) -> float:
    """The loss of samples by their numbers at a step, from the definitions, before any training. videos: of each its
    frames uint8 [3, F, H, W], where rows are no pictures."""
    family, train = folder.family, config.train
    net = random_net(DenoiserConfig(net=json.loads((folder.transformer / "config.json").read_text())), train.seed)
    conditions = Conditions(folder, torch.device("cpu"), torch.float32, max_length=8, seed=train.seed)
    rows = [json.loads(line) for line in Path(config.data.train_path or "").read_text().splitlines()]
    total = 0.0
    for name in names:
        if videos:
            latents = conditions.encode_pixels(videos[name])
        else:
            image = Image.open(Path(config.data.train_path or "").parent / rows[name]["image"]).convert("RGB")
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
            latents = conditions.encode_pixels(pixels.unsqueeze(1) if family.video else pixels)
        key = ("train", step, name)
        noise = torch.randn(latents.shape, generator=generator(train.seed, *key, "noise"))
        uniform = torch.rand((), dtype=torch.float64, generator=generator(train.seed, *key, "time")).item()
        s = flow_time(uniform, 0.0, 1.0, 1.0)
        dropped = torch.rand((), generator=generator(train.seed, *key, "dropout")).item() < train.cfg_dropout
        text = conditions.encode_text("" if dropped else rows[name]["caption"]).map(lambda part: part.unsqueeze(0))
        noisy = (1 - s) * latents + s * noise
        with torch.no_grad():
            made = predict(family, net, noisy.unsqueeze(0), torch.tensor([1000 * s]), text)[0]
        total += (made - (noise - latents)).square().mean().item()
    return total / len(names)


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_that_of_flow_matching(tmp_path: Path, name: str) -> None:
    changes = {"train.global_batch_size": 6, "train.micro_batch_size": 3, "train.num_train_epochs": 1}
    config = config_of(tmp_path, name, **changes, **{"train.cfg_dropout": 0.3})
    (first,) = losses(run(config))
    folder = read_folder(tmp_path / "diffusion", "x")
    assert first == pytest.approx(by_hand(folder, config, 1, list(range(6))), rel=1e-5)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A run in one process, and its folder."""
    folder = tmp_path_factory.mktemp("one")
    data = str(folder / "pictures" / "data.jsonl")
    config = config_of(folder, **{"data.eval_path": data, "train.eval_epochs": 1, "train.ema_decay": 0.9})
    return folder, run(config)


def assert_same(got: list[dict[str, Any]], want: list[dict[str, Any]]) -> None:
    assert_same_training(*([line for line in lines if "loss" in line] for lines in (got, want)))
    assert losses(got, "eval_loss") == pytest.approx(losses(want, "eval_loss"), rel=1e-5)


def like_one(folder: Path, *, world: int = 1, **changes: Any) -> Config:
    data = str(folder / "pictures" / "data.jsonl")
    config = config_of(folder, world=world, **{"data.eval_path": data, "train.eval_epochs": 1, **changes})
    return replace(config, train=replace(config.train, ema_decay=0.9))


def test_evaluation_is_the_same_however_often(one: Any) -> None:
    evaluated = losses(one[1], "eval_loss")
    assert len(evaluated) == 2 and evaluated[1] < evaluated[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"train.micro_batch_size": 2},
        {"train.micro_batch_size": 4, "train.enable_gradient_checkpointing": True},
        {"train.cache_latents": False},
        {"train.init_device": "cpu"},
    ],
    ids=["accumulation", "checkpointing", "uncached", "init on the CPU"],
)
def test_one_process_equals_another(tmp_path: Path, one: Any, changes: Mapping[str, Any]) -> None:
    found = run(like_one(tmp_path, **changes))
    assert_same(found, one[1])
    if "train.cache_latents" in changes:
        assert losses(found) == losses(one[1]), "cached and encoded in the step are not equal bit for bit"


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_two_ranks_equal_one(tmp_path: Path, one: Any, mode: str) -> None:
    config = like_one(tmp_path, world=2, **{"train.data_parallel_mode": mode, "train.micro_batch_size": 1})
    assert_same(run(config, 2), one[1])


def test_a_run_that_goes_on_is_the_same(tmp_path: Path, one: Any) -> None:
    """Also the average of the weights, which the last evaluation's samples and the export are of."""
    config = like_one(tmp_path, **{"train.save_steps": 1, "train.save_hf_weights": True})
    run(config)
    whole = load_file(tmp_path / "out/hf/final/transformer" / WEIGHTS)
    checkpoint = tmp_path / "out/checkpoints/global_step_2"
    again = replace(config.train, output_dir=str(tmp_path / "again"), load_checkpoint_path=str(checkpoint))
    lines = run(replace(config, train=again))
    assert losses(lines) == losses(one[1])[2:]
    resumed = load_file(tmp_path / "again/hf/final/transformer" / WEIGHTS)
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
    export(str(tmp_path / "out/checkpoints/global_step_3"), str(tmp_path / "later"))
    exported = load_file(tmp_path / "later/transformer" / WEIGHTS)
    assert all(torch.equal(whole[name], exported[name]) for name in whole)


def test_the_average_follows_the_weights(tmp_path: Path) -> None:
    """A decay that is reached at the first step makes it the mean of two weights."""
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0, momentum=0.1)
    root = torch.nn.Module()
    root.weight = weight
    keep_average(optimizer, 0.15)
    expected = torch.zeros(2)
    for number in range(3):
        weight.grad = torch.tensor([1.0, -1.0])
        optimizer.step()
        now = weight.detach().clone()
        # (1 + 1) / (10 + 1) is above the decay, so that it counts from the second step on.
        expected = now if number == 0 else 0.15 * expected + 0.85 * now
    last = weight.detach().clone()
    with averaged(root, optimizer):
        torch.testing.assert_close(weight.detach(), expected)
    assert torch.equal(weight.detach(), last)


def test_the_export_is_a_pipeline_that_draws_the_same(tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline, StableDiffusion3Pipeline

    config = config_of(tmp_path, **{"train.save_hf_weights": True, "train.num_train_epochs": 1})
    run(config)
    # A real SD3 has three text encoders; this one has a language model in the place of the first.
    lacking = {f"{part}_{number}": None for part in ("text_encoder", "tokenizer") for number in (2, 3)}
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out/hf/final", **lacking)
    assert isinstance(pipeline, StableDiffusion3Pipeline)
    folder = read_folder(tmp_path / "out/hf/final", "x")
    conditions = Conditions(folder, torch.device("cpu"), torch.float32, max_length=8, seed=0)
    text, empty = (conditions.encode_text(caption).map(lambda part: part.unsqueeze(0)) for caption in ("picture 1", ""))
    noise = torch.randn(1, 4, 8, 8)
    pipeline.set_progress_bar_config(disable=True)
    (theirs,) = pipeline(
        prompt_embeds=text.embeds,
        negative_prompt_embeds=empty.embeds,
        pooled_prompt_embeds=text.pooled,
        negative_pooled_prompt_embeds=empty.pooled,
        latents=noise,
        height=16,
        width=16,
        num_inference_steps=2,
        guidance_scale=2.0,
        output_type="pt",
        return_dict=False,
    )
    family = folder.family
    ours = sample(family, pipeline.transformer, read_scheduler(folder), text, empty, noise, Guided(2, 2.0))
    expected = (theirs[0] * 255).round()
    assert (conditions.decode(ours[0]).float() - expected).abs().max() <= 1


def test_pictures_of_several_sizes_are_trained_on_apart(tmp_path: Path) -> None:
    make_folder(tmp_path / "diffusion")
    make_data(tmp_path / "pictures", 7, ((16, 16), (24, 16), (16, 26)))
    config = config_of(tmp_path, **{"train.global_batch_size": 2, "train.micro_batch_size": 2})
    lines = run(config)
    assert sum(line["samples"] for line in lines if "loss" in line) == 14
    two = config_of(tmp_path / "two", world=2, **{"train.global_batch_size": 4, "train.micro_batch_size": 2})
    make_data(tmp_path / "two/pictures", 7, ((16, 16), (24, 16), (16, 26)))
    assert sum(line["samples"] for line in run(two, 2) if "loss" in line) == 14


def test_prompts_are_drawn_into_the_report(tmp_path: Path) -> None:
    changes = {"train.sample_prompts": ["picture 1", "a cat"], "train.sample_steps": 2, "train.num_train_epochs": 1}
    config = config_of(tmp_path, **changes)
    lines = run(config)
    assert [line["sample_answers"] for line in lines if "sample_answers" in line] == [1, 1]
    shown = json.loads((tmp_path / "out/run.json").read_text())
    assert [text["prompt"] for text in shown["texts"]] == ["picture 1", "a cat"] * 2
    assert all(url.startswith("data:image/png;base64,") for url in shown["pictures"].values())
    assert len(shown["pictures"]) == 4


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"caption": "a cat"}, "has no picture"),
        ({"image": "0.png"}, "has no caption under prompt or text or caption"),
        ({"image": "0.png", "caption": ["a", 1]}, "caption must be a text or a list of texts"),
        ({"image": "none.png", "caption": "a cat"}, "none.png is not a file below"),
        ({"messages": [{"role": "user", "content": "a cat"}]}, "has 0 pictures in its messages"),
    ],
    ids=["no picture", "no caption", "captions", "no file", "messages"],
)
def test_bad_rows_are_named(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    (found,) = _encoder(tmp_path)([Row(row, str(tmp_path / "pictures/data.jsonl"), 3)])
    assert isinstance(found, BadRow) and reason in str(found)


def test_pickles_are_refused(tmp_path: Path) -> None:
    row = {"latents": pickle.dumps([1.0]), "context": pickle.dumps([2.0])}
    (found,) = _encoder(tmp_path)([Row(row, str(tmp_path / "pictures/data.jsonl"), 1)])
    assert isinstance(found, BadRow) and "holds pickles (latents, context)" in str(found)
    assert "train.cache_latents" in str(found)


@pytest.mark.parametrize(
    "row",
    [
        {"image": "0.png", "caption": ["a cat", "ein Kätzchen"]},
        {"image_path": "0.png", "text": ["a cat", "ein Kätzchen"]},
        {"target_image": "0.png", "prompt": ["a cat", "ein Kätzchen"]},
        {"image_bytes": b"", "prompt": ["a cat", "ein Kätzchen"]},
    ],
    ids=["image", "image_path", "target_image", "image_bytes"],
)
def test_rows_of_pictures(tmp_path: Path, row: dict[str, Any]) -> None:
    encoder = _encoder(tmp_path)
    if "image_bytes" in row:
        row = {**row, "image_bytes": (tmp_path / "pictures/0.png").read_bytes()}
    ((sample,),) = encoder([Row(row, str(tmp_path / "pictures/data.jsonl"), 1)])
    assert captions_of(sample.input_ids) == ["a cat", "ein Kätzchen"]
    assert (sample.input_ids == LATENT).sum() == 16
    assert encoder.extras([sample], len(sample))[PIXELS].shape == (1, 3, 16, 16)


def test_a_conversation_is_drawn(tmp_path: Path) -> None:
    picture = {"type": "image", "path": "0.png"}
    row = {"messages": [{"role": "user", "content": "a cat"}, {"role": "assistant", "content": [picture]}]}
    ((sample,),) = _encoder(tmp_path)([Row(row, str(tmp_path / "pictures/data.jsonl"), 1)])
    assert captions_of(sample.input_ids) == ["a cat"] and sample.media[0].size == (16, 16)


def test_limits_on_pixels_change_the_latents(tmp_path: Path) -> None:
    encoder = _encoder(tmp_path, **{"data.image_max_pixels": 64})
    row = {"image": "0.png", "caption": "a cat"}
    ((sample,),) = encoder([Row(row, str(tmp_path / "pictures/data.jsonl"), 1)])
    assert (sample.input_ids == LATENT).sum() == 4
    assert encoder.extras([sample], len(sample))[PIXELS].shape == (1, 3, 8, 8)


def _encoder(folder: Path, **changes: Any) -> CaptionEncoder:
    config = config_of(folder, **changes)
    found = read_folder(folder / "diffusion", "x")
    transformer = SimpleNamespace(**json.loads((found.transformer / "config.json").read_text()))
    grid = read_grid(found, transformer)
    assert grid == Grid(2, 0, 2)
    return CaptionEncoder(text_columns(config), grid, config.data)


def test_latents_that_the_transformer_does_not_take_are_refused(tmp_path: Path) -> None:
    _encoder(tmp_path)
    file = tmp_path / "diffusion/transformer/config.json"
    write_json(file, {**json.loads(file.read_text()), "in_channels": 3})
    found = read_folder(tmp_path / "diffusion", "x")
    transformer = SimpleNamespace(**json.loads(file.read_text()))
    with pytest.raises(ValueError, match=r"x: the latents of .*vae have 4 channels, and SD3.* takes 3"):
        read_grid(found, transformer)
    read_grid(replace(found, parts={"transformer": found.transformer}), transformer)  # pixels


def test_a_class_that_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    write_json(tmp_path / "model/transformer/config.json", {"_class_name": "UNet2DConditionModel"})
    with pytest.raises(ValueError, match="UNet2DConditionModel cannot be trained"):
        open_folder(config_of(tmp_path, **{"model.config_path": str(tmp_path / "model")}))


def test_settings_of_the_times_change_what_is_trained(tmp_path: Path) -> None:
    task = make_task(config_of(tmp_path))
    assert task.time_at(0.5) == 0.5
    for name, value in (("flow_time_mean", 1.0), ("flow_shift", 3.0)):
        assert make_task(config_of(tmp_path, **{f"train.{name}": value})).time_at(0.5) > 0.7
    assert make_task(config_of(tmp_path, **{"train.flow_time_std": 0.1})).time_at(0.9) < task.time_at(0.9)


def test_all_captions_are_dropped_with_certainty(tmp_path: Path) -> None:
    """Then those of the data count for nothing."""
    changes = {"train.cfg_dropout": 1.0, "train.num_train_epochs": 1}
    first = losses(run(config_of(tmp_path, **changes)))
    path = tmp_path / "pictures/data.jsonl"
    path.write_text(path.read_text().replace("picture", "painting"))
    assert losses(run(config_of(tmp_path, **changes, **{"train.output_dir": str(tmp_path / "second")}))) == first


def test_conditions_may_lie_in_another_folder(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    model = tmp_path / "diffusion"
    (model / "transformer").rename(tmp_path / "alone")
    apart = {"model.config_path": str(tmp_path / "alone"), "model.condition_model_path": str(model)}
    found = open_folder(config_of(tmp_path, **apart))
    assert found.transformer == tmp_path / "alone" and found.parts["vae"] == model / "vae"
    with pytest.raises(ValueError, match="has no text_encoder"):
        open_folder(replace(config, model=replace(config.model, config_path=str(tmp_path / "alone"))))


def test_a_part_may_be_a_link(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    (tmp_path / "diffusion/vae").rename(tmp_path / "vae")
    write_json(tmp_path / "diffusion/model_index.json", {"vae": "../vae"})
    assert open_folder(config).parts["vae"] == tmp_path / "diffusion/../vae"
    write_json(tmp_path / "diffusion/model_index.json", {"vae": "../none"})
    with pytest.raises(ValueError, match=r"vae is \.\./none, which is no folder"):
        open_folder(config)


def test_adapters_are_read_by_diffusers(tmp_path: Path) -> None:
    from diffusers import StableDiffusion3Pipeline

    changes = {"train.architecture": "lora", "train.lora_rank": 2, "train.lora_alpha": 6.0, "train.lr": 0.1}
    config = config_of(
        tmp_path, **changes, **{"train.lora_targets": ["to_q", "to_out.0"], "train.save_hf_weights": True}
    )
    config = replace(config, train=replace(config.train, save_steps=3))
    lines = run(config)
    assert losses(lines)[-1] < losses(lines)[0]
    folder = read_folder(tmp_path / "diffusion", "x")
    content = json.loads((folder.transformer / "config.json").read_text())
    net = random_net(DenoiserConfig(net=content), config.train.seed)
    latents, times, pooled = torch.randn(1, 4, 8, 8), torch.tensor([300.0]), torch.randn(1, 16)
    text = EncodedText(torch.randn(1, 8, 16), None, pooled)
    family = folder.family
    before = predict(family, net, latents, times, text)
    lacking = {f"{part}{number}": None for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")}
    pipeline = StableDiffusion3Pipeline(net, read_scheduler(folder), None, **lacking)
    pipeline.load_lora_weights(tmp_path / "out/hf/final")
    theirs = predict(family, pipeline.transformer, latents, times, text)
    assert (theirs - before).abs().max() > 1e-2
    # The same by the checkpoint's own adapters.
    run_ranks(
        1,
        _predict_adapted,
        config,
        str(tmp_path / "out/checkpoints/global_step_3"),
        (latents, times, text),
        str(tmp_path / "ours.pt"),
    )
    ours = torch.load(tmp_path / "ours.pt")
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-4, atol=1e-5)


def _predict_adapted(config: Config, checkpoint: str, given: Any, out: str) -> None:
    world = init_world(torch.device("cpu"))
    _, model = denoiser.build(config, world.device)
    load_denoiser(model, None, seed=config.train.seed, device=world.device, world=world)
    read_model(Path(checkpoint), model, world)
    with torch.no_grad():
        torch.save(predict(model.family, model.eval().net, *given), out)


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "WanTransformer3DModel", "QwenImageTransformer2DModel"])
def test_ranks_that_share_tokens_equal_one(tmp_path: Path, name: str) -> None:
    changes = {"train.num_train_epochs": 1, "train.micro_batch_size": 2, "train.enable_gradient_checkpointing": True}
    want = run(config_of(tmp_path / "one", name, **changes))
    two = config_of(tmp_path / "two", name, world=2, **changes, **{"train.ulysses_parallel_size": 2})
    assert_same(run(two, 2), want)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (SD3, "diffusers has no plan to share the tokens of SD3Transformer2DModel"),
        (
            "LTXVideoTransformer3DModel",
            "the attention of LTXVideoTransformer3DModel makes its mask of captions for all",
        ),
    ],
)
def test_sharing_tokens_is_refused_by_name_where_diffusers_cannot(tmp_path: Path, name: str, reason: str) -> None:
    model = build_denoiser(config_of(tmp_path, name), tmp_path / "diffusion/transformer")
    with pytest.raises(ValueError, match=f"train.ulysses_parallel_size: {reason}"):
        check_shares(model, 2)


def test_the_recipe_takes_two_steps(tmp_path: Path) -> None:
    given = ["configs/diffusion.yaml", "train.max_steps=2", "train.num_train_epochs=1", "train.micro_batch_size=8"]
    given += ["train.sample_prompts_path=none", "train.save_epochs=0", "train.eval_epochs=0", "data.num_workers=0"]
    config = load(
        [*given, "data.eval_path=none", f"train.output_dir={tmp_path / 'out'}", "train.compute_dtype=float32"]
    )
    lines = run(resolve_sizes(config, 1))
    assert len(losses(lines)) == 2
    assert (tmp_path / "out/hf/final/text_encoder/model.safetensors").is_file()


@pytest.mark.parametrize("name", ["SanaTransformer2DModel", "PixArtTransformer2DModel", "LTXVideoTransformer3DModel"])
def test_further_classes_learn_and_draw(tmp_path: Path, name: str) -> None:
    make_folder(tmp_path / "diffusion", name)
    make_data(tmp_path / "pictures", 4, ((64, 64),))
    changes = {
        "train.num_train_epochs": 5,
        "train.lr": 2e-2,
        "train.sample_prompts": ["a cat"],
        "train.sample_steps": 2,
    }
    config = config_of(tmp_path, name, **changes, **{"data.eval_path": str(tmp_path / "pictures/data.jsonl")})
    evaluated = losses(run(replace(config, train=replace(config.train, eval_epochs=1))), "eval_loss")
    assert evaluated[-1] < evaluated[0] - 0.01
    assert json.loads((tmp_path / "out/run.json").read_text())["pictures"]


def test_a_broken_picture_is_left_out_where_that_is_wanted(tmp_path: Path) -> None:
    config = config_of(tmp_path, **{"data.silent_exception": True})
    picture = tmp_path / "pictures/3.png"
    picture.write_bytes(picture.read_bytes()[:60])
    cached = losses(run(config))
    second = {"data.silent_exception": True, "train.output_dir": str(tmp_path / "second"), "train.cache_latents": False}
    assert losses(run(config_of(tmp_path, **second))) == cached
    with pytest.raises(AssertionError, match=r"data.jsonl, line 4: 3.png cannot be read as an image"):
        run(config_of(tmp_path, **{"train.output_dir": str(tmp_path / "third")}))


@pytest.mark.parametrize(("name", "frames"), [("WanTransformer3DModel", 5), ("LTXVideoTransformer3DModel", 17)])
def test_videos_are_trained_on_frame_by_frame(tmp_path: Path, name: str, frames: int) -> None:
    """A file and a list of pictures, at half of their frames a second."""
    make_folder(tmp_path / "diffusion", name)
    given = video(2 * frames, 4)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/a.mp4").write_bytes(given)
    rows = [{"video": "a.mp4", "caption": "a"}, {"prompt": "b", "video_path": "a.mp4"}]
    (tmp_path / "pictures/data.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    changes = {"train.global_batch_size": 2, "train.micro_batch_size": 2, "train.num_train_epochs": 3}
    config = config_of(tmp_path, name, **changes, **{"data.video_fps": 2.0})
    lines = run(config)
    indices = tuple(range(0, 2 * frames, 2))
    pixels = torch.from_numpy(load_video(Media("video", given, (64, 48), Frames(indices, 2 * frames, 4.0)), (64, 48)))
    height = 48 if name.startswith("Wan") else 32  # what makes whole latent tokens
    top = (48 - height) // 2
    cut = pixels.transpose(0, 1)[:, :, top : top + height]
    rows[1]["caption"] = "b"
    (tmp_path / "pictures/data.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    want = by_hand(read_folder(tmp_path / "diffusion", "x"), config, 1, [0, 1], [cut, cut])
    assert losses(lines)[0] == pytest.approx(want, rel=1e-5)
    assert losses(lines)[-1] < losses(lines)[0]
