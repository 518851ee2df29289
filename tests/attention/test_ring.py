"""Ring attention: exactly one rank's attention, wherever the samples' borders fall."""

import pytest
import torch

from tests.harness import run_ranks
from tutti.attention import online_softmax as tiled
from tutti.attention import varlen_blocks as flash
from tutti.attention.online_softmax import Gradients, Keys, Queries
from tutti.attention.ring import _plan, plan_blocks
from tutti.attention.tiles import AttentionSpec
from tutti.parallel.sequence import chunks

BORDERS = {
    "one": [0, 96],
    "ragged": [0, 1, 2, 30, 31, 77, 80, 96],
    "at-chunks": [0, 12, 24, 48, 96],
    "short": [0, 4, 5, 6, 7, 8],
}
SETTINGS = {
    "causal": AttentionSpec(0.3),
    "window": AttentionSpec(0.3, window=7),
    "softcap": AttentionSpec(0.3, softcap=2.0),
    "both-ways": AttentionSpec(0.3, causal=False),
    "both-ways-window": AttentionSpec(0.3, causal=False, window=9),
}


def visible(borders: list[int], settings: AttentionSpec) -> torch.Tensor:
    """Which key each query sees, [T, T]."""
    place = torch.arange(borders[-1])
    sample = torch.bucketize(place, torch.tensor(borders[1:]), right=True)
    distance = place[:, None] - place
    seen = sample[:, None] == sample
    if settings.causal:
        seen &= distance >= 0
    if settings.window:
        seen &= distance.abs() < settings.window
    return seen


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("borders", BORDERS.values(), ids=BORDERS)
def test_blocks_cover_what_is_seen_once(borders, settings, size):
    seen = visible(borders, settings)
    covered = torch.zeros_like(seen, dtype=torch.int)
    for queries in range(size):
        for keys in range(size):
            spans = [chunks(rank, size, borders[-1]) for rank in (queries, keys)]
            for block in plan_blocks(*spans, borders, settings):
                rectangle = slice(*block.queries), slice(*block.keys)
                assert seen[rectangle].any(1).all(), f"{block} has a query that sees nothing"
                covered[rectangle] += 1
    assert covered.max() <= 1
    assert covered[seen].all()


def test_only_keys_that_are_seen_travel():
    short, long = tuple(range(0, 97, 4)), (0, 96)
    assert not any(_plan(short, AttentionSpec(1.0), rank, 4).seen[step] for rank in range(4) for step in (1, 2, 3))
    sent = sum(
        last - first
        for rank in range(4)
        for spans in _plan(long, AttentionSpec(1.0), rank, 4).seeing[1:]
        for first, last in spans
    )
    assert sent == 96 * 3 * 3 / 4
    windowed = _plan(long, AttentionSpec(1.0, window=5), 0, 4)
    assert all(last - first <= 4 for spans in windowed.seen[1:] for first, last in spans)


def attention(query, key, value, borders, settings, sinks):
    """Plain masked attention, heads first -> [T, H, E]."""
    heads = len(query)
    key, value = (item.repeat_interleave(heads // len(key), 0) for item in (key, value))
    scores = query @ key.transpose(1, 2) * settings.scale
    if settings.softcap:
        scores = settings.softcap * torch.tanh(scores / settings.softcap)
    scores = scores.masked_fill(~visible(borders, settings), float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(heads, scores.shape[1], 1)], -1)
    weights = scores.softmax(-1)
    return (weights if sinks is None else weights[..., :-1]).matmul(value).transpose(0, 1)


def compare_with_one_rank(size):
    """Every case on this rank's tokens against the whole; the largest error."""
    import torch.distributed as dist

    from tutti.attention.ring import ring_attention

    rank, group = dist.get_rank(), dist.group.WORLD
    torch.manual_seed(0)
    worst = 0.0
    for borders in BORDERS.values():
        total = borders[-1]
        held = torch.cat([torch.arange(*chunk) for chunk in chunks(rank, size, total)])
        for settings in SETTINGS.values():
            for with_sinks in (False, True) if settings.causal else (False,):
                shapes = ((4, total, 8), (2, total, 8), (2, total, 6))
                whole = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
                sinks = torch.randn(4, dtype=torch.float64) if with_sinks else None
                grad = torch.randn(total, 4, 6, dtype=torch.float64)
                inputs = [item.clone().requires_grad_() for item in (*whole, *([sinks] if with_sinks else []))]
                parts = [item[:, held].clone().requires_grad_() for item in whole]
                own_sinks = sinks.clone().requires_grad_() if with_sinks else None
                want = attention(*inputs[:3], borders, settings, inputs[3] if with_sinks else None)
                want.backward(grad)
                got = ring_attention(*parts, torch.tensor(borders), settings, own_sinks, group.group_name)
                got.backward(grad[held])
                pairs = [(got, want[held])] + [
                    (a.grad, b.grad[:, held]) for a, b in zip(parts, inputs[:3], strict=True)
                ]
                if with_sinks:
                    dist.all_reduce(own_sinks.grad)
                    pairs.append((own_sinks.grad, inputs[3].grad))
                worst = max(worst, *((a - b).abs().max().item() for a, b in pairs))
    return worst


@pytest.mark.parametrize("size", [2, 4])
def test_equals_attention_of_one_rank(size):
    assert max(run_ranks(size, compare_with_one_rank, size)) < 1e-12


def emulated_forward(*args):
    """What torch's variable-length kernel computes, tokens first: output, lse [H, T] and the state of dropout."""
    query, key, value, query_borders, key_borders, _max_q, _max_k, _causal, scale, window, _gqa = args
    scores, value = emulated_scores(query, key, value, query_borders, key_borders, scale, window)
    lse = scores.logsumexp(-1)
    return ((scores - lse[..., None]).exp() @ value).transpose(0, 1), lse, None


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
    monkeypatch.setattr(torch.ops.torch_attn, "_varlen_attn", emulated_forward)
    monkeypatch.setattr(torch.ops.torch_attn, "_varlen_attn_backward", emulated_backward)
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_flash_kernel_equals_tiles_on_a_gpu():
    settings, spans = AttentionSpec(0.3), ((0, 96),)
    blocks = plan_blocks(spans, spans, BORDERS["ragged"], settings)
    results = []
    for kernel in (tiled, flash):
        torch.manual_seed(0)
        query, key, value = (torch.randn(n, 96, 16, device="cuda", dtype=torch.bfloat16) for n in (4, 2, 2))
        queries = Queries(query, query.new_full((4, 96), float("-inf"), dtype=torch.float32), spans)
        out, grad = torch.zeros(4, 96, 16, device="cuda"), torch.ones_like(query)
        kernel.attend(queries, out, Keys(key, value, spans), blocks, settings)
        sums = Gradients(*(torch.zeros_like(item, dtype=torch.float32) for item in (query, key, value)))
        outer = grad, out.bfloat16()
        kernel.attend_backward(queries, Keys(key, value, spans), blocks, settings, outer, sums)
        results.append((out, queries.lse, *sums))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
