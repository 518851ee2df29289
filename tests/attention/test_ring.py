"""Ring attention equals the attention of a single rank, wherever sample boundaries are."""

import pytest
import torch

from tests.harness import run_ranks
from tutti.attention.ring import _plan, chunks, plan_blocks
from tutti.attention.spec import AttentionSpec

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
    """The mask [T, T] of the keys that each query attends to."""
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
    """The largest error of this rank's tokens over all cases, compared with full attention."""
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
