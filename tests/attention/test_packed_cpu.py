"""Tiled attention equals an explicit masked softmax."""

import pytest
import torch
from torch import Tensor

from tutti.attention.packed_cpu import packed_attention
from tutti.attention.spec import AttentionSpec

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
    monkeypatch.setattr("tutti.attention.packed_cpu.SAVING_DIM", 1)
    for limit in (0, 1e9):
        monkeypatch.setattr("tutti.attention.packed_cpu.SAVED_SCORES", limit)
        inputs = make_inputs(4, 2)
        packed_attention(*inputs, BORDERS, AttentionSpec(0.3)).square().sum().backward()
        grads.append([item.grad for item in inputs])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_probabilities_of_narrow_heads_are_not_saved():
    spec = [float(item) for item in AttentionSpec(0.3)]
    for dim in (64, 128):
        inputs = [torch.randn(heads, int(BORDERS[-1]), dim) for heads in (4, 2, 2)]
        saved = torch.ops.tutti.packed_attention(*inputs, BORDERS, None, True, spec)[1]
        assert bool(saved.numel()) == (dim == 128)


def test_operator_is_sound_under_compile():
    query, key, value = (item.float().detach().requires_grad_() for item in make_inputs(4, 2))
    for keep in (True, False):
        arguments = (query, key, value, BORDERS, None, keep, [0.3, 1.0, 0.0, 0.0])
        torch.library.opcheck(torch.ops.tutti.packed_attention.default, arguments)
