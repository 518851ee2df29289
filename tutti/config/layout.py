"""The layout of a run: the parallel sizes of a configuration completed for a number of ranks.

The world is a product of axes: W = pipeline * data * context * ulysses * tensor, and data = replicate * shard. All but
the data axis are given, so data-parallel ranks are the remaining ones: dp = W / (tp * pp * ulysses * cp). Experts are
distributed over ranks that hold one replica of a stage together. A global batch is a whole number of micro batches on
each of the dp ranks.

Everything here is arithmetic on plain numbers. `fit` checks the sizes against every rule. A violated rule names the
argument that could be changed, and the values that satisfy the rule (and no other rule violates, if there are any). It
is called twice: before the training code is loaded, and when the model's sizes are known.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, NamedTuple

from tutti.config import Config, ConfigError
from tutti.config.train import TrainConfig

INNER = ("tensor", "pipeline", "ulysses", "context")
"""The axes whose sizes are always given; data-parallel ranks are the rest of the world."""


class Piece(NamedTuple):
    """A part of a model that the tensor axis divides: `units` equal pieces (what: heads, features) of `name`.

    shared: with more ranks than units, several ranks may hold the same one.
    """

    name: str
    units: int
    what: str
    shared: bool = False


@dataclass(frozen=True)
class ModelFacts:
    """The sizes in a model that the axes divide. Sizes for axes of size 1 may be omitted.

    blocks: its depth (pipeline). heads: numbers of query heads of its attention layers (ulysses). experts: numbers of
    experts of its experts layers (expert). pieces: the divided parts of its blocks (tensor). vocabulary: rows of its
    embedding, of which every rank must get some (tensor).
    """

    blocks: int = 0
    heads: tuple[int, ...] = ()
    experts: tuple[int, ...] = ()
    pieces: tuple[Piece, ...] = ()
    vocabulary: int = 0


@dataclass(frozen=True)
class Sizes:
    """The size arguments of the train group, under their names, and the number of ranks."""

    world: int
    data_parallel_mode: str = "ddp"
    data_parallel_replicate_size: int = 1
    data_parallel_shard_size: int = 1
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    ulysses_parallel_size: int = 1
    context_parallel_size: int = 1
    expert_parallel_size: int = 1
    pipeline_schedule: str = "1f1b"
    pipeline_stages_per_rank: int = 1
    micro_batch_size: int = 1
    global_batch_size: int | None = None

    @classmethod
    def of(cls, train: TrainConfig, world: int) -> "Sizes":
        return cls(world, **{field.name: getattr(train, field.name) for field in fields(cls)[1:]})

    @cached_property
    def inner(self) -> dict[str, int]:
        """The size of each of the `INNER` axes."""
        return {axis: getattr(self, f"{axis}_parallel_size") for axis in INNER}

    @cached_property
    def data(self) -> int | None:
        """The number of data-parallel ranks; None if the axes do not divide the world."""
        ranks = math.prod(self.inner.values())
        return None if self.world % ranks else self.world // ranks

    @property
    def data_axes(self) -> tuple[int, int]:
        """The numbers of replicas and of ranks that share one, for valid sizes."""
        assert self.data is not None, "the axes do not divide the world"
        if self.data_parallel_mode == "ddp":
            return self.data, 1
        if self.data_parallel_replicate_size == self.data_parallel_shard_size == 1:
            return 1, self.data
        return self.data_parallel_replicate_size, self.data_parallel_shard_size

    @property
    def expert_ranks(self) -> int:
        """Ranks with different tokens that hold one replica of a stage; its experts are divided among them."""
        return self.data_axes[1] * self.context_parallel_size * self.ulysses_parallel_size * self.tensor_parallel_size


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


def fit(config: Config, world: int, facts: ModelFacts | None = None) -> Layout:
    """The layout of `config` on `world` ranks, checked against the model's sizes in `facts` if given.

    ConfigError: which sizes do not fit, and which would.
    """
    sizes = Sizes.of(config.train, world)
    problems = misfits(sizes, facts)
    if problems:
        raise ConfigError(problems)
    replicate, shard = sizes.data_axes
    micro = sizes.micro_batch_size * replicate * shard
    global_batch_size = sizes.global_batch_size or micro
    return Layout(
        world=world,
        data=replicate * shard,
        replicate=replicate,
        shard=shard,
        **sizes.inner,
        expert=sizes.expert_parallel_size,
        global_batch_size=global_batch_size,
        accumulation=global_batch_size // micro,
    )


def resolve_sizes(config: Config, world: int) -> Config:
    """The configuration with train.global_batch_size filled in for `world` ranks. ConfigError: as for `fit`."""
    return replace(config, train=replace(config.train, global_batch_size=fit(config, world).global_batch_size))


class _Complaint(NamedTuple):
    """A violated rule, an argument that could fix it, and the message. Several may belong to one rule."""

    rule: str
    argument: str
    text: str


def _complaints(sizes: Sizes, facts: ModelFacts | None) -> Iterator[_Complaint]:
    """Yield the rules that `sizes` violate."""
    if sizes.data is None:
        yield from _about_ranks(sizes)
    else:
        yield from _about_data(sizes, sizes.data)
    yield from _about_schedule(sizes)
    if facts is not None:
        yield from _about_model(sizes, facts)


def _about_ranks(sizes: Sizes) -> Iterator[_Complaint]:
    used = {axis: size for axis, size in sizes.inner.items() if size > 1}
    described = " * ".join(f"{axis} {size}" for axis, size in used.items())
    for axis in used:
        text = f"the axes take {math.prod(used.values())} ranks together ({described}), which does not divide "
        yield _Complaint("ranks", f"{axis}_parallel_size", f"{text}{sizes.world}")


def _about_data(sizes: Sizes, data: int) -> Iterator[_Complaint]:
    replicate, shard = sizes.data_parallel_replicate_size, sizes.data_parallel_shard_size
    expert, ddp = sizes.expert_parallel_size, sizes.data_parallel_mode == "ddp"
    if ddp and shard > 1:
        text = f"ddp does not shard, so that {shard} does not fit"
        yield _Complaint("shards", "data_parallel_shard_size", text)
    if ddp and replicate not in (1, data):
        text = f"ddp keeps {data} replicas here, not {replicate}"
        yield _Complaint("replicas", "data_parallel_replicate_size", text)
    if not ddp and (replicate, shard) != (1, 1) and replicate * shard != data:
        text = (
            f"{replicate} times train.data_parallel_shard_size {shard} is {replicate * shard}, not the {data} "
            "data-parallel ranks"
        )
        yield _Complaint("replicas", "data_parallel_replicate_size", text)
    if sizes.expert_ranks % expert:
        text = f"{expert} does not divide the {sizes.expert_ranks} ranks of a replica"
        text += ", which with ddp are all but the data-parallel ones" if ddp else ""
        yield _Complaint("experts", "expert_parallel_size", text)
    micro = sizes.micro_batch_size * data
    if sizes.global_batch_size is not None and sizes.global_batch_size % micro:
        text = (
            f"{sizes.global_batch_size} is not a multiple of train.micro_batch_size times the data-parallel ranks "
            f"({sizes.micro_batch_size} * {data} = {micro})"
        )
        yield _Complaint("batch", "global_batch_size", text)


def _about_schedule(sizes: Sizes) -> Iterator[_Complaint]:
    count = sizes.pipeline_stages_per_rank
    if sizes.pipeline_parallel_size == 1:
        return
    if sizes.pipeline_schedule == "interleaved" and count == 1:
        yield _Complaint("schedule", "pipeline_stages_per_rank", "interleaved takes several stages on each rank")
    if sizes.pipeline_schedule == "1f1b" and count > 1:
        text = f"1f1b takes one stage on each rank, not {count}"
        yield _Complaint("schedule", "pipeline_stages_per_rank", text)


def _about_model(sizes: Sizes, facts: ModelFacts) -> Iterator[_Complaint]:
    tensor, expert = sizes.tensor_parallel_size, sizes.expert_parallel_size
    ranks, per_rank = sizes.pipeline_parallel_size, sizes.pipeline_stages_per_rank
    if ranks > 1 and ranks * per_rank > facts.blocks:
        text = f"{ranks} ranks of {per_rank} stages each are more than the model's {facts.blocks} blocks"
        yield _Complaint("blocks", "pipeline_parallel_size", text)
    if expert > 1 and not facts.experts:
        text = f"{expert}, but this model has no experts that can be divided"
        yield _Complaint("layers", "expert_parallel_size", text)
    if any(count % expert for count in facts.experts):
        text = f"{expert} does not divide the {_listed(sorted(facts.experts), 'or')} experts of a layer"
        yield _Complaint("layers", "expert_parallel_size", text)
    for heads in facts.heads:
        own = heads // tensor if heads % tensor == 0 else heads
        if own % sizes.ulysses_parallel_size:
            shared = f" on each of the {tensor} tensor-parallel ranks" if own < heads else ""
            text = f"{sizes.ulysses_parallel_size} does not divide the model's {own} attention heads{shared}"
            yield _Complaint("heads", "ulysses_parallel_size", text)
            break
    for piece in facts.pieces:
        if piece.units % tensor and not (piece.shared and tensor % piece.units == 0):
            text = f"{tensor} does not divide the {piece.units} {piece.what} of {piece.name}"
            yield _Complaint("pieces", "tensor_parallel_size", text)
            break
    if tensor > 1 and facts.vocabulary <= (tensor - 1) * -(-facts.vocabulary // tensor):
        text = f"{tensor} ranks are too many for a vocabulary of {facts.vocabulary}"
        yield _Complaint("vocabulary", "tensor_parallel_size", text)


def misfits(sizes: Sizes, facts: ModelFacts | None = None) -> list[str]:
    """One problem for each rule that `sizes` violate, with changes that would fix it.

    facts: sizes of the model; without them, model rules are skipped.
    """
    found = list(_complaints(sizes, facts))
    return [f"train.{item.argument}: {item.text}; {_advice(item, sizes, facts)}" for item in found]


def _advice(complaint: _Complaint, sizes: Sizes, facts: ModelFacts | None) -> str:
    """The values of the complaint's argument that fix its rule, preferably without violating another one."""
    broken = {item.rule for item in _complaints(sizes, facts)}
    mending, clean = [], []
    for label, change in _changes(complaint, sizes):
        still = {item.rule for item in _complaints(replace(sizes, **change), facts)}
        if complaint.rule not in still:
            mending.append(label)
            if still <= broken:
                clean.append(label)
    if not mending:
        assert complaint.rule == "ranks", f"nothing would do about {complaint.rule}: {sizes}, {facts}"
        return f"{math.prod(sizes.inner.values())} ranks would"
    labels = clean or mending
    if labels == ["1"] and complaint.argument != "global_batch_size":
        return "leave it at 1"
    return f"{_listed(labels, 'or')} would"


def _changes(complaint: _Complaint, sizes: Sizes) -> Iterator[tuple[str, dict[str, Any]]]:
    """Other values for the argument of a complaint, each with its description, in the order for messages. Except for
    the rule about ranks, at least one of them fixes the rule."""
    argument, data = complaint.argument, sizes.data
    if argument == "global_batch_size":
        assert data is not None and sizes.global_batch_size is not None
        micro = sizes.micro_batch_size * data
        below = sizes.global_batch_size // micro * micro
        yield from ((str(size), {argument: size}) for size in (below, below + micro) if size)
    elif argument == "data_parallel_replicate_size" and sizes.data_parallel_mode != "ddp":
        assert data is not None
        for size in _divisors(data):
            yield f"{size} * {data // size}", {argument: size, "data_parallel_shard_size": data // size}
    elif argument == "pipeline_stages_per_rank":
        yield from ((str(size), {argument: size}) for size in (1, 2))
        for schedule in ("1f1b", "interleaved"):
            yield f"train.pipeline_schedule={schedule}", {"pipeline_schedule": schedule}
    else:
        yield from ((str(size), {argument: size}) for size in _divisors(sizes.world))
        if complaint.rule == "blocks":
            for count in range(1, sizes.pipeline_stages_per_rank):
                yield f"train.pipeline_stages_per_rank={count}", {"pipeline_stages_per_rank": count}
        if complaint.rule in ("shards", "experts") and sizes.data_parallel_mode == "ddp":
            yield "train.data_parallel_mode=fsdp2", {"data_parallel_mode": "fsdp2"}


def _divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    return [size for size in range(1, number + 1) if number % size == 0]


def _listed(choices: Sequence[Any], conjunction: str) -> str:
    """Format choices as `1, 2 or 4`."""
    *first, last = map(str, choices)
    return f"{', '.join(first)} {conjunction} {last}" if first else last
