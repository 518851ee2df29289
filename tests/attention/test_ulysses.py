"""Ulysses: exchange of tokens for heads, values that are sent early, and unsupported settings."""

import logging

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.harness import run_ranks
from tests.model.zoo import tiny
from tests.parallel.test_sequence import make_batch
from tutti.attention.interface import packed_kwargs, resolve_attention
from tutti.attention.packed_cpu import packed_attention
from tutti.attention.spec import AttentionSpec
from tutti.attention.ulysses import heads_to_tokens, overlap_values, own_heads, tokens_to_heads
from tutti.config import ConfigError
from tutti.config.load import from_dict
from tutti.core.batch import SequenceRanks
from tutti.parallel.sequence import split_tokens

BORDERS = torch.tensor([0, 1, 7, 24], dtype=torch.int32)
HEADS = ((4, 4), (4, 2), (4, 1), (12, 3), (12, 6))


def ranks_of(size):
    import torch.distributed as dist

    return SequenceRanks(0, 1, "", dist.get_rank(), size, dist.group.WORLD.group_name)


def exchange_around_attention(size):
    """The largest error of Ulysses attention compared with a single rank, for many numbers of heads."""
    import torch.distributed as dist

    ranks, worst = ranks_of(size), 0.0
    torch.manual_seed(0)
    for heads, kv_heads in HEADS:
        total = int(BORDERS[-1])
        shapes = ((heads, total, 8), (kv_heads, total, 8), (kv_heads, total, 6))
        whole = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]
        sinks = torch.randn(heads, dtype=torch.float64).requires_grad_()
        grad = torch.randn(total, heads, 6, dtype=torch.float64)
        want = packed_attention(*whole, BORDERS, AttentionSpec(0.3), sinks)
        want.backward(grad)
        own = [item.detach().chunk(size, 1)[ranks.ulysses_rank].clone().requires_grad_() for item in whole]
        own_sinks = sinks.detach().clone().requires_grad_()
        exchanged = tokens_to_heads(*own, ranks)
        assert exchanged[0].shape == (heads // size, total, 8)
        out = packed_attention(*exchanged, BORDERS, AttentionSpec(0.3), own_heads(own_sinks, ranks))
        got = heads_to_tokens(out, ranks)
        got.backward(grad.chunk(size)[ranks.ulysses_rank])
        dist.all_reduce(own_sinks.grad)
        pairs = [(got, want.chunk(size)[ranks.ulysses_rank]), (own_sinks.grad, sinks.grad)]
        pairs += [(a.grad, b.grad.chunk(size, 1)[ranks.ulysses_rank]) for a, b in zip(own, whole, strict=True)]
        worst = max(worst, *((a - b).abs().max().item() for a, b in pairs[:1] + pairs[2:]))
        torch.testing.assert_close(*pairs[1], rtol=1e-5, atol=1e-5)  # the kernel sums these in fp32
    return worst


@pytest.mark.parametrize("size", [2, 4])
def test_attention_between_exchanges_equals_one_rank(size):
    assert max(run_ranks(size, exchange_around_attention, size)) < 1e-12


class Recorder:
    """Records the order in which projections run and exchanges start."""

    def __init__(self, monkeypatched, layer):
        import torch.distributed as dist

        self.events = []
        original = dist.all_to_all_single

        def exchange(*args, **kwargs):
            self.events.append("early exchange" if kwargs.get("async_op") else "exchange")
            return original(*args, **kwargs)

        monkeypatched.all_to_all_single = exchange
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(layer, name).register_forward_hook(lambda *_, name=name: self.events.append(name))


def step_with_early_values(family, overlap):
    """Gradients of one packed batch, and what happened in the first attention layer."""
    import torch.distributed as dist

    ranks = ranks_of(2)
    torch.manual_seed(0)
    config = tiny(family)
    attention = resolve_attention("sdpa", torch.device("cpu"))
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float64)
    layers = list(model.model.layers)
    if overlap:
        overlap_values(layers, ranks)
    recorder = Recorder(dist, layers[0].self_attn)
    part = split_tokens(make_batch([7, 1, 20, 3]), ranks)
    states = model.model(**packed_kwargs(part)).last_hidden_state
    forward = recorder.events[:]
    states.square().sum().backward()
    return {name: item.grad for name, item in model.named_parameters() if item.grad is not None}, forward


def early_and_not(family):
    early, events = step_with_early_values(family, True)
    plain, _ = step_with_early_values(family, False)
    assert early.keys() == plain.keys()
    # The gradient of the projections' common input is summed up in another order.
    return [name for name in plain if not torch.allclose(early[name], plain[name], rtol=1e-6, atol=1e-9)], events


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gemma3"])
def test_early_values_change_nothing_and_set_out_before_the_queries(family):
    for different, events in run_ranks(2, early_and_not, family):
        assert not different
        assert events[:5] == ["early exchange", "q_proj", "k_proj", "v_proj", "exchange"]


def test_values_that_the_model_changes_are_exchanged_anew():
    """OLMo clips its values after projecting them."""
    for different, events in run_ranks(2, clipped):
        assert not different
        assert events[:5] == ["early exchange", "q_proj", "k_proj", "v_proj", "exchange"]


def clipped():
    from tests.model import zoo

    zoo.FAMILIES["olmo"] = ("olmo", {**zoo.FAMILIES["llama"][1], "clip_qkv": 0.01})
    return early_and_not("olmo")


def test_a_model_without_values_of_their_own_says_so(caplog):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny("deepseek_v3"))
    with caplog.at_level(logging.INFO):
        overlap_values(model.model.layers, SequenceRanks(0, 1, "", 0, 2, ""))
    assert "does not project its values on their own" in caplog.text


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model": {"attn_implementation": "eager"}}, "model.attn_implementation: eager"),
        ({"train": {"async_enabled": True, "enable_compile": True}}, "train.async_enabled: an exchange"),
    ],
)
def test_what_cannot_run_split_is_refused(changes, problem):
    train = {"ulysses_parallel_size": 2, **changes.get("train", {})}
    with pytest.raises(ConfigError) as caught:
        from_dict({**changes, "train": train})
    assert [item for item in caught.value.problems if item.startswith(problem)]
