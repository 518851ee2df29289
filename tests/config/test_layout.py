"""Layouts are completed from the sizes in a configuration, and errors name sizes that would work."""

import pytest

from tutti.config import Config, ConfigError, TrainConfig
from tutti.config.layout import Layout, fit, resolve_sizes


def config(**train: object) -> Config:
    return Config(train=TrainConfig(**train))  # type: ignore[arg-type]


def problems(made: Config, world: int) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        fit(made, world)
    return caught.value.problems


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
            "(2 * 2 = 4); 4 or 8 would",
        ),
        (
            {"global_batch_size": 1},
            2,
            "train.global_batch_size: 1 is not a multiple of train.micro_batch_size times the data-parallel ranks "
            "(1 * 2 = 2); 2 would",
        ),
        (
            {"data_parallel_mode": "fsdp2", "data_parallel_replicate_size": 3},
            4,
            "train.data_parallel_replicate_size: 3 times train.data_parallel_shard_size 1 is 3, not the 4 "
            "data-parallel ranks; 1 * 4, 2 * 2 or 4 * 1 would",
        ),
        (
            {"data_parallel_shard_size": 2},
            2,
            "train.data_parallel_shard_size: ddp does not shard, so that 2 does not fit; 1 or "
            "train.data_parallel_mode=fsdp2 would",
        ),
        (
            {"data_parallel_replicate_size": 2},
            4,
            "train.data_parallel_replicate_size: ddp keeps 4 replicas here, not 2; 1 or 4 would",
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
        (
            {"expert_parallel_size": 2},
            4,
            "train.expert_parallel_size: 2 does not divide the 1 ranks of a replica, which with ddp are all but the "
            "data-parallel ones; 1 or train.data_parallel_mode=fsdp2 would",
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
    assert found[0].endswith("(tensor 4 * ulysses 3), which does not divide 8; 12 ranks would")
    assert found[1].endswith("; 1 or 2 would")


def test_several_problems_at_once() -> None:
    made = config(data_parallel_replicate_size=3, data_parallel_shard_size=2, global_batch_size=7, micro_batch_size=2)
    assert len(problems(made, 4)) == 3
