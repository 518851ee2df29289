"""Adapters train on every layout as in one process: equal loss, norm, samples and files; they move between layouts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.harness import run_ranks
from tests.parallel.layouts import assert_same, train_all
from tests.train.adapted import export_quietly, lora_config, open_merged, write_bases, written
from tests.train.runs import records, run
from tests.train.test_run import HYBRID, REMAT, ZERO2, train_until
from tutti.checkpoint.dcp import read_index

VARIANTS = {
    "dense": ("dense", {"lora_dora": True, "lora_full_modules": ["embed_tokens", "norm"]}),
    "deep": ("deep", {"lora_rslora": True, "lora_full_modules": ["lm_head", "layers.1.mlp.down_proj"]}),
    "last": ("deep", {"lora_targets": ["layers.3.*"], "lora_dora": True}),
    "moe": ("moe", {"lora_dora": True}),
}
COMMON = {
    "save_hf_weights": True,
    "save_steps": 2,
    "sample_prompts": ["What is the capital of Sweden?"],
    "sample_tokens": 3,
    # With a smaller one, Adam's steps depend on the signs of gradients that are zero but for rounding.
    "adam_eps": 1e-4,
}
FSDP2 = {"data_parallel_mode": "fsdp2"}
TP2, PP2, EP2 = {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}, {"expert_parallel_size": 2}
ZERO_BUBBLE = PP2 | {"pipeline_schedule": "zero_bubble"}
LAYOUTS = {
    "remat, reentrant": ("dense", 1, REMAT),
    "built on the cpu": ("dense", 1, {"init_device": "cpu"}),
    "ddp": ("dense", 2, {"data_parallel_mode": "ddp"}),
    "zero3, remat": ("dense", 2, REMAT | FSDP2),
    "zero2": ("dense", 2, ZERO2),
    "hybrid": ("dense", 4, HYBRID),
    "expert": ("moe", 2, FSDP2 | EP2),
    "tensor": ("dense", 2, TP2),
    "tensor, experts": ("moe", 2, TP2 | FSDP2),
    "tensor, heads shared, biases": ("deep", 4, {"tensor_parallel_size": 4}),
    "tensor x zero3, remat": ("deep", 4, TP2 | FSDP2 | REMAT),
    "tensor x ulysses": ("dense", 4, TP2 | FSDP2 | {"ulysses_parallel_size": 2, "async_enabled": True}),
    "tensor x context": ("dense", 4, TP2 | FSDP2 | {"context_parallel_size": 2}),
    "tensor x expert": ("moe", 4, TP2 | FSDP2 | EP2),
    "pipeline": ("dense", 2, PP2),
    "pipeline, experts": ("moe", 2, PP2),
    "pipeline, first stage frozen": ("last", 2, PP2 | REMAT),
    "pipeline x tensor": ("dense", 4, PP2 | TP2),
    "pipeline x tensor, experts": ("moe", 4, PP2 | TP2),
    "pipeline x tensor, first stage frozen": ("last", 4, PP2 | TP2),
    "pipeline x expert": ("moe", 4, PP2 | FSDP2 | EP2),
    "interleaved": ("deep", 2, PP2 | {"pipeline_schedule": "interleaved", "pipeline_stages_per_rank": 2}),
    "zero bubble": ("dense", 2, ZERO_BUBBLE),
    "zero bubble x zero3": ("deep", 4, ZERO_BUBBLE | FSDP2),
    "zero bubble x zero3, first stage frozen": ("last", 4, ZERO_BUBBLE | FSDP2),
    "pipeline x tensor x zero3": ("deep", 8, PP2 | TP2 | FSDP2),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return write_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module")
def make(bases):
    def config_of(folder, variant, world=1, **train):
        base, settings = VARIANTS[variant]
        return lora_config(folder, bases / base, world, **(settings | COMMON | train))

    return config_of


@pytest.fixture(scope="module")
def alone(tmp_path_factory, make):
    """Of each variant: a run on one process, and its metrics lines."""
    configs = [make(tmp_path_factory.mktemp(name), name) for name in VARIANTS]
    return dict(zip(VARIANTS, zip(configs, train_all(configs, 1), strict=True), strict=True))


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory, make):
    """The results of a layout; all layouts of as many ranks are run together, when the first is asked for."""
    known: dict = {}

    def get(name):
        if name not in known:
            world = LAYOUTS[name][1]
            together = {other: layout for other, layout in LAYOUTS.items() if layout[1] == world}
            configs = [
                make(tmp_path_factory.mktemp("layout"), variant, world, **train)
                for variant, _, train in together.values()
            ]
            known.update(zip(together, zip(configs, train_all(configs, world), strict=True), strict=True))
        return known[name]

    return get


def texts(config):
    return json.loads((Path(config.train.output_dir) / "run.json").read_text())["texts"]


def assert_same_adapter(got, want, **tolerance):
    (tensors, settings), (others, other_settings) = written(got), written(want)
    assert settings == other_settings
    assert tensors.keys() == others.keys()
    for name, value in others.items():
        torch.testing.assert_close(tensors[name], value, **tolerance, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_equals_one_process(alone, laid_out, name):
    (config, lines), (other, other_lines) = laid_out(name), alone[LAYOUTS[name][0]]
    assert other_lines[-1]["loss"] < other_lines[0]["loss"]
    assert_same(lines, other_lines)
    assert_same_adapter(config, other, rtol=1e-3, atol=1e-4)
    assert texts(config) == texts(other) and len(texts(config)) == 2


@pytest.mark.parametrize("name", ["pipeline x tensor", "pipeline x expert"])
def test_what_a_layout_writes_is_the_trained_model(laid_out, tmp_path, name):
    """To peft, and merged from its checkpoint; which holds what trains alone."""
    config, _ = laid_out(name)
    output = Path(config.train.output_dir)
    run_ranks(1, export_quietly, str(output), str(tmp_path / "merged"), True)
    run_ranks(1, export_quietly, str(output), str(tmp_path / "adapter"), False)
    final = output / "hf" / "final" / "adapter_model.safetensors"
    again, tensors = load_file(tmp_path / "adapter" / final.name), written(config)[0]
    assert again.keys() == tensors.keys()
    for key, tensor in tensors.items():  # the magnitudes' norms are sums in another order
        torch.testing.assert_close(again[key], tensor, rtol=1e-6, atol=0, msg=lambda text, k=key: f"{k}: {text}")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(ids).logits
        plain = AutoModelForCausalLM.from_pretrained(config.model.model_path).eval()(ids).logits
        torch.testing.assert_close(open_merged(final.parent).eval()(ids).logits, merged, rtol=0, atol=1e-5)
    assert (merged - plain).abs().max() > 1e-2
    names = {
        name.removeprefix("model.")
        for name in read_index(output / "checkpoints" / "global_step_4").state_dict_metadata
        if name.startswith("model.")
    }
    assert {name for name in names if "_lora_" not in name} == (
        {"model.embed_tokens.weight", "model.norm.weight"} if LAYOUTS[name][0] == "dense" else set()
    )
    if LAYOUTS[name][0] == "moe":
        return  # with DoRA on stacks of experts, which peft has no layout for
    peft = pytest.importorskip("peft")
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(final.parent).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, merged, rtol=0, atol=1e-5)


MOVES = [
    ("dense", None, 4, PP2 | TP2),
    ("dense", "pipeline x tensor", 1, {}),
    ("dense", "pipeline", 2, TP2),
    ("moe", "pipeline x expert", 2, TP2),
    ("last", "pipeline x tensor, first stage frozen", 2, FSDP2),
]


@pytest.mark.parametrize(("variant", "origin", "world", "train"), MOVES)
def test_runs_go_on_on_another_layout(alone, laid_out, make, tmp_path, variant, origin, world, train):
    """From a checkpoint, and from the adapter that was written in the end."""
    config, _ = laid_out(origin) if origin else alone[variant]
    output = Path(config.train.output_dir)
    middle = str(output / "checkpoints" / "global_step_2")
    resumed = make(tmp_path / "resumed", variant, world, **train, load_checkpoint_path=middle)
    path = str(output / "hf" / "final")
    # The adapter's own settings apply, not train.lora_*.
    still = {"lr": 0.0, "lr_min": 0.0, "max_steps": 1, "model.adapter_path": path, "lora_targets": ["q_proj"]}
    taken = make(tmp_path / "taken", variant, world, **train | still)
    lines, again = train_all([resumed, taken], world)
    assert_same(lines, alone[variant][1][2:])
    assert_same_adapter(resumed, alone[variant][0], rtol=1e-3, atol=1e-4)
    assert_same_adapter(taken, config, rtol=1e-6, atol=1e-6)
    assert again[0]["loss"] < alone[variant][1][0]["loss"] - 1e-3


def test_resume_is_bit_equal_with_dropout(make, tmp_path):
    changes = PP2 | TP2 | {"lora_dropout": 0.2, "enable_full_determinism": True}
    expected = run(make(tmp_path / "whole", "dense", 4, **changes), 4)
    half = make(tmp_path / "half", "dense", 4, **changes)
    run_ranks(4, train_until, half, 2)
    assert [line["step"] for line in records(half)] == [1, 2]
    resumed = run(make(tmp_path / "half", "dense", 4, **changes, load_checkpoint_path="auto"), 4)
    for ours, theirs in zip(resumed, expected, strict=True):
        assert (ours["loss"], ours["grad_norm"]) == (theirs["loss"], theirs["grad_norm"]), f"step {ours['step']}"
