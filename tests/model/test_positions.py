"""Positions that depend on a sample's length, or end at the end of a table."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.model.zoo import tiny
from tests.train.runs import run, tiny_config
from tests.train.test_run import assert_same_training
from tutti.attention.interface import resolve_attention
from tutti.config import ConfigError
from tutti.config.layout import fit
from tutti.kinds import language
from tutti.model.positions import rotate_by_sample

THETA = {"rope_theta": 10000.0}
ROPES = {
    "dynamic": ("llama", {"max_position_embeddings": 16, "rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}),
    "longrope": (
        "phi3",
        {
            "max_position_embeddings": 256,
            "original_max_position_embeddings": 48,
            "rope_parameters": {
                "rope_type": "longrope",
                "short_factor": [1.0] * 4,
                "long_factor": [8.0] * 4,
                "factor": 8.0,
                "original_max_position_embeddings": 48,
            },
        },
    ),
}
LENGTHS = (60, 9, 100, 30, 49)
"""Samples beyond and within the limit, in an order that reveals any state that is kept."""


def config_of(name: str, **changes):
    family, values = ROPES[name]
    values = values | {"rope_parameters": values["rope_parameters"] | THETA}
    return tiny(family, **values | changes)


@pytest.mark.parametrize("name", ROPES)
def test_a_packed_sample_is_what_it_is_alone(name):
    config = config_of(name)
    torch.manual_seed(0)
    packed = AutoModelForCausalLM.from_config(
        config, attn_implementation=resolve_attention("sdpa", torch.device("cpu"))
    )
    rotate_by_sample(packed)
    generator = torch.Generator().manual_seed(1)
    samples = [torch.randint(3, 90, (length,), generator=generator) for length in LENGTHS]
    borders = torch.tensor([0, *LENGTHS]).cumsum(0)
    row = {
        "input_ids": torch.cat(samples)[None],
        "position_ids": torch.cat([torch.arange(length) for length in LENGTHS])[None],
        "cu_seq_lens_q": borders.int(),
        "borders": borders,
        "max_length_q": max(LENGTHS),
        "use_cache": False,
    }
    for _ in range(2):  # the second time from the state that the first one left
        got = packed(**row).logits[0].split(list(LENGTHS))
        for sample, logits in zip(samples, got, strict=True):
            alone = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
            alone.load_state_dict(packed.state_dict())
            torch.testing.assert_close(logits, alone(sample[None]).logits[0], rtol=1e-5, atol=1e-5)


def run_of(folder: Path, name: str, world: int = 1, **changes):
    model = folder / "config"
    special = {"vocab_size": 2048, "eos_token_id": 2, "bos_token_id": None, "pad_token_id": 0}
    config_of(name, **special).save_pretrained(model)
    return tiny_config(folder, world=world, **{"model.config_path": str(model)} | changes)


@pytest.mark.parametrize("name", ROPES)
def test_training_packed_and_in_stages_is_training_one_by_one(tmp_path, name):
    alone = run(run_of(tmp_path / "alone", name, **{"train.dyn_bsz": False, "train.micro_batch_size": 1}))
    packed = run(run_of(tmp_path / "packed", name, **{"train.dyn_bsz": False, "train.micro_batch_size": 8}))
    assert_same_training(packed, alone)
    changes = {"train.dyn_bsz": False, "train.micro_batch_size": 4, "train.pipeline_parallel_size": 2}
    assert_same_training(run(run_of(tmp_path / "stages", name, 2, **changes), 2), alone)


@pytest.mark.parametrize("axis", ["ulysses", "context"])
def test_ranks_with_parts_of_samples_are_refused(tmp_path, axis):
    changes = {f"train.{axis}_parallel_size": 2}
    config = run_of(tmp_path, "dynamic", 2, **changes)
    _, model = language.build(config, torch.device("cpu"))
    with pytest.raises(ConfigError, match=rf"train\.{axis}_parallel_size: the rotary embedding of LlamaForCausalLM"):
        language.inspect(config, fit(config, 2), model)


@pytest.mark.parametrize(("family", "limit"), [("gpt2", 64), ("opt", 64), ("ctrl", 64)])
def test_samples_longer_than_learned_positions_are_refused(tmp_path, family, limit):
    from transformers import AutoConfig

    sizes = {
        "gpt2": {"n_positions": limit, "n_embd": 32, "n_layer": 2, "n_head": 4},
        "opt": {"max_position_embeddings": limit, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
        "ctrl": {"n_positions": limit, "n_embd": 32, "n_layer": 2, "n_head": 4, "dff": 48},
    }[family]
    extra = {"word_embed_proj_dim": 32, "ffn_dim": 48} if family == "opt" else {}
    AutoConfig.for_model(family, vocab_size=2048, **sizes, **extra).save_pretrained(tmp_path / "config")
    changes = {"model.config_path": str(tmp_path / "config"), "data.max_seq_len": limit + 1}
    config = tiny_config(tmp_path, **changes)
    _, model = language.build(config, torch.device("cpu"))
    with pytest.raises(
        ValueError, match=rf"data\.max_seq_len: .* has (learned|computed) positions .* set {limit} or less"
    ):
        language.inspect(config, fit(config, 1), model)
    fitting = tiny_config(tmp_path / "fits", **changes | {"data.max_seq_len": limit})
    language.inspect(fitting, fit(fitting, 1), model)
