"""Layout checks agree with an oracle that assigns everything to ranks, and the sizes that errors name fix them."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from tutti.config.layout import ModelFacts, Piece, Sizes, misfits

NUM_RANDOM = 5000
AXES = ("tensor_parallel_size", "pipeline_parallel_size", "ulysses_parallel_size", "context_parallel_size")


def shares(things: Sequence[Any], hands: int) -> list[int]:
    """The number of things per hand after dealing them out one by one."""
    held = [0] * hands
    for number, _ in enumerate(things):
        held[number % hands] += 1
    return held


def evenly(things: Sequence[Any], hands: int) -> bool:
    held = shares(things, hands)
    return min(held) == max(held) > 0


def batches(things: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Split into groups of consecutive items; the last group may be smaller."""
    return [things[start : start + size] for start in range(0, len(things), size)]


def fits(sizes: Sizes, facts: ModelFacts | None) -> bool:
    """The oracle: assign ranks, experts, blocks, heads and samples, and check what each rank gets."""
    axes = [getattr(sizes, name) for name in AXES]
    tensor, pipeline, ulysses, context = axes
    copies = batches(range(sizes.world), math.prod(axes))
    if len(copies[-1]) < math.prod(axes):
        return False
    right = [grid for grid in data_grids(len(copies)) if asked_for(sizes, *grid)]
    if not right:
        return False
    ((_, shard),) = right
    replica = list(itertools.product(range(shard), range(context), range(ulysses), range(tensor)))
    groups = batches(replica, sizes.expert_parallel_size)
    if len(groups[-1]) < sizes.expert_parallel_size:
        return False
    if sizes.global_batch_size is not None:
        samples = sizes.global_batch_size
        while samples > 0:
            samples -= len(copies) * sizes.micro_batch_size
        if samples < 0:
            return False
    stages = sizes.pipeline_stages_per_rank
    if pipeline > 1 and {"1f1b": stages > 1, "interleaved": stages < 2, "zero_bubble": False}[sizes.pipeline_schedule]:
        return False
    return facts is None or model_fits(sizes, facts)


def data_grids(data: int) -> Iterator[tuple[int, int]]:
    for replicate in range(1, data + 1):
        if evenly(range(data), replicate):
            yield replicate, data // replicate


def asked_for(sizes: Sizes, replicate: int, shard: int) -> bool:
    given = (sizes.data_parallel_replicate_size, sizes.data_parallel_shard_size)
    if sizes.data_parallel_mode == "ddp":
        return shard == 1 and given in ((1, 1), (replicate, 1))
    return replicate == 1 if given == (1, 1) else given == (replicate, shard)


def model_fits(sizes: Sizes, facts: ModelFacts) -> bool:
    tensor, pipeline = sizes.tensor_parallel_size, sizes.pipeline_parallel_size
    if pipeline > 1 and not all(shares(range(facts.blocks), pipeline * sizes.pipeline_stages_per_rank)):
        return False
    if sizes.expert_parallel_size > 1 and not facts.experts:
        return False
    if not all(evenly(range(count), sizes.expert_parallel_size) for count in facts.experts):
        return False
    for heads in facts.heads:
        if any(not own or not evenly(range(own), sizes.ulysses_parallel_size) for own in shares(range(heads), tensor)):
            return False
    for piece in facts.pieces:
        held_by_several = piece.shared and evenly(range(tensor), piece.units)
        if not evenly(range(piece.units), tensor) and not held_by_several:
            return False
    rows = batches(range(facts.vocabulary), -(-facts.vocabulary // tensor))
    return len(rows) == tensor


def random_facts(draw: random.Random) -> ModelFacts:
    heads = draw.choice([2, 4, 6, 8, 12])
    kv_heads = draw.choice([count for count in range(1, heads + 1) if heads % count == 0])
    pieces = (
        Piece("q_proj", heads, "heads"),
        Piece("k_proj", kv_heads, "heads", shared=True),
        Piece("up_proj", draw.choice([24, 36, 48, 50]), "features"),
    )
    experts = tuple({draw.choice([4, 6, 8, 12]) for _ in range(draw.choice([0, 1, 1, 2]))})
    return ModelFacts(draw.choice([2, 3, 4, 6, 8]), (heads,), experts, pieces, draw.choice([5, 9, 64, 101]))


def random_sizes(draw: random.Random) -> Sizes:
    """Random layouts: some valid, some with one or several errors."""
    axes = dict.fromkeys(AXES, 1)
    for name in draw.sample(AXES, draw.choice([0, 1, 1, 2, 2, 3])):
        axes[name] = draw.choice([2, 2, 3, 4])
    data = draw.choice([1, 1, 2, 3, 4])
    world = math.prod(axes.values()) * data + draw.choice([0] * 9 + [1])
    mode, replicate = draw.choice(["ddp", "fsdp1", "fsdp2", "fsdp2"]), draw.choice([1, 1, 1, 2])
    micro = draw.choice([1, 1, 2, 3])
    count = draw.choice([1, 1, 1, 2, 3])
    sizes = Sizes(
        world=world,
        data_parallel_mode=mode,
        data_parallel_replicate_size=replicate,
        data_parallel_shard_size=1 if mode == "ddp" or replicate == 1 else max(1, data // replicate),
        **axes,
        expert_parallel_size=draw.choice([1, 1, 1, 1, 2, 3, 4]),
        pipeline_schedule={1: "1f1b"}.get(count, draw.choice(["interleaved", "zero_bubble"])),
        pipeline_stages_per_rank=count,
        micro_batch_size=micro,
        global_batch_size=draw.choice([None, None, micro * data, 2 * micro * data, draw.randint(1, 24)]),
    )
    wrong = {
        "data_parallel_shard_size": draw.choice([2, 3]),
        "data_parallel_replicate_size": draw.choice([2, 3]),
        "pipeline_schedule": draw.choice(["1f1b", "interleaved"]),
    }
    return replace(sizes, **{name: value for name, value in wrong.items() if draw.random() < 0.06})


PROBLEM = re.compile(r"train\.(\w+): ([^;]+); (?:(leave it at 1)|(.+) would)")


def remedies(problem: str) -> tuple[str, str, list[dict[str, Any]]]:
    """The argument that a problem is about, the kind of problem, and the changes that the message names."""
    found = PROBLEM.fullmatch(problem)
    assert found, problem
    argument, wrong, leave, labels = found.groups()
    changes: list[dict[str, Any]] = []
    for label in ["1"] if leave else re.split(r", | or ", labels):
        if "=" in label:
            name, _, value = label.removeprefix("train.").partition("=")
            changes.append({name: int(value) if value.isdecimal() else value})
        elif "*" in label:
            replicate, shard = map(int, label.split(" * "))
            changes.append({"data_parallel_replicate_size": replicate, "data_parallel_shard_size": shard})
        elif label.endswith(" ranks"):
            changes.append({"world": int(label.removesuffix(" ranks"))})
        else:
            changes.append({argument: int(label)})
    return argument, wrong, changes


def every_size(problem: str, argument: str, sizes: Sizes) -> list[dict[str, Any]]:
    """The arguments that a message could name; it names all that work."""
    if argument == "data_parallel_replicate_size" and sizes.data_parallel_mode != "ddp":
        data = sizes.world // math.prod(getattr(sizes, name) for name in AXES)
        return [{"data_parallel_replicate_size": a, "data_parallel_shard_size": b} for a, b in data_grids(data)]
    if argument in (*AXES, "expert_parallel_size", "data_parallel_replicate_size"):
        return [{argument: size} for size in range(1, sizes.world + 1)]
    return []


def test_random_sizes_are_told_apart_and_what_is_named_mends_them() -> None:
    draw, counts = random.Random(0), Counter[str]()
    for _ in range(NUM_RANDOM):
        sizes = random_sizes(draw)
        facts = draw.choice([random_facts(draw), random_facts(draw), None])
        problems = misfits(sizes, facts)
        assert (not problems) == fits(sizes, facts), (sizes, facts, problems)
        counts["fits" if not problems else "one problem" if len(problems) == 1 else "several"] += 1
        for problem in problems:
            argument, wrong, changes = remedies(problem)
            counts[argument] += 1
            for change in changes:
                left = misfits(replace(sizes, **change), facts)
                assert not any(wrong in line for line in left), (problem, change, sizes, facts)
            if len(problems) > 1:
                continue
            named = [fits(replace(sizes, **change), facts) for change in changes]
            assert all(named) or not any(named), (problem, sizes, facts)
            for change in every_size(problem, argument, sizes):
                if fits(replace(sizes, **change), facts):
                    assert change in changes, (problem, change, sizes, facts)
    assert counts["fits"] > 0.3 * NUM_RANDOM and counts["one problem"] > 0.15 * NUM_RANDOM, counts
    assert counts["several"] > 0.1 * NUM_RANDOM, counts
    fields = set(Sizes.__dataclass_fields__) - {"world", "data_parallel_mode", "pipeline_schedule", "micro_batch_size"}
    assert {name for name in fields if counts[name] < 40} == set(), counts


def test_the_batch_sizes_that_are_named_are_the_nearest() -> None:
    for wanted, micro, data in itertools.product(range(1, 14), (1, 2, 3), (1, 2, 3)):
        sizes = Sizes(world=data, micro_batch_size=micro, global_batch_size=wanted)
        for problem in misfits(sizes):
            named = [change["global_batch_size"] for change in remedies(problem)[2]]
            good = [size for size in range(1, 40) if fits(replace(sizes, global_batch_size=size), None)]
            below = [size for size in good if size < wanted][-1:]
            assert named == below + [size for size in good if size > wanted][:1]


LLAMA = ModelFacts(
    blocks=2,
    heads=(24,),
    experts=(),
    pieces=(Piece("layers.0.self_attn.q_proj", 24, "heads"), Piece("layers.0.self_attn.k_proj", 6, "heads", True)),
    vocabulary=64,
)


@pytest.mark.parametrize(
    ("facts", "sizes", "expected"),
    [
        (
            replace(LLAMA, vocabulary=9),
            {"world": 8, "tensor_parallel_size": 8},
            [
                "tensor_parallel_size: 8 does not divide the 6 heads of layers.0.self_attn.k_proj; 1 or 2 would",
                "tensor_parallel_size: 8 ranks are too many for a vocabulary of 9; 1 or 2 would",
            ],
        ),
        (LLAMA, {"world": 12, "tensor_parallel_size": 3, "ulysses_parallel_size": 4}, []),
        (
            LLAMA,
            {"world": 16, "tensor_parallel_size": 2, "ulysses_parallel_size": 8},
            [
                "ulysses_parallel_size: 8 does not divide the model's 12 attention heads on each of the 2 "
                "tensor-parallel ranks; 1, 2 or 4 would"
            ],
        ),
        (
            LLAMA,
            {"world": 4, "pipeline_parallel_size": 4},
            ["pipeline_parallel_size: 4 ranks of 1 stages each are more than the model's 2 blocks; 1 or 2 would"],
        ),
        (
            LLAMA,
            {"world": 2, "data_parallel_mode": "fsdp2", "expert_parallel_size": 2},
            ["expert_parallel_size: 2, but this model has no experts that can be divided; leave it at 1"],
        ),
        (
            replace(LLAMA, experts=(8, 12)),
            {"world": 8, "data_parallel_mode": "fsdp2", "expert_parallel_size": 8},
            ["expert_parallel_size: 8 does not divide the 8 or 12 experts of a layer; 1, 2 or 4 would"],
        ),
        (
            LLAMA,
            {"world": 4, "tensor_parallel_size": 4, "global_batch_size": 1},
            [
                "tensor_parallel_size: 4 does not divide the 6 heads of layers.0.self_attn.k_proj; 1 or 2 would",
            ],
        ),
    ],
)
def test_what_a_model_asks_of_the_sizes(facts: ModelFacts, sizes: dict, expected: list[str]) -> None:
    assert misfits(Sizes(**sizes), facts) == [f"train.{problem}" for problem in expected]
