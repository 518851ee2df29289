from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import sweep, sweep_layouts
from tests.sweep import EQUAL
from tutti.model.attention_arguments import pass_arguments
from tutti.model.structure import blocks, text_model


@pytest.mark.parametrize("family", ["nemotron", "stablelm"])
def test_borders_reach_attention_past_blocks_that_drop_them(family: str) -> None:
    assert sweep.check(family) == dict.fromkeys(sweep.COLUMNS, EQUAL)


def test_the_cache_reaches_attention_past_blocks_that_drop_it(tmp_path) -> None:
    config = sweep.AutoConfig.from_pretrained(sweep_layouts.write_family("nemotron", tmp_path))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert sweep_layouts.generated(tmp_path) == EQUAL


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen2_moe", {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]}),
        ("phimoe", {}),
    ],
)
def test_windows_that_are_in_masks_alone_reach_attention(family, changes, monkeypatch) -> None:
    monkeypatch.setitem(sweep.PARTICULAR, family, {"sliding_window": 8, **changes})
    found = sweep.check(family)
    assert found == dict.fromkeys(sweep.COLUMNS, EQUAL)


def test_nothing_is_put_on_models_that_pass_all_on() -> None:
    config = sweep.tiny_config("mistral")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    pass_arguments(text_model(model), blocks(model))
    assert all("forward" not in vars(module) for module in model.modules())
