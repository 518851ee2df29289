"""Native sparse attention equals its definition with dense masks; generating token by token equals one pass."""

from __future__ import annotations

import logging
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import tutti.attention
from tutti.attention import sparse, sparse_tensors
from tutti.attention.kv_cache import KVCache
from tutti.attention.sparse import NativeSparse, SparseSizes

SIZES = SparseSizes(block=8, stride=4, selected_block=16, selected=4, window=24)
LENGTHS = (5, 70, 300, 1, 64, 130, 33)
"""Samples shorter than a block, shorter than the selected tokens, and longer; with ends within and at block ends."""
SCALE = 0.25


@pytest.fixture
def layer() -> NativeSparse:
    torch.manual_seed(0)
    made = NativeSparse(64, 8, 16, 12, SIZES, 0.02)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return made


def inputs(lengths: tuple[int, ...] = LENGTHS) -> tuple[list[Tensor], Tensor]:
    """Queries, keys, values and gates of samples of these lengths, and their borders."""
    generator, total = torch.Generator().manual_seed(1), sum(lengths)
    shapes = [(8, total, 16), (4, total, 16), (4, total, 12)]
    made = [torch.randn(*shape, generator=generator).mul_(1.5).requires_grad_() for shape in shapes]
    gates = torch.rand(8, total, 3, generator=generator).requires_grad_()
    return [*made, gates], torch.tensor([0, *lengths]).cumsum(0)


def by_masks(layer: NativeSparse, query: Tensor, key: Tensor, value: Tensor, gates: Tensor) -> Tensor:
    """One sample's attention as the paper defines it: [H, n, ...] -> [n, H, E]."""
    heads, length = query.shape[:2]
    kv_heads, places, sizes = key.shape[0], torch.arange(length), layer.sizes
    grouped = query.view(kv_heads, -1, length, query.shape[-1])

    def attend(keys: Tensor, values: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.einsum("kgnd,kmd->kgnm", grouped, keys) * SCALE
        weights = torch.softmax(scores.masked_fill(~seen, -torch.inf), -1).nan_to_num(0)
        return weights, torch.einsum("kgnm,kme->kgne", weights, values).reshape(heads, length, -1)

    keys, values = layer.compress(key, value)
    starts = torch.arange(keys.shape[1]) * sizes.stride
    weights, compressed = attend(keys, values, starts + sizes.block - 1 <= places[:, None])
    chosen = choose(weights.detach().sum(1), places, sizes)
    tokens = chosen.repeat_interleave(sizes.selected_block, -1)[:, None, :, :length]
    behind = places[:, None] - places
    _, selected = attend(key, value, tokens & (behind >= 0))
    _, sliding = attend(key, value, (behind >= 0) & (behind < sizes.window))
    branches = torch.stack([compressed, selected, sliding], -1)
    return (branches * gates[:, :, None]).sum(-1).transpose(0, 1)


def choose(weights: Tensor, places: Tensor, sizes: SparseSizes) -> Tensor:
    """The blocks, bool [K, n, B], that compressed blocks of these weights [K, n, M] select."""
    num_blocks = -(-len(places) // sizes.selected_block)
    shares = torch.zeros(weights.shape[-1], num_blocks)
    for number in range(weights.shape[-1]):
        for start in range(number * sizes.stride, number * sizes.stride + sizes.block, sizes.stride):
            shares[number, start // sizes.selected_block] += 1
    scores = weights @ shares
    for place in places.tolist():
        own = place // sizes.selected_block
        scores[:, place, sorted({0, max(own - 1, 0), own})] = 1e9
        scores[:, place, own + 1 :] = -1e9
    index = scores.topk(min(sizes.selected, num_blocks), -1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(2, index, True)


def test_filled_up_rows_count_for_nothing(layer, monkeypatch):
    results = []
    for filled in (1, 32):
        monkeypatch.setattr(sparse_tensors, "_FILLED", filled)
        given, borders = inputs()
        halves = [item.detach().bfloat16().requires_grad_() for item in given]
        out = layer.bfloat16()(*halves, borders, SCALE)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), halves)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02 * float(one.detach().abs().max()))


@pytest.mark.parametrize("queries", [4096, 64], ids=["at once", "in parts"])
def test_equals_its_definition_within_each_sample(layer, monkeypatch, queries):
    monkeypatch.setattr(sparse_tensors, "_QUERIES", queries)
    given, borders = inputs()
    weight = torch.randn(sum(LENGTHS), 8, 12, generator=torch.Generator().manual_seed(2))
    learned = [*layer.keys.parameters(), *layer.values.parameters()]
    got = layer(*given, borders, SCALE)
    samples = zip(*(item.split(list(LENGTHS), 1) for item in given), strict=True)
    want = torch.cat([by_masks(layer, *sample) for sample in samples])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    grads, wanted = (torch.autograd.grad((out * weight).sum(), [*given, *learned]) for out in (got, want))
    for mine, theirs in zip(grads, wanted, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


def test_parameters_have_gradients_where_no_sample_fills_a_block(layer):
    given, borders = inputs((5, 3))
    layer(*given, borders, SCALE).sum().backward()
    assert all(parameter.grad is not None for parameter in (*layer.keys.parameters(), *layer.values.parameters()))


def test_a_token_at_a_time_with_a_cache_gives_the_same(layer):
    lengths, steps = (70, 3, 121), 12
    given, borders = inputs(lengths)
    whole = layer(*given, borders, SCALE)
    samples = list(zip(*(item.split(list(lengths), 1) for item in given), strict=True))
    cache = KVCache(torch.device("cpu"))
    starts = [max(0, length - steps) for length in lengths]
    prompts = [(key[:, :start], value[:, :start]) for (_, key, value, _), start in zip(samples, starts, strict=True)]
    cache.prefill([[0] * start for start in starts], lengths)
    cache.store((0, 0), *(torch.cat(parts, 1) for parts in zip(*prompts, strict=True)))
    rows = [0, 1, 2]
    for step in range(steps):
        cache.decode([0] * len(rows))
        places = [starts[row] + step for row in rows]
        now = [torch.cat([samples[r][i][:, p : p + 1] for r, p in zip(rows, places, strict=True)], 1) for i in range(4)]
        layer._gates = now.pop()
        got = cache.attend_sparsely((0, 0), *now, layer, SCALE)
        want = torch.stack([whole[int(borders[row]) + place] for row, place in zip(rows, places, strict=True)])
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        kept = [number for number, row in enumerate(rows) if starts[row] + step + 1 < lengths[row]]
        cache.keep(kept)
        rows = [rows[number] for number in kept]
    assert rows == []


def fails(*given):
    raise RuntimeError("no such instruction")


@pytest.mark.parametrize(
    ("trial", "works", "said"),
    [
        (fails, False, "no such instruction"),
        (lambda *given: None, False, "has no kernels"),
        (lambda *given: 0.5, False, "other values"),
        (lambda *given: math.nan, False, "other values"),
        (lambda *given: 1e-3, True, None),
    ],
    ids=["fail", "none", "differ", "nan", "equal"],
)
def test_kernels_are_used_where_their_trial_succeeds(monkeypatch, caplog, trial, works, said):
    made = SimpleNamespace(try_kernels=trial)
    monkeypatch.setitem(sys.modules, "tutti.attention.sparse_triton", made)
    monkeypatch.setattr(tutti.attention, "sparse_triton", made, raising=False)
    given = (torch.device("cpu"), torch.bfloat16, (4, 2, 16, 16), SIZES, SCALE)
    with caplog.at_level(logging.WARNING):
        assert [sparse._kernels_tried.__wrapped__(*given)] == [works]
    assert [said in record.getMessage() for record in caplog.records] == [True] * (said is not None)


def test_no_kernels_are_tried_on_a_cpu(monkeypatch):
    monkeypatch.setattr(sparse, "_kernels_tried", fails)
    assert not sparse._kernels_work(*(item.detach() for item in inputs()[0][:3]), SIZES, SCALE)


@pytest.mark.parametrize(
    ("entry", "named"),
    [({"windows": 3}, "windows"), ({"window": 0}, "window"), ({"stride": 5}, "stride"), ({"selected": 2}, "selected")],
)
def test_sizes_that_cannot_be_are_refused(entry, named):
    with pytest.raises(ValueError, match=rf"config\.json: native_sparse: .*{named}"):
        SparseSizes.read(entry)
