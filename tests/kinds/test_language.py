"""The sizes that a run reads from a model before it shards it."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.model.zoo import tiny
from tutti.attention.interface import resolve_attention
from tutti.config import Config, ConfigError, TrainConfig
from tutti.config.layout import ModelFacts, Piece, fit
from tutti.kinds.language import inspect, read_facts
from tutti.model import families
from tutti.model.structure import read_structure


def on_meta(family, **overrides):
    attention = resolve_attention("sdpa", torch.device("cpu"))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny(family, **overrides), attn_implementation=attention)


def config_of(**train):
    return Config(train=TrainConfig(**train))


def test_facts_are_what_the_axes_divide():
    sizes = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}
    layout = fit(config_of(**sizes), 4)
    attention = "layers.0.self_attn"
    assert read_facts(read_structure(on_meta("qwen3", num_hidden_layers=3)), layout) == ModelFacts(
        blocks=3,
        heads=(4,),
        experts=(),
        pieces=(
            Piece(f"{attention}.q_proj", 4, "heads"),
            Piece(f"{attention}.k_proj", 2, "heads", shared=True),
            Piece("layers.0.mlp.gate_proj", 48, "features"),
        ),
        vocabulary=256,
    )
    sparse = read_facts(read_structure(on_meta("deepseek_v3", num_attention_heads=8)), layout)
    assert (sparse.heads, sparse.experts) == ((8,), (4,))


@pytest.mark.parametrize(
    ("train", "problem"),
    [
        ({"pipeline_parallel_size": 4}, r"pipeline_parallel_size: 4 ranks .* 2 blocks; 1 or 2 would"),
        ({"tensor_parallel_size": 8}, r"tensor_parallel_size: 8 does not divide the 4 heads of .*q_proj; 1, 2 or 4"),
        ({"ulysses_parallel_size": 8}, r"ulysses_parallel_size: 8 .* 4 attention heads; 1, 2 or 4 would"),
        ({"expert_parallel_size": 2, "data_parallel_mode": "fsdp2"}, r"expert_parallel_size: 2, .* leave it at 1"),
    ],
)
def test_sizes_are_checked_against_the_model(train, problem):
    config, model = config_of(**train), on_meta("qwen3")
    with pytest.raises(ConfigError, match=problem):
        inspect(config, fit(config, 8), model)
    inspect(config_of(), fit(config_of(), 8), model)


def test_a_family_that_was_not_compared_says_so_once(monkeypatch, warnings):
    config = config_of()
    inspect(config, fit(config, 1), on_meta("qwen3"))
    assert "untested" not in warnings.text
    monkeypatch.setattr(families, "COMPARED", families.COMPARED - {"qwen3"})
    inspect(config, fit(config, 1), on_meta("qwen3"))
    assert [record.getMessage().partition(":")[0] for record in warnings.records] == ["qwen3 is untested"]
