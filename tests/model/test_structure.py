"""The facts that the structure reads from a model are correct."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from tests import sweep
from tests.model.zoo import FAMILIES, HYBRIDS, tiny
from tutti.model import structure as plan

IDS = torch.tensor([[5, 17, 3, 99, 42, 7, 250, 11, 64, 8, 9, 31]])


def _built(name: str, **overrides: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny(name, **overrides), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3).add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_decoder_head_and_transform_give_the_models_logits(name: str) -> None:
    model = _built(name)
    with torch.no_grad():
        hidden = plan.decoder(model)(IDS, use_cache=False).last_hidden_state
        logits = plan.logit_transform(model)(plan.head(model)(hidden))
        torch.testing.assert_close(logits, model(IDS, use_cache=False).logits, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        ("llama", {}, plan.LogitTransform()),
        ("gemma2", {}, plan.LogitTransform(softcap=30.0)),
        ("gemma2", {"final_logit_softcapping": None}, plan.LogitTransform()),
        ("gemma3", {"final_logit_softcapping": 5.0}, plan.LogitTransform(softcap=5.0)),
        ("granite", {}, plan.LogitTransform(scale=0.125)),
        ("cohere", {}, plan.LogitTransform(scale=0.0625)),
    ],
)
def test_transforms_on_meta(name: str, overrides: dict[str, Any], expected: plan.LogitTransform) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny(name, **overrides))
    assert plan.logit_transform(model) == expected


def test_an_unknown_transform_is_refused() -> None:
    model = _built("llama")

    class Shifted(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits + 0.5
            return output

    model.__class__ = Shifted
    with pytest.raises(ValueError, match="does something to its logits"):
        plan.logit_transform(model)


def test_a_cropped_vocabulary_is_refused() -> None:
    model = _built("llama")

    class Cropped(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits[..., :-1]
            return output

    model.__class__ = Cropped
    with pytest.raises(ValueError, match="does something to its logits"):
        plan.logit_transform(model)


def test_a_model_whose_head_is_more_than_linear_is_refused() -> None:
    from transformers import BertConfig, BertLMHeadModel

    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32, is_decoder=True
    )
    with pytest.raises(ValueError, match="BertLMHeadModel cannot be cut"):
        plan.logit_transform(BertLMHeadModel(config))


def test_a_classifiers_head_is_its_score() -> None:
    model = AutoModelForSequenceClassification.from_config(tiny("gemma2", num_labels=3))
    assert plan.is_classifier(model) and plan.head(model) is model.score
    assert plan.logit_transform(model) == plan.LogitTransform()
    assert plan.decoder(model) is model.model


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_are_the_layers(name: str) -> None:
    model = _built(name)
    found = plan.blocks(model)
    assert [path.rsplit(".", 1)[1] for path, _ in found] == ["0", "1"]
    assert all(model.get_submodule(path) is module for path, module in found)
    model._no_split_modules = set()
    assert plan.blocks(model) == found


def test_basic_modules_are_found_or_refused() -> None:
    model = _built("qwen3_moe")
    found = [path for path, _ in plan.basic_modules(model, ["Embedding", "Qwen3MoeExperts"])]
    assert found == ["model.layers.1.mlp.experts", "model.layers.0.mlp.experts", "model.embed_tokens"]
    with pytest.raises(ValueError, match=r"has no Qwen3Expert; it is made of Embedding, Linear, .*Qwen3MoeExperts"):
        plan.basic_modules(model, ["Qwen3Expert", "Embedding"])


def test_parameters_in_all_and_active() -> None:
    assert plan.num_params(_built("smollm2")) == (23712, 23712)
    model = _built("mixtral")
    experts = sum(p.numel() for m in model.modules() if plan.is_experts(m) for p in m.parameters())
    total, active = plan.num_params(model)
    assert total == sum(p.numel() for p in model.parameters())
    assert active == total - experts + experts * 2 // 4


@pytest.mark.parametrize("name", ["llama", "smollm2", "qwen3", "gpt2", "phi3", "deepseek_v3"])
def test_flops_equal_what_torch_counts(name: str) -> None:
    """torch counts full attention; ours counts the pairs that causal attention looks at."""
    length = 16
    overrides = {"n_routed_experts": 4, "num_experts_per_tok": 4} if name == "deepseek_v3" else {}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        tiny(name, **overrides), attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
    )
    ids = torch.randint(0, 256, (1, length))
    with FlopCounterMode(display=False) as counter:
        model(ids, use_cache=False).logits.sum().backward()
    count = plan.count_flops(model)
    square = sum(flops for flops, _ in count.pairs) * length * length
    # The first layer's inputs take gradients too, which torch counts and which 6 flops a parameter includes.
    assert counter.get_total_flops() == pytest.approx(count.per_token * length + square, rel=0.02)
    causal = sum(flops for flops, _ in count.pairs) * (10 * 11 + 6 * 7) / 2
    assert count.batch([10, 6]) == count.per_token * 16 + causal


@pytest.mark.parametrize("name", HYBRIDS)
def test_flops_of_recurrences_equal_what_torch_counts(name: str) -> None:
    """Of the forward pass, and twice that backward, where torch counts a depthwise convolution as a dense one."""
    length = 512
    torch.manual_seed(0)
    changes = {"num_experts_per_tok": 4} if name == "qwen3_next" else {}
    config = tiny(name, **changes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
    with FlopCounterMode(display=False) as counter:
        model(torch.randint(0, 256, (1, length)), use_cache=False)
    count = plan.count_flops(model)
    square = sum(flops for flops, _ in count.pairs) * length * length
    assert 3 * counter.get_total_flops() == pytest.approx(count.per_token * length + square, rel=0.02)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("jetmoe", {}),
        ("longcat_flash", {"num_layers": 1, "expert_ffn_hidden_size": 16}),
        ("hrm_text", {}),
        ("zamba", {}),
    ],
)
def test_flops_of_what_runs_otherwise_than_once(name: str, changes: dict[str, Any]) -> None:
    """Stacks of experts of a class's own, experts that compute nothing, loops with and without gradients, and blocks
    that share their weights."""
    length = 64
    torch.manual_seed(0)
    config = sweep.tiny_config(name)
    for key, value in changes.items():
        setattr(config, key, value)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
    forward, backward = FlopCounterMode(display=False), FlopCounterMode(display=False)
    with forward:
        out = model(torch.randint(0, 90, (1, length)), use_cache=False).logits.sum()
    rest = 2 * forward.get_total_flops()  # torch counts a depthwise convolution backward as a dense one
    if name == "hrm_text":
        with backward:
            out.backward()
        rest = backward.get_total_flops()
    count = plan.count_flops(model)
    square = sum(flops for flops, _ in count.pairs) * length * length
    assert forward.get_total_flops() + rest == pytest.approx(count.per_token * length + square, rel=0.02)


def test_windows_bound_the_pairs() -> None:
    count = plan.FlopCount(0.0, ((1.0, 4),))
    assert count.batch([3]) == 6 and count.batch([10]) == 10 + 6 * 4
    kinds = plan.count_flops(_built("gemma3")).pairs
    assert [window for _, window in kinds] == [8, 0]


def test_the_class_under_a_sharded_one_is_found() -> None:
    from torch.distributed.fsdp import FSDPModule

    class Sharded(FSDPModule, nn.Linear):
        pass

    assert plan.model_class(object.__new__(Sharded)) is nn.Linear


def test_what_makes_images_is_no_part_to_train() -> None:
    with torch.device("meta"):
        model = AutoModelForMultimodalLM.from_config(AutoConfig.for_model("janus"))
    plan.freeze_parts(model, [])
    still = {name.split(".")[1] for name, item in model.named_parameters() if not item.requires_grad}
    assert still == {"vqmodel", "generation_embeddings", "generation_aligner", "generation_head"}
    parts = {
        part: {name.split(".")[1] for name in plan.part_parameters(model, part, "train.freeze")}
        for part in ("towers", "projectors", "language_model")
    }
    seen = {"towers": {"vision_model"}, "projectors": {"aligner"}, "language_model": {"language_model"}}
    assert parts == seen
