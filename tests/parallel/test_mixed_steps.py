"""Steps in which only some ranks have media: no rank waits for a gradient that another one does not have.

For some steps only the second rank has images, then none, then all, then only the first. Losses and
gradient norms equal one process, every parameter has a gradient on every rank in every step, and towers run where there
are images and nowhere else.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.data.processors import PROCESSORS
from tests.harness import run_ranks
from tests.model.test_media import fitted_config, make_rows
from tests.train.runs import QUICKSTART, tiny_config
from tutti.config.layout import fit
from tutti.config.load import from_dict
from tutti.core.batch import Batch, GlobalBatch, pack
from tutti.core.dist import init_world
from tutti.core.tensors import local_part
from tutti.data.encode import make_encoder
from tutti.data.formats import Row
from tutti.model.build import build_model
from tutti.model.structure import read_structure
from tutti.parallel.mesh import build_mesh
from tutti.train.placement import load_parameters, make_executor, place_model
from tutti.train.step import Totals, TrainStep
from tutti.train.tasks.language import LanguageModelling

CPU = torch.device("cpu")
STEPS = 200 if os.environ.get("SOAK") else 16
STRETCHES = ((0, 1), (0, 0), (1, 1), (1, 0))
"""Images in the first and in the second micro batch, of which two ranks have one each."""
FAMILIES = {"llava_next": "llava_next", "qwen3_vl_moe": "qwen3_vl"}
"""Families, and whose processor each has. LLaVA-NeXT's outer decoder has a parameter of its own, image_newline."""
FSDP2 = {"data_parallel_mode": "fsdp2"}
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddp": ("llava_next", {"data_parallel_mode": "ddp"}),
    "fsdp1": ("llava_next", {"data_parallel_mode": "fsdp1"}),
    "fsdp2": ("llava_next", FSDP2),
    "ulysses 2": ("qwen3_vl_moe", {"ulysses_parallel_size": 2}),
    "expert 2": ("qwen3_vl_moe", {**FSDP2, "expert_parallel_size": 2}),
}


class Result(NamedTuple):
    """The mean loss and the gradient norm of each step."""

    losses: list[float]
    norms: list[float]


def batches_of(family: str) -> dict[int, list[Batch]]:
    """Micro batches without images, and with some, several of either kind."""
    processor = PROCESSORS[FAMILIES[family]]()
    config = from_dict({"data": {"train_path": "x", "data_type": "conversation", "max_seq_len": 512}})
    encoder = make_encoder(config, processor.tokenizer, vocab_size=4096, processor=processor)
    found: dict[int, list[Batch]] = {}
    for kind, counts in ((0, (0, 0, 0)), (1, (1, 0, 2))):
        rows = [Row(row, str(QUICKSTART / "rows.jsonl"), 1) for row in make_rows(counts * 5)]
        samples: list[Any] = [one[0] for one in encoder(rows)]
        parts = [samples[place : place + 3] for place in range(0, 15, 3)]
        found[kind] = [
            replace(batch := pack(part), extras=encoder.extras(part, len(batch.input_ids))) for part in parts
        ]
    return found


def train(config: Any, family: str) -> Result:
    """Steps on all ranks of the group together, as `config` says."""
    ranks, made = init_world(CPU), batches_of(family)
    layout = fit(config, ranks.size)
    mesh = build_mesh(layout, ranks, ddp=config.train.data_parallel_mode == "ddp")
    model = build_model(config, device=CPU)
    placed = place_model(config, model, read_structure(model), LanguageModelling(), layout, mesh)
    load_parameters(config, placed, mesh, ranks)
    executor = make_executor(config.train, placed, mesh, CPU)
    runs: list[int] = []
    for tower in placed.structure.towers:
        tower.register_forward_hook(lambda *_: runs.append(1))
    trained = [(name, one) for name, one in placed.objective.named_parameters() if one.requires_grad]
    optimizer = torch.optim.SGD([parameter for _, parameter in trained], lr=0.02)

    def require_gradients(*_: Any) -> None:
        lacking = [name for name, one in trained if one.grad is None and local_part(one).numel()]
        assert not lacking, f"no gradient on rank {ranks.rank}: {lacking}"

    optimizer.register_step_pre_hook(require_gradients)
    step_of = TrainStep(placed.objective, optimizer, executor, mesh, max_grad_norm=1.0)
    result = Result([], [])
    for step in range(STEPS):
        kinds = STRETCHES[step * len(STRETCHES) // STEPS]
        micro = [made[kind][(step + 2 * place) % 5] for place, kind in enumerate(kinds)]
        count = sum(len(batch.target_index) for batch in micro)
        own = tuple(micro[mesh.dp_rank :: mesh.dp_size])
        totals = Totals.zero(placed.objective.sizes, CPU)
        runs.clear()
        step_of.step(
            GlobalBatch(own, count, count, count, 6, count, {}, {}, (), step=step + 1, epoch=0, epoch_end=False), totals
        )
        reduced = totals.reduce(ranks)
        result.losses.append(reduced.sums["loss"] / count)
        result.norms.append(reduced.grad_norm)
        assert bool(runs) == any("pixel_values" in batch.extras for batch in own), "towers run where images are"
    return result


def config_for(folder: Path, family: str, world: int, **train: Any) -> Any:
    path = folder / family
    fitted_config(family, PROCESSORS[FAMILIES[family]]()).save_pretrained(path)
    values = {f"train.{name}": value for name, value in train.items()}
    return tiny_config(folder, world=world, **{"model.config_path": str(path)}, **values)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Result]:
    """The results of one process for a family."""
    folder = tmp_path_factory.mktemp("one")
    return cache(lambda family: run_ranks(1, train, config_for(folder, family, 1), family, timeout=600)[0])


@pytest.mark.parametrize("name", LAYOUTS)
def test_mixed_steps_equal_one_process(tmp_path: Path, alone: Callable[[str], Result], name: str) -> None:
    family, layout = LAYOUTS[name]
    want = alone(family)
    for got in run_ranks(2, train, config_for(tmp_path, family, 2, **layout), family, timeout=1200):
        assert got.losses == pytest.approx(want.losses, rel=1e-5)
        assert got.norms == pytest.approx(want.norms, rel=1e-4)
    assert want.losses[-1] != want.losses[0] and min(want.norms) > 0
