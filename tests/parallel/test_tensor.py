"""Models split over a tensor axis: loss and gradients of every family, whole runs, and what travels between ranks."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.harness import run_ranks
from tests.model.zoo import tiny
from tests.parallel.layouts import assert_same, train_family
from tests.train.runs import tiny_config
from tutti.config.layout import fit
from tutti.core.batch import IGNORE, Batch, Sample, pack
from tutti.core.dist import init_dist
from tutti.model.attention import resolve_attention
from tutti.model.experts import resolve_experts
from tutti.model.initial import init_weights
from tutti.model.plan import blocks, experts
from tutti.parallel.apply import parallelize
from tutti.parallel.fsdp import GradientSync
from tutti.parallel.grads import gradient_norm
from tutti.parallel.mesh import build_mesh
from tutti.parallel.sequence import sequence_ranks, split_tokens
from tutti.parallel.tensor import tensor_ranks
from tutti.train.setup import tensor_plan
from tutti.train.task import Objective

FAMILIES = (
    "llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "granite", "cohere", "olmo2", "gpt_neox",
    "qwen3_moe", "mixtral", "deepseek_v3",
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


def run_whole(model: Any, batches: list[Batch]) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Sums over `batches`, and gradients, of a model on one process without anything parallel."""
    init_weights(model, 0, CPU)
    objective = Objective(model)
    return _sums(objective, batches, []), {name: item.grad for name, item in model.named_parameters()}


def run_split(
    model: Any, batches: list[Batch], config: Any
) -> tuple[dict[str, float], dict[str, torch.Tensor], float, Objective]:
    """The same by all ranks together as `config` says, the gradients gathered; and the gradient norm."""
    ranks = init_dist(CPU)
    layout = fit(config, ranks.world)
    mesh = build_mesh(layout, ranks, ddp=config.train.data_parallel_mode == "ddp")
    objective = Objective(model, tensor_ranks(mesh))
    units = [block for _, block in blocks(model)]
    parallelize(objective, units, mesh, config.train, experts=experts(model), plan=tensor_plan(model, layout))
    init_weights(model, 0, CPU)
    sync = GradientSync(objective, mesh, config.train)
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
    sums = {"loss": 0.0, "losses": 0.0, "router": 0.0, "correct": 0.0}
    for number, batch in enumerate(batches):
        for sync in syncs:
            sync.before(last=number == len(batches) - 1)
        out = objective(batch)
        loss = out.loss if out.router_loss is None else out.loss + out.router_loss
        loss.backward()
        sums["loss"] += out.loss.item()
        sums["losses"] += out.losses.sum().item()
        sums["router"] += 0.0 if out.router_loss is None else out.router_loss.item()
        sums["correct"] += 0.0 if out.num_correct is None else float(out.num_correct)
    return sums


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
    torch.use_deterministic_algorithms(False)
    for name, config, family, model in cases:
        compare(name, config, family, **model)


def config_for(folder: Any, world: int, **train: Any) -> Any:
    return tiny_config(folder, world=world, **{f"train.{name}": value for name, value in train.items()})


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
