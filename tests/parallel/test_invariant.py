"""A sample's logits and losses, bit for bit the same alone, among others, and at any place in a batch."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.model.zoo import EXPERTS, tiny
from tests.parallel.layouts import assert_same
from tests.train.runs import run, tiny_config
from tutti.config import ConfigError
from tutti.core.batch import IGNORE, Sample, pack
from tutti.model.attention import resolve_attention
from tutti.model.experts import resolve_experts
from tutti.model.plan import blocks
from tutti.parallel.invariant import separate_samples
from tutti.parallel.remat import apply_remat
from tutti.train import loss as loss_module
from tutti.train.task import Objective


def make_objective(family, dtype=torch.float32, *, attention="sdpa", invariant=True, remat=False, **overrides):
    kernels = {"attn_implementation": resolve_attention(attention, torch.device("cpu"))}
    if family in EXPERTS:
        kernels["experts_implementation"] = resolve_experts(None)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny(family, **overrides), **kernels).train().to(dtype)
    objective = Objective(model, by_sample=invariant)
    units = [module for _, module in blocks(model)]
    if remat:
        apply_remat(units, reentrant=True)
    if invariant:
        separate_samples(objective, units)
    return objective


def make_samples(*lengths):
    generator = np.random.default_rng(0)
    samples = []
    for length in lengths:
        ids = generator.integers(1, 200, length).astype(np.int32)
        labels = np.where(generator.random(length) < 0.7, ids, IGNORE).astype(np.int32)
        labels[-1] = 7
        samples.append(Sample(ids, labels))
    return samples


def of_each(objective, samples, pad_to=None):
    """(logits, losses) of each sample, from one batch of them all."""
    batch = pack(samples, pad_to=pad_to)
    with torch.no_grad():
        logits, losses = objective(batch, only_logits=True), objective(batch).losses
    counts = [int((sample.labels != IGNORE).sum()) for sample in samples]
    return list(zip(logits.split(counts), losses.split(counts), strict=True))


FAMILIES = {
    "dense": ("qwen3", {"hidden_size": 96}),
    "soft-capped, eager": ("gemma2", {"hidden_size": 96, "attention": "eager"}),
    "layer norm": ("gpt2", {}),
    "moe": ("qwen3_moe", {"hidden_size": 96}),
    "moe, sinks, eager": ("gpt_oss", {"hidden_size": 96, "attention": "eager"}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("family", "options"), FAMILIES.values(), ids=FAMILIES)
def test_a_sample_is_the_same_in_any_batch(monkeypatch, family, options, dtype):
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 256 * 100 * dtype.itemsize)  # a long sample is several chunks
    objective = make_objective(family, dtype, **options)
    samples = make_samples(37, 1, 150, 64, 5, 203)
    alone = [of_each(objective, [sample])[0] for sample in samples]
    for order, pad_to in (([0, 1, 2, 3, 4, 5], None), ([5, 2, 0], 700), ([4, 1, 3], None), ([1, 1, 5, 5], None)):
        together = of_each(objective, [samples[number] for number in order], pad_to)
        for number, (logits, losses) in zip(order, together, strict=True):
            assert torch.equal(logits, alone[number][0]), f"logits of sample {number} in batch {order}"
            assert torch.equal(losses, alone[number][1]), f"losses of sample {number} in batch {order}"


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize("remat", [False, True])
def test_it_is_the_same_training(family, remat):
    batch = pack(make_samples(37, 1, 50, 64))
    options = {"output_router_logits": True, "router_aux_loss_coef": 0.1} if family in EXPERTS else {}
    found = []
    for invariant in (True, False):
        objective = make_objective(family, invariant=invariant, remat=remat and not options, **options)
        out = objective(batch)
        (out.loss + (0 if out.router_loss is None else out.router_loss)).backward()
        found.append((out.loss, out.router_loss, [parameter.grad for parameter in objective.parameters()]))
    (loss, router_loss, grads), (plain_loss, plain_router_loss, plain_grads) = found
    torch.testing.assert_close(loss, plain_loss)
    torch.testing.assert_close(router_loss, plain_router_loss)
    for ours, theirs in zip(grads, plain_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_blocks_see_one_sample_at_a_time():
    objective = make_objective("qwen3", invariant=False)
    model = objective.model
    seen = []
    for _, block in blocks(model):
        forward = block.forward
        block.forward = lambda hidden, *args, _forward=forward, **kwargs: (
            seen.append((hidden.shape[1], kwargs["cu_seq_lens_q"].tolist(), kwargs["max_length_k"]))
            or _forward(hidden, *args, **kwargs)
        )
    separate_samples(objective, [block for _, block in blocks(model)])
    objective(pack(make_samples(3, 9)))
    assert seen == [(3, [0, 3], 3), (9, [0, 9], 9)] * 2


def test_a_run_on_two_ranks_equals_one_process_without_it(tmp_path):
    changes = {
        "train.enable_batch_invariant_mode": True,
        "train.data_parallel_mode": "fsdp2",
        "train.enable_gradient_checkpointing": True,
        "train.enable_activation_offload": True,
    }
    assert_same(run(tiny_config(tmp_path / "a", world=2, **changes), 2), run(tiny_config(tmp_path / "b")))


@pytest.mark.parametrize("other", ["train.context_parallel_size=2", "train.enable_compile=True"])
def test_what_it_does_not_go_with_is_refused(tmp_path, other):
    name, _, value = other.partition("=")
    with pytest.raises(ConfigError, match=rf"enable_batch_invariant_mode: not available yet together with {name}"):
        tiny_config(tmp_path, world=2, **{"train.enable_batch_invariant_mode": True, name: eval(value)})
