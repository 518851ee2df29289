"""Fused norms, gated activations and rotary embeddings in parallel layouts: equal to the plain run of one process."""

from __future__ import annotations

import pytest
from torch.distributed.tensor import DTensor

from tests.harness import regroup, run_ranks
from tests.parallel.layouts import assert_same, family_config, train_family
from tests.train.runs import records, train_quietly
from tutti.model import fused
from tutti.model.fuse_modules import fuse_modules
from tutti.train import placement

LAYOUTS = {
    "fsdp2": {"data_parallel_mode": "fsdp2", "enable_gradient_checkpointing": True},
    "tensor": {"tensor_parallel_size": 2},
    "context": {"context_parallel_size": 2},
    "pipeline": {"pipeline_parallel_size": 2},
    "adapters": {"architecture": "lora", "lora_rank": 4},
}


def train_fused(configs) -> list[int]:
    """Train by the operators that stand for the kernels, on the CPU; the number of their calls in each run."""
    calls = []

    def fits(*tensors) -> bool:
        calls[-1] += 1
        return not any(isinstance(item, DTensor) for item in tensors)

    fused.fits = fits
    placement.fuse_modules = lambda model, device, dtype: fuse_modules(model, None, dtype)
    for config in configs:
        regroup()
        calls.append(0)
        train_quietly(config)
    return calls


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_layouts_equal_one_plain_process(tmp_path, family):
    layouts = LAYOUTS if family == "qwen3" else {"fsdp2": LAYOUTS["fsdp2"]}
    configs = [family_config(tmp_path / name, family, world=2, **changes) for name, changes in layouts.items()]
    calls = run_ranks(2, train_fused, configs)
    assert all(number > 0 for on_rank in calls for number in on_rank)
    plain = train_family(tmp_path / "plain", family)
    for name, config in zip(layouts, configs, strict=True):
        adapted = train_family(tmp_path / "adapted", family, **LAYOUTS[name]) if name == "adapters" else plain
        assert_same(records(config), adapted)
