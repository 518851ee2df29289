"""Tokenizer, configuration and model are built from local paths; a one-line error says if they do not fit."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from tests.checkpoint.weighing import ONE
from tests.model.zoo import FAMILIES, tiny
from tests.sweep_layouts import write_family
from tutti.attention.interface import PACKED, resolve_attention
from tutti.checkpoint.hf_load import load_weights
from tutti.config import Config
from tutti.config.load import from_dict
from tutti.model.build import (
    build_model,
    check_dtypes,
    check_eager,
    check_packable,
    instantiate,
    load_model_config,
    turn_off_dropout,
)
from tutti.model.experts import EAGER, FUSED
from tutti.model.tokenizer import build_tokenizer

QUICKSTART = Path(__file__).parents[2] / "data" / "quickstart"
CPU = torch.device("cpu")


def _config(model: dict[str, Any], **groups: dict[str, Any]) -> Config:
    return from_dict({"model": model, **groups})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Qwen3 of 2048 tokens with its tokenizer, as transformers saves it."""
    config = tiny("qwen3", vocab_size=2048)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(QUICKSTART / "tokenizer.json"), eos_token="<|im_end|>")
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_model_of_pictures_alone_is_refused_with_its_reason(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "glm_image"}')
    config = from_dict({"model": {"config_path": str(tmp_path)}, "data": {"train_path": "x"}})
    with pytest.raises(ValueError, match="for model_type glm_image; it writes codes of pictures and no text"):
        build_model(config)


def test_a_config_that_may_not_be_without_a_token_keeps_it(tmp_path: Path) -> None:
    """CWM's says which kinds of values it takes; the tokenizer has no begin of text."""
    write_family("cwm", tmp_path / "model")
    config = _config({"config_path": str(tmp_path / "model")})
    model = build_model(config, tokenizer=build_tokenizer(config))
    assert (model.config.bos_token_id, model.config.eos_token_id) == (1, 2)


def test_a_tokenizer_from_its_folder(folder: Path) -> None:
    tokenizer = build_tokenizer(_config({"model_path": str(folder)}))
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.chat_template


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A folder with nothing but a tokenizer.json."""
    (tmp_path / "bare").mkdir()
    return Path(shutil.copy(QUICKSTART / "tokenizer.json", tmp_path / "bare")).parent


@pytest.mark.parametrize("file", ["", "tokenizer.json"])
def test_a_bare_tokenizer_gets_its_special_tokens(file: str, bare: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "tutti"):
        tokenizer = build_tokenizer(_config({"tokenizer_path": str(bare / file)}))
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == ("<|endoftext|>", "<|endoftext|>", None)
    assert "eos_token <|endoftext|>" in caplog.text
    assert len(tokenizer) == 2048
    assert tokenizer.decode(tokenizer("Hello, world")["input_ids"]) == "Hello, world"


def test_a_tokenizer_follows_the_model_or_its_config(folder: Path) -> None:
    assert build_tokenizer(_config({"config_path": str(folder)})).eos_token == "<|im_end|>"
    assert build_tokenizer(_config({"config_path": str(folder / "config.json")})).eos_token == "<|im_end|>"


def test_bare_tokenizers_without_an_end_of_text_are_refused(tmp_path: Path) -> None:
    tree = json.loads((QUICKSTART / "tokenizer.json").read_text())
    tree["added_tokens"] = []
    for token in ("<|endoftext|>", "<|im_end|>"):
        tree["model"]["vocab"][token + "x"] = tree["model"]["vocab"].pop(token)
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=r"model.tokenizer_path: .*none of its tokens is a known end of text"):
        build_tokenizer(_config({"tokenizer_path": str(tmp_path)}))


def test_tokenizers_that_are_not_there_or_damaged_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^model.tokenizer_path: .*gone is not there"):
        build_tokenizer(_config({"tokenizer_path": str(tmp_path / "gone")}))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"^model.tokenizer_path: no tokenizer could be read from"):
        build_tokenizer(_config({"tokenizer_path": str(tmp_path)}))


def test_a_name_is_no_path_here() -> None:
    """Names have become folders before a model is built."""
    with pytest.raises(ValueError, match=r"^model.model_path: Qwen/Qwen3-0.6B is not there; .* \(org/name\)"):
        load_model_config(_config({"model_path": "Qwen/Qwen3-0.6B"}))


def test_configs_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    config = _config({"config_path": str(tmp_path)})
    with pytest.raises(ValueError, match=r"^model.config_path: there is no config.json in"):
        load_model_config(config)
    for text in ("{", '{"model_type": "no_such_model"}', '{"hidden_size": 4}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(
            ValueError, match=r"^model.config_path: .*config.json is not a configuration that can be used"
        ):
            load_model_config(config)
    tree = {**tiny("llama").to_dict(), "quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "config.json").write_text(json.dumps(tree, default=str))
    with pytest.raises(ValueError, match=r"^model.config_path: .* holds mxfp4 weights"):
        load_model_config(config)
    (tmp_path / "config.json").write_text('{"model_type": "clip_vision_model"}')
    with pytest.raises(ValueError, match="no causal language model for model_type clip_vision_model"):
        build_model(config, device=CPU)


@pytest.mark.parametrize("name", FAMILIES)
def test_models_are_built_on_meta(name: str, tmp_path: Path) -> None:
    tiny(name).save_pretrained(tmp_path)
    model = build_model(_config({"config_path": str(tmp_path)}), device=CPU)
    assert all(parameter.is_meta and parameter.dtype == torch.float32 for parameter in model.parameters())
    assert model.training
    assert model.config._attn_implementation == PACKED and model.config._experts_implementation == FUSED


def test_kernels_and_dtype_follow_the_configuration(folder: Path) -> None:
    plain = {"model_path": str(folder), "attn_implementation": "eager", "moe_implementation": "eager"}
    model = build_model(_config(plain, train={"enable_mixed_precision": False}), device=CPU)
    assert (model.config._attn_implementation, model.config._experts_implementation) == ("eager", EAGER)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for name, buffer in model.named_buffers() if "inv_freq" in name} == {torch.float32}


def test_a_kernel_for_experts_that_are_not_there_is_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", "tutti"):
        build_model(_config({"config_path": str(folder)}), device=CPU)
        assert not caplog.text
        build_model(_config({"config_path": str(folder), "moe_implementation": "fused"}), device=CPU)
    assert "model.moe_implementation: has no effect: Qwen3ForCausalLM has no experts" in caplog.text


def test_the_config_can_be_another_than_the_weights(folder: Path, tmp_path: Path) -> None:
    tiny("qwen3", num_hidden_layers=1).save_pretrained(tmp_path / "other")
    paths = {"model_path": str(folder), "config_path": str(tmp_path / "other")}
    assert build_model(_config(paths), device=CPU).config.num_hidden_layers == 1


def test_classifiers_and_their_number_of_labels(folder: Path) -> None:
    data = {"data_type": "classification"}
    assert build_model(_config({"model_path": str(folder)}, data=data), device=CPU).score.out_features == 2
    settings = _config({"model_path": str(folder), "num_labels": 5}, data=data)
    assert build_model(settings, device=CPU).score.out_features == 5
    assert build_model(settings, num_labels=7, device=CPU).score.out_features == 7
    named = AutoModelForSequenceClassification.from_config(tiny("qwen3", id2label={0: "no", 1: "maybe", 2: "yes"}))
    named.config.save_pretrained(folder)
    model = build_model(_config({"model_path": str(folder), "num_labels": 3}, data=data), device=CPU)
    assert model.config.id2label == {0: "no", 1: "maybe", 2: "yes"}


def test_a_tokenizer_larger_than_the_embedding_is_refused(folder: Path) -> None:
    tiny("qwen3").save_pretrained(folder)
    config = _config({"model_path": str(folder)})
    with pytest.raises(ValueError, match=r"^model.tokenizer_path: the tokenizer has 2048 tokens, .* only 256 rows"):
        build_model(config, tokenizer=build_tokenizer(config), device=CPU)


def test_a_fresh_model_ends_its_texts_as_its_tokenizer_does(folder: Path, bare: Path) -> None:
    fresh = _config({"config_path": str(folder), "tokenizer_path": str(bare)})
    tokenizer = build_tokenizer(fresh)
    model = build_model(fresh, tokenizer=tokenizer, device=CPU)
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id == 0
    # The config's padding token is now the end-of-text token, whose embedding must be trained.
    assert model.config.pad_token_id is None and model.get_input_embeddings().padding_idx is None
    trained = build_model(_config({"model_path": str(folder)}), tokenizer=tokenizer, device=CPU)
    assert trained.config.eos_token_id == 2 and trained.config.pad_token_id == 0


def test_generation_settings_come_along(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"temperature": 0.6, "do_sample": true, "eos_token_id": [1, 2]}')
    model = build_model(_config({"model_path": str(folder)}), device=CPU)
    assert (model.generation_config.temperature, model.generation_config.eos_token_id) == (0.6, [1, 2])
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"generation_config\.json"):
        build_model(_config({"model_path": str(folder)}), device=CPU)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_dropped_once_dropout_is_off(family):
    """With every dropout that the config has: a model in training mode gives the outputs of evaluation mode."""
    config = tiny(family)
    for name in config.to_dict():
        if any(part in name for part in ("drop", "jitter")):
            setattr(config, name, 0.3)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    ids = torch.arange(3, 40)[None]
    want = model.eval()(input_ids=ids, use_cache=False).logits
    random = not torch.equal(model.train()(input_ids=ids, use_cache=False).logits, want)
    assert random or family not in ("gpt2", "qwen3", "gpt_neox", "phi3", "mixtral")
    turn_off_dropout(model)
    assert torch.equal(model.train()(input_ids=ids, use_cache=False).logits, want)


MIXES, ALONE = "has layers .* would leak", "has attention of its own alone"


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("rwkv", MIXES), ("xlstm", MIXES), ("deepseek_v4", MIXES), ("bart", ALONE), ("bloom", ALONE)],
)
def test_models_that_would_leak_between_samples_are_refused(kind, reason):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, num_hidden_layers=2))
    with pytest.raises(ValueError, match=f"^{kind} {reason}"):
        check_packable(model)


def test_attention_of_a_class_of_its_own_alone_is_refused():
    options = {"attn_implementation": resolve_attention("sdpa", CPU)}
    with torch.device("meta"), pytest.raises(ValueError, match=r"^falcon has attention of its own alone"):
        instantiate(AutoModelForCausalLM, AutoConfig.for_model("falcon"), **options)


def test_every_family_of_the_zoo_can_be_packed():
    for family in FAMILIES:
        with torch.device("meta"):
            check_packable(AutoModelForCausalLM.from_config(tiny(family)))


@pytest.mark.parametrize(("family", "kept"), [("qwen3", True), ("gpt2", True), ("gemma3", True), ("gpt_oss", False)])
def test_eager_attention_that_looks_across_samples_is_refused(family, kept):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny(family), attn_implementation="eager")
    if kept:
        check_eager(model)
    else:
        with pytest.raises(ValueError, match=r"model\.attn_implementation: GptOssForCausalLM does not keep packed"):
            check_eager(model)
    assert model.config._attn_implementation == "eager"
    assert not any("forward" in vars(module) for module in model.modules())


def config_with_routers(family: str) -> PreTrainedConfig:
    if family in FAMILIES:
        return tiny(family, vocab_size=2048)
    sizes = {
        "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 2048,
        "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2, "moe_k": 2,
        "first_k_dense_replace": 1, "moe_layer_start_index": 1, "pad_token_id": 0,
    }  # fmt: skip
    return AutoConfig.for_model(family, **sizes)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "deepseek_v3", "gpt_oss", "ernie4_5_moe", "glm4_moe"])
def test_parameters_and_buffers_have_the_dtypes_that_from_pretrained_gives(tmp_path, family):
    config = config_with_routers(family)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ours = build_model(from_dict({"model": {"model_path": str(tmp_path)}}), dtype=torch.bfloat16)
    want = {name: tensor.dtype for name, tensor in theirs.state_dict().items()}
    assert {name: tensor.dtype for name, tensor in ours.state_dict().items()} == want
    load_weights(ours, tmp_path, world=ONE)
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[name]), name


def test_parameters_of_two_dtypes_are_refused_for_training(tmp_path):
    config_with_routers("ernie4_5_moe").save_pretrained(tmp_path)
    config = from_dict({"model": {"config_path": str(tmp_path)}, "train": {"enable_mixed_precision": False}})
    with pytest.raises(ValueError, match=r"train\.enable_mixed_precision: Ernie4_5_MoeForCausalLM keeps .*gate"):
        check_dtypes(build_model(config))
