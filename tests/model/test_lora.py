"""Adapters compute their formulas and the same as peft, and convert to peft's format and back."""

from __future__ import annotations

import copy
import json
import math
import re
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.model.zoo import EXPERTS, FAMILIES, VOCAB, tiny
from tests.sweep import tiny_config
from tests.train.adapted import open_merged
from tutti.checkpoint.adapter import export_adapter, load_adapter, read_lora
from tutti.core.dist import World
from tutti.model.experts import FUSED, resolve_experts
from tutti.model.lora import (
    ADAPTER_MARK,
    Lora,
    adapters,
    adapters_off,
    add_adapters,
    init_adapters,
    lora_of,
    merge,
    modules_to_save,
    require_gradients,
)

RANKS = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
IDS = torch.randint(0, VOCAB, (2, 11), generator=torch.Generator().manual_seed(1))


class NoTokenizer:
    def save_pretrained(self, folder):
        pass


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    resolve_experts(None)


def base_model(name="qwen3", auto=AutoModelForCausalLM, **overrides):
    model = auto.from_config(
        tiny(name, **overrides), dtype=torch.float32, attn_implementation="eager", experts_implementation=FUSED
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def adapted(model, **settings):
    """A copy of `model` with adapters that differ from their initial values."""
    model = copy.deepcopy(model)
    add_adapters(model, Lora(**{"rank": 4, "alpha": 8.0, **settings}), torch.float32)
    init_adapters(model, seed=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ADAPTER_MARK in name or parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def assert_equal(got, want, what):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, msg=lambda text: f"{what}: {text}")


def gradients(model):
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


VARIANTS = {
    "plain": ("llama", {}),
    "rank-stabilised": ("qwen3", {"rslora": True}),
    "dora": ("qwen3", {"dora": True}),
    "biases-dora": ("qwen2", {"dora": True}),
    "transposed": ("gpt2", {}),
    "some-layers": ("qwen3", {"targets": ("q_proj", "layers.1.mlp.*")}),
    "tied-embedding": ("qwen3", {"modules_to_save": ("embed_tokens",)}),
    "head-and-norms": ("llama", {"modules_to_save": ("lm_head", "input_layernorm")}),
    "experts": ("qwen3_moe", {}),
    "transposed-experts": ("gpt_oss", {}),
    "one-stack": ("qwen3_moe", {"targets": ("experts.down_proj", "v_proj")}),
}


@pytest.mark.parametrize(("family", "settings"), VARIANTS.values(), ids=VARIANTS)
def test_peft_reads_what_is_written_and_computes_the_same(tmp_path, family, settings):
    peft = pytest.importorskip("peft")
    base = base_model(family)
    ours = adapted(base, **settings)
    export_adapter(ours, tmp_path / "a", NoTokenizer(), world=RANKS, base=None)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a", is_trainable=True).eval()
    assert (logits(ours) - logits(base)).abs().max() > 1e-3, "the adapter does nothing"
    assert_equal(logits(theirs), logits(ours), "logits")
    if settings.get("modules_to_save") == ("embed_tokens",):
        return  # peft unties the two, so that each gets a gradient of its own
    our_gradients = gradients(ours)
    model = copy.deepcopy(ours)
    for name, parameter in model.named_parameters():
        parameter.data = our_gradients.get(name, torch.zeros_like(parameter))
    # What is written of a model of gradients is the gradients, in peft's layout; but for magnitudes, to which norms are
    # added.
    export_adapter(model, tmp_path / "g", NoTokenizer(), world=RANKS, base=None)
    written = {
        key.removeprefix("base_model.model."): value for key, value in load_file(_weights(tmp_path / "g")).items()
    }
    found = {
        re.sub(r"\.default|\.modules_to_save|^base_model\.model\.", "", name): gradient
        for name, gradient in gradients(theirs).items()
    }
    if settings.get("dora"):
        found = {name.replace("vector.weight", "vector"): gradient for name, gradient in found.items()}
        written.update(_magnitude_gradients(ours, our_gradients))
    assert found.keys() == written.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(
            gradient, written[name], rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


def _magnitude_gradients(model, found):
    return {
        adapter.name + ".lora_magnitude_vector": found[f"{adapter.name}.weight_lora_offset"]
        for _, adapter in adapters(model)
    }


def _weights(folder):
    return folder / "adapter_model.safetensors"


READ = {
    "plain": ("llama", {"target_modules": "all-linear"}),
    "dora": ("qwen3", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "rank-stabilised": ("qwen3", {"target_modules": ["q_proj"], "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": r".*(q_proj|up_proj)",
            "rank_pattern": {"layers.0.self_attn.q_proj": 2},
            "alpha_pattern": {"up_proj": 5},
        },
    ),
    "whole-modules": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "transposed": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "experts": (
        "qwen3_moe",
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
}


@pytest.mark.parametrize(("family", "settings"), READ.values(), ids=READ)
def test_what_peft_wrote_is_read(tmp_path, family, settings):
    peft = pytest.importorskip("peft")
    base = base_model(family)
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **settings)
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    theirs.save_pretrained(tmp_path)
    ours = copy.deepcopy(base)
    add_adapters(ours, read_lora(tmp_path, ours), torch.float32)
    load_adapter(ours, tmp_path)
    assert_equal(logits(ours), logits(theirs), "logits")


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("family", [*EXPERTS, "qwen3", "gpt2", "phi3"])
def test_merging_gives_a_model_of_the_original_class(family, dora):
    """Merged weights are full matrices: for experts, they are the reference for low-rank grouped products."""
    base = base_model(family)
    model = adapted(base, dora=dora)
    want = logits(model)
    found = gradients(model)
    reference = _dense_gradients(base, model)
    for name, gradient in reference.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")
    merge(model)
    assert_equal(logits(model), want, "merged")
    assert model.state_dict().keys() == base.state_dict().keys() and lora_of(model) is None


def _dense_gradients(base, model):
    """Gradients of the adapters' parameters, computed through full weights as functions of them."""
    leaves = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters() if ADAPTER_MARK in name}
    weights = {}
    for module, adapter in adapters(model):
        path = next(name for name, other in model.named_modules() if other is module)
        A, B, *offset = (
            leaves[f"{path}.{adapter.weight}{ADAPTER_MARK}{part}"]
            for part in ("A", "B", "offset")
            if f"{path}.{adapter.weight}{ADAPTER_MARK}{part}" in leaves
        )
        weight = adapter.weight_of(module)
        whole = weight + adapter.scaling * (B @ A)
        if offset:
            magnitude = weight.norm(dim=-1) + offset[0]
            whole = whole * (magnitude / whole.norm(dim=-1).detach())[..., None]
        weights[f"{path}.{adapter.weight}"] = whole.transpose(-2, -1) if adapter.transposed else whole
    arguments = {"labels": IDS, "use_cache": False}
    torch.func.functional_call(base, weights, (IDS,), arguments).loss.backward()
    return {name: leaf.grad for name, leaf in leaves.items()}


def test_formulas():
    """s = alpha / r or alpha / sqrt(r); DoRA gives outputs of the norm m where B A changes the direction."""

    def layer(**settings):
        model = adapted(base_model("llama"), targets=("q_proj",), **settings)
        module, adapter = adapters(model)[0]
        return module, adapter, adapter.factors(module)

    x = torch.randn(5, 32)
    for settings, scaling in (({}, 8 / 4), ({"rslora": True}, 8 / math.sqrt(4)), ({"rank": 8, "alpha": 4.0}, 0.5)):
        module, adapter, (A, B, _) = layer(**settings)
        assert adapter.scaling == scaling
        torch.testing.assert_close(module(x), x @ (module.weight + scaling * B @ A).T)
    module, _, (A, B, offset) = layer(dora=True)
    changed = module.weight + 2.0 * B @ A
    magnitude = module.weight.norm(dim=1) + offset
    torch.testing.assert_close(module(x), x @ (changed / changed.norm(dim=1, keepdim=True) * magnitude[:, None]).T)


def test_training_begins_at_the_base_model():
    base = base_model("qwen3_moe")
    for dora in (False, True):
        model = copy.deepcopy(base)
        add_adapters(model, Lora(rank=4, dora=dora), torch.float32)
        init_adapters(model, seed=0)
        assert_equal(logits(model), logits(base), "logits")
        for module, adapter in adapters(model):
            A = adapter.factors(module).A
            assert 0.5 < A.abs().max() * math.sqrt(A.shape[-1]) <= 1 and A.std() > 0


def test_dropout_acts_in_training_alone():
    base = base_model("qwen3_moe")
    model, without = adapted(base, dropout=0.5), adapted(base)
    for ours, theirs in zip(model.parameters(), without.parameters(), strict=True):
        ours.data.copy_(theirs.data)
    assert_equal(logits(model.eval()), logits(without), "evaluation")
    model.train()
    assert (logits(model) - logits(without)).abs().max() > 1e-3
    for target in ("experts.down_proj", "q_proj"):
        one = adapted(base, dropout=0.5, targets=(target,)).train()
        assert (logits(one) - logits(one)).abs().max() > 1e-4, target


def test_adapters_can_be_off():
    base = base_model("qwen3_moe")
    model = adapted(base)
    with adapters_off(model):
        assert torch.equal(logits(model), logits(base))
    assert (logits(model) - logits(base)).abs().max() > 1e-3


def test_only_adapters_and_whole_modules_train_and_the_rest_is_held_small():
    model = base_model("qwen3_moe")
    add_adapters(model, Lora(modules_to_save=("norm",)), torch.bfloat16)
    for name, parameter in model.named_parameters():
        trained = ADAPTER_MARK in name or name == "model.norm.weight"
        assert parameter.requires_grad == trained, name
        assert parameter.dtype == (torch.float32 if trained else torch.bfloat16), name
    assert not any("lm_head" in adapter.name or "gate.weight" in adapter.name for _, adapter in adapters(model))
    names = {adapter.name.split("layers.0.")[-1] for _, adapter in adapters(model)}
    linear = {f"self_attn.{kind}_proj" for kind in "qkvo"}
    assert names >= linear | {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}


def test_tied_parameters_stay_one():
    model = base_model("qwen3")
    add_adapters(model, Lora(modules_to_save=("lm_head",)), torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.lm_head.weight.requires_grad
    assert set(modules_to_save(model)) == {"model.embed_tokens", "lm_head"}


def test_new_head_of_a_classifier_is_trained_and_travels(tmp_path):
    base = base_model("llama", AutoModelForSequenceClassification, num_labels=3)
    model = adapted(base)
    assert model.score.weight.requires_grad
    export_adapter(model, tmp_path, NoTokenizer(), world=RANKS, base=None)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["task_type"] == "SEQ_CLS" and settings["modules_to_save"] == ["score"]
    peft = pytest.importorskip("peft")
    assert_equal(logits(peft.PeftModel.from_pretrained(base, tmp_path).eval()), logits(model), "logits")


WRONG = {
    "no-such-layer": ({"targets": ("query",)}, r"lora_targets: nothing is called query; there are q_proj, k_proj"),
    "head": (
        {"targets": ("lm_head",)},
        r"lora_targets: lm_head is no layer that an adapter goes beside .*lora_full_mod",
    ),
    "embedding": ({"targets": ("embed_tokens",)}, r"lora_full_modules"),
    "no-such-module": (
        {"modules_to_save": ("wte",)},
        r"lora_full_modules: nothing is called wte; there are .*embed_tokens",
    ),
}


@pytest.mark.parametrize(("settings", "message"), WRONG.values(), ids=WRONG)
def test_names_that_match_nothing(settings, message):
    with pytest.raises(ValueError, match=message):
        add_adapters(base_model(), Lora(**settings), torch.float32)


def test_own_loop_of_experts_knows_no_adapters():
    model = base_model("qwen3_moe")
    model.config._experts_implementation = "eager"
    with pytest.raises(ValueError, match="moe_implementation"):
        add_adapters(model, Lora(), torch.float32)
    add_adapters(model, Lora(targets=("q_proj",)), torch.float32)


@pytest.mark.parametrize(
    ("family", "left_out", "others"),
    [
        ("longcat_flash", "mlp.router.classifier", {"q_a_proj", "down_proj"}),
        ("jetmoe", "mlp.router.layer", {"kv_proj"}),
        ("glm_moe_dsa", "self_attn.indexer.wk", {"q_a_proj", "down_proj"}),
        ("gemma3n_text", "altup.correction_coefs", {"q_proj", "prediction_coefs", "per_layer_projection"}),
        ("jamba", "mamba.dt_proj", {"in_proj", "x_proj", "gate_up_proj"}),  # its weight is read without a call
        ("qwen3_next", None, {"in_proj_qkvz", "shared_expert_gate", "gate_up_proj"}),
    ],
)
def test_what_gets_no_gradient_by_itself_is_adapted_only_by_name(family, left_out, others):
    def names(**lora: Any) -> set[str]:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(tiny_config(family), experts_implementation=FUSED)
        add_adapters(model, Lora(**lora), torch.float32)
        return {adapter.name for _, adapter in adapters(model)}

    found = names()
    assert others <= {name.rpartition(".")[2] for name in found}
    assert not any(".router." in name or "indexer" in name for name in found)
    if left_out:
        assert not any(name.endswith(left_out) for name in found)
        assert {name.partition(".")[2].split(".", 2)[2] for name in names(targets=(left_out,))} == {left_out}


def test_adapter_without_gradient_is_named():
    model = base_model("llama")
    model.model.layers[1].self_attn.unused_proj = nn.Linear(32, 32)
    add_adapters(model, Lora(), torch.float32)
    init_adapters(model, seed=0)
    gradients(model)
    with pytest.raises(ValueError, match=r"of model\.layers\.1\.self_attn\.unused_proj got no gradient"):
        require_gradients(model, RANKS)
    alive = adapted(base_model("qwen3_moe"))
    gradients(alive)
    require_gradients(alive, RANKS)


def _written(tmp_path, **settings):
    model = adapted(base_model(), **settings)
    export_adapter(model, tmp_path, NoTokenizer(), world=RANKS, base=None)
    return tmp_path


REFUSED = {
    "another-kind": ({"peft_type": "IA3"}, "IA3"),
    "biases": ({"bias": "all"}, "bias = all"),
    "changed-base": ({"init_lora_weights": "pissa"}, "pissa"),
    "tokens": ({"trainable_token_indices": [1]}, "trainable_token_indices"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_adapters_of_another_kind_are_refused(tmp_path, changes, message):
    file = _written(tmp_path) / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=f"model.adapter_path.*{message}"):
        read_lora(tmp_path, base_model())


def test_adapter_of_another_model_is_refused(tmp_path):
    _written(tmp_path)
    wider = base_model(hidden_size=48)
    add_adapters(wider, read_lora(tmp_path, wider), torch.float32)
    with pytest.raises(ValueError, match=r"does not fit .* of another shape: .*lora_A"):
        load_adapter(wider, tmp_path)
    with pytest.raises(ValueError, match="which this model does not have"):
        read_lora(tmp_path, base_model("gpt2"))
    tensors = load_file(_weights(tmp_path))
    save_file({**tensors, "base_model.model.model.layers.7.x.lora_B.weight": torch.zeros(1)}, _weights(tmp_path))
    model = base_model()
    add_adapters(model, read_lora(tmp_path, model), torch.float32)
    with pytest.raises(ValueError, match=r"what the model has not: .*layers\.7\.x"):
        load_adapter(model, tmp_path)
    tensors.pop(next(key for key in tensors if key.endswith("q_proj.lora_B.weight")))
    save_file(tensors, _weights(tmp_path))
    with pytest.raises(ValueError, match=r"it lacks: .*q_proj\.lora_B"):
        load_adapter(model, tmp_path)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_folder_is_enough_to_open_the_adapted_model(tmp_path, family):
    base = base_model(family)
    base.save_pretrained(tmp_path / "base")
    model = adapted(base, dora=True)
    export_adapter(model, tmp_path / "adapter", NoTokenizer(), world=RANKS, base=str(tmp_path / "base"))
    assert_equal(logits(open_merged(tmp_path / "adapter").eval()), logits(model), "logits")


def test_every_family_can_be_adapted():
    for name in FAMILIES:
        model = adapted(base_model(name))
        gradients(model)
        require_gradients(model, RANKS)
