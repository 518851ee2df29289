"""Diffusion training with features shared by all models: frozen parts, learning rates of parts, compiled blocks,
offload, and continuing from adapters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.diffusion import TRANSFORMERS
from tests.harness import run_ranks
from tests.train.runs import run
from tests.train.test_diffusion_run import SD3, assert_same, config_of, losses
from tutti.checkpoint.dcp import read_index
from tutti.checkpoint.denoiser import load_denoiser
from tutti.checkpoint.denoiser_adapter import ADAPTERS, METADATA, load_adapters, read_lora
from tutti.checkpoint.net_files import WEIGHTS
from tutti.config import Config
from tutti.core.dist import init_world
from tutti.kinds import denoiser
from tutti.model.denoiser import DenoiserConfig, random_net
from tutti.model.diffusion import FAMILIES, EncodedText, predict

EXPORTED = Path("out/hf/final/transformer") / WEIGHTS
LORA = {"train.architecture": "lora", "train.lora_rank": 2, "train.lora_alpha": 6.0, "train.lora_targets": ["to_q"]}
STILL = {"train.lr": 0.0, "train.lr_decay_style": "constant"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The steps of a run without any of these features."""
    return run(config_of(tmp_path_factory.mktemp("plain")))


def drawn_net() -> Any:
    """The transformer that runs here begin with."""
    return random_net(DenoiserConfig(net={"_class_name": SD3, **TRANSFORMERS[SD3]}), Config().train.seed)


def test_frozen_parts_stay_and_parts_have_their_rates(tmp_path: Path) -> None:
    changes = {"train.freeze": ["*proj_out*"], "train.part_lr": {"*transformer_blocks*": 0.0}, "train.save_steps": 1}
    config = config_of(tmp_path, **changes, **{"train.save_hf_weights": True, "train.num_train_epochs": 1})
    one = run(replace(config, train=replace(config.train, weight_decay=0.0)))
    start, end = drawn_net().state_dict(), load_file(tmp_path / EXPORTED)
    moved = {name for name, item in end.items() if not torch.equal(item, start[name])}
    assert moved and not any("transformer_blocks" in name or "proj_out" in name for name in moved)
    held = read_index(tmp_path / "out/checkpoints/global_step_1").state_dict_metadata
    assert not any("proj_out" in name and "exp_avg" in name for name in held), "a frozen part has optimizer state"
    two = config_of(tmp_path / "two", world=2, **changes, **{"train.num_train_epochs": 1})
    sharded = replace(two.train, weight_decay=0.0, data_parallel_mode="fsdp2")
    assert_same(run(replace(two, train=sharded), 2), one)


def test_a_part_that_is_not_there_is_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path, **{"train.freeze": ["language_model"]})
    with pytest.raises(ValueError, match=r"train\.freeze: this model has no language_model; it has transformer, and"):
        denoiser.build(config, torch.device("cpu"))


@pytest.mark.parametrize(
    "changes",
    [
        {"train.enable_compile": True},
        {"train.enable_activation_offload": True, "train.activation_gpu_limit": 0.0},
        {"train.enable_fsdp_offload": True, "train.data_parallel_mode": "fsdp2"},
        {"train.enable_fsdp_offload": True, "train.data_parallel_mode": "fsdp1"},
        {"model.basic_modules": ["AdaLayerNormZero"], "train.data_parallel_mode": "fsdp2"},
    ],
    ids=["compiled blocks", "activations on the host", "fsdp2 on the host", "fsdp1 on the host", "further units"],
)
def test_training_is_the_same_with(tmp_path: Path, plain: list[dict[str, Any]], changes: Mapping[str, Any]) -> None:
    assert_same(run(config_of(tmp_path, **changes)), plain)


def test_training_goes_on_with_an_adapter(tmp_path: Path) -> None:
    """From the loss of the weights that it makes of its base, also on two ranks; and it stays the same at rate 0."""
    first = {"train.lr": 0.1, "train.save_hf_weights": True, "train.num_train_epochs": 1}
    run(config_of(tmp_path, **LORA, **first))
    adapter = tmp_path / "out/hf/final"
    changes = {"model.adapter_path": str(adapter), "train.architecture": "lora", "train.num_train_epochs": 1}
    still = {**STILL, "train.save_hf_weights": True, "train.output_dir": str(tmp_path / "again")}
    got = losses(run(config_of(tmp_path, **changes, **still)))
    before, after = load_file(adapter / ADAPTERS), load_file(tmp_path / "again/hf/final" / ADAPTERS)
    assert before.keys() == after.keys() and all(torch.equal(item, after[name]) for name, item in before.items())
    assert described(adapter) == described(tmp_path / "again/hf/final")
    shared = {"train.data_parallel_mode": "fsdp2", **STILL, "train.output_dir": str(tmp_path / "two")}
    assert losses(run(config_of(tmp_path, world=2, **changes, **shared), 2)) == pytest.approx(got, rel=1e-5)
    net = drawn_net()
    weights = net.state_dict()
    for name in [name for name in before if name.endswith("lora_A.weight")]:
        changed = before[name.replace("lora_A", "lora_B")] @ before[name] * 3  # alpha / rank
        weights[name.removeprefix("transformer.").replace(".lora_A", "")] += changed
    net.save_pretrained(tmp_path / "diffusion/transformer")
    whole = {"model.config_path": None, "model.model_path": str(tmp_path / "diffusion"), **STILL}
    whole["train.output_dir"] = str(tmp_path / "whole")
    want = losses(run(config_of(tmp_path, **whole, **{"train.num_train_epochs": 1})))
    assert got == pytest.approx(want, rel=1e-5)


def test_all_layers_of_the_blocks_are_adapted_by_default(tmp_path: Path) -> None:
    """Also those of SD3's last block that make queries of text, which nothing takes."""
    changes = {"train.lora_targets": [], "train.lr": 0.1, "train.save_hf_weights": True, "train.num_train_epochs": 1}
    lines = run(config_of(tmp_path, **{**LORA, **changes}))
    assert losses(lines)[-1] < losses(lines)[0]
    tensors = load_file(tmp_path / "out/hf/final" / ADAPTERS)
    still = {name for name, item in tensors.items() if name.endswith("lora_B.weight") and not item.any()}
    assert still == {"transformer.transformer_blocks.1.attn.add_q_proj.lora_B.weight"}
    assert any(".ff.net.0.proj." in name for name in tensors)


def described(folder: Path) -> str:
    with safe_open(folder / ADAPTERS, "pt") as content:
        return content.metadata()[METADATA]


def pairs(**layers: int) -> dict[str, torch.Tensor]:
    """Adapters of these ranks beside layers of the first block's attention."""
    found = {}
    for leaf, rank in layers.items():
        prefix = f"transformer.transformer_blocks.0.attn.{leaf}"
        found |= {f"{prefix}.lora_A.weight": torch.randn(rank, 16), f"{prefix}.lora_B.weight": torch.randn(16, rank)}
    return found


def test_alphas_in_a_file_are_those_of_their_layers(tmp_path: Path) -> None:
    alpha = {"transformer.transformer_blocks.0.attn.to_q.alpha": torch.tensor(5.0)}
    save_file({**pairs(to_q=2, to_k=2), **alpha}, tmp_path / ADAPTERS)
    found = read_lora(tmp_path, denoiser.build(config_of(tmp_path), torch.device("cpu"))[1])
    assert found.scaling("net.transformer_blocks.0.attn.to_q") == 2.5
    assert found.scaling("net.transformer_blocks.0.attn.to_k") == 1


def test_what_others_wrote_is_read_as_diffusers_reads_it(tmp_path: Path) -> None:
    save_file(pairs(to_q=2, to_k=4, to_v=4), tmp_path / ADAPTERS)
    config = config_of(tmp_path, **{"model.adapter_path": str(tmp_path), "train.architecture": "lora"})
    given = torch.randn(1, 4, 8, 8), torch.tensor([300.0]), EncodedText(torch.randn(1, 8, 16), None, torch.randn(1, 16))
    run_ranks(1, _predict_adapted, config, given, str(tmp_path / "ours.pt"))
    from diffusers import StableDiffusion3Pipeline

    lacking = {f"{part}{number}": None for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")}
    net, family = drawn_net(), FAMILIES[SD3]
    plain = predict(family, net, *given)
    pipeline = StableDiffusion3Pipeline(net, None, None, **lacking)
    pipeline.load_lora_weights(tmp_path)
    theirs = predict(family, pipeline.transformer, *given).detach()
    ours = torch.load(tmp_path / "ours.pt")
    assert (theirs - plain).abs().max() > 1e-2
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def _predict_adapted(config: Config, given: Any, out: str) -> None:
    world = init_world(torch.device("cpu"))
    _, model = denoiser.build(config, world.device)
    load_denoiser(model, None, seed=config.train.seed, device=world.device, world=world)
    load_adapters(model, Path(config.model.adapter_path or ""))
    with torch.no_grad():
        torch.save(predict(model.family, model.eval().net, *given), out)


REFUSED = {
    "another program's": ({"lora_unet_x.lora_down.weight": torch.ones(1)}, "holds lora_unet_x.lora_down.weight"),
    "a text encoder's": ({"text_encoder.x.lora_A.weight": torch.ones(1)}, "holds text_encoder.x.lora_A.weight"),
    "half of a pair": ({"transformer.x.lora_A.weight": torch.ones(1)}, "holds x without A and B"),
    "another model's": (
        {"transformer.x.lora_A.weight": torch.ones(1, 1), "transformer.x.lora_B.weight": torch.ones(1, 1)},
        "adapts x, which this model does not have",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_adapters_that_do_not_fit_are_refused(tmp_path: Path, case: str) -> None:
    tensors, message = REFUSED[case]
    save_file(tensors, tmp_path / ADAPTERS)
    _, model = denoiser.build(config_of(tmp_path), torch.device("cpu"))
    with pytest.raises(ValueError, match=message):
        read_lora(tmp_path, model)
    with pytest.raises(ValueError, match=f"there is no {ADAPTERS} that can be read in"):
        read_lora(tmp_path / "diffusion", model)
