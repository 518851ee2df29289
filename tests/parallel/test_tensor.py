"""Models split over a tensor axis: loss and gradients of every family, complete runs, and communication."""

from __future__ import annotations

import copy
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.profiler import profile
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests import sweep
from tests.harness import regroup, run_ranks
from tests.model.zoo import tiny
from tests.parallel.layouts import assert_same, family_config, train_all
from tests.train.runs import QUICKSTART, tiny_config
from tutti.attention.interface import resolve_attention
from tutti.config import Config, TrainConfig
from tutti.config.layout import fit
from tutti.core.batch import IGNORE, Batch, Sample, pack
from tutti.core.dist import init_world
from tutti.model.experts import resolve_experts
from tutti.model.initialize import init_weights
from tutti.model.stage_trace import tensor_plan
from tutti.model.structure import is_classifier, read_structure
from tutti.parallel.apply import parallelize
from tutti.parallel.fsdp import GradientSync, gradient_sync
from tutti.parallel.grads import gradient_norm
from tutti.parallel.mesh import build_mesh
from tutti.parallel.sequence import sequence_ranks, split_tokens
from tutti.parallel.tensor import tensor_ranks
from tutti.parallel.tp_plan import read_plan
from tutti.train.objective import Objective
from tutti.train.step import add_sums, zero_sums
from tutti.train.tasks import Task
from tutti.train.tasks.classification import Classification
from tutti.train.tasks.language import LanguageModelling

FAMILIES = (
    "llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "granite", "cohere", "olmo2", "gpt_neox",
    "qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss",
)  # fmt: skip
CPU = torch.device("cpu")


def make_batch(seed: int, *, classes: int = 0, lengths: tuple[int, ...] = (5, 33, 2, 21)) -> Batch:
    """A packed batch of an odd number of tokens."""
    rng = np.random.default_rng(seed)
    samples = []
    for length in lengths:
        ids = rng.integers(3, 250, length).astype(np.int32)
        labels = np.append(ids[1:], IGNORE).astype(np.int32)
        labels[rng.random(length) < 0.3] = IGNORE
        if classes:
            labels = np.append(np.full(length - 1, IGNORE), rng.integers(classes)).astype(np.int32)
        samples.append(Sample(ids, labels))
    return pack(samples)


def make_model(family: str, *, classes: int = 0, attention: str = "sdpa", **overrides: Any) -> Any:
    config = tiny(family, **overrides)
    if classes:
        config.num_labels = classes
    factory = AutoModelForSequenceClassification if classes else AutoModelForCausalLM
    with torch.device("meta"):
        return factory.from_config(
            copy.deepcopy(config),
            attn_implementation=resolve_attention(attention, CPU),
            experts_implementation=resolve_experts(None),
        ).train()


def task_of(model: Any) -> Task:
    return Classification() if is_classifier(model) else LanguageModelling()


def run_whole(model: Any, batches: list[Batch]) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Sums over `batches`, and gradients, of a model on one process without anything parallel."""
    init_weights(model, 0, CPU)
    objective = Objective(model, task_of(model))
    return _sums(objective, batches, []), {name: item.grad for name, item in model.named_parameters()}


def run_split(
    model: Any, batches: list[Batch], config: Any
) -> tuple[dict[str, float], dict[str, torch.Tensor], float, Objective]:
    """The loss by all ranks together as `config` says, the gradients gathered; and the gradient norm."""
    ranks = init_world(CPU)
    layout = fit(config, ranks.size)
    mesh = build_mesh(layout, ranks, ddp=config.train.data_parallel_mode == "ddp")
    structure = read_structure(model)
    plan = read_plan(structure) if layout.tensor > 1 else None
    objective = Objective(model, task_of(model), tensor_ranks(mesh), structure=structure)
    parallelize(objective, structure, mesh, config.train, plan)
    init_weights(model, 0, CPU)
    sync = gradient_sync(objective, mesh, config.train)
    own = [split_tokens(batch, sequence_ranks(mesh)) for batch in batches[mesh.dp_rank :: mesh.dp_size]]
    sums = _sums(objective, own, [sync])
    values = torch.tensor(list(sums.values()), dtype=torch.float64)
    dist.all_reduce(values)
    norm = gradient_norm(model.parameters()).item()
    grads = {
        name: item.grad.full_tensor() if isinstance(item.grad, DTensor) else item.grad
        for name, item in model.named_parameters()
    }
    return dict(zip(sums, values.tolist(), strict=True)), grads, norm, objective


def _sums(objective: Objective, batches: list[Batch], syncs: list[GradientSync]) -> dict[str, float]:
    total = zero_sums(objective.sizes, CPU)
    for number, batch in enumerate(batches):
        for sync in syncs:
            sync.before(last=number == len(batches) - 1)
        out = objective(batch)
        sum(out[name] for name in ("loss", "router_loss") if name in out).backward()
        add_sums(total, out)
    for sync in syncs:
        sync.finish()
    return {name: value.item() for name, value in total.items()}


def compare(name: str, config: Any, family: str, **model: Any) -> None:
    """Assert that the ranks of this group train `family` together as one process would."""
    batches = [make_batch(seed, classes=model.get("classes", 0)) for seed in range(4)]
    want, want_grads = run_whole(make_model(family, **model), batches)
    got, grads, norm, _ = run_split(make_model(family, **model), batches, config)
    for key, value in want.items():
        assert got[key] == pytest.approx(value, rel=1e-5, abs=1e-9), f"{name}: {key}"
    square = 0.0
    for key, grad in want_grads.items():
        if grad is None:
            continue
        square += grad.double().square().sum().item()
        scale = max(grad.abs().max().item(), 1e-3)
        error = (grads[key] - grad).abs().max().item()
        assert error <= 1e-4 * scale, f"{name}: gradient of {key} is off by {error:.2e} of {scale:.2e}"
    assert norm == pytest.approx(square**0.5, rel=1e-4), f"{name}: gradient norm"


def compare_all(cases: list[tuple[str, Any, str, dict[str, Any]]]) -> None:
    for name, config, family, model in cases:
        regroup()
        compare(name, config, family, **model)


def config_for(folder: Any, world: int, **train: Any) -> Any:
    return tiny_config(folder, world=world, **{f"train.{name}": value for name, value in train.items()})


@pytest.mark.parametrize(
    ("family", "linears"),
    [
        ("opt", 8), ("granitemoe", 8), ("phimoe", 8), ("lfm2", 10), ("nemotron_h", 6), ("persimmon", 8),
        ("granitemoehybrid", 4),
    ],
)  # fmt: skip
def test_configs_without_a_plan_of_their_own_have_the_usual_one(family, linears):
    """Experts and matrices of the block itself run on a rank's own tokens; mixers run unsplit on all tokens."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(sweep.tiny_config(family))
    structure = read_structure(model)
    plan = read_plan(structure)
    assert len(plan.linears) == linears and len(plan.counting) == (2 if family in ("opt", "persimmon") else 0)
    reduces = {region.module: region.reduces for region in plan.regions}
    assert all(reduces[mixer] is False for mixer in structure.mixers)
    inside = {part for region in reduces for part in region.modules()}
    own = [part for _, block in structure.blocks for part in block.children() if isinstance(part, torch.nn.Linear)]
    assert inside.isdisjoint([*structure.experts, *own])


@pytest.mark.parametrize(
    ("family", "linears", "whole"),
    [
        ("jetmoe", 0, {"JetMoeAttention"}),
        ("gpt_bigcode", 4, {"GPTBigCodeAttention"}),
        ("granitemoeshared", 8, {"GraniteMoeSharedMLP"}),
        ("longcat_flash", 24, set()),
    ],
)
def test_parts_that_are_made_otherwise_run_whole_on_every_rank(family, linears, whole):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(sweep.tiny_config(family))
    plan = read_plan(read_structure(model))
    assert len(plan.linears) == linears
    assert {type(region.module).__name__ for region in plan.regions if not region.reduces} == whole


def test_streams_of_hidden_states_are_refused_by_name():
    attention = resolve_attention("sdpa", torch.device("cpu"))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(sweep.tiny_config("hy_v4"), attn_implementation=attention)
    layout = fit(Config(train=TrainConfig(tensor_parallel_size=2)), 2)
    with pytest.raises(ValueError, match="HYV4ForCausalLM hands its blocks several streams"):
        tensor_plan(read_structure(model), layout)


def test_two_ranks_give_every_family_s_loss_and_gradients(tmp_path):
    config = config_for(tmp_path, 2, tensor_parallel_size=2)
    cases: list[tuple[str, Any, str, dict[str, Any]]] = [(family, config, family, {}) for family in FAMILIES]
    cases += [
        ("biases", config, "llama", {"attention_bias": True, "mlp_bias": True}),
        ("a vocabulary that two does not divide", config, "llama", {"vocab_size": 255}),
        ("the same, tied", config, "qwen3", {"vocab_size": 255}),
        ("a classifier", config, "qwen3", {"classes": 3}),
        ("eager attention", config, "gemma2", {"attention": "eager"}),
        ("a router loss", config, "qwen3_moe", {"output_router_logits": True, "router_aux_loss_coef": 0.1}),
    ]
    run_ranks(2, compare_all, cases)


def test_four_ranks_in_every_combination_with_data_parallelism(tmp_path):
    pairs = {"tensor_parallel_size": 2}
    remat = {"enable_gradient_checkpointing": True, "enable_reentrant": False}
    configs = {
        "tensor 4, key/value heads shared": {"tensor_parallel_size": 4},
        "tensor x zero3": pairs | {"data_parallel_mode": "fsdp2"},
        "tensor x zero2": pairs | {"data_parallel_mode": "fsdp2", "enable_full_shard": False},
        "tensor x ddp": pairs | {"data_parallel_mode": "ddp"},
        "tensor x zero3, remat": pairs | {"data_parallel_mode": "fsdp2"} | remat,
    }
    cases: list[tuple[str, Any, str, dict[str, Any]]] = []
    for name, train in configs.items():
        family = "llama" if "zero" in name else "qwen3"
        cases.append((name, config_for(tmp_path, 4, **train), family, {"vocab_size": 253}))
    shared = config_for(tmp_path, 4, tensor_parallel_size=4)
    cases.append(("shared heads, eager attention, biases", shared, "qwen2", {"attention": "eager"}))
    cases.append(("experts", config_for(tmp_path, 4, **pairs), "qwen3_moe", {}))
    run_ranks(4, compare_all, cases)


def test_tokens_are_split_beside_the_tensor_axis(tmp_path):
    """Ulysses exchanges tokens for some of a rank's heads; the ring passes a rank's key/value heads around."""
    ulysses = config_for(tmp_path, 4, tensor_parallel_size=2, ulysses_parallel_size=2)
    context = config_for(tmp_path, 4, tensor_parallel_size=2, context_parallel_size=2)
    cases = [("tensor x ulysses", ulysses, "qwen3", {}), ("tensor x context", context, "gemma2", {})]
    cases.append(("tensor x context, router loss", context, "qwen3_moe", {"output_router_logits": True}))
    run_ranks(4, compare_all, cases)


def test_eight_ranks_split_and_copy_beside_the_tensor_axis(tmp_path):
    hybrid = {"data_parallel_mode": "fsdp2", "data_parallel_replicate_size": 2, "data_parallel_shard_size": 2}
    config = config_for(tmp_path, 8, tensor_parallel_size=2, **hybrid)
    run_ranks(8, compare_all, [("tensor x hybrid", config, "qwen3", {})])


ODD = {"vocab_size": 2051, "tie_word_embeddings": True}
"""Complete runs of a model whose vocabulary is not divisible by two."""

TENSOR = {"tensor_parallel_size": 2, "data_parallel_mode": "fsdp2"}
CHECKED = {
    "data.eval_path": str(QUICKSTART / "chat_eval.jsonl"),
    "eval_steps": 2,
    "save_hf_weights": True,
    "save_steps": 2,
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of a run on one process, and its metrics lines."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, *train_all([family_config(folder, "qwen3", 1, ODD, **CHECKED)], 1)


@pytest.fixture(scope="module")
def split(tmp_path_factory, alone):
    """The results of several runs on four ranks; `reads` start from what one process has exported."""
    exported = str(final(alone[0]))
    reads = {"model.model_path": exported, "model.tokenizer_path": exported, "max_steps": 1}
    trains = {
        "checked": CHECKED,
        "units in blocks": {"model.basic_modules": ["Qwen3MLP"]},
        "resumed": saved(alone[0]),
        "reads": reads,
        "reads, built on the cpu": reads | {"init_device": "cpu"},
        "reads, from rank 0": reads | {"broadcast_model_weights_from_rank0": True},
    }
    folders = [tmp_path_factory.mktemp(name.split(",")[0].replace(" ", "_")) for name in trains]
    configs = [
        family_config(folder, "qwen3", 4, ODD, **TENSOR, **train)
        for folder, train in zip(folders, trains.values(), strict=True)
    ]
    return dict(zip(trains, zip(folders, train_all(configs, 4), strict=True), strict=True))


def final(folder: Path) -> Path:
    return folder / "out" / "hf" / "final"


def saved(folder: Path) -> dict:
    return {"load_checkpoint_path": str(folder / "out" / "checkpoints" / "global_step_2")}


def steps(lines: list[dict]) -> list[dict]:
    return [line for line in lines if "loss" in line]


def test_modules_of_their_own_are_split_too(alone, split):
    assert_same(split["units in blocks"][1], steps(alone[1]))


def test_whole_runs_evaluate_and_export_as_one_process_does(alone, split):
    (folder, got), (other, want) = split["checked"], alone
    assert_same(steps(got), steps(want))
    for ours, theirs in zip(got, want, strict=True):
        if "eval_loss" in theirs:
            assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=1e-5)
            assert ours["eval_tokens"] == theirs["eval_tokens"]
    theirs = dict(AutoModelForCausalLM.from_pretrained(final(other)).named_parameters())
    for name, parameter in AutoModelForCausalLM.from_pretrained(final(folder)).named_parameters():
        torch.testing.assert_close(
            parameter, theirs[name], rtol=1e-3, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_runs_resume_on_another_tensor_axis(tmp_path, alone, split):
    want = steps(alone[1])[2:]
    assert_same(split["resumed"][1], want)
    (got,) = train_all([family_config(tmp_path, "qwen3", 1, ODD, **saved(split["checked"][0]))], 1)
    assert_same(got, want)


def test_weights_are_read_and_split(tmp_path, alone, split):
    """Own slices, built on the CPU first, or sent by rank 0."""
    exported = str(final(alone[0]))
    reads = {"model.model_path": exported, "model.tokenizer_path": exported, "max_steps": 1}
    (want,) = train_all([family_config(tmp_path, "qwen3", 1, ODD, **reads)], 1)
    for name in ("reads", "reads, built on the cpu", "reads, from rank 0"):
        assert_same(split[name][1], want)


def test_compiled_blocks_are_one_graph_and_the_same(tmp_path):
    config = config_for(tmp_path, 2, tensor_parallel_size=2, enable_compile=True)
    run_ranks(2, compare_compiled, config)


def compare_compiled(config: Any) -> None:
    """With a backend that runs the graph unchanged, since only the contents of graphs matter here."""
    torch.compile = partial(torch.compile, backend="eager", fullgraph=True)
    compare("compiled", config, "qwen3", num_hidden_layers=1)


def test_nothing_of_the_size_of_logits_travels(tmp_path):
    """One gather and one sum per part of a block, forward and backward, and a few numbers per target for the loss."""
    config = config_for(tmp_path, 2, tensor_parallel_size=2)
    batch = make_batch(0, lengths=(5, 33, 2, 22))
    rows, width, num_blocks, vocabulary = len(batch.input_ids), 32, 2, 4096
    # Attention and MLP of each block, and the embedding's sum or the gather before the head; all again backward.
    count = 2 * (2 * num_blocks + 1)
    for traffic in run_ranks(2, watch_traffic, config, batch, vocabulary):
        assert traffic["c10d::_allgather_base_"] == [rows * width // 2] * count
        assert traffic["c10d::_reduce_scatter_base_"] == [rows * width] * count
        assert max(size for sizes in traffic.values() for size in sizes) < len(batch.target_index) * vocabulary // 2


def watch_traffic(config: Any, batch: Batch, vocabulary: int) -> dict[str, list[int]]:
    """Elements of what this rank gives to each collective of one forward and backward pass, by operator."""
    *_, objective = run_split(make_model("qwen3", vocab_size=vocabulary), [batch], config)
    with profile(record_shapes=True) as profiled:
        _sums(objective, [batch], [])
    traffic: dict[str, list[int]] = {}
    for event in profiled.events():
        if event.name.startswith(("c10d::", "_c10d_functional::", "gloo:")):
            given = event.input_shapes[1 if event.name.endswith("_base_") else 0]
            traffic.setdefault(event.name, []).append(math.prod(given) if given else 0)
    return traffic


def test_what_has_no_plan_is_refused_by_name():
    with pytest.raises(ValueError, match="GPT2LMHeadModel cannot be split into tensors: its config has no"):
        read_plan(read_structure(make_model("gpt2")))
