"""Exports equal what transformers itself would save, in the requested files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

from tests.checkpoint.weighing import CPU, ONE, held, logits, on_meta
from tests.model.zoo import EXPERTS, FAMILIES
from tutti.checkpoint.hf_files import INDEX, find_index
from tutti.checkpoint.hf_load import load_weights
from tutti.checkpoint.hf_save import export_hf
from tutti.model.initialize import init_weights


@pytest.mark.parametrize("name", FAMILIES)
def test_export_equals_save_pretrained(
    name: str, folders: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = on_meta(name)
    load_weights(model, folders / name, world=ONE)
    export_hf(model, tmp_path / "ours", tokenizer, world=ONE)
    reference = AutoModelForCausalLM.from_pretrained(folders / name)
    reference.save_pretrained(tmp_path / "theirs")
    tokenizer.save_pretrained(tmp_path / "theirs")
    assert sorted(os.listdir(tmp_path / "ours")) == sorted(os.listdir(tmp_path / "theirs"))
    assert held(tmp_path / "ours") == held(tmp_path / "theirs")
    ours, theirs = (json.loads((tmp_path / side / "config.json").read_text()) for side in ("ours", "theirs"))
    assert ours == theirs
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "ours")), logits(reference))


@pytest.mark.parametrize("name", EXPERTS)
def test_random_experts_export_one_by_one(name: str, folders: Path, tokenizer: Any, tmp_path: Path) -> None:
    model = on_meta(name)
    init_weights(model, 0, CPU)
    export_hf(model, tmp_path / "out", tokenizer, world=ONE)
    assert held(tmp_path / "out") == held(folders / name)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model))


def test_export_in_files_of_a_size_and_by_an_index(folders: Path, tokenizer: Any, tmp_path: Path) -> None:
    model = on_meta("mixtral")
    load_weights(model, folders / "mixtral", world=ONE)
    export_hf(model, tmp_path / "small", tokenizer, world=ONE, max_shard_gb=5e-5)
    weight_map = json.loads((tmp_path / "small" / INDEX).read_text())["weight_map"]
    assert len(set(weight_map.values())) > 3 and set(weight_map) == set(held(folders / "mixtral"))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "small")), logits(model))

    files = ["a.safetensors", "b.safetensors"]
    layout = {key: files[position % 2] for position, key in enumerate(weight_map)}
    index = tmp_path / "index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": layout}))
    export_hf(model, tmp_path / "indexed", tokenizer, world=ONE, index_path=index)
    for file in files:
        assert set(load_file(tmp_path / "indexed" / file)) == {key for key, name in layout.items() if name == file}
    again = on_meta("mixtral")
    load_weights(again, tmp_path / "indexed", world=ONE, index_path=index)
    assert torch.equal(logits(again), logits(model))
    assert find_index(tmp_path / "indexed") == tmp_path / "indexed" / INDEX


def test_export_replaces_a_folder_and_casts(folders: Path, tokenizer: Any, tmp_path: Path) -> None:
    model = on_meta("llama")
    load_weights(model, folders / "llama", world=ONE)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "stale.safetensors").write_bytes(b"x")
    export_hf(model, tmp_path / "out", tokenizer, world=ONE, dtype=torch.bfloat16)
    assert os.listdir(tmp_path) == ["out"] and not (tmp_path / "out" / "stale.safetensors").exists()
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_classifier_exports(folders: Path, tokenizer: Any, tmp_path: Path) -> None:
    model = on_meta("qwen3", AutoModelForSequenceClassification, num_labels=3)
    load_weights(model, folders / "qwen3", world=ONE)
    export_hf(model, tmp_path / "out", tokenizer, world=ONE)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again), logits(model))
    loaded = on_meta("qwen3", AutoModelForSequenceClassification, num_labels=3)
    load_weights(loaded, tmp_path / "out", world=ONE)
    assert torch.equal(logits(loaded), logits(model))
