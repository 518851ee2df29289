"""Generated tokens per second: transformers' `generate` against Tutti's loop, on one batch of different lengths.

Both greedily continue the same 16 prompts (8 to 512 random tokens) by the same number of tokens, with the randomly
initialized 60M-parameter Qwen3 of bench.workload, in one process: `generate` with a left-padded batch, Tutti with its
own batching. Rounds are interleaved, so that a machine that slows down affects both. Reports medians over the rounds
and the ratio within a round. With --mixed, answers have different lengths, as in reality: each sequence ends after its
own number of tokens, for `generate` through a stop token at that position.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from bench import workload
from tutti.attention.kv_cache import register
from tutti.core.device import keep_freed_memory
from tutti.core.dist import World
from tutti.infer.generate import CachedLogits, Generator, Request
from tutti.infer.media import MediaInputs
from tutti.infer.sampling import Sampler

BATCH = 16
STOP = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (5)")
    parser.add_argument("--tokens", type=int, default=64, help="maximum tokens per answer (64)")
    parser.add_argument("--threads", type=int, default=2, help="threads of the process (2)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--mixed", action="store_true", help="answers of different lengths")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**workload.MODEL), dtype=getattr(torch, options.dtype)
    ).eval()
    lengths = np.geomspace(8, 512, BATCH).astype(int)
    prompts = [rng.integers(1, workload.VOCABULARY, length).tolist() for length in lengths]
    limits = [options.tokens] * BATCH
    if options.mixed:
        limits = rng.permutation(np.linspace(options.tokens // 8, options.tokens, BATCH).astype(int)).tolist()
    speeds: dict[str, list[float]] = {"transformers' generate": [], "Tutti": []}
    for number in range(options.rounds + 1):
        answers = []
        for name, run in (("transformers' generate", _transformers), ("Tutti", _tutti)):
            begin = time.perf_counter()
            answers.append(run(model, prompts, limits))
            if number:  # the first round warms up
                speeds[name].append(sum(limits) / (time.perf_counter() - begin))
        same = sum(ours == theirs for ours, theirs in zip(*answers, strict=True))
    for name, rounds in speeds.items():
        print(f"{name:24} {statistics.median(rounds):8.1f} tokens/s")
    ratios = [ours / theirs for theirs, ours in zip(*speeds.values(), strict=True)]
    print(f"ratio {statistics.median(ratios):.2f} (from {min(ratios):.2f} to {max(ratios):.2f}); {same} answers equal")


class _StopAt(LogitsProcessor):
    """Makes row i end after exactly its own number of tokens."""

    def __init__(self, limits: list[int]) -> None:
        self._limits = torch.tensor(limits)
        self._made = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._made += 1
        scores[:, STOP] = torch.where(self._limits <= self._made, torch.inf, -torch.inf)
        return scores


def _transformers(model: Any, prompts: list[list[int]], limits: list[int]) -> list[list[int]]:
    model.set_attn_implementation("sdpa")
    longest = max(map(len, prompts))
    ids = torch.tensor([[STOP] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = model.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        use_cache=True,
        max_new_tokens=max(limits),
        eos_token_id=STOP,
        pad_token_id=STOP,
        logits_processor=LogitsProcessorList([_StopAt(limits)]),
    )
    return [row[longest : longest + limit - 1].tolist() for row, limit in zip(out, limits, strict=True)]


def _tutti(model: PreTrainedModel, prompts: list[list[int]], limits: list[int]) -> list[list[int]]:
    model.set_attn_implementation(register())
    one = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    logits = CachedLogits(lambda inputs, extras: model(**inputs), one.device, MediaInputs())
    generator = Generator(logits, _NeverStop(True, 1.0, 1.0, 0), frozenset({STOP}), one, batch_tokens=1 << 20)
    made: list[list[int]] = [[] for _ in prompts]
    requests = [Request(i, prompt, limit) for i, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))]
    for token in generator.stream(requests):
        made[token.number].append(token.id)
    return [answer[:-1] for answer in made]


class _NeverStop(Sampler):
    """Greedy sampling that never chooses the stop token, so that answers have exactly the length requested."""

    def pick(self, logits: torch.Tensor, generators: object) -> torch.Tensor:
        logits[:, STOP] = -torch.inf
        return logits.argmax(-1)


if __name__ == "__main__":
    main()
