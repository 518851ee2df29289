"""Whether sizes fit: a number of ranks, a batch and a model, and which sizes would do where they don't.

Everything here is arithmetic on plain numbers: `Sizes` is what a configuration asks for, `ModelFacts` what of a model
has to be divided. The steps:

1. `_complaints` holds the sizes against every rule. A broken rule names the arguments that could be changed.
2. For each of these arguments all values that make sense are tried (`_candidates`). A value would do if it mends the
   rule and is part of sizes that fit in every respect, while nothing but what is complained about was changed.
3. If no value is that good, values are named that would do once a size that follows from others (the global batch, the
   data-parallel sizes, the experts' ranks) is changed with it; then numbers of ranks.

So with one problem, whatever is named fits as it stands; and with several, the problems can be mended one by one.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import combinations
from typing import Any, NamedTuple

from tutti.config.train import TrainConfig

INNER = ("tensor", "pipeline", "ulysses", "context")
"""The axes whose sizes are always given; data-parallel ranks are what is left of the world."""


class Piece(NamedTuple):
    """Something in a model that the tensor axis divides: `units` equal parts (what: heads, features) of `name`.

    shared: with more ranks than units, several ranks may hold the same one.
    """

    name: str
    units: int
    what: str
    shared: bool = False


@dataclass(frozen=True)
class ModelFacts:
    """What of a model the axes divide, in numbers. What belongs to an axis of size 1 may be left out.

    blocks: its depth (pipeline). heads: the numbers of query heads that its attention layers have (ulysses).
    experts: the numbers of experts that its layers of experts have (expert). pieces: what is divided of its blocks, and
    vocabulary: rows of its embedding, of which every rank must get some (tensor).
    """

    blocks: int = 0
    heads: tuple[int, ...] = ()
    experts: tuple[int, ...] = ()
    pieces: tuple[Piece, ...] = ()
    vocabulary: int = 0


@dataclass(frozen=True)
class Sizes:
    """The arguments of the train group that are about sizes, under their names, and the number of ranks."""

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
        """The number of data-parallel ranks; None where the axes do not divide the world."""
        ranks = math.prod(self.inner.values())
        return None if self.world % ranks else self.world // ranks

    @property
    def data_axes(self) -> tuple[int, int]:
        """Replicas, and ranks that share one, of sizes that fit."""
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


def misfits(sizes: Sizes, facts: ModelFacts | None = None) -> list[str]:
    """One problem for each argument that keeps `sizes` from fitting, with what would do; none if they fit.

    facts: of the model; without, nothing is said about it.
    """
    complaints = list(_complaints(sizes, facts))
    free = frozenset(complaint.argument for complaint in complaints)
    return [f"train.{item.argument}: {item.text}; {_advice(item, sizes, facts, free)}" for item in complaints]


class _Complaint(NamedTuple):
    """A rule that is broken, an argument that could mend it, and what to say. Several may be of one rule."""

    rule: str
    argument: str
    text: str


def _complaints(sizes: Sizes, facts: ModelFacts | None) -> Iterator[_Complaint]:
    """What is wrong with `sizes`; nothing, if they fit."""
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


class _Change(NamedTuple):
    """Another value for an argument, as a problem names it."""

    label: str
    values: dict[str, Any]


def _candidates(complaint: _Complaint, sizes: Sizes) -> Iterator[_Change]:
    """What could be set instead, in the order in which it is named."""
    argument, data = complaint.argument, sizes.data
    if argument == "global_batch_size":
        assert data is not None and sizes.global_batch_size is not None
        micro = sizes.micro_batch_size * data
        below = sizes.global_batch_size // micro * micro
        yield from (_Change(str(size), {argument: size}) for size in (below, below + micro) if size)
    elif argument == "data_parallel_replicate_size" and sizes.data_parallel_mode != "ddp":
        assert data is not None
        for size in _divisors(data):
            shard = data // size
            yield _Change(f"{size} * {shard}", {argument: size, "data_parallel_shard_size": shard})
    elif argument == "pipeline_stages_per_rank":
        yield from (_Change(str(size), {argument: size}) for size in (1, 2))
        yield from (_named("pipeline_schedule", value) for value in ("1f1b", "interleaved"))
    else:
        yield from (_Change(str(size), {argument: size}) for size in _divisors(sizes.world))
        if complaint.rule == "blocks":
            counts = range(1, sizes.pipeline_stages_per_rank)
            yield from (_named("pipeline_stages_per_rank", count) for count in counts)
        if complaint.rule in ("shards", "experts") and sizes.data_parallel_mode == "ddp":
            yield _named("data_parallel_mode", "fsdp2")


def _last_resorts(complaint: _Complaint, sizes: Sizes) -> Iterator[_Change]:
    """What would do where no other value does: other ranks, or what follows from the other sizes, whatever they are."""
    if complaint.rule == "ranks":
        ranks, replicas = math.prod(sizes.inner.values()), sizes.data_parallel_replicate_size
        data = replicas if sizes.data_parallel_mode == "ddp" else replicas * sizes.data_parallel_shard_size
        yield _Change(f"{ranks * data} ranks", {"world": ranks * data})
    else:
        label = "leaving it unset" if complaint.rule == "batch" else "leaving both at 1"
        yield _Change(label, _FOLLOWING[complaint.argument])


def _named(argument: str, value: Any) -> _Change:
    return _Change(f"train.{argument}={value}", {argument: value})


_FOLLOWING: dict[str, dict[str, Any]] = {
    "global_batch_size": {"global_batch_size": None},
    "data_parallel_replicate_size": {"data_parallel_replicate_size": 1, "data_parallel_shard_size": 1},
    "data_parallel_shard_size": {"data_parallel_shard_size": 1},
    "expert_parallel_size": {"expert_parallel_size": 1},
    "pipeline_stages_per_rank": {"pipeline_stages_per_rank": 1, "pipeline_schedule": "1f1b"},
}
"""Arguments that fit whatever the others are once they have these values, at which nothing else fits any worse."""

_FOLLOWED = ("global_batch_size", "data_parallel_replicate_size", "expert_parallel_size")
"""Of these, the ones that others may have to be changed with."""


def _advice(complaint: _Complaint, sizes: Sizes, facts: ModelFacts | None, free: frozenset[str]) -> str:
    """What to do about one complaint among those about the arguments `free`."""
    following = [name for name in _FOLLOWED if name not in free]
    subsets = [set(names) for count in range(len(following) + 1) for names in combinations(following, count)]
    for candidates, others in ((_candidates, free - {complaint.argument}), (_last_resorts, free)):
        for changed in subsets:
            tried = ((change.label, _with(sizes, change.values)) for change in candidates(complaint, sizes))
            labels = [label for label, change in tried if _mends(complaint.rule, change, facts, others | changed)]
            if not labels:
                continue
            if labels == ["1"] and complaint.argument != "global_batch_size" and not changed:
                return "leave it at 1"
            names = [f"train.{name}" for name in sorted(changed)]
            return f"{_listed(labels, 'or')} would" + (f", with another {_listed(names, 'and')}" if names else "")
    raise AssertionError(f"nothing would do about {complaint.rule}: {sizes}, {facts}")


def _mends(rule: str, sizes: Sizes, facts: ModelFacts | None, free: Iterable[str]) -> bool:
    """Whether `sizes` keep the rule, and would fit in every respect with other values of the arguments in `free`."""
    if any(complaint.rule == rule for complaint in _complaints(sizes, facts)):
        return False
    for name in free:
        sizes = _with(sizes, _FOLLOWING.get(name, {}))
    axes = [name for name in free if name not in _FOLLOWING]
    sizes = _with(sizes, dict.fromkeys(axes, 1))
    if sizes.data is None:
        return False
    options = (_with(sizes, dict(zip(axes, grid, strict=True))) for grid in _grids(sizes.data, len(axes)))
    return any(next(_complaints(option, facts), None) is None for option in options)


def _with(sizes: Sizes, values: dict[str, Any]) -> Sizes:
    return replace(sizes, **values)


def _grids(number: int, count: int) -> Iterator[tuple[int, ...]]:
    """All ways to choose so many sizes whose product divides the number."""
    if count == 0:
        yield ()
        return
    for size in _divisors(number):
        yield from ((size, *rest) for rest in _grids(number // size, count - 1))


def _divisors(number: int) -> list[int]:
    """All of them, ascending."""
    return [size for size in range(1, number + 1) if number % size == 0]


def _listed(choices: Sequence[Any], conjunction: str) -> str:
    """`1, 2 or 4`"""
    *first, last = map(str, choices)
    return f"{', '.join(first)} {conjunction} {last}" if first else last
