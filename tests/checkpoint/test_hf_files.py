"""Weight files are found, and missing or damaged files are reported by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
)

from tests.checkpoint.weighing import ONE, logits, on_meta
from tutti.checkpoint.hf_files import INDEX
from tutti.checkpoint.hf_load import load_weights
from tutti.checkpoint.hf_save import export_hf


def test_damaged_files_are_refused(folders: Path, tokenizer: Any, tmp_path: Path) -> None:
    model = on_meta("llama")
    load_weights(model, folders / "llama", world=ONE)
    export_hf(model, tmp_path / "out", tokenizer, world=ONE, max_shard_gb=5e-5)
    file = tmp_path / "out" / "model-00001-of-00003.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"model-00001-of-00003\.safetensors is damaged"):
        load_weights(on_meta("llama"), tmp_path / "out", world=ONE)
    file.unlink()
    with pytest.raises(ValueError, match=r"1 of 3 weight files are not there: model-00001-of-00003"):
        load_weights(on_meta("llama"), tmp_path / "out", world=ONE)
    save_file({"model.norm.weight": torch.ones(32)}, file)
    with pytest.raises(ValueError, match=r"lacks .* that the index names"):
        load_weights(on_meta("llama"), tmp_path / "out", world=ONE)
    (tmp_path / "out" / INDEX).write_text("{")
    with pytest.raises(ValueError, match="not an index"):
        load_weights(on_meta("llama"), tmp_path / "out", world=ONE)
    with pytest.raises(ValueError, match="no weights in"):
        load_weights(on_meta("llama"), tmp_path, world=ONE)


def test_bin_checkpoints_load(folders: Path, tmp_path: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(folders / "llama")
    torch.save(reference.state_dict(), tmp_path / "pytorch_model.bin")
    model = on_meta("llama")
    load_weights(model, tmp_path, world=ONE)
    assert torch.equal(logits(model), logits(reference))
