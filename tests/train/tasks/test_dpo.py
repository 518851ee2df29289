"""The preference loss on packed pairs equals the formula on the original Hugging Face class, answer by answer."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import log_softmax, logsigmoid
from transformers import AutoModelForCausalLM

from tests.model.zoo import tiny
from tests.train.test_objective import assert_same_gradients
from tutti.attention.interface import resolve_attention
from tutti.core.batch import IGNORE, Sample, pack
from tutti.train.objective import Objective
from tutti.train.tasks.dpo import REFERENCE, DirectPreference, answer_log_probs

LENGTHS = ((9, 14), (21, 8), (5, 5))
SIGMOID = DirectPreference(beta=0.1)
KINDS = {
    "sigmoid": SIGMOID,
    "strong": DirectPreference(beta=2.0),
    "smoothed": DirectPreference(beta=0.3, label_smoothing=0.2),
    "ipo": DirectPreference(beta=0.5, variant="ipo"),
}


def make_pairs(vocabulary: int) -> list[Sample]:
    """Pairs whose answers share their first three tokens, which are not trained on."""
    rng = np.random.default_rng(1)
    samples = []
    for number, lengths in enumerate(LENGTHS):
        prompt = rng.integers(3, vocabulary, 3)
        ids = [np.append(prompt, rng.integers(3, vocabulary, n - 3)).astype(np.int32) for n in lengths]
        labels = [np.append(one[1:], IGNORE).astype(np.int32) for one in ids]
        for one in labels:
            one[:2] = IGNORE
        samples.append(Sample(np.concatenate(ids), np.concatenate(labels), number % 2, split=lengths[0]))
    return samples


def build(family: str = "qwen3", seed: int = 0):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(copy.deepcopy(tiny(family)), attn_implementation="eager").eval()


def packed_twin(plain):
    config = copy.deepcopy(plain.config)
    twin = AutoModelForCausalLM.from_config(
        config, attn_implementation=resolve_attention("sdpa", torch.device("cpu"))
    ).eval()
    twin.load_state_dict(plain.state_dict())
    return twin


def halves(sample: Sample):
    """The chosen and the rejected answer: ids [1, n], and which of the tokens from the second on are trained on."""
    parts = zip(np.split(sample.input_ids, [sample.split]), np.split(sample.labels, [sample.split]), strict=True)
    return [(torch.from_numpy(ids).long()[None], torch.from_numpy(labels[:-1] != IGNORE)) for ids, labels in parts]


def log_prob(model, ids, trained):
    """Sum over the answer's tokens, and their number."""
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    chosen = log_softmax(logits, -1).gather(1, ids[0, 1:, None]).squeeze(1)
    return chosen[trained].sum(), int(trained.sum())


def formula(preference, model, reference, samples):
    losses, rewards = [], []
    for sample in samples:
        ratios = []
        for ids, trained in halves(sample):
            policy, count = log_prob(model, ids, trained)
            with torch.no_grad():
                base, _ = log_prob(reference, ids, trained)
            ratios.append((policy - base) / (count if preference.variant == "ipo" else 1))
        margin = ratios[0] - ratios[1]
        if preference.variant == "ipo":
            losses.append((margin - 1 / (2 * preference.beta)) ** 2)
        else:
            z, smoothing = preference.beta * margin, preference.label_smoothing
            losses.append(-(1 - smoothing) * logsigmoid(z) - smoothing * logsigmoid(-z))
        rewards.append([preference.beta * ratio.item() for ratio in ratios])
    return torch.stack(losses), torch.tensor(rewards)


def reference_log_probs(model, samples):
    """[P, 2], by the packed objective itself."""
    with torch.no_grad():
        return Objective(packed_twin(model), SIGMOID)(pack(samples), compute=answer_log_probs)


def with_reference(batch, reference):
    return replace(batch, payload={REFERENCE: reference})


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gpt2"])
def test_log_probabilities_are_those_of_unpacked_answers(family):
    plain = build(family)
    samples = make_pairs(plain.config.vocab_size)
    want = torch.tensor([[log_prob(plain, *half)[0].item() for half in halves(sample)] for sample in samples])
    torch.testing.assert_close(reference_log_probs(plain, samples), want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("preference", KINDS.values(), ids=KINDS)
def test_loss_and_gradients_equal_the_formula(preference):
    plain, reference = build(seed=0), build(seed=1)
    packed = packed_twin(plain)
    samples = make_pairs(plain.config.vocab_size)
    batch = with_reference(pack(samples, pad_to=80), reference_log_probs(reference, samples))
    out = Objective(packed, replace(preference, num_sources=2))(batch)
    out["loss"].backward()
    want, rewards = formula(preference, plain, reference, samples)
    want.sum().backward()
    by_source = torch.zeros(2).index_add(0, torch.tensor([sample.source for sample in samples]), want.detach())
    torch.testing.assert_close(out["source_loss"], by_source, rtol=1e-4, atol=1e-5)
    assert out["loss"].item() == pytest.approx(want.sum().item(), rel=1e-4)
    torch.testing.assert_close(out["rewards"], rewards.sum(0), rtol=1e-3, atol=1e-5)
    assert out["correct"] == (rewards[:, 0] > rewards[:, 1]).sum()
    assert_same_gradients(packed, plain)


def test_chunks_of_the_head_change_nothing(monkeypatch):
    plain, reference = build(seed=0), build(seed=1)
    samples = make_pairs(plain.config.vocab_size)
    batch = with_reference(pack(samples), reference_log_probs(reference, samples))
    models = [packed_twin(plain), packed_twin(plain)]
    losses = []
    for model, rows in zip(models, (3, 1000), strict=True):
        monkeypatch.setattr("tutti.train.loss.CHUNK_BYTES_ON_CPU", rows * plain.config.vocab_size * 4)
        out = Objective(model, SIGMOID)(batch)
        out["loss"].backward()
        losses.append(out["loss"].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert_same_gradients(*models)


def test_without_a_reference_nothing_is_preferred():
    plain = build()
    out = Objective(packed_twin(plain), SIGMOID)(pack(make_pairs(plain.config.vocab_size)))
    assert out["loss"].item() == pytest.approx(3 * np.log(2))
    assert out["rewards"].tolist() == [0, 0]


def test_padding_alone_has_a_zero_loss():
    out = Objective(packed_twin(build()), SIGMOID)(pack([], pad_to=8))
    out["loss"].backward()
    assert out["loss"] == 0 and out["rewards"].tolist() == [0, 0]


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_loss_and_gradients_equal_trl_s(kind, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    from tests.train.runs import QUICKSTART

    plain, reference = build(seed=0), build(seed=1)
    packed = packed_twin(plain)
    samples = make_pairs(plain.config.vocab_size)
    batch = with_reference(pack(samples), reference_log_probs(reference, samples))
    preference = DirectPreference(beta=0.4, variant=kind)
    out = Objective(packed, preference)(batch)
    out["loss"].backward()

    arguments = trl.DPOConfig(
        output_dir=str(tmp_path), beta=0.4, loss_type=[kind], report_to=[], use_cpu=True, bf16=False,
        gradient_checkpointing=False,
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART)
    trainer = trl.DPOTrainer(plain, reference, args=arguments, train_dataset=rows, processing_class=tokenizer)
    examples = []
    for sample in samples:
        (chosen, _), (rejected, _) = halves(sample)
        examples.append(
            {
                "prompt_ids": chosen[0, :3].tolist(),
                "chosen_ids": chosen[0, 3:].tolist(),
                "rejected_ids": rejected[0, 3:].tolist(),
            }
        )
    loss = trainer.compute_loss(plain, DataCollatorForPreference(pad_token_id=0)(examples))
    loss.backward()
    assert out["loss"].item() / len(samples) == pytest.approx(loss.item(), rel=1e-4)
    for parameter in packed.parameters():
        parameter.grad /= len(samples)
    assert_same_gradients(packed, plain)
