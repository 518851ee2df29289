"""Image autoencoders: their loss, reset codes, layouts, resume, exports and the report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vq_model import VQModel
from safetensors.torch import load_file

from tests.harness import run_ranks
from tests.train.runs import QUICKSTART, records, run, tiny_config, train_quietly
from tests.train.test_run import assert_same_training
from tutti.check.run import check
from tutti.checkpoint.autoencoder import load_autoencoder, read_weights
from tutti.checkpoint.autoencoder import write_net as write_net_weights
from tutti.config import Config
from tutti.core.batch import Sample, pack
from tutti.core.dist import World
from tutti.model.autoencoder import build_autoencoder, decode_map, nearest
from tutti.model.initialize import init_weights
from tutti.train.tasks.reconstruction import make_task, restart_codes

NETS: dict[str, dict[str, Any]] = {
    "VQModel": {"vq_embed_dim": 4, "num_vq_embeddings": 16},
    "AutoencoderKL": {"latent_channels": 4},
}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def write_net(folder: Path, name: str, **changes: Any) -> str:
    """Write the config of a tiny autoencoder of 8 pixels a side; its folder."""
    config = {
        "_class_name": name,
        "sample_size": 8,
        "block_out_channels": [4, 8],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "norm_num_groups": 2,
        "latent_channels": 4,
        "mid_block_add_attention": False,
    }
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "config.json").write_text(json.dumps(config | NETS[name] | changes))
    return str(folder / name)


def config_of(folder: Path, name: str = "VQModel", *, world: int = 1, **changes: Any) -> Config:
    values = {
        "model.config_path": write_net(folder, name),
        "model.tokenizer_path": None,
        "data.train_path": str(QUICKSTART / "images.jsonl"),
        "data.data_type": "image",
        "data.max_seq_len": None,
        "data.augment": {"flip": True, "shift": 0.1, "scale": 0.1},
        "train.dyn_bsz": None,
        "train.micro_batch_size": 3,
        "train.global_batch_size": 12,
        "train.max_steps": 3,
        "train.lr": 3e-3,
    }
    return tiny_config(folder, world=world, **values | changes)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    return {name: run(config_of(tmp_path_factory.mktemp(name), name)) for name in NETS}


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", NETS)
def test_two_ranks_equal_one(tmp_path: Path, one: dict[str, Any], name: str, mode: str) -> None:
    config = config_of(tmp_path, name, world=2, **{"train.data_parallel_mode": mode})
    assert_same_training(run(config, 2), one[name])


def reference_losses(net: Any, pixels: torch.Tensor, kind: str) -> torch.Tensor:
    """The sum of the losses of images, by diffusers' own forward passes."""
    if kind == "VQModel":
        latents = net.encode(pixels).latents
        out = net.decode(latents)
        _, _, (_, _, codes) = net.quantize(latents)
        found = net.quantize.embedding(codes).view(len(pixels), -1, latents.shape[1]).transpose(1, 2)
        apart = (found - latents.flatten(2)) ** 2
        other = (1 + net.quantize.beta) * apart.flatten(1).mean(1)
        made = out.sample
    else:
        posterior = net.encode(pixels).latent_dist
        made = net.decode(posterior.mode()).sample
        other = 1e-6 * posterior.kl() / pixels[0].numel()
    apart = (made - pixels).flatten(1)
    return (apart.abs().mean(1) + apart.square().mean(1) + other).sum()


@pytest.mark.parametrize("name", NETS)
def test_the_loss_is_that_of_diffusers_own_passes(tmp_path: Path, name: str) -> None:
    config = config_of(tmp_path, name)
    model = build_autoencoder(config)
    init_weights(model, 0, torch.device("cpu"))
    pixels = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    samples = [Sample(np.zeros(1, np.int32), np.zeros(1, np.int32))] * 5
    batch = replace(pack(samples), extras={"pixel_values": pixels})
    got = make_task(config).run(model.eval(), batch)
    assert got["loss"].item() == pytest.approx(reference_losses(model.net, pixels, name).item(), rel=1e-5)
    got["loss"].backward()
    assert all(item.grad is not None for item in model.parameters())


def test_gradients_pass_straight_through_the_choice_of_a_code(tmp_path: Path) -> None:
    """Those that reach the encoder from the pixels are those that reach the codes' vectors."""
    model = build_autoencoder(config_of(tmp_path))
    init_weights(model, 0, torch.device("cpu"))
    pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    encoded = model.net.quant_conv(model.net.encoder(pixels)).detach()
    _, found = nearest(encoded, model.net.quantize.embedding.weight)
    leaf = found.detach().requires_grad_()
    decode_map(model.net, leaf, leaf).square().sum().backward()
    model.zero_grad()
    model(pixels).pixels.square().sum().backward()
    got = model.net.quant_conv.bias.grad
    assert leaf.grad is not None and torch.allclose(got, leaf.grad.sum((0, 2, 3)), rtol=1e-4)


def exported(folder: Path, start: str | None, name: str) -> None:
    changes: dict[str, Any] = {
        "train.save_steps": 2,
        "train.save_hf_weights": True,
        "train.load_checkpoint_path": start,
    }
    changes |= {"data.eval_path": str(QUICKSTART / "images_eval.jsonl"), "train.eval_steps": 2}
    train_quietly(config_of(folder, name, **changes))


@pytest.mark.parametrize("name", NETS)
def test_a_resumed_run_is_bit_equal_and_diffusers_loads_its_export(tmp_path: Path, name: str) -> None:
    run_ranks(1, exported, tmp_path / "whole", None, name)
    start = tmp_path / "whole" / "out" / "checkpoints" / "global_step_2"
    run_ranks(1, exported, tmp_path / "resumed", str(start), name)
    folder = tmp_path / "whole" / "out" / "hf" / "final"
    whole, resumed = (load_file(tmp_path / run / "out" / "hf" / "final" / WEIGHTS) for run in ("whole", "resumed"))
    assert whole.keys() == resumed.keys() and all(item.equal(resumed[key]) for key, item in whole.items())
    factory = {"VQModel": VQModel, "AutoencoderKL": AutoencoderKL}[name]
    loaded = factory.from_pretrained(folder)
    assert all(item.equal(whole[key]) for key, item in loaded.state_dict().items())
    again = config_of(tmp_path / "again", name, **{"model.model_path": str(folder), "model.config_path": None})
    world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    model = build_autoencoder(again)
    load_autoencoder(model, folder, seed=0, device=world.device, world=world)
    pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert model.eval()(pixels).pixels.equal(loaded.eval()(pixels).sample)
    shown = json.loads((tmp_path / "whole" / "out" / "run.json").read_text())
    assert [text["step"] for text in shown["texts"]] == [0, 2, 3]
    evaluations = [line for line in records(config_of(tmp_path / "whole", name)) if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [2]


def test_unused_codes_are_put_where_the_encoder_is(tmp_path: Path) -> None:
    model = build_autoencoder(config_of(tmp_path))
    init_weights(model, 0, torch.device("cpu"))
    before = model.net.quantize.embedding.weight.detach().clone()
    model.usage[:12] = 3
    candidates = torch.arange(12.0).view(3, 4)
    restart_codes(model, candidates)
    after = model.net.quantize.embedding.weight
    assert after[:12].equal(before[:12]) and after[12:15].equal(candidates) and after[15].equal(before[15])
    assert not model.usage.any()


def test_a_step_of_training_replaces_unused_codes(tmp_path: Path) -> None:
    config = config_of(tmp_path, **{"train.lr": 1e-9, "train.save_hf_weights": True, "train.max_steps": 1})
    run(config)
    model = build_autoencoder(config)
    init_weights(model, config.train.seed, torch.device("cpu"))
    after = load_file(tmp_path / "out" / "hf" / "final" / WEIGHTS)["quantize.embedding.weight"]
    changed = (after - model.net.quantize.embedding.weight).abs().amax(1) > 1e-4
    used = records(config)[0]["codes_used"]
    assert 0 < used < 16 and int(changed.sum()) == 16 - used


def test_weights_of_losses_and_variations_count(tmp_path: Path, one: dict[str, Any]) -> None:
    first = one["VQModel"][0]
    kinds = {kind: first[f"loss/{kind}"] for kind in ("l1", "mse", "commitment")}
    assert first["loss"] == pytest.approx(sum(kinds.values()), rel=1e-5)
    weighted = run(config_of(tmp_path / "a", **{"train.loss_weights": {"mse": 3, "l1": 0.5}}))[0]
    want = 0.5 * kinds["l1"] + 3 * kinds["mse"] + kinds["commitment"]
    assert weighted["loss"] == pytest.approx(want, rel=1e-5)
    plain = run(config_of(tmp_path / "b", **{"data.augment": {}}))[0]
    assert abs(plain["loss"] - first["loss"]) > 1e-4


WRONG = {
    "another class": ({"_class_name": "UNet2DModel"}, "is of UNet2DModel; data.data_type image trains VQModel or"),
    "an odd size": ({"sample_size": 9}, "a sample_size of 9 is not divisible"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_config_that_cannot_be_used(tmp_path: Path, case: str) -> None:
    changes, message = WRONG[case]
    config = config_of(tmp_path)
    write_net(tmp_path, "VQModel", **changes)
    with pytest.raises(ValueError, match=message):
        build_autoencoder(config)


def test_check_tells_of_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check(config_of(tmp_path))
    said = capsys.readouterr().out
    assert "180 of 180" in said and "10,939 parameters" in said and "image of 1 token" in said


def test_a_folder_without_weights_and_one_of_another_model(tmp_path: Path) -> None:
    shapes = {"encoder.conv_in.weight": torch.Size([4, 3, 3, 3])}
    with pytest.raises(ValueError, match="there is no diffusion_pytorch_model"):
        read_weights(tmp_path, shapes)
    write_net_weights({}, {"other": torch.zeros(2)}, tmp_path)
    with pytest.raises(ValueError, match=r"of another model than its config.json: encoder.conv_in.weight, other"):
        read_weights(tmp_path, shapes)
