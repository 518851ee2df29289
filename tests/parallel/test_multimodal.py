"""Models that take images on several ranks: losses, gradient norms and parameters equal one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from tests.harness import regroup, run_ranks
from tests.model.gallery import pack_pictures, picture, tiny
from tests.train.runs import tiny_config
from tutti.config.layout import fit
from tutti.core.batch import Batch, GlobalBatch
from tutti.core.dist import init_world
from tutti.model.build import build_model
from tutti.model.structure import read_structure
from tutti.parallel.mesh import build_mesh
from tutti.train.placement import load_parameters, make_executor, place_model
from tutti.train.step import Totals, TrainStep
from tutti.train.tasks.language import LanguageModelling

CPU = torch.device("cpu")
NUM_STEPS = 3


class Result(NamedTuple):
    """The results of a run: by step the mean loss, router loss and gradient norm; the parameters in the end."""

    losses: list[float]
    router_losses: list[float]
    norms: list[float]
    parameters: dict[str, np.ndarray]


def micro_batches(family: str, step: int) -> list[Batch]:
    """Four micro batches: with images, of text alone, with both; in the last step there are no images at all."""

    def packed(number: int, images: tuple[int, ...]) -> Batch:
        images = images if step < NUM_STEPS - 1 else tuple(0 for _ in images)
        seed = 100 * step + 10 * number
        return pack_pictures([picture(family, seed + place, 9 + 4 * place, n) for place, n in enumerate(images)])

    return [packed(0, (1, 2)), packed(1, (0, 0, 0)), packed(2, (0, 0)), packed(3, (0, 1, 3))]


def train(config: Any, family: str) -> Result:
    """Three steps on all ranks of the group together, as `config` says."""
    ranks = init_world(CPU)
    layout = fit(config, ranks.size)
    mesh = build_mesh(layout, ranks, ddp=config.train.data_parallel_mode == "ddp")
    model = build_model(config, device=CPU)
    placed = place_model(config, model, read_structure(model), LanguageModelling(), layout, mesh)
    load_parameters(config, placed, mesh, ranks)
    executor = make_executor(config.train, placed, mesh, CPU)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # The large epsilon keeps gradients that are nothing but rounding (of keys' biases) from counting.
    optimizer = torch.optim.AdamW(trained, lr=1e-2, eps=1e-3, weight_decay=0.1)
    trainer = TrainStep(placed.objective, optimizer, executor, mesh, max_grad_norm=1.0)
    result = Result([], [], [], {})
    for step in range(NUM_STEPS):
        totals = Totals.zero(placed.objective.sizes, CPU)
        batches = micro_batches(family, step)
        num_targets = sum(len(batch.target_index) for batch in batches)
        num_tokens = sum(batch.num_tokens for batch in batches)
        trainer.step(
            GlobalBatch(
                micro_batches=tuple(batches[mesh.dp_rank :: mesh.dp_size]),
                num_targets=num_targets,
                trained_tokens=num_targets,
                num_tokens=num_tokens,
                num_samples=10,
                num_slots=num_tokens,
                source_targets={},
                source_tokens={},
                names=(),
                step=step + 1,
                epoch=0,
                epoch_end=False,
            ),
            totals,
        )
        reduced = totals.reduce(ranks)
        result.losses.append(reduced.sums["loss"] / num_targets)
        result.router_losses.append(reduced.sums.get("router_loss", 0.0) / num_tokens)
        result.norms.append(reduced.grad_norm)
    for name, parameter in model.named_parameters():
        result.parameters[name] = _whole(parameter.detach()).numpy().copy()
    return result


def train_all(configs: dict[str, Any]) -> dict[str, Result]:
    results = {}
    for family, config in configs.items():
        regroup()
        results[family] = train(config, family)
    return results


def _whole(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def assert_same(name: str, got: Result, want: Result) -> None:
    assert got.losses == pytest.approx(want.losses, rel=1e-5), name
    assert got.router_losses == pytest.approx(want.router_losses, rel=1e-5), name
    assert got.norms == pytest.approx(want.norms, rel=1e-4), name
    assert got.parameters.keys() == want.parameters.keys() or "pipeline" in name
    for key, value in got.parameters.items():
        np.testing.assert_allclose(value, want.parameters[key], rtol=1e-4, atol=1e-4, err_msg=f"{name}, {key}")


def compare_all(cases: list[tuple[str, Any, str, Result]]) -> None:
    for name, config, family, want in cases:
        regroup()
        assert_same(name, train(config, family), want)


def config_for(folder: Path, family: str, world: int, text: dict[str, Any], **changes: Any) -> Any:
    path = folder / family
    tiny(family, **text).save_pretrained(path)
    arguments = {name if "." in name else f"train.{name}": value for name, value in changes.items()}
    return tiny_config(folder, world=world, **{"model.config_path": str(path)}, **arguments)


ROUTER = {"output_router_logits": True, "router_aux_loss_coef": 0.1}
TEXT: dict[str, dict[str, Any]] = {"qwen3_vl_moe": ROUTER}


FSDP = {"data_parallel_mode": "fsdp2"}
REMAT = {"enable_gradient_checkpointing": True}
TWO: dict[str, tuple[str, dict[str, Any]]] = {
    "ddp": ("internvl", {}),
    "zero3, remat": ("qwen2_5_vl", {**FSDP, **REMAT}),
    "zero2": ("llava", {**FSDP, "enable_full_shard": False}),
    "fsdp1": ("smolvlm", {"data_parallel_mode": "fsdp1"}),
    "ulysses 2": ("qwen3_vl", {"ulysses_parallel_size": 2}),
    "ulysses 2 async, a mask of images": ("gemma3", {"ulysses_parallel_size": 2, "async_enabled": True}),
    "context 2": ("mistral3", {"context_parallel_size": 2}),
    "tensor 2, a config without a plan": ("qwen3_vl", {"tensor_parallel_size": 2}),
    "tensor 2, experts": ("qwen3_vl_moe", {"tensor_parallel_size": 2}),
    "tensor 2, remat": ("gemma3", {"tensor_parallel_size": 2, **REMAT}),
    "expert 2": ("qwen3_vl_moe", {"expert_parallel_size": 2, **FSDP}),
    "pipeline 2": ("qwen3_vl_moe", {"pipeline_parallel_size": 2}),
    "pipeline 2, tied, remat": ("qwen2_5_vl", {"pipeline_parallel_size": 2, **REMAT}),
    "pipeline 2, zero bubble": ("qwen3_vl", {"pipeline_parallel_size": 2, "pipeline_schedule": "zero_bubble"}),
}
FOUR: dict[str, tuple[str, dict[str, Any]]] = {
    "zero3 x ulysses 2, remat": ("qwen3_vl", {**FSDP, **REMAT, "ulysses_parallel_size": 2}),
    "context 2 x ulysses 2": ("qwen3_vl", {"context_parallel_size": 2, "ulysses_parallel_size": 2}),
    "zero3 x context 2": ("qwen2_vl", {**FSDP, "context_parallel_size": 2}),
    "zero3 x tensor 2": ("qwen3_vl_moe", {**FSDP, "tensor_parallel_size": 2}),
    "tensor 2 x ulysses 2": ("qwen3_vl_moe", {"tensor_parallel_size": 2, "ulysses_parallel_size": 2}),
    "expert 2 x ulysses 2 x zero3": (
        "qwen3_vl_moe",
        {**FSDP, "expert_parallel_size": 2, "ulysses_parallel_size": 2},
    ),
    "pipeline 2 x ulysses 2 x zero3": ("qwen3_vl", {**FSDP, "pipeline_parallel_size": 2, "ulysses_parallel_size": 2}),
    "pipeline 2 x tensor 2": ("qwen3_vl_moe", {"pipeline_parallel_size": 2, "tensor_parallel_size": 2}),
    "pipeline 2 x zero3": ("llava", {**FSDP, "pipeline_parallel_size": 2}),
    "hybrid shards": (
        "idefics3",
        {**FSDP, "data_parallel_replicate_size": 2, "data_parallel_shard_size": 2},
    ),
}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """The results of one process for each family."""
    folder = tmp_path_factory.mktemp("one")
    families = sorted({family for family, _ in (*TWO.values(), *FOUR.values())})
    configs = {family: config_for(folder, family, 1, TEXT.get(family, {})) for family in families}
    return run_ranks(1, train_all, configs)[0]


def test_two_ranks_equal_one_process(tmp_path, one_process):
    cases = [
        (name, config_for(tmp_path, family, 2, TEXT.get(family, {}), **changes), family, one_process[family])
        for name, (family, changes) in TWO.items()
    ]
    run_ranks(2, compare_all, cases, timeout=600)


def test_four_ranks_equal_one_process(tmp_path, one_process):
    cases = [
        (name, config_for(tmp_path, family, 4, TEXT.get(family, {}), **changes), family, one_process[family])
        for name, (family, changes) in FOUR.items()
    ]
    run_ranks(4, compare_all, cases, timeout=600)
