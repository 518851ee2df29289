"""The packed objective equals the original Hugging Face class, sample by sample: loss and all gradients."""

import copy

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests import sweep
from tests.model.zoo import FAMILIES, tiny
from tutti.attention.interface import resolve_attention
from tutti.core.batch import IGNORE, Sample, pack
from tutti.train.objective import Objective
from tutti.train.tasks.classification import Classification
from tutti.train.tasks.language import LanguageModelling

LENGTHS = (5, 33, 2, 20)


def make_samples(vocabulary: int) -> list[Sample]:
    rng = np.random.default_rng(0)
    samples = []
    for number, length in enumerate(LENGTHS):
        ids = rng.integers(3, vocabulary, length).astype(np.int32)
        labels = np.append(ids[1:], IGNORE).astype(np.int32)
        labels[rng.random(length) < 0.3] = IGNORE
        samples.append(Sample(ids, labels, source=number % 2))
    return samples


def build_pair(factory, config):
    torch.manual_seed(0)
    plain = factory.from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    packed = factory.from_config(config, attn_implementation=resolve_attention("sdpa", torch.device("cpu"))).eval()
    packed.load_state_dict(plain.state_dict())
    return plain, packed


def assert_same_gradients(packed, plain):
    for (name, ours), theirs in zip(packed.named_parameters(), plain.parameters(), strict=True):
        if theirs.grad is None:
            assert ours.grad is None or not ours.grad.any(), name
            continue
        scale = theirs.grad.abs().max().item()
        torch.testing.assert_close(
            ours.grad,
            theirs.grad,
            rtol=1e-4,
            atol=1e-5 * max(scale, 1e-3),
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_loss_and_gradients_equal_the_family_s_own(family):
    plain, packed = build_pair(AutoModelForCausalLM, tiny(family))
    samples = make_samples(packed.config.get_text_config().vocab_size)
    objective = Objective(packed)
    out = objective(pack(samples, pad_to=80))
    out["loss"].backward()
    want = torch.zeros(())
    for sample in samples:
        ids = torch.from_numpy(sample.input_ids).long()[None]
        labels = torch.full_like(ids, IGNORE)
        labels[0, 1:] = torch.from_numpy(sample.labels[:-1]).long()
        if (sample.labels != IGNORE).any():
            want = want + plain(input_ids=ids, labels=labels, use_cache=False).loss * (labels != IGNORE).sum()
    want.backward()
    assert out["loss"].item() == pytest.approx(want.item(), rel=1e-5)
    assert_same_gradients(packed, plain)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_classification_takes_the_last_token_of_each_sample(family):
    config = tiny(family)
    config.num_labels, config.pad_token_id = 3, 0
    plain, packed = build_pair(AutoModelForSequenceClassification, config)
    samples = []
    for number, sample in enumerate(make_samples(config.vocab_size)):
        labels = np.full(len(sample), IGNORE, np.int32)
        labels[-1] = number % 3
        samples.append(Sample(sample.input_ids, labels))
    out = Objective(packed, Classification())(pack(samples))
    out["loss"].backward()
    want, correct = torch.zeros(()), 0
    for sample in samples:
        result = plain(
            input_ids=torch.from_numpy(sample.input_ids).long()[None], labels=torch.tensor([int(sample.labels[-1])])
        )
        want = want + result.loss
        correct += int(result.logits.argmax() == sample.labels[-1])
    want.backward()
    assert out["loss"].item() == pytest.approx(want.item(), rel=1e-5)
    assert out["correct"] == correct
    assert_same_gradients(packed, plain)


def test_losses_are_summed_by_source():
    samples = make_samples(100)
    batch = pack(samples, pad_to=100)
    losses = torch.arange(1.0, len(batch.target_index) + 1)
    want = [0.0, 0.0]
    for loss, position in zip(losses.tolist(), batch.target_index.tolist(), strict=True):
        sample = int(np.searchsorted(np.cumsum(LENGTHS), position, side="right"))
        want[samples[sample].source] += loss
    task = LanguageModelling(num_sources=2)
    sums = task.by_source(losses, batch.segment_sources[batch.target_segment])
    assert sums["source_loss"].tolist() == want and task.sizes() == {"loss": 1, "source_loss": 2}
    assert LanguageModelling().by_source(losses, batch.segment_sources[batch.target_segment]) == {}


@pytest.mark.parametrize("pad_to", [None, 200])
def test_router_loss_is_the_family_s_own_times_tokens_that_are_not_padding(pad_to):
    config = tiny("qwen3_moe")
    config.output_router_logits, config.router_aux_loss_coef = True, 0.01
    plain, packed = build_pair(AutoModelForCausalLM, config)
    sample = make_samples(config.vocab_size)[1]
    out = Objective(packed)(pack([sample], pad_to=pad_to))
    ids = torch.from_numpy(sample.input_ids).long()[None]
    want = 0.01 * plain(input_ids=ids, output_router_logits=True, use_cache=False).aux_loss * len(sample)
    assert out["router_loss"].item() == pytest.approx(want.item(), rel=1e-5)
    out["router_loss"].backward()
    want.backward()
    assert_same_gradients(packed, plain)


def test_padding_alone_has_a_router_loss_of_nothing():
    config = tiny("qwen3_moe")
    config.output_router_logits, config.router_aux_loss_coef = True, 0.01
    _, packed = build_pair(AutoModelForCausalLM, config)
    out = Objective(packed)(pack([], pad_to=16))
    (out["loss"] + out["router_loss"]).backward()
    assert out["router_loss"].item() == 0
    assert not any(item.grad is not None and item.grad.any() for item in packed.parameters())


def test_a_router_loss_under_another_name_is_refused():
    with torch.device("meta"):
        config = sweep.tiny_config("jetmoe")
        config.output_router_logits = True
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="sets output_router_logits"):
        Objective(model)
