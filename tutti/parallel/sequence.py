"""Sequence parallelism: the tokens of one batch are split over ranks, for samples that are too long for one rank.

All ranks along the context and ulysses axes get the same packed batch, and each keeps its share of the tokens:

1. The batch is padded (with a segment of its own) until its length divides evenly.
2. Over the context axis of size C it is cut into 2C chunks; rank r gets chunks r and 2C - 1 - r ("zig-zag"). A query's
   work grows with its position in a long sample, so an early and a late chunk balance each other.
3. Over the ulysses axis, a context rank's tokens are cut again, into contiguous slices.

Everything except attention processes tokens independently, and runs on the share unchanged: embedding, norms, MLPs,
experts, head and loss. Positions and targets are cut together with the tokens. Attention knows the borders of the whole
batch (`GlobalSequence`), and reaches the other tokens through `tutti.attention.ulysses` and `tutti.attention.ring`.
Other inputs (images) stay complete on every rank: see `tutti.model.multimodal`.

In batch-invariant mode (`tutti.parallel.batch_invariant`) each sample is split separately, as if it were the whole
batch (`split_samples`), with its own padding and cuts.

Sums over the shares are sums over the batch, and gradients are summed over all ranks anyway. A loss that is not a sum
over tokens (a router's load-balancing loss) is computed from `gather_tokens`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tutti.attention.ring import chunks
from tutti.core.batch import ALONG_TOKENS, IGNORE, Batch, FullTokens, GlobalSequence, SequenceRanks
from tutti.core.collectives import gather_over, sum_over
from tutti.parallel.mesh import Mesh


def sequence_ranks(mesh: Mesh) -> SequenceRanks | None:
    """The ranks that share this rank's batches; None if there are none. Every rank must call it."""
    context, ulysses = mesh.group("context"), mesh.group("ulysses")
    ranks = SequenceRanks(
        mesh.rank("context"),
        mesh.size("context"),
        context.group_name,
        mesh.rank("ulysses"),
        mesh.size("ulysses"),
        ulysses.group_name,
        mesh.size("tensor"),
    )
    if ranks.context_size > 1:
        # NCCL connects a group in its first call, which all ranks must make; in the ring some may have nothing to
        # send.
        dist.barrier(group=context)
    return ranks if ranks.size * ranks.tensor_size > 1 else None


def padded_length(length: int, ranks: SequenceRanks) -> int:
    """`length` rounded up so that it splits evenly into chunks, slices and parts."""
    unit = ranks.ulysses_size if ranks.context_size == 1 else ranks.context_size * math.lcm(2, ranks.ulysses_size)
    unit *= ranks.tensor_size
    return -(-length // unit) * unit


def held_tokens(length: int, ranks: SequenceRanks) -> Tensor:
    """The positions, int64 [T] ascending, in a batch of padded length `length`, of the tokens that this rank holds."""
    held = torch.cat([torch.arange(*chunk) for chunk in chunks(ranks.context_rank, ranks.context_size, length)])
    return held.chunk(ranks.ulysses_size)[ranks.ulysses_rank]


def split_tokens(batch: Batch, ranks: SequenceRanks | None) -> Batch:
    """This rank's share of `batch`, which all of `ranks` have; a batch on the host.

    Inputs other than tokens are left complete, and all tokens are kept with them for reference.
    """
    if ranks is None:
        return batch
    length = len(batch.input_ids)
    padded = _pad(batch, padded_length(length, ranks) - length)
    held = held_tokens(len(padded.input_ids), ranks)
    sample = torch.bucketize(held, padded.cu_seqlens[1:], right=True)
    labels = padded.labels[held]
    # A piece ends where the next token belongs to another sample, or is not the next one of its sample.
    ends = (sample.diff() != 0) | (held.diff() != 1)
    last = torch.cat([ends.nonzero().flatten(), torch.tensor([len(held) - 1])])
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int32), (last + 1).int()])
    target_index = (labels != IGNORE).nonzero().flatten()
    row = FullTokens(padded.input_ids, padded.position_ids, held) if padded.extras else None
    return Batch(
        input_ids=padded.input_ids[held],
        labels=labels,
        position_ids=padded.position_ids[held],
        cu_seqlens=cu_seqlens,
        max_seqlen=int(cu_seqlens.diff().max()),
        target_index=target_index,
        target_segment=sample[target_index],
        segment_sources=padded.segment_sources,
        num_sequences=padded.num_sequences,
        num_tokens=int((padded.segment_sources[sample] >= 0).sum()),
        extras=padded.extras,
        sequence=GlobalSequence(
            length, batch.num_tokens, padded.cu_seqlens, padded.cu_seqlens, padded.max_seqlen, ranks, row
        ),
        payload=padded.payload,
    )


def split_samples(batch: Batch, ranks: SequenceRanks | None) -> Batch:
    """This rank's share of each sample of `batch`, split as if it were alone, concatenated."""
    if ranks is None:
        return batch
    assert not batch.extras, "inputs beside the tokens belong to the batch as a whole"
    shares = [split_tokens(_segment(batch, number), ranks) for number in range(len(batch.segment_sources))]
    samples = tuple(share.sequence for share in shares if share.sequence is not None)
    labels = torch.cat([share.labels for share in shares])
    borders = _in_a_row(sample.borders for sample in samples)
    counts = torch.tensor([len(share.target_index) for share in shares])
    return Batch(
        input_ids=torch.cat([share.input_ids for share in shares]),
        labels=labels,
        position_ids=torch.cat([share.position_ids for share in shares]),
        cu_seqlens=_in_a_row(share.cu_seqlens for share in shares),
        max_seqlen=max(share.max_seqlen for share in shares),
        target_index=(labels != IGNORE).nonzero().flatten(),
        target_segment=torch.arange(len(shares)).repeat_interleave(counts),
        segment_sources=batch.segment_sources,
        num_sequences=batch.num_sequences,
        num_tokens=sum(share.num_tokens for share in shares),
        sequence=GlobalSequence(
            length=len(batch.input_ids),
            num_tokens=batch.num_tokens,
            cu_seqlens=borders,
            borders=borders,
            max_seqlen=max(sample.max_seqlen for sample in samples),
            ranks=ranks,
            samples=samples,
        ),
        payload=batch.payload,
    )


def _segment(batch: Batch, number: int) -> Batch:
    """One sample of `batch`, or a padding segment, as a batch of its own."""
    first, last = batch.cu_seqlens[number : number + 2].tolist()
    labels, length = batch.labels[first:last], last - first
    return Batch(
        input_ids=batch.input_ids[first:last],
        labels=labels,
        position_ids=batch.position_ids[first:last],
        cu_seqlens=torch.tensor([0, length], dtype=torch.int32),
        max_seqlen=length,
        target_index=(labels != IGNORE).nonzero().flatten(),
        target_segment=torch.zeros(int((labels != IGNORE).sum()), dtype=torch.int64),
        segment_sources=batch.segment_sources[number : number + 1],
        num_sequences=int(batch.segment_sources[number] >= 0),
        num_tokens=length if batch.segment_sources[number] >= 0 else 0,
    )


def _in_a_row(borders: Iterable[Tensor]) -> Tensor:
    """Concatenate borders that each start at 0."""
    lengths = torch.cat([each.diff() for each in borders])
    return nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def add_fillers(batch: Batch, count: int) -> Batch:
    """`batch` with `count` additional samples of one padding token each; a batch on the host."""
    for _ in range(count):
        batch = _pad(batch, 1)
    return batch


def _pad(batch: Batch, padding: int) -> Batch:
    """`batch` with a segment of `padding` additional tokens without targets."""
    if not padding:
        return batch

    def extend(tensor: Tensor, values: Tensor) -> Tensor:
        return torch.cat([tensor, values.to(tensor.dtype)])

    # Repeat the last token: a padding token's embedding may be zero, where some models are not differentiable. In a
    # batch with media, however, it might be a placeholder.
    filler = torch.zeros(1) if batch.extras else batch.input_ids[-1:]
    return replace(
        batch,
        input_ids=extend(batch.input_ids, filler.expand(padding)),
        labels=extend(batch.labels, torch.full((padding,), IGNORE)),
        position_ids=extend(batch.position_ids, torch.arange(padding)),
        cu_seqlens=extend(batch.cu_seqlens, batch.cu_seqlens[-1:] + padding),
        max_seqlen=max(batch.max_seqlen, padding),
        segment_sources=extend(batch.segment_sources, torch.tensor([-1])),
        extras={name: _extend(value, name, padding) for name, value in batch.extras.items()},
    )


def _extend(value: Tensor, name: str, padding: int) -> Tensor:
    """One of a batch's extras, extended by `padding` tokens if it lies along the tokens."""
    if name not in ALONG_TOKENS:
        return value
    more = torch.arange(padding) if name == "position_ids" else torch.zeros(padding)
    return torch.cat([value, more.to(value.dtype).expand(*value.shape[:-1], -1)], dim=-1)


def sum_shares(tensor: Tensor, sequence: GlobalSequence | None) -> Tensor:
    """Sum `tensor` over the ranks that share a batch, on each of them: see `tutti.core.collectives.sum_over`."""
    if sequence is None:
        return tensor
    return sum_over(tensor, (sequence.ranks.ulysses_group, sequence.ranks.context_group))


def gather_tokens(tensor: Tensor, sequence: GlobalSequence | None) -> Tensor:
    """Gather [t, ...] of this rank's tokens to [T, ...] of all tokens of the batch, in its order, on every rank.

    Differentiable: gradients of all ranks are summed. The padding that made the batch divide evenly is removed.
    """
    if sequence is None:
        return tensor
    ranks = sequence.ranks
    places = [
        _held_places(sequence, ranks._replace(context_rank=context, ulysses_rank=ulysses))
        for context in range(ranks.context_size)
        for ulysses in range(ranks.ulysses_size)
    ]
    real = torch.cat([torch.arange(int(part.borders[-1])) < part.length for part in sequence.parts])
    found = torch.cat(places).argsort()[real].to(tensor.device)
    return gather_over(tensor, (ranks.ulysses_group, ranks.context_group)).index_select(0, found)


def _held_places(sequence: GlobalSequence, ranks: SequenceRanks) -> Tensor:
    """The positions in the padded batch of the tokens that one of the ranks holds, in its order."""
    places, begin = [], 0
    for part in sequence.parts:
        length = int(part.borders[-1])
        places.append(begin + held_tokens(length, ranks))
        begin += length
    return torch.cat(places)
