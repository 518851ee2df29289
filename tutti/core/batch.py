"""Samples, packed micro batches and global batches: the records that the data pipeline passes to training.

A *sample* is one training sequence with its targets already shifted: `labels[t]` is the token that position `t` must
predict, or `IGNORE`. A *batch* (micro batch) is several samples laid end to end without padding, together with the
borders between them (`cu_seqlens`), which attention, rotary positions and the loss all respect. A *global batch* is
everything that one optimizer step on this data-parallel rank consumes, plus totals over all ranks. The totals are known
before the forward pass because packing is planned globally: the loss is a sum divided by `num_targets`, and no
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
"""Label of a position that is not trained on; torch's cross-entropy ignores this value."""

EMPTY_LENGTH = 16
"""Tokens of a batch without samples: at least two for each rank that shares it, since torch.compile recompiles for
sizes of one."""

PAD_SEGMENT = 256
"""Maximum length of a padding segment, so that attention over padding stays linear in its length."""


ALONG_TOKENS = ("position_ids", "mm_token_type_ids", "token_type_ids")
"""The extras that have a value for each token, in their last dimension. position_ids have one row per rotary axis of
the model (mrope)."""


DRAWN_PIXELS = "drawn_pixels"
"""The extra, fp32 [N, 3, S, S] in [-1, 1], with the images that a model encodes to codes because it generates them.
"""


class Frames(NamedTuple):
    """The frames that are used of a video: their indices, the total number of frames, and the frame rate."""

    indices: tuple[int, ...]
    total: int
    fps: float


class Grid(NamedTuple):
    """The grid of latents: pixels per latent along a side, frames per latent beyond the first one (0: image models),
    and latents per token along a side."""

    pixels: int
    frames: int
    patch: int

    @property
    def step(self) -> int:
        """A picture's sides are multiples of this number of pixels."""
        return self.pixels * self.patch


class Media(NamedTuple):
    """An image, a video or a sound of a sample: where it is found, and its size.

    kind: image, video, audio, or drawn (an image that is represented by codes because the model generates it). source:
    a path, or encoded bytes; for a video possibly a tuple of those, one per frame. size: (width, height), upright, of
    an image or video; the number of samples of a sound, at the rate of the model's processor. frames: of a video.
    sound: number of samples of a video's own sound, if it is used.
    """

    kind: str
    source: str | bytes | tuple[str | bytes, ...]
    size: tuple[int, ...]
    frames: Frames | None = None
    sound: int = 0


@dataclass(frozen=True, slots=True)
class Sample:
    """One training sequence of n tokens.

    input_ids, labels: int32 [n]. For language modeling `labels[t]` is `input_ids[t + 1]` if that token is trained on,
    else IGNORE; the last entry is always IGNORE. For classification the last entry is the class, all others are IGNORE.
    source: index of the data source. split: start of the rejected answer in a pair of answers, each of which is a
    sequence of its own; 0 for a single sequence. media: in the order in which they occur. num_values: the number of
    values (pixels, or features of sounds) that the media become. bucket: samples of different buckets (picture sizes)
    are never in one micro batch.
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
    """A sample whose media cannot be decoded: the reason, its data source, and the number of targets that it had."""

    reason: str
    source: int
    targets: int


class SequenceRanks(NamedTuple):
    """The ranks that split the tokens of one batch, and this rank's place among them.

    This is plain data that compiled code and custom operators accept; groups are given by their names in torch.
    context: ranks that pass keys and values around a ring. ulysses: ranks that exchange tokens for heads. tensor: ranks
    that have the same tokens and split them between attention and MLP.
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
    """All tokens of a batch that several ranks share, for a model that looks at all of them before they are divided
    (every rank must know where images are).

    input_ids, position_ids: int64 [T], as in `Batch`. held: int64 [t], the positions of this rank's own tokens,
    ascending.
    """

    input_ids: Tensor
    position_ids: Tensor
    held: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> FullTokens:
        return FullTokens(change(self.input_ids), change(self.position_ids), change(self.held))


@dataclass(frozen=True, slots=True)
class GlobalSequence:
    """The whole batch that a rank's tokens are a part of, as attention needs it.

    length: its tokens before it was padded to a multiple of the ranks. num_tokens: its tokens without any padding,
    which comes last. cu_seqlens: int32, the borders of its samples and padding. borders: the same, always on the host.
    max_seqlen: length of the longest segment. row: all of its tokens, if it has `Batch.extras`. samples: one sequence
    per sample, if ranks split each sample separately.
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
        """The sequences that were split: its samples, or the whole batch."""
        return self.samples or (self,)

    @property
    def share(self) -> int:
        """The number of its tokens, including padding, that each rank holds."""
        return int(self.borders[-1]) // self.ranks.size

    def map(self, change: Callable[[Tensor], Tensor]) -> GlobalSequence:
        row, samples = self.row and self.row.map(change), tuple(sample.map(change) for sample in self.samples)
        return replace(self, cu_seqlens=change(self.cu_seqlens), row=row, samples=samples)


@dataclass(frozen=True, slots=True)
class Batch:
    """A packed micro batch.

    input_ids, labels, position_ids: int64 [T]; positions restart at 0 with every sample. cu_seqlens: int32 [S + 1], the
    samples' borders, from 0 to T; segments of padding count as samples. max_seqlen: length of the longest segment.
    target_index: int64 [N], the positions whose label is not IGNORE, ascending. target_segment: int64 [N], the index of
    each target's segment, counted over the whole batch if ranks share it. segment_sources: int64, the data source of
    each segment of the whole batch (padding: -1). num_sequences: segments of the whole batch without padding. A pair of
    answers makes two adjacent segments. num_tokens: tokens without padding. extras: inputs that only some models take
    (pixel_values ...), by the name and in the shape of the model's forward argument. Those in ALONG_TOKENS have a value
    for each token (of the whole batch, if ranks share it), in the last dimension. borders: cu_seqlens on the host, if
    the batch is on another device. sequence: set if these are one rank's tokens of a batch that several ranks share;
    describes the whole batch. The samples are then the pieces of samples on this rank, and a piece's positions continue
    where it was cut. payload: tensors that the task added to the batch, by name; moved with it, and the same on all
    ranks that share it. broken: samples that were left out because their media could not be decoded; padding takes
    their place.
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
        """The segments' lengths without padding, for a whole batch on the host."""
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
        """A copy of the batch with `change` applied to each of its tensors (or arrays, while it is sent between
        processes)."""
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

    A sample with a split makes two segments. Padding has IGNORE labels and segments of its own. Without samples the
    batch is only padding (T = pad_to or EMPTY_LENGTH); a rank runs such a batch if it has no data left while others
    have.
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

    micro_batches: this rank's, as many as on every other rank (a rank short of data gets batches of padding).
    num_targets: the divisor of the summed loss, over all ranks and micro batches: trained tokens, or pairs.
    trained_tokens, num_samples: over all ranks. num_tokens, num_slots: tokens without and with padding or unfilled
    room, over all ranks (a micro batch has B slots with dyn_bsz or pad_to_length; else its own length). source_targets,
    source_tokens: num_targets and trained_tokens by source name. names: for each micro batch, plain data that
    identifies its samples (for indexed data their numbers). step: the optimizer step, from 1. epoch: the epoch, from 0.
    epoch_end: True for the epoch's last step.
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
        """The divisor of each loss of the step, by its name among the objective's sums."""
        return {"loss": self.num_targets, "router_loss": self.num_tokens}
