"""Sizes against the world: a brute-force oracle says which fit, and every size that an error names does fit."""

import itertools
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tutti.config import Config, ConfigError, TrainConfig
from tutti.config.layout import Layout, fit, resolve_sizes


def config(**train: object) -> Config:
    return Config(train=TrainConfig(**train))  # type: ignore[arg-type]


def problems(made: Config, world: int) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        fit(made, world)
    return caught.value.problems


def oracle(train: TrainConfig, world: int) -> tuple[int, int, int, int] | None:
    """(data, replicate, shard, accumulation), found by trying every grid of ranks; None: nothing fits."""
    sizes = range(1, world + 1)
    inner = [train.tensor_parallel_size, train.pipeline_parallel_size]
    inner += [train.ulysses_parallel_size, train.context_parallel_size]
    given_sizes = (train.data_parallel_replicate_size, train.data_parallel_shard_size)
    for replicate, shard in itertools.product(sizes, sizes):
        ranks = replicate * shard
        for size in inner:
            ranks *= size
        if ranks != world:
            continue
        if train.data_parallel_mode == "ddp":
            right = shard == 1 and given_sizes in ((1, 1), (replicate, 1))
        elif given_sizes == (1, 1):
            right = replicate == 1
        else:
            right = given_sizes == (replicate, shard)
        replica = shard * train.ulysses_parallel_size * train.context_parallel_size * train.tensor_parallel_size
        if not right or replica not in [train.expert_parallel_size * times for times in range(1, replica + 1)]:
            continue
        for accumulation in range(1, 65):
            total = train.micro_batch_size * replicate * shard * accumulation
            if train.global_batch_size in (None, total):
                return replicate * shard, replicate, shard, accumulation
    return None


_SIZES = st.sampled_from([1, 1, 1, 2, 3, 4])
_TRAIN = st.builds(
    TrainConfig,
    data_parallel_mode=st.sampled_from(["ddp", "fsdp2"]),
    data_parallel_replicate_size=_SIZES,
    data_parallel_shard_size=_SIZES,
    tensor_parallel_size=_SIZES,
    pipeline_parallel_size=_SIZES,
    ulysses_parallel_size=_SIZES,
    context_parallel_size=_SIZES,
    expert_parallel_size=_SIZES,
    micro_batch_size=st.integers(1, 3),
    global_batch_size=st.none() | st.integers(1, 48),
)


@settings(max_examples=300, deadline=None)
@given(_TRAIN, st.sampled_from([1, 2, 3, 4, 6, 8, 12]))
def test_fits_where_the_oracle_says_so(train: TrainConfig, world: int) -> None:
    expected = oracle(train, world)
    try:
        layout = fit(Config(train=train), world)
    except ConfigError as error:
        assert expected is None
        assert all(re.match(r"train\.\w+: ", problem) for problem in error.problems)
        return
    assert (layout.data, layout.replicate, layout.shard, layout.accumulation) == expected
    axes = layout.data * layout.tensor * layout.pipeline * layout.ulysses * layout.context
    assert axes == layout.world == world
    assert layout.global_batch_size == train.micro_batch_size * layout.data * layout.accumulation


@settings(max_examples=100, deadline=None)
@given(_TRAIN, st.sampled_from([2, 4, 6, 8, 12]))
def test_a_batch_size_that_an_error_names_fits(train: TrainConfig, world: int) -> None:
    try:
        fit(Config(train=train), world)
    except ConfigError as error:
        for problem in error.problems:
            if problem.startswith("train.global_batch_size") and len(error.problems) == 1:
                for size in re.findall(r"\d+", problem.partition(";")[2]):
                    fit(Config(train=replace(train, global_batch_size=int(size))), world)


def test_one_process() -> None:
    assert fit(config(), 1) == Layout(1, 1, 1, 1, 1, 1, 1, 1, 1, global_batch_size=1, accumulation=1)


def test_the_default_batch_and_accumulation() -> None:
    assert fit(config(micro_batch_size=3), 4).global_batch_size == 12
    assert fit(config(micro_batch_size=3, global_batch_size=24), 4).accumulation == 2
    assert resolve_sizes(config(micro_batch_size=3), 4).train.global_batch_size == 12
    assert resolve_sizes(config(global_batch_size=8), 4).train.global_batch_size == 8


@pytest.mark.parametrize(
    ("train", "world", "expected"),
    [
        (
            {"global_batch_size": 6, "micro_batch_size": 2},
            2,
            "train.global_batch_size: 6 is not a multiple of train.micro_batch_size times the data-parallel ranks "
            "(2 * 2 = 4); 4 or 8 would be",
        ),
        (
            {"global_batch_size": 1},
            2,
            "train.global_batch_size: 1 is not a multiple of train.micro_batch_size times the data-parallel ranks "
            "(1 * 2 = 2); 2 would be",
        ),
        (
            {"data_parallel_mode": "fsdp2", "data_parallel_replicate_size": 3},
            4,
            "train.data_parallel_replicate_size: 3 times train.data_parallel_shard_size 1 is 3, not the 4 "
            "data-parallel ranks; 1 * 4, 2 * 2 or 4 * 1 would be",
        ),
        (
            {"data_parallel_shard_size": 2},
            2,
            "train.data_parallel_shard_size: ddp does not shard, so 2 does not fit; leave it at 1, or set "
            "train.data_parallel_mode to fsdp2",
        ),
        (
            {"data_parallel_replicate_size": 2},
            4,
            "train.data_parallel_replicate_size: ddp keeps 4 replicas here, not 2",
        ),
        (
            {"tensor_parallel_size": 3},
            4,
            "train.tensor_parallel_size: the axes take 3 ranks together (tensor 3), which does not divide 4; "
            "1, 2 or 4 would",
        ),
        (
            {"data_parallel_mode": "fsdp2", "expert_parallel_size": 3},
            4,
            "train.expert_parallel_size: 3 does not divide the 4 ranks of a replica; 1, 2 or 4 would",
        ),
    ],
)
def test_errors_name_sizes_that_would_do(train: dict, world: int, expected: str) -> None:
    assert problems(config(**train), world) == [expected]


def test_two_axes_that_do_not_fit_are_two_problems() -> None:
    found = problems(config(tensor_parallel_size=4, ulysses_parallel_size=3), 8)
    assert [problem.partition(":")[0] for problem in found] == [
        "train.tensor_parallel_size",
        "train.ulysses_parallel_size",
    ]
    assert found[0].endswith("(tensor 4 * ulysses 3), which does not divide 8; a multiple of 12 ranks would")
    assert found[1].endswith("; 1 or 2 would")


def test_several_problems_at_once() -> None:
    made = config(data_parallel_replicate_size=3, data_parallel_shard_size=2, global_batch_size=7, micro_batch_size=2)
    assert len(problems(made, 4)) == 3
