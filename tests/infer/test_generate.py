"""Our loop generates the same as transformers' `generate`, whatever else is in the batch."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.infer.models import ONE, PROMPTS, infer_config, open_model, write_model
from tests.model.zoo import HYBRIDS
from tutti.attention.kv_cache import CACHED
from tutti.infer import load as load_module
from tutti.infer.generate import Generator, Request
from tutti.infer.hf_generate import GeneratedLogits, needs_generate
from tutti.infer.load import load_model
from tutti.infer.media import MediaInputs
from tutti.infer.prompts import prompt_request
from tutti.infer.sampling import Sampler

NEW = 24
PLAIN = (
    "qwen3", "llama", "llama3_rope", "mistral", "gemma2", "gemma3", "gpt2", "phi3", "granite", "cohere", "olmo2",
    "gpt_neox", "mixtral", "gpt_oss", "deepseek_v3",
)  # fmt: skip


def ids_of(loaded, prompt):
    return prompt_request(loaded.form, prompt, 0, 1).ids


def answers(config, loaded, prompts, *, batch_tokens=10_000, limit=NEW):
    generator = Generator(loaded.logits, Sampler.of(config.infer), loaded.stop_ids, ONE, batch_tokens)
    made = {number: [] for number in range(len(prompts))}
    requests = [Request(number, ids_of(loaded, prompt), limit) for number, prompt in enumerate(prompts)]
    for token in generator.stream(requests):
        made[token.number].append(token.id)
    return list(made.values())


def by_transformers(path, loaded, prompts, limit=NEW):
    model = AutoModelForCausalLM.from_pretrained(path)
    made = []
    for prompt in prompts:
        ids = torch.tensor([ids_of(loaded, prompt)])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=limit,
            eos_token_id=sorted(loaded.stop_ids), pad_token_id=0,
        )  # fmt: skip
        made.append(out[0, ids.shape[1] :].tolist())
    return made


@pytest.mark.parametrize("family", PLAIN)
def test_greedy_equals_generate_in_a_batch_of_mixed_lengths(tmp_path, family):
    path = write_model(tmp_path, family)
    config, loaded = open_model(path, do_sample=False)
    assert loaded.model.config._attn_implementation == CACHED and not needs_generate(loaded.model)
    got = answers(config, loaded, PROMPTS)
    assert got == by_transformers(path, loaded, PROMPTS)
    assert len({tuple(answer) for answer in got}) >= 2, "the answers are to differ, or this shows little"


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("qwen"))


@pytest.mark.parametrize(
    "infer", [{"do_sample": False}, {"temperature": 0.8, "top_p": 0.95}], ids=["greedy", "sampled"]
)
def test_a_batch_gives_what_single_runs_give(qwen, infer):
    config, loaded = open_model(qwen, **infer)
    together = answers(config, loaded, PROMPTS)
    generator = Generator(loaded.logits, Sampler.of(config.infer), loaded.stop_ids, ONE, 10_000)
    for number, prompt in enumerate(PROMPTS):
        alone = [token.id for token in generator.stream([Request(number, ids_of(loaded, prompt), NEW)])]
        assert alone == together[number], prompt


@pytest.mark.parametrize("batch_tokens", [1, 200, 400])
def test_the_budget_only_says_how_many_run_at_once(qwen, batch_tokens):
    """Sequences join as others end; with a budget of 1 they run one by one."""
    config, loaded = open_model(qwen)
    largest = 0

    def watch(module, args, kwargs):
        nonlocal largest
        largest = max(largest, len(kwargs["kv_cache"].lengths))

    hook = loaded.model.register_forward_pre_hook(watch, with_kwargs=True)
    got = answers(config, loaded, PROMPTS, batch_tokens=batch_tokens)
    hook.remove()
    assert largest == 1 if batch_tokens == 1 else 1 < largest < len(PROMPTS)
    assert got == answers(config, loaded, PROMPTS)


def test_the_cache_stays_within_the_budget(qwen):
    """Also after a long sequence has ended before others, and while sequences grow."""
    config, loaded = open_model(qwen)
    held = []

    def watch(module, args, kwargs):
        cache = kwargs["kv_cache"]
        held.append((len(cache.lengths), cache.places))
        for layer in cache._layers.values():
            assert all(part.shape[0] * part.shape[2] <= cache.places for part in layer)

    hook = loaded.model.register_forward_pre_hook(watch, with_kwargs=True)
    generator = Generator(loaded.logits, Sampler.of(config.infer), frozenset(), ONE, 300)
    sizes = [(100, 100), (3, 100), (3, 20), (5, 30), (90, 5), *[(2, 20), (4, 40)] * 6, (200, 50), (1, 1), (1, 70)]
    requests = [Request(number, [7] * length, limit) for number, (length, limit) in enumerate(sizes)]
    ended = [token.number for token in generator.stream(requests) if token.end]
    hook.remove()
    assert sorted(ended) == list(range(len(sizes)))
    assert all(places <= 300 for rows, places in held if rows > 1) and max(rows for rows, _ in held) > 3
    assert max(places for rows, places in held if rows == 1) <= 250


def test_logits_equal_a_pass_without_a_cache(qwen):
    _, loaded = open_model(qwen, do_sample=False)
    reference = AutoModelForCausalLM.from_pretrained(qwen)
    seen: dict[int, list[torch.Tensor]] = {number: [] for number in range(len(PROMPTS))}

    class Watching(Sampler):
        def pick(self, logits, generators):
            for number, row in zip(range(len(PROMPTS)), logits, strict=True):
                seen[number].append(row)
            return super().pick(logits, generators)

    generator = Generator(loaded.logits, Watching(True, 1.0, 1.0, 0), frozenset(), ONE, 10_000)
    ids = [ids_of(loaded, prompt) for prompt in PROMPTS]
    made = {number: [] for number in range(len(PROMPTS))}
    for token in generator.stream([Request(number, prompt, 8) for number, prompt in enumerate(ids)]):
        made[token.number].append(token.id)
    for number, prompt in enumerate(ids):
        with torch.no_grad():
            logits = reference(torch.tensor([[*prompt, *made[number]]])).logits[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(torch.stack(seen[number]), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("asked", "slow", "expected"),
    [
        ("auto", (), torch.bfloat16),
        ("auto", (torch.bfloat16, torch.float16), torch.float32),
        ("bfloat16", (torch.bfloat16,), torch.bfloat16),
        ("float32", (), torch.float32),
    ],
)
def test_bf16_is_kept_where_it_is_fast(tmp_path, monkeypatch, asked, slow, expected):
    monkeypatch.setattr(load_module, "slow_dtypes", lambda ranks: frozenset(slow))
    config = infer_config(write_model(tmp_path, dtype=torch.bfloat16))
    config = replace(config, train=replace(config.train, compute_dtype=asked))
    loaded = load_model(config, ONE)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {expected}


def test_stop_tokens_and_limits_end_an_answer(qwen):
    config, loaded = open_model(qwen, do_sample=False)
    (whole,) = answers(config, loaded, PROMPTS[1:2])
    stop = next(token for place, token in enumerate(whole) if token not in whole[:place] and place > 3)
    generator = Generator(loaded.logits, Sampler.of(config.infer), frozenset({stop}), ONE, 1000)
    tokens = list(generator.stream([Request(0, ids_of(loaded, PROMPTS[1]), NEW)]))
    assert [token.id for token in tokens] == whole[: whole.index(stop) + 1]
    assert [token.end for token in tokens] == [None] * (len(tokens) - 1) + ["stop"]
    short = list(generator.stream([Request(0, ids_of(loaded, PROMPTS[1]), 2)]))
    assert [token.end for token in short] == [None, "length"]


OTHERS = {
    **{family: (family, {}) for family in HYBRIDS},
    "coupled rotary": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}),
}


@pytest.mark.parametrize("kind", [*OTHERS, "penalty"])
def test_other_models_run_by_transformers_generate(tmp_path, kind):
    family, overrides = OTHERS.get(kind, ("qwen3", {}))
    path = write_model(tmp_path, family, **overrides)
    if kind == "penalty":
        (tmp_path / "generation_config.json").write_text('{"repetition_penalty": 1.3, "eos_token_id": 2}')
    config, loaded = open_model(path, do_sample=False)
    assert needs_generate(loaded.model)
    prompts = [*PROMPTS[:3], "Howdy"]
    assert answers(config, loaded, prompts, limit=10) == by_transformers(path, loaded, prompts, limit=10)
    config, _ = open_model(path)
    sampled = answers(config, loaded, prompts, limit=10)
    assert sampled == answers(config, loaded, prompts, limit=10) != answers(config, loaded, prompts[::-1], limit=10)


def generated_logits(folder, **generation):
    """A model run by transformers' generate, without tokens that end an answer."""
    path = write_model(folder)
    (folder / "generation_config.json").write_text(
        json.dumps({"repetition_penalty": 1.3, "eos_token_id": 2} | generation)
    )
    _, loaded = open_model(path)
    return GeneratedLogits(loaded.model, frozenset(), MediaInputs(None))


def test_transformers_generate_goes_on_after_the_end_token_of_the_model_s_settings(tmp_path):
    logits = generated_logits(tmp_path)
    logits.start([Request(0, [5, 9], 4)])
    assert all(logits.step([token]).isfinite().all() for token in (2, 7))
    logits.keep([])


def test_an_answer_that_transformers_generate_ends_is_told_of(tmp_path):
    logits = generated_logits(tmp_path, max_time=1e-9)
    logits.start([Request(0, [5, 9], 4)])
    with pytest.raises(ValueError, match="generate ended an answer of Qwen3ForCausalLM by itself"):
        logits.step([7])


@pytest.mark.parametrize("penalty", [False, True], ids=["own loop", "transformers' generate"])
def test_interruption_ends_the_stream(tmp_path, penalty):
    path = write_model(tmp_path)
    if penalty:
        (tmp_path / "generation_config.json").write_text('{"repetition_penalty": 1.3, "eos_token_id": 2}')
    config, loaded = open_model(path)
    rounds = iter([False, False, True])
    generator = Generator(loaded.logits, Sampler.of(config.infer), frozenset(), ONE, 1000, lambda: next(rounds))
    tokens = list(generator.stream([Request(0, ids_of(loaded, "Hello"), NEW)]))
    assert [token.end for token in tokens] == [None, None]
