"""Each switch of a run has an effect, either on its output or on what its ranks do during training."""

from __future__ import annotations

import gc
import json
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

from tests.harness import regroup, run_ranks
from tests.model import gallery
from tests.model.zoo import tiny
from tests.train.runs import QUICKSTART, records, run, tiny_config
from tutti.config import Config
from tutti.config.load import from_dict

EVAL = str(QUICKSTART / "chat_eval.jsonl")


def watch(config: Config) -> dict[str, Any]:
    """Train on this rank, and report what cannot be seen in the output folder (`Watcher.seen`)."""
    from tests.train.runs import train_quietly
    from tutti.checkpoint.hf_files import Checkpoint
    from tutti.checkpoint.manager import Checkpointer
    from tutti.kinds import language
    from tutti.parallel import apply
    from tutti.train import placement, run
    from tutti.train import step as step_module

    watcher = Watcher()
    watched: list[tuple[Any, str, Callable[..., None], Callable[..., None]]] = [
        (run, "build_mesh", ignore, watcher.made_mesh),
        (placement, "parallelize", watcher.parallelizes, ignore),
        (language, "init_weights", watcher.gets_values, ignore),
        (language, "load_weights", watcher.gets_values, ignore),
        (apply, "overlap_values", watcher.overlaps, ignore),
        (Checkpoint, "read", watcher.reads, ignore),
        (step_module.TrainStep, "step", watcher.steps, ignore),
        (torch.Tensor, "backward", watcher.notes_gathered, watcher.notes_gathered),
        (step_module, "_update", watcher.updates, ignore),
        (Checkpointer, "_write", watcher.writes, ignore),
    ]
    with ExitStack() as stack:
        for owner, name, before, after in watched:
            stack.enter_context(patch.object(owner, name, around(getattr(owner, name), before, after)))
        stack.enter_context(patch.object(torch, "compile", watcher.compiles))
        train_quietly(config)
    return watcher.seen


def around(call: Callable[..., Any], before: Callable[..., None], after: Callable[..., None]) -> Callable[..., Any]:
    """The call, with its arguments told before and its result after it."""

    def run(*args: Any, **kwargs: Any) -> Any:
        before(*args, **kwargs)
        result = call(*args, **kwargs)
        after(result)
        return result

    return run


def ignore(*_: Any, **__: Any) -> None:
    pass


class Watcher:
    """Records what a run does.

    seen, as it is at the first step: share (of all parameters, that this rank holds), dtypes, units (on one rank),
    decay (parameters by their weight decay), collects_by_itself, deterministic; mesh, experts (this rank's group).
    placed: whether the model had been parallelized when parameters got their values. reads: tensors read from files.
    passes: for each time the first block ran, whether a graph was made of it. tokens: this rank's, of each micro batch.
    gathered: whether the first block's parameters were whole after each forward, after each backward pass, in turn.
    norms: of the gradient that each step was taken with. writers: whether the main thread wrote each checkpoint.
    compiled: the `dynamic` of each compiled block. overlapped: whether values set out early.
    """

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {"reads": 0, "overlapped": False}
        self.seen |= {name: [] for name in ("placed", "passes", "tokens", "gathered", "norms", "writers", "compiled")}
        self.root: Any = None
        self.block: Any = None

    def made_mesh(self, mesh: Any) -> None:
        self.seen.update(mesh=str(mesh), experts=mesh.expert.mesh.tolist())

    def parallelizes(self, root: torch.nn.Module, *_: Any, **__: Any) -> None:
        self.root = root

    def gets_values(self, *_: Any, **__: Any) -> None:
        self.seen["placed"].append(self.root is not None)

    def overlaps(self, *_: Any) -> None:
        self.seen["overlapped"] = True

    def reads(self, *_: Any) -> None:
        self.seen["reads"] += 1

    def compiles(self, forward: Callable, *, dynamic: bool | None) -> Callable:
        self.seen["compiled"].append(dynamic)
        return forward

    def writes(self, *_: Any) -> None:
        self.seen["writers"].append(threading.current_thread() is threading.main_thread())

    def notes_gathered(self, *_: Any) -> None:
        self.seen["gathered"].append(not isinstance(next(self.block.parameters()), DTensor))

    def updates(self, optimizer: Any, _: Any) -> None:
        from tutti.parallel.grads import gradient_norm

        norm = gradient_norm(item for group in optimizer.param_groups for item in group["params"])
        self.seen["norms"].append(norm.item())
        self.seen["decay"] = {group["weight_decay"]: len(group["params"]) for group in optimizer.param_groups}

    def steps(self, *_: Any) -> None:
        from tutti.core.modules import attached

        if self.block is not None:
            return
        model = self.root.model
        self.block = model.model.layers[0]
        self.block.self_attn.register_forward_pre_hook(self._runs)
        model.model.embed_tokens.register_forward_pre_hook(self._embeds)
        parameters = list(model.parameters())
        local = [item.to_local() if isinstance(item, DTensor) else item for item in parameters]
        self.seen.update(
            share=sum(item.numel() for item in local) / sum(item.numel() for item in parameters),
            dtypes={str(item.dtype) for item in parameters},
            units=Counter(type(m).__name__ for m in self.root.modules() if "local parameters" in attached(m).wrappers),
            collects_by_itself=gc.isenabled(),
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )

    def _runs(self, attention: torch.nn.Module, _: Any) -> None:
        if attention.training:
            self.seen["passes"].append(torch.is_grad_enabled())

    def _embeds(self, embedding: torch.nn.Module, args: Any) -> None:
        if embedding.training:
            self.seen["tokens"].append(args[0].numel())


def watch_each(configs: list[Config]) -> list[dict[str, Any]]:
    seen = []
    for config in configs:
        regroup()
        seen.append(watch(config))
    return seen


def alone(*configs: Config) -> list[dict[str, Any]]:
    """The observations of one rank, run after run in one process."""
    return run_ranks(1, watch_each, list(configs))[0]


def saved(config: Config, folder: str) -> list[str]:
    return sorted(path.name for path in (Path(config.train.output_dir) / folder).glob("[!.]*") if path.is_dir())


def column(config: Config, name: str) -> list[Any]:
    return [line[name] for line in records(config) if name in line]


@pytest.fixture(scope="module")
def by_steps(tmp_path_factory):
    """Six steps with a warm-up and a decay, clipped, with what is due by steps; (configuration, what it did)."""
    config = tiny_config(
        tmp_path_factory.mktemp("steps"),
        **{
            "train.max_steps": 6,
            "train.lr": 1e-3,
            "train.lr_start": 1e-4,
            "train.lr_min": 2e-4,
            "train.lr_warmup_ratio": 0.34,
            "train.lr_decay_style": "linear",
            "train.lr_decay_ratio": 0.84,
            "train.save_steps": 3,
            "train.hf_save_steps": 4,
            "train.max_grad_norm": 0.01,
            "train.weight_decay": 0.1,
            "train.no_decay_params": ["k_norm"],
            "train.no_decay_modules": ["Embedding"],
            "train.enable_gradient_checkpointing": True,
            "train.enable_compile": True,
            "data.dyn_bsz_buffer_size": 1,
        },
    )
    return config, alone(config)[0]


@pytest.fixture(scope="module")
def by_epochs(tmp_path_factory):
    """Two epochs of four steps in bf16, with what is due by epochs; (configuration, what it did)."""
    folder = tmp_path_factory.mktemp("epochs")
    config = tiny_config(
        folder,
        **{
            "train.max_steps": 4,
            "model.basic_modules": ["Qwen3MLP"],
            "train.num_train_epochs": 2,
            "train.log_steps": 3,
            "train.save_epochs": 2,
            "train.hf_save_epochs": 1,
            "train.save_hf_weights": True,
            "data.eval_path": EVAL,
            "data.chat_template": "llama2",
            "train.eval_epochs": 2,
            "train.save_async": True,
            "train.optimizer": "anyprecision_adamw",
            "train.enable_mixed_precision": False,
            "train.enable_full_determinism": True,
            "train.enable_gradient_checkpointing": True,
            "train.enable_reentrant": False,
            "train.pad_to_length": True,
            "train.max_grad_norm": 0,
            "train.gc_steps": 0,
            "train.enable_profiling": True,
            "train.profile_start_step": 2,
            "train.profile_end_step": 4,
            "train.profile_with_stack": False,
            "train.profile_trace_dir": str(folder / "trace"),
        },
    )
    return config, alone(config)[0]


@pytest.fixture(scope="module")
def others(tmp_path_factory, by_steps):
    """Short runs, by name; those with weights start from the export of `by_steps`, in two files with another index."""
    folder = tmp_path_factory.mktemp("others")
    weights = divided(Path(by_steps[0].train.output_dir) / "hf" / "global_step_4", folder / "weights")
    unshuffled, from_weights = {"data.shuffle": False}, {"model.model_path": str(weights)}
    index = {"model.safetensor_idx_path": str(weights / "layout.json")}
    changes = {
        "seed 1": {**unshuffled, "train.seed": 1, "data.source_name": "chats"},
        "seed 2": {**unshuffled, "train.seed": 2},
        "order 1": {**from_weights, **index, "train.seed": 1},
        "order 2": {**from_weights, **index, "train.seed": 2},
        "index": {**from_weights, **index, "train.save_hf_weights": True, "train.init_device": "cpu"},
    }
    configs = [tiny_config(folder / name, **{"train.max_steps": 1, **values}) for name, values in changes.items()]
    return dict(zip(changes, zip(configs, alone(*configs), strict=True), strict=True))


def divided(exported: Path, folder: Path) -> Path:
    """A copy of an export with its weights in two files, and `layout.json` for the only index."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(exported, folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: f"{'ab'[number % 2]}.safetensors" for number, name in enumerate(sorted(weights))}
    for file in set(files.values()):
        save_file({name: weights[name] for name in files if files[name] == file}, folder / file, {"format": "pt"})
    (folder / "layout.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


def test_the_learning_rate_follows_its_arguments(by_steps):
    expected = [1e-4, 5.5e-4, 1e-3, 1e-3 - 8e-4 / 3, 1e-3 - 16e-4 / 3, 2e-4]
    assert column(by_steps[0], "lr") == pytest.approx(expected)


def test_max_steps_caps_each_epoch(by_epochs):
    lines = [line for line in records(by_epochs[0]) if "loss" in line]
    assert lines[-1]["step"] == 8 and [line["epoch"] for line in lines] == [0, 0, 1, 1]


def test_lines_come_every_log_steps_and_at_the_end_of_an_epoch(by_steps, by_epochs):
    assert [line["step"] for line in records(by_steps[0])] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in records(by_epochs[0]) if "loss" in line] == [3, 4, 6, 8]


def test_checkpoints_and_exports_come_by_steps(by_steps):
    config = by_steps[0]
    assert saved(config, "checkpoints") == ["global_step_3", "global_step_6"]
    assert saved(config, "hf") == ["global_step_4"]


def test_checkpoints_exports_and_evaluations_come_by_epochs(by_epochs):
    config = by_epochs[0]
    assert saved(config, "checkpoints") == ["global_step_8"]
    assert saved(config, "hf") == ["final", "global_step_4", "global_step_8"]
    assert [line["step"] for line in records(config) if "eval_loss" in line] == [8]


def test_checkpoints_are_written_in_the_background_when_asked(by_steps, by_epochs):
    assert by_steps[1]["writers"] == [True, True] and by_epochs[1]["writers"] == [False]


def test_gradients_are_clipped_to_the_norm(by_steps, by_epochs):
    """The norm in the metrics is that before clipping."""
    config, seen = by_steps
    assert min(column(config, "grad_norm")) > 0.1
    assert seen["norms"] == pytest.approx([0.01] * 6, rel=1e-3)
    config, seen = by_epochs
    logged = [seen["norms"][line["step"] - 1] for line in records(config) if "loss" in line]
    assert logged == column(config, "grad_norm") and min(logged) > 0.1


def test_weight_decay_spares_what_is_named(by_steps, by_epochs):
    # One embedding, and a norm of the keys in each of two layers.
    assert by_steps[1]["decay"] == {0.0: 3, 0.1: 21}
    assert by_epochs[1]["decay"] == {0.0: 24}


def test_parameters_are_fp32_with_mixed_precision_and_bf16_without(by_steps, by_epochs):
    from safetensors.torch import load_file

    for (config, seen), dtype, folder in ((by_steps, "float32", "global_step_4"), (by_epochs, "bfloat16", "final")):
        assert seen["dtypes"] == {f"torch.{dtype}"}
        weights = load_file(Path(config.train.output_dir) / "hf" / folder / "model.safetensors")
        assert {str(tensor.dtype) for tensor in weights.values()} == {f"torch.{dtype}"}


def test_the_optimizer_is_the_one_asked_for(by_steps, by_epochs):
    from torch.distributed.checkpoint import FileSystemReader

    states = []
    for (config, _), step in ((by_steps, 6), (by_epochs, 8)):
        reader = FileSystemReader(Path(config.train.output_dir) / "checkpoints" / f"global_step_{step}")
        entries = reader.read_metadata().state_dict_metadata.items()
        states.append(
            {
                name.rpartition(".")[2]: entry.properties.dtype
                for name, entry in entries
                if name.startswith("optimizer.")
            }
        )
    assert states[0] == {"step": torch.float32, "exp_avg": torch.float32, "exp_avg_sq": torch.float32}
    half = dict.fromkeys(("exp_avg", "exp_avg_sq", "compensation"), torch.bfloat16)
    assert states[1] == {"step": torch.float32, **half}


def test_blocks_are_recomputed_in_the_way_asked_for(by_steps, by_epochs, others):
    """The reentrant way runs a block without a graph first, the other way with one; without either it runs once."""
    for (_, seen), ways in ((by_steps, [False, True]), (by_epochs, [True, True]), (others["seed 1"], [True])):
        assert seen["passes"] == ways * len(seen["tokens"])


def test_blocks_are_compiled_when_asked(by_steps, by_epochs):
    assert by_steps[1]["compiled"] == [True, True] and by_epochs[1]["compiled"] == []


def test_basic_modules_are_units_of_their_own(by_steps, by_epochs):
    """Units that cast their parameters to bf16; in fp32 a rank that is alone has none."""
    assert by_epochs[1]["units"] == {"Objective": 1, "Qwen3DecoderLayer": 2, "Qwen3MLP": 2}
    assert by_steps[1]["units"] == {}


def test_a_larger_buffer_fills_batches_better(by_steps, by_epochs):
    small, large = (
        sum(column(config, "packing")) / len(column(config, "packing")) for config, _ in (by_steps, by_epochs)
    )
    assert small < large - 0.05


def test_padded_batches_have_one_length(by_steps, by_epochs):
    assert len(set(by_steps[1]["tokens"])) > 1 and set(by_epochs[1]["tokens"]) == {256}


def test_collection_is_automatic_without_gc_steps_alone(by_steps, by_epochs):
    assert not by_steps[1]["collects_by_itself"] and by_epochs[1]["collects_by_itself"]


def test_garbage_and_cached_memory_go_at_their_steps(monkeypatch):
    from tutti.train import process

    gone: dict[str, list[int]] = {"collect": [], "empty": []}
    now = 0
    monkeypatch.setattr(process.gc, "collect", lambda: gone["collect"].append(now))
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: gone["empty"].append(now))
    config = from_dict({"train": {"gc_steps": 3, "empty_cache_steps": 4}})
    never = from_dict({"train": {"gc_steps": 0, "empty_cache_steps": 0}})
    for accelerated in (False, True):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda accelerated=accelerated: accelerated)
        for now in range(1 + 8 * accelerated, 9 + 8 * accelerated):
            process.housekeeping(now, config)
            process.housekeeping(now, never)
    assert gone == {"collect": [3, 6, 9, 12, 15], "empty": [12, 16]}


def test_only_deterministic_kernels_when_asked(by_steps, by_epochs):
    assert by_epochs[1]["deterministic"] and not by_steps[1]["deterministic"]


def test_the_asked_steps_are_profiled(by_steps, by_epochs):
    (trace,) = Path(by_epochs[0].train.output_dir).with_name("trace").iterdir()
    events = json.loads(trace.read_text())["traceEvents"]
    found = {event["name"] for event in events if str(event.get("name")).startswith("ProfilerStep#")}
    assert (trace.name, found) == ("rank0_steps2-3.json", {"ProfilerStep#2", "ProfilerStep#3"})


def test_the_seed_decides_on_weights_and_on_the_order_of_the_data(others):
    one, two = (records(others[f"seed {seed}"][0])[0] for seed in (1, 2))
    assert one["tokens"] == two["tokens"] and one["loss"] != two["loss"]
    one, two = (records(others[f"order {seed}"][0])[0] for seed in (1, 2))
    assert one["tokens"] != two["tokens"]


def test_a_label_names_the_figures_of_the_one_source(others):
    (line,) = records(others["seed 1"][0])
    assert (line["source_loss/chats"], line["source_tokens/chats"]) == (line["loss"], line["trained_tokens"])
    assert not [key for key in records(others["seed 2"][0])[0] if key.startswith("source_")]


def test_chats_are_rendered_by_the_template_asked_for(by_steps, by_epochs):
    """The exported tokenizer shows this."""
    exported = [Path(config.train.output_dir) / "hf" / "global_step_4" for config, _ in (by_steps, by_epochs)]
    own, llama = (AutoTokenizer.from_pretrained(folder).chat_template for folder in exported)
    assert "<|im_start|>" in own and "[INST]" not in own
    assert "[INST]" in llama


def test_an_index_says_how_weights_are_read_and_written(others):
    from safetensors import safe_open

    config, seen = others["index"]
    wanted = json.loads(Path(config.model.safetensor_idx_path).read_text())["weight_map"]
    assert seen["reads"] == len(wanted)
    final = Path(config.train.output_dir) / "hf" / "final"
    assert {path.name for path in final.glob("*.safetensors")} == {"a.safetensors", "b.safetensors"}
    for file in set(wanted.values()):
        with safe_open(final / file, "pt") as opened:
            assert set(opened.keys()) == {name for name, place in wanted.items() if place == file}
    assert json.loads((final / "model.safetensors.index.json").read_text())["weight_map"] == wanted


def test_a_missing_index_is_told_before_training(tmp_path):
    config = tiny_config(tmp_path, **{"model.safetensor_idx_path": str(tmp_path / "gone.json")})
    with pytest.raises(AssertionError, match=r"ValueError: model.safetensor_idx_path: .*gone.json"):
        alone(config)
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_the_model_is_built_where_init_device_says(others):
    """meta: parallelized first and then loaded; cpu: the other way round."""
    assert others["order 1"][1]["placed"] == [True] and others["index"][1]["placed"] == [False]


ZERO2 = {"train.data_parallel_mode": "fsdp2", "train.enable_full_shard": False}
ON_TWO_RANKS = {
    "ddp": ({}, {"mesh": "replicate 2", "share": 1.0, "gathered": [True, True, True, False]}),
    "zero3": (
        {"train.data_parallel_mode": "fsdp2", "train.broadcast_model_weights_from_rank0": False},
        {"mesh": "shard 2", "share": 0.5, "gathered": [False, False, False, False]},
    ),
    "zero2": (ZERO2, {"share": 0.5, "gathered": [True, True, True, False]}),
    "zero2, reshard after forward": (
        {**ZERO2, "train.enable_reshard_after_forward": True},
        {"gathered": [False, True, False, False]},
    ),
    "zero2, reshard after backward": (
        {**ZERO2, "train.enable_reshard_after_backward": True},
        {"gathered": [True, False, True, False]},
    ),
    "tensor": ({"train.tensor_parallel_size": 2}, {"mesh": "tensor 2", "share": pytest.approx(0.5, abs=0.01)}),
    "context": ({"train.context_parallel_size": 2}, {"mesh": "context 2", "overlapped": False}),
    "ulysses": ({"train.ulysses_parallel_size": 2}, {"mesh": "ulysses 2", "overlapped": False}),
    "ulysses, async": ({"train.ulysses_parallel_size": 2, "train.async_enabled": True}, {"overlapped": True}),
}
"""Views of both ranks of a step of four micro batches of up to 256 tokens."""


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory, others):
    folder, weights = tmp_path_factory.mktemp("two"), others["index"][0].model
    common = {
        "train.max_steps": 1,
        "model.model_path": weights.model_path,
        "model.safetensor_idx_path": weights.safetensor_idx_path,
    }
    configs = [
        tiny_config(folder / str(number), world=2, **common, **changes)
        for number, (changes, _) in enumerate(ON_TWO_RANKS.values())
    ]
    return dict(zip(ON_TWO_RANKS, zip(*run_ranks(2, watch_each, configs), strict=True), strict=True))


@pytest.mark.parametrize("layout", ON_TWO_RANKS)
def test_ranks_share_the_model_as_asked(on_two_ranks, layout):
    for seen in on_two_ranks[layout]:
        expected = ON_TWO_RANKS[layout][1]
        assert {name: seen[name] for name in expected} == expected


def test_ranks_share_a_batch_along_some_axes_and_have_their_own_along_others(on_two_ranks):
    for layout, ranks in on_two_ranks.items():
        for seen in ranks:
            tokens = seen["tokens"]
            if layout.startswith(("ulysses", "context")):
                assert len(tokens) == 4 and max(tokens) <= 128, layout
            else:
                assert len(tokens) == (4 if layout == "tensor" else 2) and min(tokens) > 128, layout


def test_rank_0_alone_reads_weights_unless_told_otherwise(on_two_ranks):
    first, second = on_two_ranks["zero2"]
    assert first["reads"] > 0 and second["reads"] == 0
    first, second = on_two_ranks["zero3"]
    assert first["reads"] > 0 and second["reads"] > 0


def test_replicas_and_expert_groups_are_of_the_ranks_asked_for(tmp_path):
    tiny("qwen3_moe", vocab_size=2048).save_pretrained(tmp_path / "moe")
    common = {"train.data_parallel_mode": "fsdp2", "train.max_steps": 1, "model.config_path": str(tmp_path / "moe")}
    sizes = {"train.data_parallel_replicate_size": 2, "train.data_parallel_shard_size": 2}
    strided = {"train.expert_parallel_size": 2, "train.ep_outside": True}
    configs = [
        tiny_config(tmp_path / str(number), world=4, **common, **changes)
        for number, changes in enumerate((sizes, strided, strided | {"train.ep_outside": False}))
    ]
    hybrid, outside, inside = run_ranks(4, watch_each, configs)[1]
    assert (hybrid["mesh"], hybrid["share"]) == ("replicate 2 x shard 2", pytest.approx(0.5, abs=0.01))
    assert (outside["mesh"], outside["experts"], inside["experts"]) == ("shard 4 x expert 2", [1, 3], [0, 1])


def test_towers_stay_as_they_are_beside_texts(tmp_path):
    """Neither weight decay nor a resume changes what a model sees images with, while its language model learns."""
    gallery.tiny("qwen2_5_vl", vocab_size=2048).save_pretrained(tmp_path / "seeing")
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(tmp_path / "seeing"))
    model.float().save_pretrained(tmp_path / "seeing")
    arguments = {"model.model_path": str(tmp_path / "seeing"), "train.weight_decay": 0.5, "train.save_steps": 2}
    arguments |= {"train.save_hf_weights": True, "train.data_parallel_mode": "fsdp2"}
    lines = run(tiny_config(tmp_path, world=2, **arguments), 2)
    saved = str(tmp_path / "out" / "checkpoints" / "global_step_2")
    again = run(tiny_config(tmp_path / "again", **arguments, **{"train.load_checkpoint_path": saved}))
    assert [line["loss"] for line in again] == pytest.approx([line["loss"] for line in lines[2:]], rel=1e-5)
    for folder in (tmp_path, tmp_path / "again"):
        trained = AutoModelForImageTextToText.from_pretrained(folder / "out" / "hf" / "final", dtype=torch.float32)
        for name, value in model.state_dict().items():
            assert torch.equal(trained.state_dict()[name], value) == ("visual" in name), name


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_blocks_that_share_keys_and_values_are_checkpointed_rightly(tmp_path, lora):
    """Reentrant checkpointing would leave out the gradient that comes back through the keys that later blocks read."""
    sizes = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 2048, "vocab_size_per_layer_input": 2048,
        "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2, "laurel_rank": 4, "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "activation_sparsity_pattern": [0.0] * 4,
        "eos_token_id": 2, "bos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    AutoConfig.for_model("gemma3n_text", **sizes).save_pretrained(tmp_path / "config")
    changes = {"model.config_path": str(tmp_path / "config"), "train.max_steps": 2}
    changes |= {"train.architecture": "lora", "train.lora_targets": ["q_proj", "k_proj"]} if lora else {}
    plain = run(tiny_config(tmp_path / "plain", **changes))
    again = run(tiny_config(tmp_path / "again", **changes | {"train.enable_gradient_checkpointing": True}))
    for ours, theirs in zip(again, plain, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
