"""Random weights depend only on the class and the seed, not on the layout; buffers are recomputed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
)

from tests.checkpoint.weighing import CPU, SHARDED, full, logits, nothing_on_meta, on_meta, sharded
from tests.harness import run_ranks
from tests.model.zoo import FAMILIES, tiny
from tests.sweep import tiny_config
from tutti.model.initialize import init_weights, materialize


@pytest.mark.parametrize("name", FAMILIES)
def test_random_weights_follow_the_classes_rules(name: str) -> None:
    """Each parameter has the distribution of transformers' own initialization of the same config."""
    model = on_meta(name)
    init_weights(model, 3, CPU)
    assert nothing_on_meta(model)
    torch.manual_seed(5)
    reference = AutoModelForCausalLM.from_config(tiny(name), dtype=torch.float32)
    for key, theirs in reference.named_parameters():
        ours = model.get_parameter(key)
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours.mean(), theirs.mean(), rtol=0, atol=0.02, msg=key)
        if theirs.numel() >= 100:
            torch.testing.assert_close(ours.std(), theirs.std(), rtol=0.25, atol=1e-6, msg=key)
    for key, theirs in reference.named_buffers():
        assert torch.equal(model.get_buffer(key), theirs), key
    assert {id(p) for p in model.parameters()}.__len__() == {id(p) for p in reference.parameters()}.__len__()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_only_a_constructor_sets_keeps_its_value(dtype: torch.dtype) -> None:
    """The factors of Apertus's activation are parameters and buffers that the class has no rule for."""
    config = tiny_config("apertus")
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    init_weights(model, 0, CPU)
    reference: Any = AutoModelForCausalLM.from_config(tiny_config("apertus"), dtype=torch.float32)
    for ours, theirs in zip(model.model.layers, reference.model.layers, strict=True):
        for name in ("alpha_p", "alpha_n", "beta", "eps"):
            assert torch.equal(getattr(ours.mlp.act_fn, name), getattr(theirs.mlp.act_fn, name).to(dtype)), name


def test_random_weights_differ_by_seed_and_between_layers() -> None:
    one, two = on_meta("llama"), on_meta("llama")
    init_weights(one, 1, CPU)
    init_weights(two, 2, CPU)
    layers = one.model.layers
    assert not torch.equal(one.lm_head.weight, two.lm_head.weight)
    assert not torch.equal(layers[0].mlp.up_proj.weight, layers[1].mlp.up_proj.weight)
    assert not torch.equal(layers[0].self_attn.k_proj.weight, layers[0].self_attn.v_proj.weight)


def test_initialising_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    init_weights(on_meta("llama"), 1, CPU)
    assert torch.equal(torch.get_rng_state(), before)


def test_bf16_models_get_rounded_fp32_values() -> None:
    exact = on_meta("gemma2")
    init_weights(exact, 1, CPU)
    with torch.device("meta"):
        rounded = AutoModelForCausalLM.from_config(tiny("gemma2"), dtype=torch.bfloat16)
    init_weights(rounded, 1, CPU)
    for key, value in exact.named_parameters():
        assert torch.equal(rounded.get_parameter(key), value.to(torch.bfloat16)), key


def _initialised(names: tuple[str, ...], hybrid: bool) -> list[dict[str, Any]]:
    found = []
    for name in names:
        model = sharded(name, hybrid)
        init_weights(model, 7, CPU)
        found.append({**full(model), "logits": logits(model).numpy()})
    return found


@pytest.mark.parametrize(("world", "hybrid"), [(2, False), (4, True)])
def test_random_weights_are_the_same_on_any_layout(world: int, hybrid: bool) -> None:
    for ranks in zip(SHARDED, *run_ranks(world, _initialised, SHARDED, hybrid), strict=True):
        model = on_meta(ranks[0])
        init_weights(model, 7, CPU)
        expected = {**model.state_dict(), "logits": logits(model)}
        for found in ranks[1:]:
            for key, value in expected.items():
                assert torch.equal(torch.from_numpy(found[key]), value), (ranks[0], key)


def test_storage_alone_recomputes_buffers() -> None:
    model = on_meta("gemma3")
    materialize(model, CPU)
    reference = AutoModelForCausalLM.from_config(tiny("gemma3"))
    assert nothing_on_meta(model)
    for key, value in reference.named_buffers():
        assert torch.equal(model.get_buffer(key), value), key
