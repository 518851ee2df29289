"""Runs with native sparse attention: equal in every layout, with resume, export and generation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.harness import run_ranks
from tests.infer.models import ONE, infer_config
from tests.train.runs import run, tiny_config, write_model_config
from tests.train.test_run import assert_same_training, train_until
from tutti.attention.interface import resolve_attention
from tutti.config import Config, ConfigError
from tutti.config.layout import fit
from tutti.config.load import from_dict
from tutti.infer.generate import Generator
from tutti.infer.load import load_model
from tutti.infer.prompts import prompt_request
from tutti.infer.sampling import Sampler
from tutti.kinds import language
from tutti.train.run import train

SIZES = {"block": 4, "stride": 2, "selected_block": 8, "selected": 3, "window": 8}
REMAT = {"enable_gradient_checkpointing": True}
LAYOUTS = {
    "remat-reentrant": (1, REMAT),
    "compile": (1, {"enable_compile": True}),
    "ddp": (2, {"data_parallel_mode": "ddp"}),
    "fsdp2-remat": (2, REMAT | {"data_parallel_mode": "fsdp2", "enable_reentrant": False}),
    "ulysses": (2, {"ulysses_parallel_size": 2, "async_enabled": True}),
    "pipeline": (2, {"pipeline_parallel_size": 2}),
}


def sparse_config(folder: Path, **changes: Any) -> Config:
    model = write_model_config(folder / "sparse", native_sparse=SIZES)
    return tiny_config(folder, **{"model.config_path": model, "model.attn_implementation": "native-sparse"} | changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The configuration and the metrics of a run in one process, with its export."""
    config = sparse_config(tmp_path_factory.mktemp("sparse"), **{"train.save_hf_weights": True})
    return config, run(config)


def exported(config: Config) -> Path:
    return Path(config.train.output_dir) / "hf" / "final"


@pytest.mark.parametrize(("world", "changes"), LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_equals_one_process(tmp_path, trained, world, changes):
    changes = {f"train.{name}": value for name, value in changes.items()}
    assert_same_training(run(sparse_config(tmp_path, world=world, **changes), world), trained[1])


def test_it_is_another_attention_than_the_full_one(tmp_path, trained):
    full = run(tiny_config(tmp_path, **{"train.max_steps": 1}))
    assert abs(full[0]["loss"] - trained[1][0]["loss"]) > 1e-4


def test_resume_is_bit_equal(tmp_path, trained):
    run_ranks(1, train_until, sparse_config(tmp_path), 2)
    resumed = run(sparse_config(tmp_path, **{"train.load_checkpoint_path": "auto"}))
    assert [line["loss"] for line in resumed] == [line["loss"] for line in trained[1]]


def test_an_export_says_what_it_is_and_goes_on_without_being_told(tmp_path, trained, capsys):
    folder = exported(trained[0])
    assert json.loads((folder / "config.json").read_text())["native_sparse"] == SIZES
    config = tiny_config(tmp_path, **{"model.model_path": str(folder), "train.max_steps": 1, "train.lr": 0.0})
    train(config)
    shown = capsys.readouterr().err
    assert "attention is native-sparse, as the model's config.json says" in shown
    assert "initialised at random" not in shown
    before = load_file(folder / "model.safetensors")
    assert any(".native_sparse.gate." in name for name in before)


def test_generation_with_a_cache_follows_the_trained_model(trained):
    loaded = load_model(infer_config(str(exported(trained[0])), do_sample=False), ONE)
    config = infer_config("", do_sample=False, max_tokens=12)
    generator = Generator(loaded.logits, Sampler.of(config.infer), loaded.stop_ids, ONE, 10_000)
    texts = ["Hello", "What is the capital of Sweden, and which of its islands is the largest of all?"]
    requests = [prompt_request(loaded.form, text, number, 12) for number, text in enumerate(texts)]
    made: dict[int, list[int]] = {0: [], 1: []}
    for token in generator.stream(requests):
        made[token.number].append(token.id)
    loaded.model.set_attn_implementation(resolve_attention("native-sparse", torch.device("cpu")))
    for request in requests:
        ids = list(request.ids)
        for token in made[request.number]:
            borders = torch.tensor([0, len(ids)])
            kwargs = {"cu_seq_lens_q": borders, "borders": borders, "max_length_q": len(ids), "use_cache": False}
            with torch.no_grad():
                logits = loaded.model(input_ids=torch.tensor([ids]), **kwargs).logits[0, -1]
            assert int(logits.argmax()) == token
            ids.append(token)


def test_a_model_without_the_parameters_gets_new_ones_and_a_part_of_them_is_an_error(tmp_path, trained, capsys):
    plain = run_and_export_plain(tmp_path / "plain")
    config = tiny_config(
        tmp_path / "new",
        **{"model.model_path": str(plain), "model.attn_implementation": "native-sparse", "train.max_steps": 1},
    )
    train(config)
    shown = capsys.readouterr().err
    assert "native_sparse.gate.bias" in shown and "initialised at random" in shown
    folder = exported(trained[0])
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.layers.1.self_attn.native_sparse.gate.bias")
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    (plain / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ValueError, match=r"1 missing: model\.layers\.1\.self_attn\.native_sparse\.gate\.bias"):
        train(tiny_config(tmp_path / "part", **{"model.model_path": str(plain)}))


def run_and_export_plain(folder: Path) -> Path:
    config = tiny_config(folder, **{"train.max_steps": 1, "train.save_hf_weights": True})
    run(config)
    return exported(config)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"train.tensor_parallel_size": 2}, "train.tensor_parallel_size: native-sparse"),
        ({"train.context_parallel_size": 2}, "train.context_parallel_size: native-sparse"),
        ({"train.ulysses_parallel_size": 4}, "train.ulysses_parallel_size: 4 does not divide"),
    ],
)
def test_axes_that_would_divide_a_selection_are_refused(tmp_path, changes, named):
    world = next(iter(changes.values()))
    config = sparse_config(tmp_path, world=world, **changes)
    _, model = language.build(config, torch.device("cpu"))
    with pytest.raises(ConfigError, match=named):
        language.inspect(config, fit(config, world), model)


def test_models_with_another_attention_are_refused(tmp_path):
    changes = {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "head_dim": 8}
    folder = write_model_config(tmp_path / "gemma2", **changes)
    with pytest.raises(ValueError, match=r"native-sparse takes the place of causal attention.*gemma2 has attn_logit"):
        train(tiny_config(tmp_path, **{"model.config_path": folder, "model.attn_implementation": "native-sparse"}))


def test_new_parameters_and_adapters_do_not_go_together():
    tree = {"model": {"config_path": "x", "attn_implementation": "native-sparse"}, "train": {"architecture": "lora"}}
    with pytest.raises(ConfigError, match=r"model\.attn_implementation: native-sparse gives a model new parameters"):
        from_dict(tree)
