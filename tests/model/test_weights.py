"""Loading, initialising and exporting equal what transformers does, on any number of ranks, or say what is wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.device_mesh import init_device_mesh
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from tests.harness import run_ranks
from tests.model.zoo import EXPERTS, FAMILIES, tiny
from tutti.core.dist import Dist, init_dist
from tutti.model.export import export_hf
from tutti.model.files import INDEX, Checkpoint, find_index
from tutti.model.initial import init_weights, materialize
from tutti.model.plan import blocks
from tutti.model.weights import load_weights

CPU = torch.device("cpu")
ONE = Dist(rank=0, world=1, local_rank=0, device=CPU)
IDS = torch.tensor([[5, 17, 3, 99, 42, 7, 250, 11, 64, 8, 9]])
SHARDED = ("qwen3", "gpt2", *EXPERTS)
"""Families for the tests on several ranks: tied weights, biases, experts stacked from files of one each."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of each family, written by transformers, with no parameter left at a special value."""
    root = tmp_path_factory.mktemp("zoo")
    for seed, name in enumerate(FAMILIES):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny(name))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    file = Path(__file__).parents[2] / "data" / "quickstart" / "tokenizer.json"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token="<|endoftext|>")
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    return tokenizer


def _on_meta(name: str, factory: Any = AutoModelForCausalLM, **overrides: Any) -> PreTrainedModel:
    with torch.device("meta"):
        return factory.from_config(tiny(name, **overrides), dtype=torch.float32)


def _logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS, use_cache=False).logits


def _nothing_on_meta(model: nn.Module) -> bool:
    return not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def _held(folder: Path) -> dict[str, list[int]]:
    shapes: dict[str, list[int]] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as handle:
            shapes.update({key: handle.get_slice(key).get_shape() for key in handle.keys()})  # noqa: SIM118
    return shapes


@pytest.mark.parametrize("broadcast", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_loaded_equals_from_pretrained(name: str, broadcast: bool, folders: Path) -> None:
    model = _on_meta(name)
    load_weights(model, folders / name, dist=ONE, broadcast=broadcast)
    assert _nothing_on_meta(model)
    assert torch.equal(_logits(model), _logits(AutoModelForCausalLM.from_pretrained(folders / name)))


@pytest.mark.parametrize("name", FAMILIES)
def test_export_equals_save_pretrained(
    name: str, folders: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = _on_meta(name)
    load_weights(model, folders / name, dist=ONE)
    export_hf(model, tmp_path / "ours", tokenizer, dist=ONE)
    reference = AutoModelForCausalLM.from_pretrained(folders / name)
    reference.save_pretrained(tmp_path / "theirs")
    tokenizer.save_pretrained(tmp_path / "theirs")
    assert sorted(os.listdir(tmp_path / "ours")) == sorted(os.listdir(tmp_path / "theirs"))
    assert _held(tmp_path / "ours") == _held(tmp_path / "theirs")
    ours, theirs = (json.loads((tmp_path / side / "config.json").read_text()) for side in ("ours", "theirs"))
    assert ours == theirs
    assert torch.equal(_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "ours")), _logits(reference))


@pytest.mark.parametrize("name", EXPERTS)
def test_random_experts_export_one_by_one(name: str, folders: Path, tokenizer: Any, tmp_path: Path) -> None:
    model = _on_meta(name)
    init_weights(model, 0, CPU)
    export_hf(model, tmp_path / "out", tokenizer, dist=ONE)
    assert _held(tmp_path / "out") == _held(folders / name)
    assert torch.equal(_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), _logits(model))


def test_export_in_files_of_a_size_and_by_an_index(folders: Path, tokenizer: Any, tmp_path: Path) -> None:
    model = _on_meta("mixtral")
    load_weights(model, folders / "mixtral", dist=ONE)
    export_hf(model, tmp_path / "small", tokenizer, dist=ONE, max_shard_gb=5e-5)
    weight_map = json.loads((tmp_path / "small" / INDEX).read_text())["weight_map"]
    assert len(set(weight_map.values())) > 3 and set(weight_map) == set(_held(folders / "mixtral"))
    assert torch.equal(_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "small")), _logits(model))

    files = ["a.safetensors", "b.safetensors"]
    layout = {key: files[position % 2] for position, key in enumerate(weight_map)}
    index = tmp_path / "index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": layout}))
    export_hf(model, tmp_path / "indexed", tokenizer, dist=ONE, index_path=index)
    for file in files:
        assert set(load_file(tmp_path / "indexed" / file)) == {key for key, name in layout.items() if name == file}
    again = _on_meta("mixtral")
    load_weights(again, tmp_path / "indexed", dist=ONE, index_path=index)
    assert torch.equal(_logits(again), _logits(model))
    assert find_index(tmp_path / "indexed") == tmp_path / "indexed" / INDEX


def test_export_replaces_a_folder_and_casts(folders: Path, tokenizer: Any, tmp_path: Path) -> None:
    model = _on_meta("llama")
    load_weights(model, folders / "llama", dist=ONE)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "stale.safetensors").write_bytes(b"x")
    export_hf(model, tmp_path / "out", tokenizer, dist=ONE, dtype=torch.bfloat16)
    assert os.listdir(tmp_path) == ["out"] and not (tmp_path / "out" / "stale.safetensors").exists()
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_bin_checkpoints_load(folders: Path, tmp_path: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(folders / "llama")
    torch.save(reference.state_dict(), tmp_path / "pytorch_model.bin")
    model = _on_meta("llama")
    load_weights(model, tmp_path, dist=ONE)
    assert torch.equal(_logits(model), _logits(reference))


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
        load_weights(_on_meta("llama"), path, dist=ONE)


def test_long_lists_of_keys_are_cut(folders: Path) -> None:
    with pytest.raises(ValueError, match=r"90 missing: model\.layers\.2\..* and 70 more$"):
        load_weights(_on_meta("llama", num_hidden_layers=12), folders / "llama", dist=ONE)


def test_a_missing_expert_is_refused(folders: Path, tmp_path: Path) -> None:
    keys = [key for key in _held(folders / "qwen3_moe") if "layers.1.mlp.experts.3." in key]
    path = _damaged(folders, tmp_path, "qwen3_moe", **dict.fromkeys(keys))
    with pytest.raises(ValueError, match=r"experts.*3x48x32 in the checkpoint, 4x48x32"):
        load_weights(_on_meta("qwen3_moe"), path, dist=ONE)


def test_damaged_files_are_refused(folders: Path, tokenizer: Any, tmp_path: Path) -> None:
    model = _on_meta("llama")
    load_weights(model, folders / "llama", dist=ONE)
    export_hf(model, tmp_path / "out", tokenizer, dist=ONE, max_shard_gb=5e-5)
    file = tmp_path / "out" / "model-00001-of-00003.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"model-00001-of-00003\.safetensors is damaged"):
        load_weights(_on_meta("llama"), tmp_path / "out", dist=ONE)
    file.unlink()
    with pytest.raises(ValueError, match=r"1 of 3 weight files are not there: model-00001-of-00003"):
        load_weights(_on_meta("llama"), tmp_path / "out", dist=ONE)
    save_file({"model.norm.weight": torch.ones(32)}, file)
    with pytest.raises(ValueError, match=r"lacks .* that the index names"):
        load_weights(_on_meta("llama"), tmp_path / "out", dist=ONE)
    (tmp_path / "out" / INDEX).write_text("{")
    with pytest.raises(ValueError, match="not an index"):
        load_weights(_on_meta("llama"), tmp_path / "out", dist=ONE)
    with pytest.raises(ValueError, match="no weights in"):
        load_weights(_on_meta("llama"), tmp_path, dist=ONE)


def test_tied_weights_that_differ_are_refused(folders: Path, tmp_path: Path) -> None:
    tensors = load_file(folders / "smollm2" / "model.safetensors")
    assert "lm_head.weight" not in tensors
    _damaged(folders, tmp_path, "smollm2", **{"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    model = _on_meta("smollm2")
    load_weights(model, tmp_path, dist=ONE)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    _damaged(folders, tmp_path, "smollm2", **{"lm_head.weight": tensors["model.embed_tokens.weight"] + 1})
    with pytest.raises(ValueError, match=r"ties .*lm_head\.weight.* tie_word_embeddings to false"):
        load_weights(_on_meta("smollm2"), tmp_path, dist=ONE)


@pytest.mark.parametrize("name", ["qwen3", "llama"])
def test_a_classifier_takes_a_language_model_and_a_new_head(name: str, folders: Path) -> None:
    model = _on_meta(name, AutoModelForSequenceClassification, num_labels=3)
    load_weights(model, folders / name, dist=ONE, seed=1)
    reference = AutoModelForCausalLM.from_pretrained(folders / name)
    for key, value in reference.model.state_dict().items():
        assert torch.equal(model.model.state_dict()[key], value), key
    assert model.score.weight.shape == (3, 32) and 0.01 < model.score.weight.std() < 0.03
    again = _on_meta(name, AutoModelForSequenceClassification, num_labels=3)
    load_weights(again, folders / name, dist=ONE, seed=2)
    assert not torch.equal(again.score.weight, model.score.weight)


def test_a_classifier_exports(folders: Path, tokenizer: Any, tmp_path: Path) -> None:
    model = _on_meta("qwen3", AutoModelForSequenceClassification, num_labels=3)
    load_weights(model, folders / "qwen3", dist=ONE)
    export_hf(model, tmp_path / "out", tokenizer, dist=ONE)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert torch.equal(_logits(again), _logits(model))
    loaded = _on_meta("qwen3", AutoModelForSequenceClassification, num_labels=3)
    load_weights(loaded, tmp_path / "out", dist=ONE)
    assert torch.equal(_logits(loaded), _logits(model))


@pytest.mark.parametrize("name", FAMILIES)
def test_random_weights_follow_the_classes_rules(name: str) -> None:
    """Each parameter is distributed as transformers' own initialisation of the same config has it."""
    model = _on_meta(name)
    init_weights(model, 3, CPU)
    assert _nothing_on_meta(model)
    reference = AutoModelForCausalLM.from_config(tiny(name), dtype=torch.float32)
    for key, theirs in reference.named_parameters():
        ours = model.get_parameter(key)
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours.mean(), theirs.mean(), rtol=0, atol=0.02, msg=key)
        if theirs.numel() >= 100:
            torch.testing.assert_close(ours.std(), theirs.std(), rtol=0.25, atol=1e-6, msg=key)
    for key, theirs in reference.named_buffers():
        assert torch.equal(model.get_buffer(key), theirs), key
    assert {id(p) for p in model.parameters()}.__len__() == {id(p) for p in reference.parameters()}.__len__()


def test_random_weights_differ_by_seed_and_between_layers() -> None:
    one, two = _on_meta("llama"), _on_meta("llama")
    init_weights(one, 1, CPU)
    init_weights(two, 2, CPU)
    layers = one.model.layers
    assert not torch.equal(one.lm_head.weight, two.lm_head.weight)
    assert not torch.equal(layers[0].mlp.up_proj.weight, layers[1].mlp.up_proj.weight)
    assert not torch.equal(layers[0].self_attn.k_proj.weight, layers[0].self_attn.v_proj.weight)


def test_initialising_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    init_weights(_on_meta("llama"), 1, CPU)
    assert torch.equal(torch.get_rng_state(), before)


def test_bf16_models_get_rounded_fp32_values() -> None:
    exact = _on_meta("gemma2")
    init_weights(exact, 1, CPU)
    with torch.device("meta"):
        rounded = AutoModelForCausalLM.from_config(tiny("gemma2"), dtype=torch.bfloat16)
    init_weights(rounded, 1, CPU)
    for key, value in exact.named_parameters():
        assert torch.equal(rounded.get_parameter(key), value.to(torch.bfloat16)), key


def _sharded(name: str, hybrid: bool) -> PreTrainedModel:
    model = _on_meta(name)
    world = int(os.environ["WORLD_SIZE"])
    shape, names = ((2, world // 2), ("replicate", "shard")) if hybrid else ((world,), ("shard",))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    for _, block in blocks(model):
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _full(model: PreTrainedModel) -> dict[str, Any]:
    """Every parameter in full, as arrays that travel between processes."""
    return {
        key: (value.full_tensor() if isinstance(value, DTensor) else value).detach().numpy()
        for key, value in model.state_dict().items()
    }


def _initialised(names: tuple[str, ...], hybrid: bool) -> list[dict[str, Any]]:
    found = []
    for name in names:
        model = _sharded(name, hybrid)
        init_weights(model, 7, CPU)
        found.append({**_full(model), "logits": _logits(model).numpy()})
    return found


@pytest.mark.parametrize(("world", "hybrid"), [(2, False), (3, False), (4, True)])
def test_random_weights_are_the_same_on_any_layout(world: int, hybrid: bool) -> None:
    for ranks in zip(SHARDED, *run_ranks(world, _initialised, SHARDED, hybrid), strict=True):
        model = _on_meta(ranks[0])
        init_weights(model, 7, CPU)
        expected = {**model.state_dict(), "logits": _logits(model)}
        for found in ranks[1:]:
            for key, value in expected.items():
                assert torch.equal(torch.from_numpy(found[key]), value), (ranks[0], key)


def _loaded(names: tuple[str, ...], root: Path, out: Path, broadcast: bool) -> list[dict[str, Any]]:
    dist = init_dist(CPU)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file="data/quickstart/tokenizer.json", eos_token="<|endoftext|>")
    found = []
    for name in names:
        model = _sharded(name, hybrid=False)
        load_weights(model, root / name, dist=dist, broadcast=broadcast)
        export_hf(model, out / name, tokenizer, dist=dist, max_shard_gb=5e-5)
        found.append({**_full(model), "logits": _logits(model).numpy()})
    return found


@pytest.mark.parametrize(("world", "broadcast"), [(2, True), (2, False), (5, False)])
def test_loaded_and_exported_on_several_ranks(world: int, broadcast: bool, folders: Path, tmp_path: Path) -> None:
    """With five ranks some have no row of a tensor, and no expert."""
    for ranks in zip(SHARDED, *run_ranks(world, _loaded, SHARDED, folders, tmp_path, broadcast), strict=True):
        reference = AutoModelForCausalLM.from_pretrained(folders / ranks[0])
        expected = {**reference.state_dict(), "logits": _logits(reference)}
        for found in ranks[1:]:
            for key, value in expected.items():
                assert torch.equal(torch.from_numpy(found[key]), value), (ranks[0], key)
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / ranks[0])
        assert torch.equal(_logits(exported), expected["logits"])
        assert _held(tmp_path / ranks[0]) == _held(folders / ranks[0])


def _opened(root: Path, broadcast: bool) -> list[str]:
    """The keys of the experts that this rank reads from the files."""
    keys = []

    class Recorded(Checkpoint):
        def read(self, key: str) -> Any:
            keys.append(key)
            return super().read(key)

    with patch("tutti.model.weights.Checkpoint", Recorded):
        model = _sharded("qwen3_moe", hybrid=False)
        load_weights(model, root / "qwen3_moe", dist=init_dist(CPU), broadcast=broadcast)
    return [key for key in keys if "experts" in key]


def test_ranks_read_their_own_experts_or_rank_0_alone_reads(folders: Path) -> None:
    experts = {key for key in _held(folders / "qwen3_moe") if "experts" in key}
    for number, keys in enumerate(run_ranks(2, _opened, folders, False)):
        mine = {key for key in experts if int(key.split(".")[5]) // 2 == number}
        assert len(keys) == len(mine) and set(keys) == mine
    first, second = run_ranks(2, _opened, folders, True)
    assert set(first) == experts and second == []


def _failing(path: Path, broadcast: bool) -> str:
    try:
        load_weights(_sharded("llama", hybrid=False), path, dist=init_dist(CPU), broadcast=broadcast)
    except ValueError as error:
        return str(error)
    return "loaded"


@pytest.mark.parametrize("broadcast", [True, False])
def test_all_ranks_say_the_same_of_a_bad_checkpoint(broadcast: bool, folders: Path, tmp_path: Path) -> None:
    _damaged(folders, tmp_path, **{"model.norm.weight": None})
    one, two = run_ranks(2, _failing, tmp_path, broadcast)
    assert one == two and "1 missing: model.norm.weight" in one


def test_storage_alone_recomputes_buffers() -> None:
    model = _on_meta("gemma3")
    materialize(model, CPU)
    reference = AutoModelForCausalLM.from_config(tiny("gemma3"))
    assert _nothing_on_meta(model)
    for key, value in reference.named_buffers():
        assert torch.equal(model.get_buffer(key), value), key
