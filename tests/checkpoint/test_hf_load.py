"""Loaded weights equal those of from_pretrained on any number of ranks; tensors that do not fit are reported by
name."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

from tests.checkpoint.weighing import CPU, ONE, SHARDED, full, held, logits, nothing_on_meta, on_meta, sharded
from tests.harness import run_ranks
from tests.model.zoo import FAMILIES
from tutti.checkpoint.hf_files import Checkpoint
from tutti.checkpoint.hf_load import load_weights
from tutti.checkpoint.hf_save import export_hf
from tutti.core.dist import init_world


@pytest.mark.parametrize("broadcast", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_loaded_equals_from_pretrained(name: str, broadcast: bool, folders: Path) -> None:
    model = on_meta(name)
    load_weights(model, folders / name, world=ONE, broadcast=broadcast)
    assert nothing_on_meta(model)
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(folders / name)))


def _damaged(folders: Path, target: Path, name: str = "llama", **changes: Tensor | None) -> Path:
    """A copy of a checkpoint with tensors replaced, added, or (None) taken out."""
    tensors = load_file(folders / name / "model.safetensors")
    for key, value in changes.items():
        if value is None:
            del tensors[key]
        else:
            tensors[key] = value
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.layers.1.mlp.up_proj.weight", None, r"1 missing: model\.layers\.1\.mlp\.up_proj\.weight"),
        ("lm_head.weight", None, r"1 missing: lm_head\.weight"),
        ("model.layers.7.mlp.up_proj.weight", torch.ones(2), r"1 unexpected: model\.layers\.7\.mlp\.up_proj\.weight"),
        ("model.norm.weight", torch.ones(31), r"another shape: model\.norm\.weight \(31 in the checkpoint, 32 in"),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused(
    key: str, value: Tensor | None, message: str, folders: Path, tmp_path: Path
) -> None:
    path = _damaged(folders, tmp_path, **{key: value})
    with pytest.raises(ValueError, match=message):
        load_weights(on_meta("llama"), path, world=ONE)


def test_long_lists_of_keys_are_cut(folders: Path) -> None:
    with pytest.raises(ValueError, match=r"90 missing: model\.layers\.2\..* and 70 more$"):
        load_weights(on_meta("llama", num_hidden_layers=12), folders / "llama", world=ONE)


def test_a_missing_expert_is_refused(folders: Path, tmp_path: Path) -> None:
    keys = [key for key in held(folders / "qwen3_moe") if "layers.1.mlp.experts.3." in key]
    path = _damaged(folders, tmp_path, "qwen3_moe", **dict.fromkeys(keys))
    with pytest.raises(ValueError, match=r"experts.*3x48x32 in the checkpoint, 4x48x32"):
        load_weights(on_meta("qwen3_moe"), path, world=ONE)


def test_what_a_family_lets_its_checkpoints_lack_is_initialised(folders: Path, tmp_path: Path) -> None:
    name = "model.layers.1.input_layernorm.weight"
    folder = _damaged(folders, tmp_path, **{name: None})
    model = on_meta("llama")
    with patch.object(model, "_keys_to_ignore_on_load_missing", [r"layers\.1\.input_layernorm"]):
        load_weights(model, folder, world=ONE, device=CPU)
    assert torch.equal(model.state_dict()[name], torch.ones_like(model.state_dict()[name]))


def test_tied_weights_that_differ_are_refused(folders: Path, tmp_path: Path) -> None:
    tensors = load_file(folders / "smollm2" / "model.safetensors")
    assert "lm_head.weight" not in tensors
    _damaged(folders, tmp_path, "smollm2", **{"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    model = on_meta("smollm2")
    load_weights(model, tmp_path, world=ONE)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    _damaged(folders, tmp_path, "smollm2", **{"lm_head.weight": tensors["model.embed_tokens.weight"] + 1})
    with pytest.raises(ValueError, match=r"ties .*lm_head\.weight.* tie_word_embeddings to false"):
        load_weights(on_meta("smollm2"), tmp_path, world=ONE)


@pytest.mark.parametrize("name", ["qwen3", "llama"])
def test_a_classifier_takes_a_language_model_and_a_new_head(name: str, folders: Path) -> None:
    model = on_meta(name, AutoModelForSequenceClassification, num_labels=3)
    load_weights(model, folders / name, world=ONE, seed=1)
    reference = AutoModelForCausalLM.from_pretrained(folders / name)
    for key, value in reference.model.state_dict().items():
        assert torch.equal(model.model.state_dict()[key], value), key
    assert model.score.weight.shape == (3, 32) and 0.01 < model.score.weight.std() < 0.03
    again = on_meta(name, AutoModelForSequenceClassification, num_labels=3)
    load_weights(again, folders / name, world=ONE, seed=2)
    assert not torch.equal(again.score.weight, model.score.weight)


def _loaded(names: tuple[str, ...], root: Path, out: Path, broadcast: bool) -> list[dict[str, Any]]:
    dist = init_world(CPU)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file="data/quickstart/tokenizer.json", eos_token="<|endoftext|>")
    found = []
    for name in names:
        model = sharded(name, hybrid=False)
        load_weights(model, root / name, world=dist, broadcast=broadcast)
        export_hf(model, out / name, tokenizer, world=dist, max_shard_gb=5e-5)
        found.append({**full(model), "logits": logits(model).numpy()})
    return found


@pytest.mark.parametrize(("world", "broadcast"), [(2, True), (2, False), (5, False)])
def test_loaded_and_exported_on_several_ranks(world: int, broadcast: bool, folders: Path, tmp_path: Path) -> None:
    """With five ranks, some have no row of a tensor and no expert."""
    for ranks in zip(SHARDED, *run_ranks(world, _loaded, SHARDED, folders, tmp_path, broadcast), strict=True):
        reference = AutoModelForCausalLM.from_pretrained(folders / ranks[0])
        expected = {**reference.state_dict(), "logits": logits(reference)}
        for found in ranks[1:]:
            for key, value in expected.items():
                assert torch.equal(torch.from_numpy(found[key]), value), (ranks[0], key)
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / ranks[0])
        assert torch.equal(logits(exported), expected["logits"])
        assert held(tmp_path / ranks[0]) == held(folders / ranks[0])


def _opened(root: Path, broadcast: bool) -> list[str]:
    """The keys of the experts that this rank reads from the files."""
    keys = []

    class Recorded(Checkpoint):
        def read(self, key: str) -> Any:
            keys.append(key)
            return super().read(key)

    with patch("tutti.checkpoint.hf_load.Checkpoint", Recorded):
        model = sharded("qwen3_moe", hybrid=False)
        load_weights(model, root / "qwen3_moe", world=init_world(CPU), broadcast=broadcast)
    return [key for key in keys if "experts" in key]


def test_ranks_read_their_own_experts_or_rank_0_alone_reads(folders: Path) -> None:
    experts = {key for key in held(folders / "qwen3_moe") if "experts" in key}
    for number, keys in enumerate(run_ranks(2, _opened, folders, False)):
        mine = {key for key in experts if int(key.split(".")[5]) // 2 == number}
        assert len(keys) == len(mine) and set(keys) == mine
    first, second = run_ranks(2, _opened, folders, True)
    assert set(first) == experts and second == []


def _failing(path: Path, broadcast: bool) -> str:
    try:
        load_weights(sharded("llama", hybrid=False), path, world=init_world(CPU), broadcast=broadcast)
    except ValueError as error:
        return str(error)
    return "loaded"


@pytest.mark.parametrize("broadcast", [True, False])
def test_all_ranks_say_the_same_of_a_bad_checkpoint(broadcast: bool, folders: Path, tmp_path: Path) -> None:
    _damaged(folders, tmp_path, **{"model.norm.weight": None})
    one, two = run_ranks(2, _failing, tmp_path, broadcast)
    assert one == two and "1 missing: model.norm.weight" in one
