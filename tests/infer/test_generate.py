"""Our loop gives what transformers' generate gives, whatever a sequence shares its batch with."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.infer.models import ONE, PROMPTS, open_model, write_model
from tutti.infer.cache import CACHED
from tutti.infer.fallback import needs_generate
from tutti.infer.generate import Generator, Request
from tutti.infer.prompts import prompt_ids
from tutti.infer.sampling import Sampler

NEW = 24
PLAIN = (
    "qwen3", "llama", "llama3_rope", "mistral", "gemma2", "gemma3", "gpt2", "phi3", "granite", "cohere", "olmo2",
    "gpt_neox", "mixtral", "gpt_oss", "deepseek_v3",
)  # fmt: skip


def answers(config, speaker, prompts, *, batch_tokens=10_000, limit=NEW):
    generator = Generator(speaker.model, Sampler.of(config.infer), speaker.stop_ids, ONE, batch_tokens)
    made = {number: [] for number in range(len(prompts))}
    requests = [Request(number, prompt_ids(speaker, prompt), limit) for number, prompt in enumerate(prompts)]
    for token in generator.stream(requests):
        made[token.number].append(token.id)
    return list(made.values())


def by_transformers(path, speaker, prompts, limit=NEW):
    model = AutoModelForCausalLM.from_pretrained(path)
    made = []
    for prompt in prompts:
        ids = torch.tensor([prompt_ids(speaker, prompt)])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=limit,
            eos_token_id=sorted(speaker.stop_ids), pad_token_id=0,
        )  # fmt: skip
        made.append(out[0, ids.shape[1] :].tolist())
    return made


@pytest.mark.parametrize("family", PLAIN)
def test_greedy_equals_generate_in_a_batch_of_mixed_lengths(tmp_path, family):
    path = write_model(tmp_path, family)
    config, speaker = open_model(path, do_sample=False)
    assert speaker.model.config._attn_implementation == CACHED and not needs_generate(speaker.model)
    got = answers(config, speaker, PROMPTS)
    assert got == by_transformers(path, speaker, PROMPTS)
    assert len({tuple(answer) for answer in got}) >= 2, "the answers are to differ, or this shows little"


if __name__ == "__main__":
    pytest.main([__file__])
