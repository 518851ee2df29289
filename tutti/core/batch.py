"""Samples, packed micro batches and global batches: the records that data hands to training.

A *sample* is one training sequence with its targets already shifted: `labels[t]` is the token that position `t`
must predict, or `IGNORE`. A *batch* (micro batch) is several samples laid end to end without padding, together with
the borders between them (`cu_seqlens`), which attention, rotary positions and the loss all honour. A *global batch*
is everything that one optimizer step on this data-parallel rank consumes, plus the totals over all ranks, which are
known before the forward pass because packing is planned globally: the loss is a sum divided by `num_targets`, and no
communication is needed to find that number.

Shapes: T tokens in a micro batch, S samples in it, N trained targets in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

IGNORE = -100
"""Label of a position that is not trained on; the value torch's cross-entropy ignores."""

EMPTY_LENGTH = 16
"""Tokens of a batch without samples. Ranks that share it get two each or more: sizes of one are compiled anew."""

PAD_SEGMENT = 256
"""Padding is cut into segments of at most this many tokens, so that attention over it stays linear in its length."""


ALONG_TOKENS = ("position_ids", "mm_token_type_ids", "token_type_ids")
"""The extras of a batch that have a value for each token, in their last dimension. position_ids have as many rows as
the model rotates by (mrope)."""


DRAWN_PIXELS = "drawn_pixels"
"""The extra, fp32 [N, 3, S, S] in [-1, 1], that holds the pictures of which a model that draws gets the codes."""


class Frames(NamedTuple):
    """The frames that are taken of a video: their indices among how many, and how many a second there are."""

    indices: tuple[int, ...]
    total: int
    fps: float


class Grid(NamedTuple):
    """Latents of pixels: the pixels a side of one, the frames of a video to each beyond the first (0: of models
    of pictures), and the latents a side that make a token."""

    pixels: int
    frames: int
    patch: int

    @property
    def step(self) -> int:
        """The pixels that the sides of a picture are multiples of."""
        return self.pixels * self.patch


class Media(NamedTuple):
    """An image, a video or a sound of a sample: where it is found, and its size.

    kind: image, video, audio, or drawn: an image that comes as the codes that it is drawn by. source: a path, or the
    encoded bytes; of a video also those of each of its frames. size: of an image or a video (width, height), upright;
    of a sound its number of samples, at the rate of the model's processor. frames: of a video. sound: number of samples
    of a video's own sound, if that is heard with it.
    """

    kind: str
    source: str | bytes | tuple[str | bytes, ...]
    size: tuple[int, ...]
    frames: Frames | None = None
    sound: int = 0


@dataclass(frozen=True, slots=True)
class Sample:
    """One training sequence of n tokens.

    input_ids, labels: int32 [n]. For language modelling `labels[t]` is `input_ids[t + 1]` where that token is trained
    on, else IGNORE; the last entry is always IGNORE. For classification the last entry is the class, all others IGNORE.
    source: index of the data source the sample came from.
    split: where the rejected one of a pair of answers begins, each a sequence of its own; 0 for a single sequence.
    media: what stands in the place of some of its tokens, in their order. num_values: the numbers (of pixels, or of a
    sound's features) that these become.
    bucket: samples of different buckets (sizes of pictures) are never in one micro batch.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    source: int = 0
    split: int = 0
    media: tuple[Media, ...] = ()
    num_values: int = 0
    bucket: int = 0

    def __len__(self) -> int:
        return len(self.input_ids)


class LostSample(NamedTuple):
    """A sample whose media cannot be decoded: why, the data source that it came from, and the targets that it had."""

    reason: str
    source: int
    targets: int


class SequenceRanks(NamedTuple):
    """The ranks that split the tokens of one batch, and this rank's place among them.

    Plain data, which compiled code and custom operators can be handed: groups are named as torch registers them.
    context: ranks that pass keys and values around. ulysses: ranks that exchange tokens for heads. tensor: ranks that
    are given the same tokens and cut them among themselves between attention and MLP.
    """

    context_rank: int
    context_size: int
    context_group: str
    ulysses_rank: int
    ulysses_size: int
    ulysses_group: str
    tensor_size: int = 1

    @property
    def size(self) -> int:
        """The number of ranks that have different tokens."""
        return self.context_size * self.ulysses_size


@dataclass(frozen=True, slots=True)
class FullTokens:
    """All tokens of a batch that several ranks share, for a model that looks at them before they are divided: where
    images lie among them is the same for every rank.

    input_ids, position_ids: int64 [T], as in `Batch`. held: int64 [t], the places of this rank's own tokens, in order.
    """

    input_ids: Tensor
    position_ids: Tensor
    held: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> FullTokens:
        return FullTokens(change(self.input_ids), change(self.position_ids), change(self.held))


@dataclass(frozen=True, slots=True)
class GlobalSequence:
    """The batch that a rank's tokens are a part of, for attention, which looks beyond them.

    length: its tokens before it was padded to a multiple of the ranks. num_tokens: those of them that are not padding,
    which come first. cu_seqlens: int32, the borders of its samples
    and of that padding. borders: the same, always on the host. max_seqlen: length of the longest segment. row: its
    tokens, where it has inputs beside them (`Batch.extras`). samples: where the ranks split each sample apart, every
    sample as a batch of its own.
    """

    length: int
    num_tokens: int
    cu_seqlens: Tensor
    borders: Tensor
    max_seqlen: int
    ranks: SequenceRanks
    row: FullTokens | None = None
    samples: tuple[GlobalSequence, ...] = ()

    @property
    def parts(self) -> tuple[GlobalSequence, ...]:
        """The sequences that were split, one after the other: its samples, or all of it at once."""
        return self.samples or (self,)

    @property
    def share(self) -> int:
        """The number of its tokens, padding included, that each rank holds."""
        return int(self.borders[-1]) // self.ranks.size

    def map(self, change: Callable[[Tensor], Tensor]) -> GlobalSequence:
        row, samples = self.row and self.row.map(change), tuple(sample.map(change) for sample in self.samples)
        return replace(self, cu_seqlens=change(self.cu_seqlens), row=row, samples=samples)


@dataclass(frozen=True, slots=True)
class Batch:
    """A packed micro batch.

    input_ids, labels, position_ids: int64 [T]; positions restart at 0 with every sample.
    cu_seqlens: int32 [S + 1], the samples' borders, from 0 to T; segments of padding count as samples.
    max_seqlen: length of the longest segment.
    target_index: int64 [N], the positions whose label is not IGNORE, ascending.
    target_segment: int64 [N], the number of the segment that each target lies in. Segments are counted over the whole
    batch, also where this is one rank's part of it.
    segment_sources: int64, the data source of each segment of the whole batch (padding: -1).
    num_sequences: the segments of the whole batch that are not padding. A pair of answers makes two, next to each
    other.
    num_tokens: tokens that are not padding.
    extras: what only some models take (pixel_values ...), by the name and in the shape of the model's forward argument.
    Those of ALONG_TOKENS have a value for each token, in the last dimension; where ranks share the batch, for each of
    all its tokens.
    borders: cu_seqlens on the host, once the batch is on another device.
    sequence: where these are one rank's tokens of a batch that several ranks share, what that batch was. The samples
    are then the pieces of samples that lie on this rank, and a piece's positions go on from where it was cut.
    payload: tensors about the batch as a whole that its task laid beside it, by name; they are moved with it, and
    are the same for all ranks that share it.
    broken: samples that had to be left out when their media were decoded; padding lies in their place.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    target_index: Tensor
    target_segment: Tensor
    segment_sources: Tensor
    num_sequences: int
    num_tokens: int
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    sequence: GlobalSequence | None = None
    payload: Mapping[str, Tensor] = field(default_factory=dict)
    borders: Tensor | None = None
    broken: tuple[LostSample, ...] = ()

    def lengths(self) -> list[int]:
        """The segments' lengths, padding left out; for a whole batch on the host."""
        lengths = self.cu_seqlens.diff().tolist()
        return [length for length, source in zip(lengths, self.segment_sources.tolist(), strict=True) if source >= 0]

    def num_values(self) -> int:
        """The number of values (pixels times channels) in the batch's images, video and audio."""
        return sum(value.numel() for value in self.extras.values() if value.is_floating_point())

    def to(self, device: torch.device) -> Batch:
        """A copy of the batch on `device`; copies from pinned memory do not block."""
        moved = self.map(lambda tensor: tensor.to(device, non_blocking=True))
        return replace(moved, borders=self.cu_seqlens if self.borders is None else self.borders)

    def pin_memory(self) -> Batch:
        """A copy of the batch in page-locked memory (the hook that torch's DataLoader calls)."""
        return self.map(Tensor.pin_memory)

    def map(self, change: Callable[[Any], Any]) -> Batch:
        """A copy of the batch with each of its tensors, or arrays on their way, changed."""
        values: dict[str, Any] = {name: getattr(self, name) for name in self.__slots__}
        held = (Tensor, np.ndarray)
        values = {name: change(value) if isinstance(value, held) else value for name, value in values.items()}
        for name in ("extras", "payload"):
            values[name] = {key: change(value) for key, value in values[name].items()}
        if self.sequence is not None:
            values["sequence"] = self.sequence.map(change)
        return Batch(**values)


def pack(samples: Sequence[Sample], *, pad_to: int | None = None, pad_id: int = 0) -> Batch:
    """Lay `samples` end to end as one micro batch of T tokens; with `pad_to`, T is exactly that.

    A sample that is split makes two segments. Padding carries IGNORE labels and lies in segments of its own. With no
    samples the batch is padding alone (T = pad_to or EMPTY_LENGTH): what a rank runs that has nothing left to train on
    while others have.
    """
    if not samples and pad_to is None:
        pad_to = EMPTY_LENGTH
    lengths: list[int] = []
    sources: list[int] = []
    for sample in samples:
        parts = (sample.split, len(sample) - sample.split) if sample.split else (len(sample),)
        lengths += parts
        sources += [sample.source] * len(parts)
    num_tokens, num_sequences = sum(lengths), len(lengths)
    padding = max(0, (pad_to or 0) - num_tokens)
    ids = [sample.input_ids for sample in samples] + [np.full(padding, pad_id, np.int64)]
    labels = [sample.labels for sample in samples] + [np.full(padding, IGNORE, np.int64)]
    while padding:
        lengths.append(min(padding, PAD_SEGMENT))
        sources.append(-1)
        padding -= lengths[-1]
    flat_labels = np.concatenate(labels).astype(np.int64)
    targets = (flat_labels != IGNORE).nonzero()[0]
    cu_seqlens = np.cumsum([0, *lengths], dtype=np.int32)
    return Batch(
        input_ids=torch.from_numpy(np.concatenate(ids).astype(np.int64)),
        labels=torch.from_numpy(flat_labels),
        position_ids=torch.from_numpy(np.concatenate([np.arange(n, dtype=np.int64) for n in lengths])),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        max_seqlen=max(lengths),
        target_index=torch.from_numpy(targets),
        target_segment=torch.from_numpy(np.searchsorted(cu_seqlens[1:], targets, side="right")),
        segment_sources=torch.tensor(sources, dtype=torch.int64),
        num_sequences=num_sequences,
        num_tokens=num_tokens,
    )


@dataclass(frozen=True, slots=True)
class GlobalBatch:
    """The micro batches of this data-parallel rank in one optimizer step, and the totals over all ranks.

    micro_batches: this rank's, as many as every other rank's (a rank short of data gets batches of padding).
    num_targets: what the summed loss is divided by, over all ranks and micro batches: trained tokens, or pairs.
    trained_tokens: over all ranks as well.
    num_tokens, num_slots: tokens without and with padding or unfilled room, over all ranks (a micro batch has B slots
    with dyn_bsz or pad_to_length; else its own length). num_samples: samples over all ranks.
    source_targets, source_tokens: num_targets and trained_tokens per source name.
    names: for each micro batch what finds its samples in the data again (plain data; of indexed data their numbers).
    step: the optimizer step this is for, from 1. epoch: the epoch, from 0, that it belongs to. epoch_end: whether it is
    that epoch's last.
    """

    micro_batches: tuple[Batch, ...]
    num_targets: int
    trained_tokens: int
    num_tokens: int
    num_samples: int
    num_slots: int
    source_targets: Mapping[str, int]
    source_tokens: Mapping[str, int]
    names: tuple[tuple[Any, ...], ...]
    step: int
    epoch: int
    epoch_end: bool

    @property
    def counts(self) -> dict[str, int]:
        """The number that each loss of the step, by its name among the objective's sums, is divided by."""
        return {"loss": self.num_targets, "router_loss": self.num_tokens}
