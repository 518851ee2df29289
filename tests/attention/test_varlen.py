"""Variable-length attention equals tiled attention; its inputs; which layers use it, and which kernel they get."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.attention.test_ring import BORDERS, SETTINGS
from tutti.attention import online_softmax as tiled
from tutti.attention import varlen as flash
from tutti.attention.online_softmax import Gradients, Keys, Queries
from tutti.attention.packed_cpu import packed_attention
from tutti.attention.ring import chunks, plan_blocks
from tutti.attention.spec import AttentionSpec


def emulated_forward(*args):
    """The results of torch's variable-length kernel, tokens first: output, lse [H, T] and the state of dropout."""
    query, key, value, query_borders, key_borders, max_q, max_k, causal, scale, window = args
    check_limits(query, key, value, window)
    assert causal == (window == [-1, 0])
    for borders, longest in ((query_borders, max_q), (key_borders, max_k)):
        assert borders.dtype == torch.int32 and longest == borders.diff().max()
    scores, value = emulated_scores(query, key, value, query_borders, key_borders, scale, window)
    lse = scores.logsumexp(-1)
    return ((scores - lse[..., None]).exp() @ value).transpose(0, 1), lse, None


def check_limits(query, key, value, window):
    """The kernel takes contiguous heads of one width, and chooses another kernel by itself without a window."""
    assert query.shape[2] == key.shape[2] == value.shape[2]
    assert query.shape[2] % 8 == 0 and query.shape[2] <= 256
    assert all(item.is_contiguous() for item in (query, key, value))
    assert list(window) != [-1, -1]


def emulated_scores(query, key, value, query_borders, key_borders, scale, window):
    key, value = (item.transpose(0, 1).repeat_interleave(query.shape[1] // item.shape[1], 0) for item in (key, value))
    places = [torch.arange(int(borders[-1])) for borders in (query_borders, key_borders)]
    samples = [
        torch.bucketize(place, borders[1:], right=True)
        for place, borders in zip(places, (query_borders, key_borders), strict=True)
    ]
    seen = samples[0][:, None] == samples[1]
    distance = places[0][:, None] - places[1]
    behind, ahead = window
    if behind >= 0:
        seen &= distance <= behind
    if ahead >= 0:
        seen &= -distance <= ahead
    return (query.transpose(0, 1) @ key.transpose(1, 2) * scale).masked_fill(~seen, float("-inf")), value


def emulated_backward(grad, query, key, value, out, *args):
    """Gradients of a part of a softmax whose lse and output are those of the whole."""
    lse, query_borders, key_borders, _max_q, _max_k, _causal, _state, scale, window = args
    check_limits(query, key, value, window)
    scores, values = emulated_scores(query, key, value, query_borders, key_borders, scale, window)
    groups = query.shape[1] // key.shape[1]
    weights = (scores - lse[..., None]).exp()
    grad, out = grad.transpose(0, 1), out.transpose(0, 1)
    grad_scores = weights * (grad @ values.transpose(1, 2) - (grad * out).sum(-1, keepdim=True)) * scale
    grad_query = grad_scores @ key.transpose(0, 1).repeat_interleave(groups, 0)
    parts = grad_scores.transpose(1, 2) @ query.transpose(0, 1), weights.transpose(1, 2) @ grad
    grads = [grad_query, *(part.unflatten(0, (-1, groups)).sum(1) for part in parts)]
    return tuple(item.transpose(0, 1) for item in grads)


@pytest.mark.parametrize("settings", [SETTINGS[name] for name in SETTINGS if name != "softcap"], ids=str)
@pytest.mark.parametrize("borders", BORDERS.values(), ids=BORDERS)
def test_calls_of_the_flash_kernel_make_up_the_same_blocks(monkeypatch, borders, settings):
    monkeypatch.setattr(flash, "varlen_forward", emulated_forward)
    monkeypatch.setattr(flash, "varlen_backward", emulated_backward)
    torch.manual_seed(0)
    size, total = 2, borders[-1]
    whole = [torch.randn(shape, dtype=torch.float64) for shape in ((4, total, 8), (2, total, 8), (2, total, 6))]
    grad = torch.randn(4, total, 6, dtype=torch.float64)
    for rank in range(size):
        results = []
        for kernel in (tiled, flash):
            parts = []
            for other in range(size):
                spans = tuple(chunks(other, size, total))
                held = torch.cat([torch.arange(*span) for span in spans])
                parts.append((spans, held, [item[:, held] for item in whole]))
            spans, held, (query, *_) = parts[rank]
            queries = Queries(query, query.new_full(query.shape[:2], float("-inf")), spans)
            out = query.new_zeros(*query.shape[:2], 6)
            met = [(Keys(key, value, theirs), plan_blocks(spans, theirs, borders, settings))
                   for theirs, _, (_, key, value) in (parts[rank], parts[1 - rank])]  # fmt: skip
            for keys, blocks in met:
                kernel.attend(queries, out, keys, blocks, settings)
            sums = []
            for keys, blocks in met:
                sums.append(Gradients(*(torch.zeros_like(item) for item in (query, keys.key, keys.value))))
                kernel.attend_backward(queries, keys, blocks, settings, (grad[:, held], out), sums[-1])
            results.append([out, queries.lse, *(item for part in sums for item in part)])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


PACKED_BORDERS = torch.tensor([0, 1, 30, 31, 77, 96], dtype=torch.int32)


def assert_equals_tiles(settings, widths, kernel, *, sinks=False):
    """Output and gradients of one batch by a kernel, and by tiles."""
    torch.manual_seed(0)
    shapes = ((4, 96, widths[0]), (2, 96, widths[0]), (2, 96, widths[1]), (4,))
    whole = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    results = []
    for each in (lambda *inputs: packed_attention(*inputs[:3], PACKED_BORDERS, settings, *inputs[3:]), kernel):
        inputs = [item.clone().requires_grad_() for item in whole[: 3 + sinks]]
        out = each(*inputs)
        out.square().sum().backward()
        results.append([out, *(item.grad for item in inputs)])
    for ours, theirs in zip(*results, strict=True):
        exact = 1e-10 if ours.ndim > 1 else 1e-5  # the tiles sum the gradients of sinks in fp32
        torch.testing.assert_close(ours, theirs, rtol=exact, atol=exact)


@pytest.mark.parametrize("widths", [(8, 8), (12, 6), (16, 8), (5, 5)], ids=str)
@pytest.mark.parametrize("settings", [SETTINGS[name] for name in SETTINGS if name != "softcap"], ids=str)
def test_a_packed_batch_by_torchs_kernel(monkeypatch, settings, widths):
    monkeypatch.setattr(flash, "varlen_forward", emulated_forward)
    monkeypatch.setattr(flash, "varlen_backward", emulated_backward)

    def kernel(query, key, value, sinks=None):
        return flash.varlen_attention(query, key, value, PACKED_BORDERS, 46, settings, sinks)

    for sinks in (False, True):
        assert_equals_tiles(settings, widths, kernel, sinks=sinks)


def emulated_package(query, key, value, cu_q, cu_k, *longest, **options):
    """The results of flash-attn's function; some versions also return the log of the softmax's denominator."""
    assert options.keys() == {"softmax_scale", "causal", "window_size", "softcap", "deterministic"}
    assert longest == (46, 46) and options["deterministic"] is False
    check_limits(query, key, value, options["window_size"])
    scale, softcap, (behind, ahead) = options["softmax_scale"], options["softcap"], options["window_size"]
    window = [behind, 0 if options["causal"] else ahead]
    key, value = (item.repeat_interleave(query.shape[1] // item.shape[1], 1) for item in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    hidden, _ = emulated_scores(query, key, value, cu_q, cu_k, scale, window)
    weights = scores.masked_fill(hidden.isinf(), float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value), scores.logsumexp(-1)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_packed_batch_by_a_package(settings):
    def kernel(query, key, value):
        return flash.package_attention(query, key, value, PACKED_BORDERS, 46, settings, emulated_package)

    assert_equals_tiles(settings, (12, 6), kernel)


def test_what_the_kernels_take(monkeypatch):
    def fitting(width, value_width=None, dtype=torch.bfloat16, device="cuda", softcap=0.0):
        with FakeTensorMode():
            query, value = (torch.empty(2, 4, n, dtype=dtype, device=device) for n in (width, value_width or width))
            return flash.fits(query, value, AttentionSpec(1.0, softcap=softcap)), flash.fits_package(query, value)

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=9))
    assert (
        fitting(64) == fitting(256) == fitting(20) == fitting(192, 128) == fitting(64, dtype=torch.half) == (True, True)
    )
    assert fitting(64, softcap=30.0) == (False, True)
    assert fitting(264) == fitting(512) == fitting(64, 128) == (False, False)
    assert fitting(64, dtype=torch.float32) == fitting(64, device="cpu") == (False, False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=7))
    assert fitting(64) == (False, False)


def test_packages_that_are_missing_or_broken(monkeypatch, caplog):
    assert flash.load_package("flash_attention_2") is None and not caplog.text

    class Broken:
        def __getattr__(self, name):
            raise ImportError("undefined symbol")

    monkeypatch.setitem(sys.modules, "flash_attn", Broken())
    assert flash.load_package("flash_attention_2") is None
    assert "the installed flash_attn cannot be used: undefined symbol" in caplog.text
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=emulated_package))
    assert flash.load_package("flash_attention_2") is emulated_package


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_flash_kernel_equals_tiles_on_a_gpu():
    settings, spans = AttentionSpec(0.3), ((0, 96),)
    blocks = plan_blocks(spans, spans, BORDERS["ragged"], settings)
    torch.manual_seed(0)
    drawn = [torch.randn(n, 96, 16, device="cuda", dtype=torch.bfloat16) for n in (4, 2, 2)]
    results = []
    for kernel, dtype in ((tiled, torch.float32), (flash, torch.bfloat16)):
        query, key, value = (item.to(dtype) for item in drawn)
        queries = Queries(query, query.new_full((4, 96), float("-inf"), dtype=torch.float32), spans)
        out, grad = torch.zeros(4, 96, 16, device="cuda"), torch.ones_like(query)
        kernel.attend(queries, out, Keys(key, value, spans), blocks, settings)
        sums = Gradients(*(torch.zeros_like(item, dtype=torch.float32) for item in (query, key, value)))
        outer = grad, out.to(dtype)
        kernel.attend_backward(queries, Keys(key, value, spans), blocks, settings, outer, sums)
        results.append((out, queries.lse, *sums))
    for exact, ours in zip(*results, strict=True):
        assert (ours - exact).norm() < 0.01 * exact.norm()
