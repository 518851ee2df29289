"""Activations that leave the device: gradients the same bit for bit, each storage once, no more kept than allowed."""

import logging
import re

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tests.harness import run_ranks
from tests.model.zoo import EXPERTS, tiny
from tests.parallel.layouts import assert_same
from tests.train.runs import records, run, tiny_config
from tutti.core.batch import Sample, pack
from tutti.model.attention import resolve_attention
from tutti.model.experts import resolve_experts
from tutti.model.plan import blocks
from tutti.parallel.offload import offload_activations
from tutti.parallel.remat import apply_remat
from tutti.train.task import Objective


def make_model(family="qwen3", *, device="cpu", **overrides):
    """A tiny model of three blocks; large enough for its activations to be worth moving."""
    config = tiny(family, num_hidden_layers=3, hidden_size=64, **overrides)
    kernels = {"attn_implementation": resolve_attention("sdpa", torch.device("cpu"))}
    if family in EXPERTS:
        kernels["experts_implementation"] = resolve_experts(None)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, **kernels).to(device).train()


def block_modules(model):
    return [module for _, module in blocks(model)]


def make_batch(*lengths):
    generator = np.random.default_rng(0)
    rows = [generator.integers(1, 200, length).astype(np.int32) for length in lengths]
    return pack([Sample(row, row, 0) for row in rows])


def gradients(model, batch):
    out = Objective(model)(batch)
    out.loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return {"loss": out.loss.detach(), **found}


def assert_equal(got, want):
    different = [name for name in want if not torch.equal(got[name], want[name])]
    assert not different


KINDS = {"kept": None, "reentrant remat": True, "remat": False}


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize("reentrant", KINDS.values(), ids=KINDS)
def test_offloaded_activations_are_bit_equal_and_counted(family, reentrant):
    batch = make_batch(100, 57, 200)

    def make():
        model = make_model(family)
        if reentrant is not None:
            apply_remat(block_modules(model), reentrant=reentrant)
        return model

    want = gradients(make(), batch)
    totals = set()
    for limit in (0.0, 1e-3, 1.0):
        model = make()
        offloader = offload_activations(block_modules(model), "cpu", limit)
        for _ in range(2):
            assert_equal(gradients(model, batch), want)
        totals.add(offloader.kept_bytes + offloader.moved_bytes)
        (total,) = totals
        assert offloader.kept_bytes <= limit * 1e9
        assert (offloader.moved_bytes > 0) == (total > limit * 1e9)
    inputs = 3 * 357 * 64 * 4
    assert total == inputs if reentrant is not None else total > 5 * inputs


class Toy(nn.Module):
    """A block that runs `function(x [64, 64], weight)`."""

    def __init__(self, function):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64))
        self.function = function

    def forward(self, hidden, shared=None):
        return self.function(hidden, self.weight)


def toys(*functions, limit=0.0):
    torch.manual_seed(0)
    made = [Toy(function) for function in functions]
    return made, offload_activations(made, "cpu", limit)


STORAGE = 64 * 64 * 4


@pytest.mark.parametrize(
    ("function", "storages"),
    [
        (lambda x, w: x @ w, 1),  # and w, which stays
        (lambda x, w: (x * x.t()) * (x[1:] * x[:-1]).sum(), 2),  # views of x are x
        (lambda x, w: x.exp().mul(x) + w, 2),  # an output, and an input twice
        (lambda x, w: x[:8] @ w + (x[0] * 2).exp(), 1),  # the row's exponential is small
        (lambda x, w: x + w, 0),
    ],
)
def test_each_storage_moves_once(function, storages):
    (block,), offloader = toys(function)
    x = torch.randn(64, 64, requires_grad=True)
    got = torch.autograd.grad(block(x).sum(), (x, block.weight), allow_unused=True)
    assert offloader.moved_bytes == storages * STORAGE
    want = torch.autograd.grad(function(x, block.weight).sum(), (x, block.weight), allow_unused=True)
    for ours, theirs in zip(got, want, strict=True):
        assert ours is theirs is None or torch.equal(ours, theirs)


def test_a_compiled_block_is_offloaded():
    (block,), offloader = toys(lambda x, w: (x @ w).sin().cos())
    x = torch.randn(64, 64)
    want = torch.autograd.grad(block(x).sum(), block.weight)[0]
    plain = offloader.moved_bytes
    block = Toy(block.function)
    block.load_state_dict({"weight": toys(block.function)[0][0].weight})
    block.forward = torch.compile(block.forward, backend="aot_eager")
    offloader = offload_activations([block], "cpu", 0.0)
    assert torch.equal(torch.autograd.grad(block(x).sum(), block.weight)[0], want)
    assert 0 < offloader.moved_bytes <= plain


def test_a_graph_can_be_run_twice_and_micro_batches_can_overlap():
    made, offloader = toys(*[lambda x, w: (x @ w).tanh()] * 3, limit=2 * STORAGE / 1e9)
    inputs = [torch.randn(64, 64) for _ in range(2)]

    def run_all(x):
        for block in made:
            x = block(x)
        return x.sum()

    weights = [block.weight for block in made]
    want = [torch.autograd.grad(run_all(x), weights) for x in inputs]
    first, second = map(run_all, inputs)
    assert offloader.kept_bytes == 2 * STORAGE
    for number, total in ((0, first), (1, second), (0, first)):
        for ours, theirs in zip(torch.autograd.grad(total, weights, retain_graph=True), want[number], strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("limit", [0.0, 1.0])
def test_a_write_into_what_was_saved_is_found(limit):
    (first, second), _ = toys(lambda x, w: (x @ w).exp(), lambda x, w: x.mul_(2), limit=limit)
    with pytest.raises(RuntimeError, match="changed in place"):
        second(first(torch.randn(64, 64))).sum().backward()


def test_nothing_moves_in_evaluation():
    (block,), offloader = toys(lambda x, w: x @ w)
    with torch.no_grad():
        block(torch.randn(64, 64))
    block.eval()
    block(torch.randn(64, 64)).sum().backward()
    assert offloader.moved_bytes == offloader.kept_bytes == 0


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    return run(tiny_config(tmp_path_factory.mktemp("one")))


ACTIVATIONS = {"enable_activation_offload": True}
FSDP2 = {"data_parallel_mode": "fsdp2"}
LAYOUTS = {
    "zero3, limit, remat": (
        FSDP2 | {"activation_gpu_limit": 4e-5, "enable_gradient_checkpointing": True, "enable_reentrant": False},
        {},
    ),
    "zero3, units in blocks": (FSDP2, {"model.basic_modules": ["Qwen3MLP"]}),
    "tensor": ({"tensor_parallel_size": 2}, {}),
}


@pytest.mark.parametrize(("train", "others"), LAYOUTS.values(), ids=LAYOUTS)
def test_offloaded_activations_on_layouts(tmp_path, one_process, train, others):
    changes = {f"train.{name}": value for name, value in (train | ACTIVATIONS).items()} | others
    config = tiny_config(tmp_path, world=2, **changes)
    lines = run_ranks(2, train_and_listen, config)[0]
    assert_same(records(config), one_process)
    (line,) = lines
    moved, kept = map(float, re.findall(r"(\S+) GB", line))
    limit = train.get("activation_gpu_limit", 0)
    assert moved > 0 and kept <= limit and (kept > 0) == (limit > 0)


def train_and_listen(config):
    from tutti.parallel import offload
    from tutti.train.run import train

    lines = []
    offload.log.addFilter(lambda record: lines.append(record.getMessage()) or True)
    logging.getLogger("tutti").setLevel(logging.INFO)
    logging.disable(logging.NOTSET)
    train(config)
    return lines


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_device_memory_is_given_back_and_copies_are_right():
    batch = make_batch(900, 700, 400).to(torch.device("cuda"))
    want, peaks = None, []
    for limit in (None, 0.0, 1e-3):
        model = make_model(device="cuda")
        if limit is not None:
            offload_activations(block_modules(model), "cuda", limit)
        gradients(model, batch)
        torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            got = gradients(model, batch)
        peaks.append(torch.cuda.max_memory_allocated())
        want = want or got
        assert_equal(got, want)
    assert peaks[1] < peaks[0] and peaks[1] <= peaks[2]
