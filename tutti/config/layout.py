"""Whether the sizes of a configuration fit a number of ranks, decided before any process group is made.

The world is a product of axes: W = pipeline * data * context * ulysses * tensor, and data = replicate * shard. All but
the data axis are given, so that data-parallel ranks are what is left: dp = W / (tp * pp * ulysses * cp). Experts are
spread over ranks that hold one replica of a stage together. A global batch is a whole number of micro batches on each
of the dp ranks. `fit` is pure: it takes the numbers, and gives the complete layout or an error that names sizes that
would do.
"""

import math
from dataclasses import dataclass, replace

from tutti.config import Config, ConfigError, TrainConfig, get

_INNER = ("tensor", "pipeline", "ulysses", "context")


@dataclass(frozen=True)
class Layout:
    """The size of every axis, and the batch in numbers.

    world = pipeline * data * context * ulysses * tensor; data = replicate * shard; expert divides expert_ranks.
    global_batch_size = micro_batch_size * data * accumulation.
    """

    world: int
    data: int
    replicate: int
    shard: int
    tensor: int
    pipeline: int
    ulysses: int
    context: int
    expert: int
    global_batch_size: int
    accumulation: int

    @property
    def expert_ranks(self) -> int:
        """Ranks with different tokens that hold one replica of a stage: shard * context * ulysses * tensor."""
        return self.shard * self.context * self.ulysses * self.tensor


def fit(config: Config, world: int) -> Layout:
    """The layout of `config` on `world` ranks.  Raises ConfigError: which sizes do not fit, and which would."""
    train = config.train
    inner = {axis: get(config, f"train.{axis}_parallel_size") for axis in _INNER}
    model_ranks = math.prod(inner.values())
    if world % model_ranks:
        raise ConfigError(_misfits(inner, world))
    data = world // model_ranks
    problems: list[str] = []
    replicate, shard = _data_axes(config, data, problems)
    if inner["pipeline"] > 1:
        problems.extend(_stage_problems(train))
    micro = train.micro_batch_size * data
    global_batch_size = train.global_batch_size or micro
    if global_batch_size % micro:
        below = global_batch_size // micro * micro
        sizes = [size for size in (below, below + micro) if size]
        problems.append(
            f"train.global_batch_size: {global_batch_size} is not a multiple of train.micro_batch_size times the "
            f"data-parallel ranks ({train.micro_batch_size} * {data} = {micro}); {either(sizes)} would be"
        )
    layout = Layout(
        world=world,
        data=data,
        replicate=replicate,
        shard=shard,
        **inner,
        expert=train.expert_parallel_size,
        global_batch_size=global_batch_size,
        accumulation=global_batch_size // micro,
    )
    problems.extend(_expert_problems(train, layout.expert_ranks))
    if problems:
        raise ConfigError(problems)
    return layout


def resolve_sizes(config: Config, world: int) -> Config:
    """The same configuration with train.global_batch_size filled in for `world` ranks.  Raises what `fit` raises."""
    return replace(config, train=replace(config.train, global_batch_size=fit(config, world).global_batch_size))


def _data_axes(config: Config, data: int, problems: list[str]) -> tuple[int, int]:
    """Replicas and ranks that share one, for `data` data-parallel ranks."""
    train = config.train
    replicate, shard = train.data_parallel_replicate_size, train.data_parallel_shard_size
    if train.data_parallel_mode == "ddp":
        if shard != 1:
            problems.append(
                f"train.data_parallel_shard_size: ddp does not shard, so {shard} does not fit; leave it at 1, or set "
                "train.data_parallel_mode to fsdp2"
            )
        if replicate not in (1, data):
            problems.append(f"train.data_parallel_replicate_size: ddp keeps {data} replicas here, not {replicate}")
        return data, 1
    if replicate == shard == 1:
        return 1, data
    if replicate * shard != data:
        pairs = [f"{count} * {data // count}" for count in divisors(data)]
        problems.append(
            f"train.data_parallel_replicate_size: {replicate} times train.data_parallel_shard_size {shard} is "
            f"{replicate * shard}, not the {data} data-parallel ranks; {either(pairs)} would be"
        )
    return replicate, shard


def _expert_problems(train: TrainConfig, ranks: int) -> list[str]:
    """What keeps experts from being divided among the `ranks` of a replica."""
    size = train.expert_parallel_size
    if ranks % size == 0:
        return []
    if train.data_parallel_mode == "ddp":
        return [
            "train.expert_parallel_size: ddp keeps a replica on each data-parallel rank, so experts are divided among "
            f"its {ranks} context, ulysses and tensor ranks alone, which {size} does not divide; "
            f"{either(divisors(ranks))} would, or set train.data_parallel_mode to fsdp2"
        ]
    return [
        f"train.expert_parallel_size: {size} does not divide the {ranks} ranks of a replica; "
        f"{either(divisors(ranks))} would"
    ]


def _stage_problems(train: TrainConfig) -> list[str]:
    """What does not go together of a pipeline's schedule and its stages."""
    schedule, count = train.pipeline_schedule, train.pipeline_stages_per_rank
    if schedule == "interleaved" and count == 1:
        return ["train.pipeline_stages_per_rank: interleaved takes several stages on each rank; 2 would do"]
    if schedule == "1f1b" and count > 1:
        return [
            f"train.pipeline_stages_per_rank: 1f1b takes one stage on each rank, not {count}; set "
            "train.pipeline_schedule to interleaved"
        ]
    return []


def _misfits(inner: dict[str, int], world: int) -> list[str]:
    """What to say when the product of the axes does not divide the world."""
    product = math.prod(inner.values())
    problems = []
    for axis, size in inner.items():
        others = product // size
        if size > 1:
            fitting = divisors(world // others) if world % others == 0 else []
            would = f"{either(fitting)} would" if fitting else f"a multiple of {product} ranks would"
            problems.append(
                f"train.{axis}_parallel_size: the axes take {product} ranks together ({_product(inner)}), which does "
                f"not divide {world}; {would}"
            )
    return problems


def _product(inner: dict[str, int]) -> str:
    return " * ".join(f"{axis} {size}" for axis, size in inner.items() if size > 1)


def divisors(number: int) -> list[int]:
    """All of them, ascending."""
    return [size for size in range(1, number + 1) if number % size == 0]


def either(choices: list) -> str:
    """`1, 2 or 4`"""
    *first, last = map(str, choices)
    return f"{', '.join(first)} or {last}" if first else last
