"""The workload of the speed benchmark: model size, counted operations, and the distribution of samples."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from bench import workload


def test_model_has_60_million_parameters(tmp_path: Path) -> None:
    workload.write_model(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6) == 60
    matrices = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert workload.matmul_parameters() == sum(matrix.weight.numel() for matrix in matrices)


@pytest.mark.parametrize("name", list(workload.MODELS))
def test_weights_in_products_are_counted_for_each_model(tmp_path: Path, name: str) -> None:
    config = workload.MODELS[name]
    workload.write_model(tmp_path, config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    total = sum(parameter.numel() for parameter in model.parameters())
    assert round(total / 1e6) == {"qwen3": 60, "smollm2": 135, "moe": 137}[name]
    used = config.get("num_experts_per_tok", 1) / config.get("num_experts", 1)
    counted = 0
    for part, parameter in model.named_parameters():
        is_table = "embed_tokens" in part and not config["tie_word_embeddings"]
        if parameter.ndim > 1 and not is_table:
            counted += round(parameter.numel() * (used if "experts" in part else 1))
    assert workload.matmul_parameters(config) == counted


def test_operations_a_token() -> None:
    # One token attends only to itself; longer samples cost more per token.
    channels = 8 * 64 * 8
    assert workload.flops_per_token([[1]]) == 6 * workload.matmul_parameters() + 6 * channels
    assert workload.flops_per_token([[1] * 100]) == 6 * workload.matmul_parameters() + 6 * channels * 100


def test_samples_are_ragged_and_grouped() -> None:
    work = workload.make_workload(micro_batches=16, batch_size=10, warmup=20, seed=0)
    lengths = np.array([len(sample) for sample in work.measured]).reshape(16, 10)
    assert len(work.warmup) == 20
    assert 150 < lengths.mean() < 250
    assert lengths.max() <= workload.MAX_LENGTH
    assert lengths.sum() / (lengths.max(1) * 10).sum() > 0.85, "length-grouped batches hold little padding"
    assert all(sample[-1] == workload.EOS and workload.EOS not in sample[:-1] for sample in work.measured)


def test_text_gives_back_the_tokens(tmp_path: Path) -> None:
    work = workload.make_workload(micro_batches=1, batch_size=2, warmup=0, seed=0)
    workload.write_model(tmp_path)
    workload.write_text(tmp_path / "rows.jsonl", work.measured)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for line, sample in zip((tmp_path / "rows.jsonl").read_text().splitlines(), work.measured, strict=True):
        assert tokenizer(json.loads(line)["content_split"])["input_ids"] == sample[:-1]
        assert tokenizer.eos_token_id == sample[-1]
