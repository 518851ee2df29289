"""Packed attention in models, with the kernel chosen for it, equals the models' own attention."""

import logging
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM, Qwen3Config

from tests.model.zoo import tiny
from tutti.attention.interface import PACKED, border_kwargs, packed_kwargs, resolve_attention
from tutti.core.batch import Sample, pack

CUDA = torch.device("cuda")


def test_packed_equals_each_sample_alone_in_a_real_model():
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=48, vocab_size=64, use_sliding_window=True, sliding_window=16, max_window_layers=1,
    )  # fmt: skip
    name = resolve_attention("sdpa", torch.device("cpu"))
    assert name == PACKED
    packed = AutoModelForCausalLM.from_config(config, attn_implementation=name)
    plain = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    plain.load_state_dict(packed.state_dict())
    ids = [torch.randint(0, 64, (n,)).int().numpy() for n in (5, 40, 1, 23)]
    batch = pack([Sample(input_ids=item, labels=item) for item in ids])
    together = packed(**packed_kwargs(batch)).logits[0]
    alone = torch.cat([plain(input_ids=torch.from_numpy(item)[None].long()).logits[0] for item in ids])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("device", "instead"), [("cuda", "torch's variable-length kernel"), ("cpu", "packed sdpa")])
def test_a_package_that_is_not_there_is_replaced(device, instead, caplog):
    with caplog.at_level(logging.INFO):
        assert resolve_attention("flash_attention_2", torch.device(device)) == PACKED
    assert instead in caplog.text


def test_an_installed_package_is_called_with_the_borders_or_not_at_all(monkeypatch):
    """Registered under a name of our own, which transformers does not mistake for one of its implementations."""
    calls = []

    def kernel(query, key, value, *borders, **options):
        calls.append(borders)
        return torch.zeros_like(query)

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=kernel))
    monkeypatch.setattr("tutti.attention.interface.fits_package", lambda query, value: True)
    assert resolve_attention("flash_attention_2", torch.device("cpu")) == PACKED
    name = resolve_attention("flash_attention_2", CUDA)
    assert name != PACKED and "flash" not in name
    model = AutoModelForCausalLM.from_config(tiny("qwen3"), attn_implementation=name)
    ids = torch.arange(7).int().numpy()
    batch = pack([Sample(input_ids=item, labels=item) for item in (ids, ids[:3])])
    model(**packed_kwargs(batch))
    assert len(calls) == model.config.num_hidden_layers
    assert calls[0][0] is batch.cu_seqlens and calls[0][2:] == (7, 7)
    heads, mask = (torch.ones(1, 4, 5, 8),) * 3, torch.ones(1, 1, 5, 5, dtype=torch.bool)
    attention, layer = AttentionInterface()[name], model.model.layers[0].self_attn
    assert attention(layer, *heads, mask, cu_seq_lens_q=batch.cu_seqlens)[0].shape == (1, 5, 4, 8)
    assert len(calls) == model.config.num_hidden_layers, "a mask that the kernel does not take"
    with pytest.raises(ValueError, match="does not pass the samples' borders on"):
        attention(layer, *heads, None)


def test_borders_stay_on_the_host_when_a_batch_leaves_it():
    ids = torch.arange(7).int().numpy()
    batch = pack([Sample(input_ids=item, labels=item) for item in (ids, ids[:3])])
    assert border_kwargs(batch)["borders"] is batch.cu_seqlens
    for moved in (batch.to(torch.device("meta")), batch.to(torch.device("meta")).to(torch.device("meta"))):
        kwargs = border_kwargs(moved)
        assert kwargs["cu_seq_lens_q"].is_meta and kwargs["borders"] is batch.cu_seqlens


@pytest.mark.parametrize(("family", "key"), [("gpt2", "attn_pdrop"), ("qwen3", "attention_dropout")])
def test_dropout_is_refused_by_the_name_that_the_config_has_for_it(family, key):
    model = AutoModelForCausalLM.from_config(
        tiny(family, **{key: 0.1}), attn_implementation=resolve_attention("sdpa", torch.device("cpu"))
    )
    ids = torch.arange(6)
    batch = {"input_ids": ids[None], "position_ids": ids[None], "use_cache": False}
    borders = torch.tensor([0, 6], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": 6, "max_length_k": 6}
    with pytest.raises(ValueError, match=rf"set {key} to 0"):
        model.train()(**batch, **lengths)
