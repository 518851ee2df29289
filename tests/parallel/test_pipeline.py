"""A model split into stages loads weights, evaluates, saves and exports like the unsplit model."""

import copy
import itertools
import json
import random

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests import sweep
from tests.harness import run_ranks
from tests.model.zoo import FAMILIES, tiny
from tests.train.runs import run, tiny_config, train_quietly
from tutti.attention.interface import packed_kwargs, resolve_attention
from tutti.config import ConfigError
from tutti.core.batch import IGNORE, Sample, pack
from tutti.core.tensors import local_part
from tutti.model.stage_trace import trace_stages
from tutti.model.structure import blocks, decoder, read_structure
from tutti.parallel.pipeline.schedule import rank_schedule
from tutti.parallel.pipeline.stage import Cost, cut, make_handoff, split_blocks


def test_the_split_is_the_best_there_is():
    draw = random.Random(0)
    for _ in range(300):
        units = [Cost(draw.choice([1, 1, 1, 2, 5]), draw.choice([1, 2, 7])) for _ in range(draw.randint(2, 9))]
        front, tail = Cost(0, draw.randint(0, 20)), Cost(draw.randint(0, 12), draw.randint(0, 20))
        count = draw.randint(1, len(units))
        everything = [front, *units, tail]
        work, size = (sum(values) or 1 for values in zip(*everything, strict=True))
        share = [cost.work / work + 0.25 * cost.size / size for cost in everything]

        inner = itertools.combinations(range(1, len(units)), count - 1)
        best = min(stage_costs((0, *borders, len(units)), share) for borders in inner)
        found = split_blocks(units, front, tail, count)
        assert stage_costs((0, *(blocks.stop for blocks in found)), share) == pytest.approx(best)


def stage_costs(borders, share):
    """The largest, and the sum of the squares, of what stages between these borders cost."""
    stages = [sum(share[1 + first : 1 + last]) for first, last in itertools.pairwise(borders)]
    stages[0] += share[0]
    stages[-1] += share[-1]
    return max(stages), sum(cost * cost for cost in stages)


def play(orders, num_stages, split):
    """The time when the last action ends, if F takes 1, B 2, I and W 1; checks that messages arrive in order."""
    length = {"F": 1, "B": 2, "I": 1, "W": 1}
    ends, place, free = {}, [0] * len(orders), [0] * len(orders)
    while any(place[rank] < len(order) for rank, order in enumerate(orders)):
        before = list(place)
        for rank, order in enumerate(orders):
            while place[rank] < len(order):
                kind, stage, batch = order[place[rank]]
                needs = [("F", stage - 1, batch)] if kind == "F" and stage else []
                if kind in "BI":
                    needs = [("F", stage, batch)]
                    if stage + 1 < num_stages:
                        needs.append(("I" if split else "B", stage + 1, batch))
                if kind == "W":
                    needs = [("I", stage, batch)]
                if any(need not in ends for need in needs):
                    break
                free[rank] = max([free[rank], *(ends[need] for need in needs)]) + length[kind]
                ends[kind, stage, batch] = free[rank]
                place[rank] += 1
        assert place != before, "the ranks wait for each other"
    return max(free), ends


@pytest.mark.parametrize("split", [False, True])
def test_schedules_run_through_in_the_time_they_should(split):
    for ranks, per_rank, batches in itertools.product((2, 3, 4), (1, 2, 3), (1, 2, 3, 4, 7, 8, 12)):
        stages = ranks * per_rank
        orders = [rank_schedule(rank, ranks, per_rank, batches, split=split) for rank in range(ranks)]
        total, ends = play(orders, stages, split)
        for stage, batch in itertools.product(range(stages), range(batches)):
            kinds = {kind for kind in "FBIW" if (kind, stage, batch) in ends}
            assert kinds == (set("FIW") if split and stage else set("FB"))
        for rank in range(ranks):  # a rank receives from another one in the order in which that one sent
            for kind, step in (("F", -1), ("I" if split else "B", 1)):
                taken = [a for a in orders[rank] if a.kind in ("F" if kind == "F" else "BI")]
                wanted = [(a.stage + step, a.batch) for a in taken if 0 <= a.stage + step < stages]
                sender = orders[(rank + step) % ranks]
                made = [(a.stage, a.batch) for a in sender if a.kind in ("F" if kind == "F" else "BI")]
                assert wanted == [place for place in made if place in wanted]
        ideal, bubble = 3 * batches * per_rank, (1 if split and per_rank == 1 else 3) * (ranks - 1)
        if per_rank == 1 and (batches >= 2 * ranks or not split):
            assert total == ideal + bubble
        if per_rank > 1 and batches % ranks == 0:
            assert total <= ideal + bubble


def make_batch(vocab=200):
    generator = torch.Generator().manual_seed(1)
    samples = []
    for length in (9, 17, 4):
        ids = torch.randint(3, vocab, (length,), generator=generator).int().numpy()
        labels = ids.copy()
        labels[-1] = IGNORE
        samples.append(Sample(ids, labels))
    return pack(samples, pad_to=32)


@pytest.mark.parametrize("family", FAMILIES)
def test_stages_of_every_family_make_the_whole(family):
    torch.manual_seed(0)
    attention = resolve_attention("sdpa", torch.device("cpu"))
    whole = AutoModelForCausalLM.from_config(tiny(family), attn_implementation=attention)
    with torch.device("meta"):
        on_meta = AutoModelForCausalLM.from_config(tiny(family), attn_implementation=attention)
    trace = trace_stages(read_structure(on_meta))
    kwargs = packed_kwargs(make_batch())
    states = decoder(whole)(**kwargs).last_hidden_state
    states.square().sum().backward()
    received, grads = None, {}
    runs = []
    for rank, _ in enumerate(blocks(whole)):
        part = copy.deepcopy(whole)
        part.zero_grad()
        (stage,) = cut(part, read_structure(part), trace, [range(1), range(1, 2)], rank, 2)
        made = make_handoff(stage.run(decoder(part), kwargs, received))
        runs.append((part, received, made.hidden))
        received = made._replace(hidden=made.hidden.detach().requires_grad_())
    assert torch.allclose(runs[-1][2], states, rtol=1e-6, atol=1e-6)
    runs[-1][2].square().sum().backward()
    runs[0][2].backward(runs[1][1].hidden.grad)
    for part, _, _ in runs:
        grads |= {name: p.grad for name, p in part.named_parameters() if p.grad is not None}
    expected = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}
    assert set(grads) == set(expected)
    for name, grad in expected.items():
        assert torch.allclose(grads[name], grad, rtol=1e-4, atol=1e-5), name
    sizes = [sum(p.numel() for p in part.parameters()) for part, _, _ in runs]
    assert max(sizes) < sum(p.numel() for p in whole.parameters())


PP2 = {"pipeline_parallel_size": 2}
FSDP2 = {"data_parallel_mode": "fsdp2"}


def test_saves_evaluates_and_exports_what_one_process_goes_on_with(tmp_path):
    evaluated = tiny_config(tmp_path / "a").data.train_path.replace("chat.jsonl", "chat_eval.jsonl")
    common = {
        "data.eval_path": evaluated,
        "train.eval_steps": 2,
        "train.save_steps": 2,
        "train.no_decay_modules": ["Embedding"],
        "train.weight_decay": 0.1,
    }
    expected = run(tiny_config(tmp_path / "a", **common, **{"train.save_hf_weights": True}))
    staged = {"train.pipeline_parallel_size": 2, "train.save_hf_weights": True}
    got = run(tiny_config(tmp_path / "b", world=2, **common, **staged), 2)
    for ours, theirs in zip(got, expected, strict=True):
        key = "loss" if "loss" in theirs else "eval_loss"
        assert ours[key] == pytest.approx(theirs[key], rel=1e-5), f"{key} at step {ours['step']}"
    final = [
        AutoModelForCausalLM.from_pretrained(tmp_path / name / "out" / "hf" / "final").state_dict() for name in "ab"
    ]
    assert set(final[0]) == set(final[1])
    for name, tensor in final[0].items():
        assert torch.allclose(final[1][name], tensor, rtol=1e-3, atol=2e-5), name
    # One process resumes from the checkpoint of two stages, and two stages from that of one process.
    for writer, name, world, train in (("b", "c", 1, {}), ("a", "d", 2, staged)):
        middle = tmp_path / writer / "out" / "checkpoints" / "global_step_2"
        changes = {"train.load_checkpoint_path": str(middle)}
        resumed = tiny_config(tmp_path / name, world=world, **common, **train, **changes)
        steps = [line for line in run(resumed, world) if "loss" in line]
        assert [line["step"] for line in steps] == [3, 4]
        for line in steps:
            theirs = next(one for one in expected if one["step"] == line["step"] and "loss" in one)
            assert line["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


@pytest.mark.parametrize("broadcast", [True, False])
def test_stages_read_their_own_weights(tmp_path, broadcast):
    torch.manual_seed(0)
    source = tmp_path / "model"
    model = AutoModelForCausalLM.from_config(tiny("qwen3_moe", vocab_size=2048, num_hidden_layers=3))
    model.save_pretrained(source)
    changes = {
        "model.config_path": None,
        "model.model_path": str(source),
        "train.max_steps": 1,
        "train.lr": 0.0,
        "train.lr_min": 0.0,
        "train.save_hf_weights": True,
        "train.broadcast_model_weights_from_rank0": broadcast,
    }
    (expected,) = run(tiny_config(tmp_path / "a", **changes))
    staged = tiny_config(tmp_path / "b", world=2, **changes, **{"train.pipeline_parallel_size": 2})
    (got,) = run(staged, 2)
    assert got["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    written = load_file(tmp_path / "b" / "out" / "hf" / "final" / "model.safetensors")
    original = load_file(source / "model.safetensors")
    assert set(written) == set(original)
    assert all(torch.equal(written[name], tensor) for name, tensor in original.items())


def test_copies_of_tied_weights_stay_equal(tmp_path):
    config = tiny_config(tmp_path, world=4, **{f"train.{name}": value for name, value in (PP2 | FSDP2).items()})
    embeddings = run_ranks(4, trained_embedding, config)
    assert embeddings[0] == embeddings[2] and embeddings[1] == embeddings[3]
    assert embeddings[0][0] != embeddings[1][0]


def trained_embedding(config):
    """Train, and give this rank's part of the embedding."""
    from tutti.train.step import TrainStep

    kept = {}
    original = TrainStep.step

    def step(self, batch, totals):
        original(self, batch, totals)
        largest = max(self._parameters, key=lambda parameter: parameter.numel())
        kept["embedding"] = local_part(largest).detach().tolist()

    TrainStep.step = step
    train_quietly(config)
    return kept["embedding"]


def test_classifies_through_stages(tmp_path):
    rows = [{"text": f"{'good' if i % 2 else 'bad'} thing number {i % 7}", "label": i % 2} for i in range(16)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    changes = {
        "data.data_type": "classification",
        "data.train_path": str(path),
        "data.eval_path": str(path),
        "model.num_labels": 2,
        "train.eval_steps": 2,
        "train.max_steps": 2,
        "train.dyn_bsz": False,
    }
    expected = run(tiny_config(tmp_path / "a", **changes))
    got = run(tiny_config(tmp_path / "b", world=2, **changes, **{"train.pipeline_parallel_size": 2}), 2)
    assert [set(line) for line in got] == [set(line) for line in expected]
    for ours, theirs in zip(got, expected, strict=True):
        for key in ("loss", "grad_norm", "eval_loss", "eval_accuracy"):
            if key in theirs:
                assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key


def test_what_cannot_be_cut_is_refused_with_what_would_do(tmp_path):
    with pytest.raises(AssertionError, match=r"pipeline_parallel_size: 4 ranks .* 2 blocks; 1 or 2 would"):
        run(tiny_config(tmp_path, world=4, **{"train.pipeline_parallel_size": 4}), 4)
    with pytest.raises(ConfigError, match="interleaved"):
        tiny_config(tmp_path, world=2, **{"train.pipeline_parallel_size": 2, "train.pipeline_stages_per_rank": 2})


@pytest.mark.parametrize("frozen", [False, True])
def test_a_family_that_is_no_chain_of_blocks_is_refused_by_name(frozen):
    attention = resolve_attention("sdpa", torch.device("cpu"))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny("llama"), attn_implementation=attention)
    model.requires_grad_(not frozen)
    assert trace_stages(read_structure(model)).front == ("embed_tokens",)
    assert all(parameter.requires_grad != frozen for parameter in model.parameters())
    original = type(decoder(model)).forward

    class Skipping(type(decoder(model))):
        def forward(self, *args, **kwargs):
            output = original(self, *args, **kwargs)
            return type(output)(last_hidden_state=output.last_hidden_state + self.embed_tokens(kwargs["input_ids"]))

    structure = read_structure(model)
    decoder(model).__class__ = Skipping
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot be cut in stages"):
        trace_stages(structure)


@pytest.mark.parametrize(
    ("family", "inputs", "shared", "problem"),
    [
        ("gemma4_text", 8, 0, "handed more than hidden states"),
        ("gemma4_text", 0, 1, "keys and values of ones before"),
        ("gemma4_text", 0, 0, None),
        ("hrm_text", 0, 0, "is not a list of blocks"),
        ("qwen4_exp_text", 0, 0, "several streams"),
    ],
)
def test_families_that_hand_on_more_are_refused_by_name(family, inputs, shared, problem):
    """Gemma 4's small models, whose blocks have inputs of their own and share keys, and not its large ones."""
    config = sweep.tiny_config(family)
    config.hidden_size_per_layer_input = inputs
    attention = resolve_attention("sdpa", torch.device("cpu"))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    model.config.num_kv_shared_layers = shared
    structure = read_structure(model)
    if problem is None:
        assert trace_stages(structure).blocks == "layers"
    else:
        with pytest.raises(ValueError, match=problem):
            trace_stages(structure)


def test_check_tells_where_the_cuts_are(tmp_path, capsys):
    from tutti.check.run import check

    def memory(world, **train):
        arguments = {f"train.{name}": value for name, value in train.items()}
        config = tiny_config(tmp_path / str(world), world=world, **arguments)
        capsys.readouterr()
        check(config, world)
        return capsys.readouterr().out

    alone, staged = memory(1), memory(2, pipeline_parallel_size=2)
    assert "stages" not in alone
    assert "2 on 2 ranks (1f1b): blocks 0 to 0, 1 to 1" in staged
    assert "on the fullest of 2 pipeline ranks" in staged
