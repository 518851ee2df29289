"""The data of a run: global batches for this data-parallel rank, and the position to resume from.

`build_data` opens the sources, finds the lengths of all samples (index.py) or sets up streams (stream.py), and plans
the number of steps (plan.py). `Data.train()` then follows the plan, step by step:

1. The planner says which samples make up the step's M micro batches, for all ranks.
2. This rank's samples are read, encoded and packed, in worker processes if that takes time (prefetch.py).
3. The totals over all ranks come from the plan.

The planner runs ahead together with the workers. Every planned step therefore carries the position after it, and
`state_dict()` is the position of the last global batch returned.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice, takewhile
from typing import Any, Literal, NamedTuple

import numpy as np

from tutti.config import Config
from tutti.core.batch import Batch, GlobalBatch, Sample
from tutti.core.dist import World
from tutti.data.encode import make_encoder
from tutti.data.images import make_image_encoder
from tutti.data.index import CHUNK, Index, MapSource, encode_chunk, log_left_out
from tutti.data.learn import make_index
from tutti.data.media import MediaSummary
from tutti.data.mix import SampleRef, Weights
from tutti.data.pack import deal_work
from tutti.data.plan import (
    BatchingPlan,
    MicroBatches,
    Planner,
    SampleSource,
    StepPlan,
    describe_steps,
    make_batching_plan,
    one_pass,
)
from tutti.data.preencoded import PreEncoded
from tutti.data.preference import make_pair_encoder
from tutti.data.prefetch import Collator, Fetch, PackedSamples, fetch_indexed, fetch_streamed, loader_options
from tutti.data.remote import fetch_data
from tutti.data.source import LocalCopies, Source, open_sources
from tutti.data.stream import ChunkPrefetcher, StreamSource, data_changed, row_counts
from tutti.data.template import is_dated

log = logging.getLogger(__name__)

Work = Callable[[Sequence[int], int], float]
"""Estimates the work of a micro batch from the lengths of its samples and the number of its media's values."""


def num_tokens(lengths: Sequence[int], num_values: int) -> float:
    """The work of a model whose parts cost the same for each token."""
    return float(sum(lengths))


@dataclass(frozen=True)
class DataSummary:
    """Statistics of the training data; for streamed data, of what has been read so far.

    rows, samples, tokens, trained_tokens: of one pass; tokens are estimated if rows are tokenised as they are drawn.
    dropped: rows left out, by reason. packing_efficiency: tokens per slot, over the entire run or so far; None before
    the first step. media: of indexed data.
    """

    rows: int
    samples: int
    tokens: int
    trained_tokens: int
    dropped: dict[str, int]
    packing_efficiency: float | None
    media: MediaSummary = field(default_factory=MediaSummary)


@dataclass(frozen=True)
class DataSplit:
    """Data for training or evaluation: the plan, how its micro batches are fetched, its report, and how to close it.

    sources: their names, used as keys of a batch's counts. report: takes the samples, tokens, trained tokens and slots
    returned so far. has_media: None if data is streamed. broken: counts of samples that this rank left out because
    their media cannot be decoded, by reason. may_lose: true if samples may be left out. Of indexed data only: digest:
    its checksum; scan: makes a planner of one ordered pass; read: returns samples by their names in a batch.
    """

    sources: tuple[str, ...]
    planner: Planner
    fetch: Fetch
    report: Callable[[np.ndarray], DataSummary]
    close: Callable[[], None] = lambda: None
    digest: str | None = None
    scan: Callable[[], Planner] | None = None
    has_media: bool | None = None
    broken: Counter[str] = field(default_factory=Counter)
    read: Callable[[list[int]], list[Sample]] | None = None
    may_lose: bool = False


@dataclass(frozen=True)
class DataRank:
    """Selects this rank's micro batches. pairs: a sample is a pair of answers.

    work: the cost of a micro batch, by which micro batches are distributed over ranks.
    """

    dp_rank: int
    dp_size: int
    pairs: bool
    world: World
    work: Work = num_tokens

    def micro_batches(self, plan: StepPlan, source: SampleSource, number: int) -> MicroBatches:
        """This rank's share of the `number` micro batches of a step; missing ones at the end are empty."""
        planned = plan.micro_batches + [[]] * (number - len(plan.micro_batches))
        if self.dp_size == 1:
            return planned
        works = [self._work_of(batch, source) for batch in planned]
        return [planned[k] for k in deal_work(works, self.dp_size)[self.dp_rank]]

    def lost(self, batch: Sequence[Batch], num_sources: int) -> np.ndarray:
        """The number of targets, by source, in samples of a step that any rank left out. batch: this rank's micro
        batches. A collective call."""
        own = np.zeros(num_sources, np.int64)
        for sample in (sample for micro in batch for sample in micro.broken):
            own[sample.source] += sample.targets
        by_rank = dict(self.world.gather((self.dp_rank, own)))  # ranks with the same dp_rank have the same
        return sum(by_rank.values(), np.zeros_like(own))

    def _work_of(self, batch: Sequence[SampleRef], source: SampleSource) -> float:
        items = [item for _, item in batch]
        return self.work([length for length, _ in batch], source.num_values(items)) if items else 0.0


def global_batches(planner: Planner, split: DataSplit, rank: DataRank) -> Iterator[tuple[StepPlan, GlobalBatch]]:
    """Follow `planner`, which plans batches of `split`; fetching may run ahead, while plans wait for their batches."""
    planned: deque[tuple[StepPlan, MicroBatches]] = deque()
    micro_batches = planner.batching.micro_batches

    def mine() -> Iterator[list[Any]]:
        for plan in planner.steps():
            own = rank.micro_batches(plan, planner.source, micro_batches)
            planned.append((plan, own))
            for batch in own:
                yield [item for _, item in batch]

    batches = split.fetch(mine())
    while batch := tuple(islice(batches, micro_batches // rank.dp_size)):
        plan, own = planned.popleft()
        for reason in (lost.reason for one in batch for lost in one.broken):
            if not split.broken[reason]:
                log.warning("left out, with padding in its place: %s", reason)
            split.broken[reason] += 1
        yield plan, _with_totals(plan, own, batch, split, rank)


def _with_totals(
    plan: StepPlan, own: MicroBatches, batch: tuple[Batch, ...], split: DataSplit, rank: DataRank
) -> GlobalBatch:
    pairs = rank.pairs
    sample_source = split.planner.source
    drawn = [one for micro_batch in plan.micro_batches for one in micro_batch]
    tokens, sources = sample_source.facts([item for _, item in drawn])
    targets = np.ones_like(tokens) if pairs else tokens

    lost = np.zeros(len(split.sources), np.int64)
    if split.may_lose and split.has_media is not False:
        lost = rank.lost(batch, len(split.sources))

    def by_source(counts: np.ndarray, lost: np.ndarray | int = 0) -> dict[str, int]:
        sums = np.bincount(sources, weights=counts, minlength=len(split.sources)) - lost
        return {name: int(count) for name, count in zip(split.sources, sums, strict=True)}

    source_tokens, num_lost = by_source(tokens, lost), int(lost.sum())
    return GlobalBatch(
        micro_batches=batch,
        # A step that has lost all its samples trains on nothing, and no loss is divided.
        num_targets=int(targets.sum()) if pairs else max(1, int(tokens.sum()) - num_lost),
        trained_tokens=int(tokens.sum()) - num_lost,
        num_tokens=sum(length for length, _ in drawn),
        num_samples=len(drawn),
        num_slots=plan.slots,
        source_targets=by_source(targets) if pairs else source_tokens,
        source_tokens=source_tokens,
        names=tuple(tuple(sample_source.name(item) for _, item in one) for one in own),
        step=plan.step,
        epoch=plan.epoch,
        epoch_end=plan.epoch_end,
    )


class Data:
    """Training and evaluation data of a run, made by `build_data`.

    total_steps: optimizer steps of the entire run, including those before the position. steps_reason: the log line that
    explains it. Both change with `load_state_dict`. sources, evaluation_sources: names. digest: checksum of all
    training and evaluation data, None if streamed. chat_date: the date written into chats, None if their template
    writes none. state_dict() is the position after the last global batch of train(): plain data, the same on every
    rank.
    """

    def __init__(
        self, train: DataSplit, evaluation: DataSplit | None, rank: DataRank, settings: dict[str, Any], encoder: Any
    ) -> None:
        self.sources, self.evaluation_sources = train.sources, evaluation.sources if evaluation else ()
        self.chat_date: str | None = settings["data.chat_date"]
        self.digest = train.digest and f"{train.digest} {evaluation.digest if evaluation else None}"
        self._train, self._evaluation, self._rank, self._settings = train, evaluation, rank, settings
        self._encoder = encoder
        self._given = np.zeros(4, np.int64)
        self._ahead = False
        self._plan_ahead()
        if evaluation is not None:
            evaluation.planner.count()
            self._evaluation_start = evaluation.planner.position()

    def leave_out_drawn(self) -> None:
        """Replace pictures that the model draws by blanks, from the next `train` or `evaluate` on: their codes are
        already known."""
        getattr(self._encoder, "encoder", self._encoder).media.decodes_drawn = False  # inside PreEncoded

    def _plan_ahead(self) -> None:
        planner = self._train.planner
        planner.count()
        self.total_steps = planner.total_steps
        self._position = planner.position()

    @property
    def has_media(self) -> bool | None:
        """True if training samples have media; None if they are streamed, when nobody knows."""
        return self._train.has_media

    def read(self, names: Sequence[Any], split: Literal["train", "eval"] = "train") -> list[Sample] | None:
        """The samples of a micro batch, with their media, by their names in it; None if the data is streamed, or
        there is no evaluation data."""
        part = self._train if split == "train" else self._evaluation
        return None if part is None or part.read is None else part.read(list(names))

    def size(self, split: Literal["train", "eval"]) -> int:
        """The number of samples that `read` can return; 0 if the data is streamed."""
        part = self._train if split == "train" else self._evaluation
        return 0 if part is None or part.read is None else part.planner.source.size or 0

    def largest(self) -> list[Sample]:
        """The samples of the micro batch with the most media values, among those planned for the epoch of the first
        step; empty if there are no media or the data is streamed."""
        if not self._train.has_media or self._train.read is None:
            return []
        planner = Planner(self._train.planner.source, self._train.planner.batching)
        planner.count()
        plans = iter(planner.steps())
        first = next(plans)  # it may end in a later epoch
        plans = chain([first], takewhile(lambda plan: plan.epoch == first.epoch, plans))
        batches = ([item for _, item in batch] for plan in plans for batch in plan.micro_batches)
        return self._train.read(max(batches, key=planner.source.num_values))

    @property
    def steps_reason(self) -> str:
        return describe_steps(self._train.planner)

    @property
    def report(self) -> DataSummary:
        found = self._train.report(self._given)
        return replace(found, dropped={**found.dropped, **self._train.broken})

    def train(self) -> Iterator[GlobalBatch]:
        """Global batches from the position to the end of the last epoch."""
        if self._ahead:
            self._train.planner.load_position(self._position)
        self._ahead = True
        try:
            for plan, batch in global_batches(self._train.planner, self._train, self._rank):
                self._position = plan.position
                self._given += (batch.num_samples, batch.num_tokens, batch.trained_tokens, batch.num_slots)
                yield batch
        finally:
            self._train.close()

    def close(self) -> None:
        """Close the training data. Logs how many rows of streams were left out (for an index this is logged before
        training)."""
        self._train.close()
        if self._train.digest is None and self._rank.world.is_main:
            log_left_out("data.train_path", self.report.rows, self.report.dropped)

    def evaluate(self) -> Iterator[GlobalBatch]:
        """Global batches of one pass over data.eval_path, in order, each sample once over all ranks."""
        if self._evaluation is None:
            raise ValueError("there is nothing to evaluate on: set data.eval_path")
        planner = self._evaluation.planner
        planner.load_position(self._evaluation_start)
        for _, batch in global_batches(planner, self._evaluation, self._rank):
            yield batch

    def scan(self) -> Iterator[GlobalBatch]:
        """Global batches of one pass over the training data, in order, each sample once over all ranks; the position
        does not change. For data that is not streamed."""
        assert self._train.scan is not None, "streams cannot be gone over beforehand"
        planner = self._train.scan()
        planner.count()
        for _, batch in global_batches(planner, self._train, self._rank):
            yield batch

    def deal_by(self, work: Work) -> None:
        """Distribute each step's micro batches over ranks by this measure instead of by tokens."""
        self._rank = replace(self._rank, work=work)

    def state_dict(self) -> dict[str, Any]:
        """The position, and the data, seed and order for which it is valid."""
        return {
            "settings": _plain(self._settings),
            "position": _plain(self._position),
            "given": self._given.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`; ValueError if it was made with other data, another seed or another order."""
        for name, now in self._settings.items():
            before = state["settings"].get(name)
            if before == now:
                continue
            if name == "digest":
                raise data_changed()
            raise ValueError(
                f"{name} is {now} but was {before} when the checkpoint was made: set it back to go on, or start a run "
                "of its own from an exported model (model.model_path: .../hf/final, another train.output_dir)"
            )
        self._train.planner.load_position(state["position"])
        self._given = np.array(state["given"], np.int64)
        self._ahead = False
        self._plan_ahead()


class Classes(NamedTuple):
    """The classes of a classifier: their number, and their names, if any."""

    number: int | None = None
    names: Sequence[str] = ()


NO_CLASSES = Classes()


def build_data(
    config: Config,
    tokenizer: Any,
    *,
    world: World,
    dp_rank: int,
    dp_size: int,
    vocab_size: int,
    classes: Classes = NO_CLASSES,
    processor: Any = None,
) -> Data:
    """Open data.train_path (and data.eval_path), index them and plan the run. A collective call on all ranks.

    dp_rank, dp_size: this rank's coordinate along the data-parallel axes; ranks with the same dp_rank get the same
    batches. vocab_size: rows of the model's embedding. processor: the Hugging Face processor of a model that takes
    media; for a pixel model, its `Square`. ValueError, on all ranks: data that is missing, empty or bad, or too little
    for one global batch.
    """
    rows = config.data.task.rows
    pairs = rows == "pairs"
    elsewhere = fetch_data(config, world)

    def find_encoder() -> Any:
        if rows == "captions":
            return processor
        if rows == "images":
            return make_image_encoder(config, processor)
        options: dict[str, Any] = {"vocab_size": vocab_size, "processor": processor}
        if pairs:
            return make_pair_encoder(config, tokenizer, **options)
        return make_encoder(config, tokenizer, num_labels=classes.number, label_names=classes.names, **options)

    encoder, sources, held_out = world.run_on_all_ranks(
        lambda: (find_encoder(), open_sources(config, elsewhere=elsewhere), _held_out(config, elsewhere))
    )
    if ":" in config.data.datasets_type:
        encoder = PreEncoded(encoder, config.data.sample_tokens, vocab_size, pairs=pairs)
    pad_id = _pad_id(tokenizer)
    streams = config.data.datasets_type == "iterable" or not all(source.mapping for source in sources)
    _require_same_rows(config, sources, encoder, world)
    explicit = "data.train_size" if config.train.dyn_bsz else "data.train_sample"
    batching = make_batching_plan(config, dp_size=dp_size, by_formula=streams or explicit in config.explicit)
    names = [source.name for source in sources]
    settings: dict[str, Any] = {
        "train.seed": config.train.seed,
        "data.max_seq_len": config.data.sample_tokens,
        "data.shuffle": config.data.shuffle,
        "data.datasets_type iterable": streams,
        "data.chat_date": config.data.chat_date if config.data.task.holds_chats and is_dated(tokenizer) else None,
        "the list of sources in data.train_path": names,
        "whether sources in data.train_path have weights": _weights(sources) is not None,
    }
    collate = Collator(encoder, batching.pad_to, pad_id, config.data.silent_exception)
    if streams:
        part = _streamed_part(config, sources, collate, batching, decodes=processor is not None)
    else:
        index = make_index(
            config,
            sources,
            encoder,
            world,
            "data.train_path",
            row_is_sample=rows in ("conversations", "labels")
            and processor is None
            and not any(source.own for source in sources),
            counts_without_lengths=batching.counts_without_lengths,
        )
        settings["digest"] = index.digest
        sample_source = MapSource(index, _weights(sources), names, config.train.seed, config.data.shuffle)
        part = _indexed_part(config, PackedSamples(index, sources, collate), sample_source, batching)
    evaluation = None
    if held_out is not None:
        index = make_index(config, held_out, encoder, world, "data.eval_path")
        sample_source = MapSource(index, None, [source.name for source in held_out], config.train.seed, shuffle=False)
        evaluation = _indexed_part(config, PackedSamples(index, held_out, collate), sample_source, one_pass(batching))
    may_lose = config.data.silent_exception and processor is not None
    part, evaluation = replace(part, may_lose=may_lose), evaluation and replace(evaluation, may_lose=may_lose)
    return Data(part, evaluation, DataRank(dp_rank, dp_size, pairs, world), settings, encoder)


def _require_same_rows(config: Config, sources: Sequence[Source], encoder: Any, world: World) -> None:
    """ValueError, on all ranks: a user's dataset begins with different rows on some ranks, because it shards itself."""
    own = [source for source in sources if source.own]
    if world.size == 1 or not own:
        return

    def begin() -> list[tuple[int, int]]:
        heads = (list(islice(source.stream(), CHUNK)) for source in own)
        chunks = (encode_chunk(encoder, 0, range(len(rows)), rows) for rows in heads)
        return [(chunk.rows, chunk.crc) for chunk in chunks]

    first = world.run_on_all_ranks(begin)
    if any(others != first for others in world.gather(first)):
        raise ValueError(
            f"data.datasets_type: {config.data.datasets_type} gives other rows on other ranks: give all rows on all of "
            "them, which get their share later"
        )


def _held_out(config: Config, elsewhere: LocalCopies) -> list[Source | Loaded] | None:
    """The sources of data.eval_path, if set."""
    if not config.data.eval_path:
        return None
    sources = open_sources(config, config.data.eval_path, elsewhere=elsewhere)
    return [source if source.mapping else Loaded(source) for source in sources]


class Loaded:
    """A source without random access, loaded into memory: evaluation data is small."""

    def __init__(self, source: Source) -> None:
        self.name = source.name
        self._rows = list(source.stream())

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self, ids: Sequence[int]) -> list[Any]:
        return [self._rows[one] for one in ids]


def _pad_id(tokenizer: Any) -> int:
    """The padding id in packed rows. Not the tokenizer's own, whose embedding may be zero, where some models cannot
    be differentiated (Gemma 3n takes the root of its square)."""
    return int(getattr(tokenizer, "pad_token_id", None) == 0)


def _weights(sources: Sequence[Source]) -> Weights | None:
    """The sources' weights by step; None if none are set: each sample then comes once per pass."""
    if len(sources) == 1 or not any(source.weighted for source in sources):
        return None
    return lambda step: [source.weight_at(step) for source in sources]


def _needs_workers(index: Index) -> bool:
    return index.tokens is None or bool(index.num_media.any())


def _indexed_part(
    config: Config, samples: PackedSamples, sample_source: MapSource, batching: BatchingPlan
) -> DataSplit:
    index = samples.index
    planner = Planner(sample_source, batching)
    # Packing samples from memory is faster here than receiving them from workers; media are decoded by workers.
    num_workers = config.data.num_workers if _needs_workers(index) else 0

    def report(given: np.ndarray) -> DataSummary:
        counted = planner.counted
        known = len(index) if index.learn is None else np.count_nonzero(index.length)
        tokens, targets = (
            round(int(column.sum()) * len(index) / max(1, known)) for column in (index.length, index.targets)
        )
        return DataSummary(
            rows=index.rows,
            samples=len(index),
            tokens=tokens,
            trained_tokens=targets,
            dropped=index.dropped,
            packing_efficiency=counted.tokens / counted.slots if counted.slots else _efficiency(given),
            media=index.media,
        )

    def scan() -> Planner:
        return Planner(
            MapSource(index, None, sample_source.names, sample_source.seed, shuffle=False), one_pass(batching)
        )

    fetch = fetch_indexed(samples, loader_options(config, num_workers))
    return DataSplit(
        tuple(sample_source.names),
        planner,
        fetch,
        report,
        close=(lambda: None) if index.learn is None else index.learn.close,
        digest=index.digest,
        scan=scan,
        has_media=bool(index.num_media.any()),
        read=samples.read,
    )


def _streamed_part(
    config: Config, sources: Sequence[Source], collate: Collator, batching: BatchingPlan, *, decodes: bool
) -> DataSplit:
    chunks = ChunkPrefetcher(
        sources, collate.encoder, loader_options(config, config.data.num_workers) | {"pin_memory": False}
    )
    capacity = config.data.shuffle_buffer_size if config.data.shuffle else 1
    silent = config.data.silent_exception
    sample_source = StreamSource(chunks, _weights(sources), seed=config.train.seed, capacity=capacity, silent=silent)
    planner = Planner(sample_source, batching)

    def report(given: np.ndarray) -> DataSummary:
        samples, tokens, targets, _ = given.tolist()
        rows, dropped = row_counts(planner.mix)
        return DataSummary(rows, samples, tokens, targets, dropped, _efficiency(given))

    names = tuple(source.name for source in sources)
    return DataSplit(names, planner, fetch_streamed(config, collate, decodes=decodes), report, chunks.close)


def _efficiency(given: np.ndarray) -> float | None:
    return float(given[1] / given[3]) if given[3] else None


def _plain(value: Any) -> Any:
    """The value with arrays converted to lists, at any depth."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value
