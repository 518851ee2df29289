"""Layers with a recurrent state, in packed rows: each sample gives the same results as alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tests.model.zoo import FAMILIES, HYBRIDS, tiny
from tests.sweep import tiny_config
from tutti.attention.interface import resolve_attention
from tutti.config import ConfigError
from tutti.config.layout import Layout
from tutti.core.batch import Batch, Sample, pack
from tutti.core.modules import wrap_forward
from tutti.model.build import check_packable
from tutti.model.mixers import _group, check_mixers, separate_mixers, uncalled
from tutti.model.structure import blocks, read_structure
from tutti.parallel.activation_checkpoint import checkpoint_activations
from tutti.train.objective import Objective

CPU = torch.device("cpu")
ONE = Layout(*[1] * len(fields(Layout)))


def built(family: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny(family, **changes), attn_implementation=resolve_attention("sdpa", CPU))


def on_meta(family: str) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny(family))


def packed(*lengths: int, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    rows = [rng.integers(3, 250, length).astype(np.int32) for length in lengths]
    return pack([Sample(ids, np.append(ids[1:], -100).astype(np.int32)) for ids in rows])


def separated(model: Any, wrap: Callable[[Any], None] = lambda model: None) -> Objective:
    objective = Objective(model)
    separate_mixers(objective.structure)
    wrap(model)
    return objective.train()


def gradients(objective: Objective, batches: list[Batch]) -> tuple[float, dict[str, torch.Tensor]]:
    """The summed loss of batches, all of them run before the first goes backward, and the gradients."""
    objective.zero_grad()
    losses = [objective(batch)["loss"] for batch in batches]
    for loss in losses:
        loss.backward()
    return sum(loss.item() for loss in losses), {name: item.grad for name, item in objective.named_parameters()}


def assert_alike(got: tuple[float, dict[str, torch.Tensor]], want: tuple[float, dict[str, torch.Tensor]]) -> None:
    assert got[0] == pytest.approx(want[0], rel=1e-5)
    for name, grad in want[1].items():
        if grad is not None:
            torch.testing.assert_close(got[1][name], grad, rtol=1e-4, atol=1e-4 * float(grad.abs().max()), msg=name)


@pytest.mark.parametrize("reentrant", [True, False])
def test_blocks_that_run_again_see_the_borders_of_their_own_batch(reentrant: bool) -> None:
    """Also if another batch ran in between, and if a class does not pass sample boundaries to its blocks (Mamba)."""
    batches = [packed(3, 20, 1, 9), packed(18, 2, 13, seed=1)]
    for family in ("mamba", "lfm2"):
        want = gradients(separated(built(family)), batches)

        def wrap(model: Any) -> None:
            checkpoint_activations([block for _, block in blocks(model)], reentrant=reentrant)

        assert_alike(gradients(separated(built(family), wrap), batches), want)


def test_compiled_blocks_give_the_same() -> None:
    def wrap(model: Any) -> None:
        for _, block in blocks(model):
            wrap_forward(block, "compile", partial(torch.compile, dynamic=True, backend="eager"))

    batches = [packed(3, 20, 1, 9), packed(18, 2, 13, seed=1)]
    assert_alike(gradients(separated(built("lfm2"), wrap), batches), gradients(separated(built("lfm2")), batches))


def test_a_row_is_what_its_samples_are() -> None:
    row, lengths = packed(5, 1, 70, 30, 2), (5, 1, 70, 30, 2)
    for family in HYBRIDS:
        objective = separated(built(family))
        alone = [
            packed_one(row, begin, length) for begin, length in zip(np.cumsum((0, *lengths)), lengths, strict=False)
        ]
        assert_alike(gradients(objective, [row]), gradients(objective, alone))


def packed_one(row: Batch, begin: int, length: int) -> Batch:
    ids, labels = (each[begin : begin + length].numpy().astype(np.int32) for each in (row.input_ids, row.labels))
    return pack([Sample(ids, labels)])


def test_samples_of_about_one_length_run_together() -> None:
    groups = _group((100, 7, 95, 40, 1), CPU)
    assert groups.shapes == ((2, 100), (3, 40))
    row = torch.arange(243.0).view(1, 243, 1) + 1
    parts = groups.cut(row)
    assert [tuple(part.shape[:2]) for part in parts] == [*groups.shapes]
    assert parts[0][1, 95:].eq(0).all() and torch.equal(parts[0][1, :95], row[0, 107:202])
    assert torch.equal(groups.join(parts), row)
    assert groups.join([part[:, :1] for part in parts]) is None, "a state is not of the row"


def test_short_samples_are_computed_in_short_chunks() -> None:
    model = built("granite4", mamba_chunk_size=256)
    objective, seen = separated(model), []
    mixer: Any = objective.structure.mixers[0]
    mixer.get_submodule("in_proj").register_forward_pre_hook(lambda module, args: seen.append(mixer.chunk_size))
    got = gradients(objective, [packed(300, 40, 2, 3)])
    assert seen == [256, 64] and mixer.chunk_size == 256
    assert_alike(got, gradients(separated(built("granite4", mamba_chunk_size=16)), [packed(300, 40, 2, 3)]))


def test_a_mixer_is_called_once_for_each_group() -> None:
    model = built("lfm2")
    seen: list[tuple[int, ...]] = []
    mixer = read_structure(model).mixers[0]
    mixer.get_submodule("in_proj").register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape[:2])))
    objective = separated(model)
    seen.clear()
    objective(packed(50, 48, 120, 3))
    assert seen == [(1, 120), (2, 50), (1, 3)]
    seen.clear()
    model.set_attn_implementation("sdpa")
    model.model(input_ids=torch.arange(9)[None], use_cache=False)
    assert seen == [(1, 9)], "without borders"


@pytest.mark.parametrize("family", HYBRIDS)
def test_mixers_are_found_in_the_classes(family: str) -> None:
    model = on_meta(family)
    structure = read_structure(model)
    kinds = getattr(model.config, "layer_types", ["linear_attention"] * 2)
    assert len(structure.mixers) == sum(kind != "full_attention" for kind in kinds)
    check_packable(model)
    with pytest.raises(ConfigError, match=r"ulysses_parallel_size: .* carry a state .*\n.*context_parallel_size"):
        check_mixers(structure, replace(ONE, ulysses=2, context=2))
    check_mixers(structure, replace(ONE, tensor=2, pipeline=2))


def test_attention_that_is_written_for_one_sample_is_one() -> None:
    """Not all of its layers need an indexer of their own (GLM-5)."""
    with torch.device("meta"):
        models = {name: AutoModelForCausalLM.from_config(tiny_config(name)) for name in ("deepseek_v32", "glm_moe_dsa")}
    structures = {name: read_structure(model) for name, model in models.items()}
    for name, structure in structures.items():
        attention = [block.get_submodule("self_attn") for _, block in structure.blocks]
        assert list(structure.mixers) == attention
        check_packable(models[name])
        with pytest.raises(ConfigError, match=r"ulysses_parallel_size: .* attend to a whole sample"):
            check_mixers(structure, replace(ONE, ulysses=2))
    check_mixers(structures["deepseek_v32"], replace(ONE, pipeline=2))
    with pytest.raises(ConfigError, match=r"pipeline_parallel_size: .* a layer before them has chosen"):
        check_mixers(structures["glm_moe_dsa"], replace(ONE, pipeline=2))


def test_chosen_keys_of_samples_of_any_length_make_a_row() -> None:
    groups = _group((100, 2), CPU)
    row = groups.join([torch.arange(300).view(1, 100, 3), torch.tensor([[[0, 1], [1, 0]]])])
    assert row.shape == (1, 102, 3)
    assert row[0, 100:].tolist() == [[0, 1, 0], [1, 0, 1]], "the first once more, which chooses no other"


def test_weights_that_are_read_without_a_call_are_found() -> None:
    names = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(tiny_config("jamba"))
        mixer = next(iter(read_structure(model).mixers))
        names.append([name for name, part in mixer.named_modules() if part in uncalled(mixer, 32)])
    assert names == [["dt_proj"]] * 2


def test_models_of_attention_alone_have_none() -> None:
    for family in FAMILIES:
        assert not read_structure(on_meta(family)).mixers


def test_attention_inside_and_around_is_left_alone() -> None:
    objective = separated(built("qwen3_next"))
    worn = {name for name, part in objective.named_modules() if "_tutti_attached" in part.__dict__}
    assert worn == {"model.model.layers.0", "model.model.layers.0.linear_attn", "model.model.layers.1"}
    assert isinstance(copy.deepcopy(objective.model), nn.Module)
