"""Packed attention against an explicit masked softmax, and against the model's own attention."""

import pytest
import torch
from torch import Tensor

from tests.model.zoo import FAMILIES, tiny
from tutti.attention.interface import (
    PACKED,
    AttentionSpec,
    check_packable,
    packed_attention,
    packed_kwargs,
    resolve_attention,
)
from tutti.core.batch import Sample, pack

BORDERS = torch.tensor([0, 1, 50, 600, 610], dtype=torch.int32)


def masked_softmax(query, key, value, *, causal, window, softcap, sinks) -> Tensor:
    heads, total, _ = query.shape
    key, value = (item.repeat_interleave(heads // key.shape[0], 0) for item in (key, value))
    scores = query @ key.transpose(1, 2) * 0.3
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    sample = torch.bucketize(torch.arange(total), BORDERS[1:], right=True)
    distance = torch.arange(total)[:, None] - torch.arange(total)
    seen = sample[:, None] == sample
    if causal:
        seen &= distance >= 0
    if window:
        seen &= (distance < window) & (distance > -window)
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(heads, total, 1)], -1)
    weights = scores.softmax(-1)
    return (weights if sinks is None else weights[..., :-1]).matmul(value).transpose(0, 1)


def make_inputs(heads: int, kv_heads: int) -> list[Tensor]:
    torch.manual_seed(1)
    total = int(BORDERS[-1])
    shapes = ((heads, 16), (kv_heads, 16), (kv_heads, 8))
    return [torch.randn(total, h, d, dtype=torch.float64).transpose(0, 1).requires_grad_() for h, d in shapes]


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_equals_masked_softmax(kv_heads, causal, window, softcap, with_sinks):
    ours, reference = make_inputs(4, kv_heads), make_inputs(4, kv_heads)
    sinks = [torch.linspace(-1, 1, 4, dtype=torch.float64).requires_grad_() if with_sinks else None for _ in range(2)]
    got = packed_attention(*ours, BORDERS, AttentionSpec(0.3, causal, window, softcap), sinks[0])
    want = masked_softmax(*reference, causal=causal, window=window, softcap=softcap, sinks=sinks[1])
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    grad = torch.randn_like(want)
    got.backward(grad)
    want.backward(grad)
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-10)
    if with_sinks:
        torch.testing.assert_close(sinks[0].grad, sinks[1].grad, rtol=1e-5, atol=1e-5)  # summed in fp32


def test_saved_and_recomputed_probabilities_agree(monkeypatch):
    grads = []
    for limit in (0, 1e9):
        monkeypatch.setattr("tutti.attention.interface.SAVED_SCORES", limit)
        inputs = make_inputs(4, 2)
        packed_attention(*inputs, BORDERS, AttentionSpec(0.3)).square().sum().backward()
        grads.append([item.grad for item in inputs])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_operator_is_sound_under_compile():
    query, key, value = (item.float().detach().requires_grad_() for item in make_inputs(4, 2))
    for keep in (True, False):
        arguments = (query, key, value, BORDERS, None, keep, [0.3, 1.0, 0.0, 0.0])
        torch.library.opcheck(torch.ops.tutti.packed_attention.default, arguments)


def test_packed_equals_each_sample_alone_in_a_real_model():
    from transformers import AutoModelForCausalLM, Qwen3Config

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


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("mamba", {}),
        ("mamba2", {}),
        ("jamba", {}),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}),
        ("qwen3_next", {"layer_types": ["linear_attention", "full_attention"]}),
        ("bloom", {}),
    ],
)
def test_models_that_would_leak_between_samples_are_refused(kind, changes):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, num_hidden_layers=2, **changes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=f"{kind} has layers .* would leak"):
        check_packable(model)


def test_every_family_of_the_zoo_can_be_packed():
    from transformers import AutoModelForCausalLM

    for family in FAMILIES:
        with torch.device("meta"):
            check_packable(AutoModelForCausalLM.from_config(tiny(family)))
