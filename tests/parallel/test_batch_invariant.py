"""A sample's logits and losses are bit-equal alone, among other samples, and at any position in a batch."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import sweep
from tests.harness import regroup, run_ranks
from tests.model.zoo import EXPERTS, tiny
from tests.parallel.layouts import assert_same, family_config, train_all
from tutti.attention.interface import resolve_attention
from tutti.core.batch import IGNORE, Sample, pack
from tutti.core.dist import init_world
from tutti.model.experts import resolve_experts
from tutti.model.structure import blocks
from tutti.parallel.activation_checkpoint import checkpoint_activations
from tutti.parallel.batch_invariant import separate_samples
from tutti.train import loss as loss_module
from tutti.train.objective import Objective
from tutti.train.objective import logits as logits_at
from tutti.train.placement import load_parameters, make_executor
from tutti.train.run import assemble


def make_objective(family, dtype=torch.float32, *, attention="sdpa", invariant=True, remat=False, **overrides):
    kernels = {"attn_implementation": resolve_attention(attention, torch.device("cpu"))}
    if family in EXPERTS:
        kernels["experts_implementation"] = resolve_experts(None)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny(family, **overrides), **kernels).train().to(dtype)
    objective = Objective(model, by_sample=invariant)
    units = [module for _, module in blocks(model)]
    if remat:
        checkpoint_activations(units, reentrant=True)
    if invariant:
        separate_samples(objective, units)
    return objective


def losses_at(hidden, head):
    return head.cross_entropy(hidden)[1]


def make_samples(*lengths):
    generator = np.random.default_rng(0)
    samples = []
    for length in lengths:
        ids = generator.integers(1, 200, length).astype(np.int32)
        labels = np.where(generator.random(length) < 0.7, ids, IGNORE).astype(np.int32)
        labels[-1] = 7
        samples.append(Sample(ids, labels))
    return samples


def of_each(objective, samples, pad_to=None):
    """(logits, losses) of each sample, from one batch of them all."""
    batch = pack(samples, pad_to=pad_to)
    with torch.no_grad():
        logits, losses = objective(batch, compute=logits_at), objective(batch, compute=losses_at)
    counts = [int((sample.labels != IGNORE).sum()) for sample in samples]
    return list(zip(logits.split(counts), losses.split(counts), strict=True))


FAMILIES = {
    "dense": ("qwen3", {"hidden_size": 96}),
    "soft-capped, eager": ("gemma2", {"hidden_size": 96, "attention": "eager"}),
    "layer norm": ("gpt2", {}),
    "moe": ("qwen3_moe", {"hidden_size": 96}),
    "moe, sinks, eager": ("gpt_oss", {"hidden_size": 96, "attention": "eager"}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("family", "options"), FAMILIES.values(), ids=FAMILIES)
def test_a_sample_is_the_same_in_any_batch(monkeypatch, family, options, dtype):
    monkeypatch.setattr(
        loss_module, "CHUNK_BYTES_ON_CPU", 256 * 100 * dtype.itemsize
    )  # a long sample is several chunks
    objective = make_objective(family, dtype, **options)
    samples = make_samples(37, 1, 150, 64, 5, 203)
    alone = [of_each(objective, [sample])[0] for sample in samples]
    for order, pad_to in (([0, 1, 2, 3, 4, 5], None), ([5, 2, 0], 700), ([4, 1, 3], None), ([1, 1, 5, 5], None)):
        together = of_each(objective, [samples[number] for number in order], pad_to)
        for number, (logits, losses) in zip(order, together, strict=True):
            assert torch.equal(logits, alone[number][0]), f"logits of sample {number} in batch {order}"
            assert torch.equal(losses, alone[number][1]), f"losses of sample {number} in batch {order}"


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize("remat", [False, True])
def test_it_is_the_same_training(family, remat):
    batch = pack(make_samples(37, 1, 50, 64))
    options = {"output_router_logits": True, "router_aux_loss_coef": 0.1} if family in EXPERTS else {}
    found = []
    for invariant in (True, False):
        objective = make_objective(family, invariant=invariant, remat=remat and not options, **options)
        out = objective(batch)
        losses = [out[name] for name in ("loss", "router_loss") if name in out]
        sum(losses).backward()
        found.append((losses, [parameter.grad for parameter in objective.parameters()]))
    (losses, grads), (plain_losses, plain_grads) = found
    assert len(losses) == (2 if options else 1)
    torch.testing.assert_close(losses, plain_losses)
    for ours, theirs in zip(grads, plain_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_blocks_see_one_sample_at_a_time():
    objective = make_objective("qwen3", invariant=False)
    model = objective.model
    seen = []
    for _, block in blocks(model):
        forward = block.forward
        block.forward = lambda hidden, *args, _forward=forward, **kwargs: (
            seen.append((hidden.shape[1], kwargs["cu_seq_lens_q"].tolist(), kwargs["max_length_k"]))
            or _forward(hidden, *args, **kwargs)
        )
    separate_samples(objective, [block for _, block in blocks(model)])
    objective(pack(make_samples(3, 9)))
    assert seen == [(3, [0, 3], 3), (9, [0, 9], 9)] * 2


FSDP2, PP2, TP2 = {"data_parallel_mode": "fsdp2"}, {"pipeline_parallel_size": 2}, {"tensor_parallel_size": 2}
ULYSSES2, CONTEXT2 = {"ulysses_parallel_size": 2}, {"context_parallel_size": 2}
EP2, EP4 = FSDP2 | {"expert_parallel_size": 2}, FSDP2 | {"expert_parallel_size": 4}
BF16 = {"compute_dtype": "bfloat16"}
UNITS_IN_BLOCKS = FSDP2 | {"model.basic_modules": ["Qwen3MoeSparseMoeBlock"]}
ZERO_BUBBLE = {"pipeline_schedule": "zero_bubble"}
LAYOUTS = {
    "pipeline": ("qwen3", 2, PP2),
    "values sent early": ("qwen3", 2, ULYSSES2 | {"async_enabled": True} | BF16),
    "experts": ("qwen3_moe", 2, EP2 | BF16),
    "fsdp units in blocks": ("qwen3_moe", 2, UNITS_IN_BLOCKS),
    "tensor": ("qwen3", 4, {"tensor_parallel_size": 4} | BF16),
    "ulysses and context": ("gemma2", 4, ULYSSES2 | CONTEXT2),
    "pipeline and tensor": ("gemma2", 4, PP2 | TP2 | BF16),
    "experts over tensor": ("deepseek_v3", 4, EP4 | TP2),
    "experts and ulysses": ("gpt_oss", 4, EP2 | ULYSSES2 | BF16),
}


@pytest.fixture(scope="module")
def differences(tmp_path_factory):
    """The samples that differ in each layout; layouts with equal numbers of ranks run together."""
    known: dict = {}

    def get(name):
        if name not in known:
            world = LAYOUTS[name][1]
            together = [other for other, layout in LAYOUTS.items() if layout[1] == world]
            configs = []
            for other in together:
                family, _, train = LAYOUTS[other]
                folder = tmp_path_factory.mktemp("ranks")
                configs.append(family_config(folder, family, world, {"hidden_size": 96}, **train, **INVARIANT))
            found = run_ranks(world, differences_of_all, configs, timeout=600)
            for other, of_ranks in zip(together, zip(*found, strict=True), strict=True):
                known[other] = [difference for of_rank in of_ranks for difference in of_rank]
        return known[name]

    return get


INVARIANT = {"enable_batch_invariant_mode": True}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_sample_is_the_same_whatever_its_ranks_and_others_run(differences, name):
    assert not differences(name)


def differences_of_all(configs):
    found = []
    for config in configs:
        regroup()
        found.append(differences_of(config))
    return found


def differences_of(config):
    """The samples for which this rank's logits differ from those of all ranks running that sample alone."""
    ranks = init_world(torch.device("cpu"))
    parts = assemble(config, ranks)
    load_parameters(config, parts.placed, parts.mesh, ranks)
    executor = make_executor(config.train, parts.placed, parts.mesh, ranks.device)
    parts.placed.objective.eval()
    samples = make_samples(37, 1, 150, 64, 5, 203)
    orders = [[0, 1, 2, 3, 4, 5], [5, 2, 0], [4, 1, 3], [1, 1, 5, 5, 0], [3]]
    # Ranks with other data have other samples, and other numbers of them.
    mine = [orders[(number + parts.mesh.dp_rank) % len(orders)] for number in range(len(orders))]
    batches = [pack([samples[number] for number in order]) for order in mine]
    with torch.no_grad():
        alone = list(executor.evaluate([pack([sample]) for sample in samples], compute=logits_at))
        together = list(executor.evaluate(batches, compute=logits_at))
    return [
        f"rank {ranks.rank}: sample {number} in {order}"
        for order, logits in zip(mine, together, strict=False)
        for number, own in zip(order, logits.split([len(alone[n]) for n in order]), strict=True)
        if not torch.equal(own, alone[number])
    ]


ROUTER = {"output_router_logits": True, "router_aux_loss_coef": 0.1}
REMAT = {"enable_gradient_checkpointing": True}
HYBRID = {"data_parallel_replicate_size": 2, "data_parallel_shard_size": 2}
TRAININGS = {
    2: [UNITS_IN_BLOCKS, PP2, ULYSSES2 | REMAT],
    4: [
        PP2 | TP2 | EP2 | ZERO_BUBBLE,
        ULYSSES2 | CONTEXT2 | EP4,
        EP2 | HYBRID | REMAT | {"enable_activation_offload": True},
    ],
}


@pytest.mark.parametrize("world", TRAININGS)
def test_a_run_on_ranks_equals_one_process_without_it(tmp_path, world):
    (want,) = train_all([family_config(tmp_path / "one", "qwen3_moe", 1, ROUTER)], 1)
    configs = [
        family_config(tmp_path / str(number), "qwen3_moe", world, ROUTER, **train, **INVARIANT)
        for number, train in enumerate(TRAININGS[world])
    ]
    for lines in train_all(configs, world):
        assert_same(lines, want)


@pytest.mark.parametrize("lengths", [(7, 7, 7), (9, 1, 5)])
@pytest.mark.parametrize("family", ["gemma3n_text", "gemma4_text"])
def test_blocks_that_share_keys_read_those_of_their_own_sample(family, lengths, monkeypatch):
    """Gemma 3n also has several streams of hidden states."""
    monkeypatch.setattr(sweep, "LENGTHS", lengths)
    layers = {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
    }
    particular = {
        "gemma3n_text": {"intermediate_size": [48] * 4, "activation_sparsity_pattern": [0.9, 0.0, 0.0, 0.0]},
        "gemma4_text": {"per_layer_config": {1: {"head_dim": 16}, 3: {"head_dim": 16}}},
    }
    monkeypatch.setitem(sweep.PARTICULAR, family, layers | particular[family])
    config = sweep.tiny_config(family)
    state = sweep.disturbed(config).state_dict()

    def separate(objective):
        separate_samples(objective, [block for _, block in blocks(objective.model)])

    found = sweep.packed_loss(config, state, "sdpa", separate)
    assert sweep.compare(found, sweep.own_loss(config, state)) == sweep.EQUAL
