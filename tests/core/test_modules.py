"""Wrappers of a module's forward have a fixed order and can be listed; extras are attached to a single module."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tutti.core.modules import Forward, attach, attached, describe_wrappers, unwrap_forward, wrap_forward


def adding(number: float) -> object:
    def wrapper(forward: Forward) -> Forward:
        return lambda hidden: forward(hidden) + number

    return wrapper


def test_wrappers_run_from_the_outside_in_and_in_one_order():
    layer = nn.Identity()
    wrap_forward(layer, "shard", adding(1))
    wrap_forward(layer, "checkpoint", lambda forward: lambda hidden: 10 * forward(hidden))
    assert layer(torch.zeros(())) == 10
    assert attached(layer).wrappers == ("shard", "checkpoint")
    for name in ("compile", "checkpoint", "adapter"):
        with pytest.raises(AssertionError, match=f"{name} around shard, checkpoint"):
            wrap_forward(layer, name, adding(0))
    with pytest.raises(ValueError):
        wrap_forward(layer, "unheard of", adding(0))
    unwrap_forward(layer)
    assert layer(torch.zeros(())) == 0 and attached(layer).wrappers == ()


def test_a_blocks_wrappers_are_listed_by_stack():
    block = nn.ModuleDict({"norm": nn.Identity(), "up": nn.Identity(), "down": nn.Identity()})
    assert describe_wrappers(block) == ""
    for name in ("up", "down"):
        wrap_forward(block[name], "adapter", adding(0))
        wrap_forward(block[name], "shard", adding(0))
    wrap_forward(block, "offload", adding(0))
    assert describe_wrappers(block) == "offload; up, down: shard > adapter"


def test_extras_are_a_modules_own_and_go_with_its_copies():
    layers = [nn.Identity(), nn.Identity()]
    attach(layers[0], adapters={"weight": "it"})
    assert attached(layers[1]).adapters == {}
    copied = copy.deepcopy(layers[0])
    attach(layers[0], adapters={}, early_values="it")
    assert attached(copied).adapters == {"weight": "it"} and attached(copied).early_values is None
    assert attached(layers[0]).adapters == {} and attached(layers[0]).early_values == "it"
    with pytest.raises(TypeError, match="unheard_of"):
        attach(layers[0], unheard_of=1)
