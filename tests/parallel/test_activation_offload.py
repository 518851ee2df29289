"""Offloaded activations: bit-equal gradients, each storage moved once, and no more kept than allowed."""

import gc
import logging
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight
from transformers import AutoModelForCausalLM

from tests.harness import regroup, run_ranks
from tests.model.zoo import EXPERTS, tiny
from tests.parallel.layouts import assert_same, family_config, train_all
from tests.train.runs import records
from tutti.attention.interface import resolve_attention
from tutti.core.batch import Sample, pack
from tutti.model.experts import resolve_experts
from tutti.model.structure import blocks
from tutti.parallel.activation_checkpoint import checkpoint_activations
from tutti.parallel.activation_offload import Offloader, _Stored, offload_activations
from tutti.train.objective import Objective


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


def gradients(objective, batch):
    model = objective.model
    out = objective(batch)
    out["loss"].backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return {"loss": out["loss"].detach(), **found}


def assert_equal(got, want):
    different = [name for name in want if not torch.equal(got[name], want[name])]
    assert not different


KINDS = {"kept": None, "reentrant remat": True, "remat": False}


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize("reentrant", KINDS.values(), ids=KINDS)
def test_offloaded_activations_are_bit_equal_and_counted(family, reentrant):
    batch = make_batch(100, 57, 200)

    def make():
        objective = Objective(make_model(family))
        if reentrant is not None:
            checkpoint_activations(block_modules(objective.model), reentrant=reentrant)
        return objective

    want = gradients(make(), batch)
    totals = set()
    for limit in (0.0, 1e-3, 1.0):
        objective = make()
        offloader = offload_activations(objective, block_modules(objective.model), "cpu", limit)
        moved = 0
        for _ in range(2):
            kept = []
            objective.register_forward_hook(lambda *_, o=offloader, k=kept: k.append((o.kept_bytes, o.moved_bytes)))
            assert_equal(gradients(objective, batch), want)
            assert offloader.kept_bytes == 0
            totals.add(kept[0][0] + kept[0][1] - moved)
            moved = kept[0][1]
        (total,) = totals
        assert kept[0][0] <= limit * 1e9
        assert (moved > 0) == (total > limit * 1e9)
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


def toys(*functions, limit=0.0, **options):
    """Blocks that run one after the other, and what moves their activations."""
    torch.manual_seed(0)
    made = nn.Sequential(*[Toy(function) for function in functions])
    for block in made if options else ():
        block.forward = torch.compile(block.forward, **options)
    return made, offload_activations(made, list(made), "cpu", limit)


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
    made, offloader = toys(function)
    x = torch.randn(64, 64, requires_grad=True)
    got = torch.autograd.grad(made(x).sum(), (x, made[0].weight), allow_unused=True)
    assert offloader.moved_bytes == storages * STORAGE
    want = torch.autograd.grad(function(x, made[0].weight).sum(), (x, made[0].weight), allow_unused=True)
    for ours, theirs in zip(got, want, strict=True):
        assert ours is theirs is None or torch.equal(ours, theirs)


def test_a_compiled_block_is_offloaded():
    function, x = lambda x, w: (x @ w).sin().cos(), torch.randn(64, 64)
    made, plain = toys(function)
    want = torch.autograd.grad(made(x).sum(), made[0].weight)[0]
    made, offloader = toys(function, backend="aot_eager")
    assert torch.equal(torch.autograd.grad(made(x).sum(), made[0].weight)[0], want)
    assert 0 < offloader.moved_bytes <= plain.moved_bytes


def test_a_graph_can_be_run_twice_and_micro_batches_can_overlap():
    made, offloader = toys(*[lambda x, w: (x @ w).tanh()] * 3, limit=3 * STORAGE / 1e9)
    inputs = [torch.randn(64, 64) for _ in range(2)]
    weights = [block.weight for block in made]
    want = [torch.autograd.grad(made(x).sum(), weights) for x in inputs]
    assert offloader.kept_bytes == 0
    first = made(inputs[0]).sum()
    moved = offloader.moved_bytes
    assert offloader.kept_bytes == 3 * STORAGE
    second = made(inputs[1]).sum()
    assert offloader.kept_bytes == 3 * STORAGE
    assert offloader.moved_bytes - moved == 4 * STORAGE
    for number, total in ((0, first), (1, second), (0, first)):
        for ours, theirs in zip(torch.autograd.grad(total, weights, retain_graph=True), want[number], strict=True):
            assert torch.equal(ours, theirs)
    del first, total
    assert offloader.kept_bytes == 0


def test_gradients_of_parameters_can_come_later():
    """As in zero bubble: input gradients of two micro batches first; between them, nothing is on the device."""
    made, offloader = toys(*[lambda x, w: (x @ w).tanh()] * 3)
    plain, _ = toys(*[lambda x, w: (x @ w).tanh()] * 3, limit=1.0)
    found, on_device = [], []
    for model in (plain, made):
        inputs = [torch.randn(64, 64, generator=torch.Generator().manual_seed(n)).requires_grad_() for n in range(2)]
        outputs = [model(x) for x in inputs]
        later = [
            stage_backward_input([out], [torch.ones_like(out)], [x], model.parameters())[1]
            for x, out in zip(inputs, outputs, strict=True)
        ]
        del outputs
        model(torch.randn(64, 64))
        on_device.append(num_brought_back())
        for groups in later:
            stage_backward_weight(model.parameters(), groups)
        found.append([tensor.grad for tensor in (*inputs, *model.parameters())])
    assert all(map(torch.equal, *found))
    assert on_device == [0, 0]
    del later, groups
    assert offloader.kept_bytes == 0


def num_brought_back():
    """Count the storages that came back from the host and are kept."""
    return sum(type(item) is _Stored and item.back is not None for item in gc.get_objects())


@pytest.mark.parametrize("limit", [0.0, 1.0])
def test_a_write_into_what_was_saved_is_found(limit):
    made, _ = toys(lambda x, w: (x @ w).exp(), lambda x, w: x.mul_(2), limit=limit)
    with pytest.raises(RuntimeError, match="changed in place"):
        made(torch.randn(64, 64)).sum().backward()


def test_nothing_moves_in_evaluation():
    made, offloader = toys(lambda x, w: x @ w)
    with torch.no_grad():
        made(torch.randn(64, 64))
    made.eval()
    made(torch.randn(64, 64)).sum().backward()
    assert offloader.moved_bytes == offloader.kept_bytes == 0


BLOCKS = {"num_hidden_layers": 4}
FSDP2 = {"data_parallel_mode": "fsdp2"}
REMAT = {"enable_gradient_checkpointing": True, "enable_reentrant": False}
LIMIT = {"activation_gpu_limit": 4e-5}
INTERLEAVED = {"pipeline_schedule": "interleaved", "pipeline_stages_per_rank": 2}
ZERO_BUBBLE = {"pipeline_schedule": "zero_bubble"}
PP2 = {"pipeline_parallel_size": 2, "micro_batch_size": 1}
LAYOUTS = {
    "zero3, limit, remat": FSDP2 | LIMIT | REMAT,
    "zero3, units in blocks": FSDP2 | {"model.basic_modules": ["Qwen3MLP"]},
    "tensor": {"tensor_parallel_size": 2},
    "pipeline": PP2 | LIMIT,
    "pipeline, remat": PP2 | LIMIT | REMAT | {"enable_reentrant": True},
    "interleaved": PP2 | INTERLEAVED | LIMIT,
    "zero bubble": PP2 | ZERO_BUBBLE | LIMIT,
    "zero bubble, remat, nothing kept": PP2 | ZERO_BUBBLE | REMAT,
    "interleaved, split": PP2 | ZERO_BUBBLE | {"pipeline_stages_per_rank": 2},
}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """Metrics lines for each size of a micro batch."""
    folder = tmp_path_factory.mktemp("one")
    configs = [family_config(folder / str(size), "qwen3", 1, BLOCKS, micro_batch_size=size) for size in (1, 2)]
    return dict(enumerate(train_all(configs, 1), 1))


@pytest.fixture(scope="module")
def offloaded(tmp_path_factory):
    """Of each layout: metrics lines, and of every rank what it says of its activations and keeps in the end."""
    folders = [tmp_path_factory.mktemp("two") for _ in LAYOUTS]
    configs = [
        family_config(folder, "qwen3", 2, BLOCKS, **train, enable_activation_offload=True)
        for folder, train in zip(folders, LAYOUTS.values(), strict=True)
    ]
    heard = zip(*run_ranks(2, train_and_listen, configs, timeout=600), strict=True)
    return {name: (records(config), said) for name, config, said in zip(LAYOUTS, configs, heard, strict=True)}


@pytest.mark.parametrize("name", LAYOUTS)
def test_offloaded_activations_on_layouts(one_process, offloaded, name):
    train = LAYOUTS[name]
    lines, heard = offloaded[name]
    assert_same(lines, one_process[train.get("micro_batch_size", 2)])
    limit = train.get("activation_gpu_limit", 0)
    for said, most, left in heard:
        assert most <= limit * 1e9 and left == 0
        if said is not None:  # the first rank's log
            moved, kept = map(float, re.findall(r"(\S+) GB", said))
            assert moved > 0 and kept <= limit and (kept > 0) == (limit > 0)


def train_and_listen(configs):
    """For each run: this rank's line of log, and what it kept at most at the end of a block, and after the run."""
    import tutti.train.run
    from tutti.parallel import activation_offload as offload

    said, made, kept = [], [], []
    offload.log.addFilter(lambda record: said.append(record.getMessage()) or True)
    leave, init = Offloader.leave, Offloader.__init__
    Offloader.leave = lambda self: leave(self) or kept.append(self.kept_bytes)
    Offloader.__init__ = lambda self, *args: made.append(self) or init(self, *args)
    heard = []
    for config in configs:
        said.clear(), kept.clear(), made.clear()
        regroup()
        tutti.train.run.train(config)
        logging.disable(logging.NOTSET)
        heard.append((said[0] if said else None, max(kept), made[0].kept_bytes))
    return heard


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_device_memory_is_given_back_and_copies_are_right():
    batch = make_batch(900, 700, 400).to(torch.device("cuda"))
    want, peaks = None, []
    for limit in (None, 0.0, 1e-3):
        objective = Objective(make_model(device="cuda"))
        if limit is not None:
            offload_activations(objective, block_modules(objective.model), "cuda", limit)
        gradients(objective, batch)
        torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            got = gradients(objective, batch)
        peaks.append(torch.cuda.max_memory_allocated())
        want = want or got
        assert_equal(got, want)
    assert peaks[1] < peaks[0] and peaks[1] <= peaks[2]
