"""Every layout trains like one process: equal losses, gradient norms, and parameters after five steps.

The layouts are in the table of `tests.parallel.grid`; the first tests here check that the table is complete. Layouts
with equal numbers of ranks run one after the other on the same ranks, when the first of them is needed.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from safetensors.torch import load_file

from tests.parallel.grid import KINDS, LAYOUTS, NUM_STEPS, Layout, config_of, write_data
from tests.parallel.layouts import assert_same, try_all
from tests.train.runs import records
from tutti.config import Config, TrainConfig, get
from tutti.config.layout import fit
from tutti.config.rules import NOT_TOGETHER
from tutti.parallel.mesh import AXES

ALL_AXES = (*AXES, "expert")
TOLERANCES = {"float32": {"loss": 1e-5, "norm": 1e-4}, "bfloat16": {"loss": 2e-2, "norm": 2e-2}}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


@pytest.fixture(scope="module")
def configs(tmp_path_factory, data):
    """The configuration of every layout, and of its kind on one process."""
    made = {name: config_of(tmp_path_factory.mktemp("layout"), data, layout) for name, layout in LAYOUTS.items()}
    for kind in {layout.kind for layout in LAYOUTS.values()}:
        made[kind, "alone"] = config_of(tmp_path_factory.mktemp("alone"), data, Layout(kind, 1, {}))
    return made


def used(config: Config, world: int) -> set[str]:
    """The axes of more than one rank."""
    layout = fit(config, world)
    return {axis for axis in ALL_AXES if getattr(layout, axis) > 1}


def test_every_axis_pair_and_choice_is_in_the_table(configs):
    axes = {name: frozenset(used(configs[name], layout.world)) for name, layout in LAYOUTS.items()}
    refused = {frozenset(_axis(name) for name in pair) for pair in NOT_TOGETHER}
    # Experts are divided among ranks of other axes, so they need one: replicas or stages are not enough.
    alone = {frozenset({axis}) for axis in AXES} | {frozenset({"expert", "shard"})}
    assert alone - set(axes.values()) == set()
    pairs = {frozenset(pair) for pair in itertools.combinations(ALL_AXES, 2)} - refused
    assert {pair for pair in pairs if not any(pair <= one for one in axes.values())} == set()
    triples = [
        {"tensor", "pipeline", "shard"},
        {"shard", "ulysses", "context"},
        {"shard", "expert", "ulysses"},
        {"replicate", "shard", "expert"},
    ]
    assert [triple for triple in triples if triple not in axes.values()] == []
    hints = get_type_hints(TrainConfig)
    for choice in ("data_parallel_mode", "pipeline_schedule", "compute_dtype", "architecture"):
        every = set(get_args(hints[choice])) - {"auto"}  # which is one of the others by the time it is used
        assert {getattr(configs[name].train, choice) for name in LAYOUTS} == every, choice
    assert {layout.world for layout in LAYOUTS.values()} == {1, 2, 4, 8}


def _axis(argument: str) -> str:
    leaf = argument.rpartition(".")[2]
    return leaf.removeprefix("data_parallel_").removesuffix("_size").removesuffix("_parallel")


@pytest.fixture(scope="module")
def trained(configs):
    """A configuration after its run, by its name in `configs`."""
    done: dict[Any, str | None] = {}

    def get_trained(name: Any) -> Config:
        if name not in done:
            world = LAYOUTS[name].world if name in LAYOUTS else 1
            together = [other for other in configs if (LAYOUTS[other].world if other in LAYOUTS else 1) == world]
            done.update(zip(together, try_all([configs[other] for other in together], world), strict=True))
        if done[name] is not None:
            pytest.fail(f"{name}: {done[name]}")
        return configs[name]

    return get_trained


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_equals_one_process(trained, name):
    got, want = trained(name), trained((LAYOUTS[name].kind, "alone"))
    ours, theirs = records(got), records(want)
    assert [line["step"] for line in theirs] == list(range(1, NUM_STEPS + 1))
    kind = LAYOUTS[name].kind
    assert ("router_loss" in theirs[0]) == ("output_router_logits" in KINDS[kind].model)
    assert ("source_loss/short" in theirs[0]) == (kind == "sources")
    tolerance = TOLERANCES[get(want, "train.compute_dtype")]
    assert_same(ours, theirs, **tolerance)
    for line, other in zip(ours, theirs, strict=True):
        for key in {"expert_load_max", "expert_load_min"} & other.keys():
            assert line[key] == pytest.approx(other[key], rel=tolerance["norm"], abs=tolerance["norm"]), key
    weights, others = parameters(got), parameters(want)
    assert weights.keys() == others.keys()
    for key, other in others.items():
        error, size = (weights[key] - other).norm().item(), other.norm().item()
        assert error <= tolerance["norm"] * size + 1e-6 * other.numel() ** 0.5, f"{key} is off by {error} of {size}"


def parameters(config: Config) -> dict[str, torch.Tensor]:
    """The tensors that the run exported."""
    (path,) = (Path(config.train.output_dir or "") / "hf" / "final").glob("*model.safetensors")
    return load_file(path)
