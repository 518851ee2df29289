"""The workload of the speed benchmark: the models, the samples, their operations, and the machine's matrix rate.

The model is a Qwen3 of 60 million parameters (hidden size 512, 8 layers, vocabulary 32,000, untied), has the shape of
SmolLM2-135M, or is a Qwen3-MoE of 137 million parameters with 64 small experts in each of 4 layers. Samples are texts
of random words with log-normal lengths (mean 200, at most 1024 tokens, sigma 1). transformers' own length-grouped
sampler groups a corpus of 4,000 samples into micro batches. A few of these, evenly spaced over the lengths, are used,
so that long and short samples occur in the right proportion. Every contender gets the same samples, and other samples
to warm up.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
VOCABULARY = 32_000
EOS = 0
MAX_LENGTH = 1024
CORPUS = 4_000

MODEL: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": VOCABULARY,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": MAX_LENGTH,
    "tie_word_embeddings": False,
    "use_cache": False,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
}

MODELS: dict[str, dict[str, Any]] = {
    "qwen3": MODEL,
    "smollm2": MODEL
    | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 49_152,
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "moe": MODEL
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 256,
        "norm_topk_prob": True,
    },
}
"""Model configs by their names for `bench.speed --model`."""


@dataclass(frozen=True)
class Workload:
    """The data of one round: token ids, every sample ending in EOS.

    warmup: samples that come first and are not timed. measured: the timed samples, in length-grouped micro batches.
    """

    warmup: list[list[int]]
    measured: list[list[int]]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.measured))


def make_workload(micro_batches: int, batch_size: int, warmup: int, seed: int) -> Workload:
    """`micro_batches` of `batch_size` samples of the length-grouped corpus, evenly spaced over the lengths."""
    import torch
    from transformers.trainer_pt_utils import LengthGroupedSampler

    rng = np.random.default_rng(seed)
    lengths = np.exp(rng.normal(np.log(200) - 0.5, 1.0, CORPUS)).round().clip(8, MAX_LENGTH).astype(int)
    generator = torch.Generator().manual_seed(seed)
    order = np.array(list(LengthGroupedSampler(batch_size, lengths=lengths.tolist(), generator=generator)))
    groups = order[: CORPUS - CORPUS % batch_size].reshape(-1, batch_size)
    groups = groups[np.argsort(lengths[groups].mean(1), kind="stable")]
    strata = (np.arange(micro_batches) + rng.random(micro_batches)) / micro_batches
    measured = rng.permutation(groups[(strata * len(groups)).astype(int)]).flatten()
    rest = rng.permutation(np.setdiff1d(order, measured))[:warmup]

    def text(index: int) -> list[int]:
        return [*rng.integers(1, VOCABULARY, lengths[index] - 1).tolist(), EOS]

    return Workload([text(index) for index in rest], [text(index) for index in measured])


def matmul_parameters(model: dict[str, Any] = MODEL) -> int:
    """Number of weights in matrix products per token: all except an untied embedding, norms, and the experts that a
    token does not choose."""
    hidden, layers = model["hidden_size"], model["num_hidden_layers"]
    heads, kv = (model[name] * model["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    mlp = 3 * hidden * model["intermediate_size"]
    if "num_experts" in model:
        chosen = model["num_experts_per_tok"] * 3 * hidden * model["moe_intermediate_size"]
        mlp = chosen + hidden * model["num_experts"]
    return layers * (2 * hidden * heads + 2 * hidden * kv + mlp) + hidden * model["vocab_size"]


def flops_per_token(samples: list[list[int]], model: dict[str, Any] = MODEL) -> float:
    """Forward and backward operations per token: 6 per matrix weight, plus causal attention within the sample.

    Attention multiplies queries with keys and weights with values: n^2 / 2 pairs with 2 operations per channel for each
    of the two products. The backward pass costs twice the forward.
    """
    channels = model["num_attention_heads"] * model["head_dim"] * model["num_hidden_layers"]
    attention = sum(3 * 2 * len(sample) ** 2 * channels for sample in samples)
    return 6 * matmul_parameters(model) + attention / sum(map(len, samples))


def write_model(folder: Path, model: dict[str, Any] = MODEL) -> None:
    """Write a model folder without weights: config.json and a tokenizer whose words are w0, w1, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model))
    words = {f"w{index}": index for index in range(model["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=f"w{EOS}"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    eos = f"w{EOS}"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, pad_token=eos).save_pretrained(folder)


def write_text(path: Path, samples: list[list[int]]) -> None:
    """Write the samples as plaintext rows, without EOS, which Tutti appends itself."""
    rows = (" ".join(f"w{token}" for token in sample[:-1]) for sample in samples)
    path.write_text("".join(json.dumps({"content_split": row}) + "\n" for row in rows))


def faster_dtype() -> str:
    """bfloat16 or float32, whichever this CPU multiplies faster."""
    import torch

    from tutti.core.device import faster_dtype

    return str(faster_dtype(torch.device("cpu"))).removeprefix("torch.")


def matrix_rate(dtype: str, seconds: float = 4.0) -> float:
    """Operations per second of one process on this machine, from the fastest product of two 4096 x 4096 matrices."""
    import torch

    left, right = (torch.randn(4096, 4096).to(getattr(torch, dtype)) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(left, right)
        best = min(best, time.perf_counter() - start)
    return 2 * 4096**3 / best


def run_python(*arguments: str, **environment: str) -> str:
    """Run `python ARGUMENTS` in the project's root, with these changes to the environment, and return its output; if it
    fails, exit with its errors."""
    variables = os.environ | environment
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, env=variables)
    if done.returncode:
        sys.exit(f"{' '.join(arguments[:3])} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout
