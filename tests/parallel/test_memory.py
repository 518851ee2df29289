"""FSDP1 mode and offloaded shards: both change where tensors are and when they move, but no values."""

import logging

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tests.harness import run_ranks
from tests.parallel.layouts import assert_same
from tests.train.runs import records, run, tiny_config, train_quietly
from tutti.parallel.fsdp import NoSync


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    return run(tiny_config(tmp_path_factory.mktemp("one")))


def config_for(folder, *, world=2, **train):
    return tiny_config(folder, world=world, **{f"train.{name}": value for name, value in train.items()})


FSDP1 = {"data_parallel_mode": "fsdp1"}
FSDP2 = {"data_parallel_mode": "fsdp2"}
ZERO2 = {"enable_full_shard": False}
OFFLOAD = {"enable_fsdp_offload": True}

# Name: (arguments, reductions of each unit in the two micro batches of a step, frees parameters after forward)
MODES = {
    "fsdp1 zero3": (FSDP1, 1, True),
    "fsdp1 zero2": (FSDP1 | ZERO2, 1, False),
    "fsdp2 zero3": (FSDP2, 2, True),
    "fsdp1 zero3 offloaded": (FSDP1 | OFFLOAD, 2, True),
    "fsdp2 zero2 offloaded": (FSDP2 | ZERO2 | OFFLOAD, 2, False),
}


def train_and_look(config):
    """Train, and report what the data-parallel engine did: its policy, reductions per unit and step, and its log."""
    from torch.distributed.fsdp import CPUOffloadPolicy
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as engine

    from tutti.parallel import fsdp
    from tutti.train import placement

    seen = {"reductions": 0, "lines": []}
    reduce, parallelize = engine.foreach_reduce, placement.parallelize

    def counted(*args, **kwargs):
        seen["reductions"] += 1
        return reduce(*args, **kwargs)

    def looked(root, *args, **kwargs):
        parallelize(root, *args, **kwargs)
        groups = [group for module in fsdp.fsdp_modules(root) for group in module._get_fsdp_state()._fsdp_param_groups]
        seen["units"] = len(groups)
        seen["offloads"] = {isinstance(group.offload_policy, CPUOffloadPolicy) for group in groups}
        seen["frees"] = [group._reshard_after_forward for group in groups[1:]]

    engine.foreach_reduce, placement.parallelize = counted, looked
    fsdp.log.addFilter(lambda record: seen["lines"].append(record.getMessage()) or True)
    logging.getLogger("tutti").setLevel(logging.INFO)
    train_quietly_with_log(config)
    return seen


def train_quietly_with_log(config):
    from tutti.train.run import train

    logging.disable(logging.NOTSET)
    train(config)


@pytest.mark.parametrize(("train", "reductions", "frees"), MODES.values(), ids=MODES)
def test_modes_train_as_one_process_does(tmp_path, one_process, train, reductions, frees):
    config = config_for(tmp_path, **train)
    looked = run_ranks(2, train_and_look, config)
    assert_same(records(config), one_process)
    for seen in looked:
        assert seen["reductions"] == reductions * seen["units"] * len(one_process)
        assert seen["offloads"] == {"enable_fsdp_offload" in train}
        # The last block stays gathered: its backward pass comes at once.
        assert seen["frees"] == [frees] * (seen["units"] - 2) + [False]
    said = "\n".join(looked[0]["lines"])
    assert ("fsdp1 runs on the engine of fsdp2" in said) == (train["data_parallel_mode"] == "fsdp1")
    assert ("memory is the host's" in said) == ("enable_fsdp_offload" in train)


def test_what_they_save_is_resumed_and_exported(tmp_path, one_process):
    train = FSDP1 | OFFLOAD
    half = config_for(tmp_path / "half", save_steps=2, **train)
    run_ranks(2, stop_after, half, 2)
    assert_same(records(half), one_process[:2])
    resumed = config_for(tmp_path / "half", load_checkpoint_path="auto", save_hf_weights=True, **train)
    assert_same(run(resumed, 2), one_process)
    AutoModelForCausalLM.from_pretrained(tmp_path / "half" / "out" / "hf" / "final")


def stop_after(config, step):
    from tutti.train.stop import StopSignal

    calls = []
    StopSignal.requested = lambda self: calls.append(None) or len(calls) == step
    train_quietly(config)


def test_a_rank_that_is_alone_keeps_the_place_of_its_gradients_from_step_to_step():
    layer, unused = nn.Linear(3, 2), nn.Linear(3, 2)
    sync = NoSync(nn.ModuleList([layer, unused]))
    places = []
    for _ in range(2):
        batches = torch.randn(3, 5, 3)
        for number, batch in enumerate(batches):
            sync.before(last=number == 2)
            layer(batch).square().sum().backward()
        places.append(layer.weight.grad.data_ptr())
        (expected,) = torch.autograd.grad(layer(batches).square().sum(), layer.weight)
        torch.testing.assert_close(layer.weight.grad, expected)
        assert unused.weight.grad is None
        layer.zero_grad(set_to_none=True)
    assert places[0] == places[1]
