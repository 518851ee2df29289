"""Batches split over context and ulysses ranks: each token is on one rank, and evaluation equals one process."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.harness import run_ranks
from tests.parallel.layouts import train_family
from tutti.core.batch import IGNORE, Sample, SequenceRanks, pack
from tutti.parallel.sequence import gather_tokens, held_tokens, padded_length, split_tokens

LENGTHS = ([7, 1, 1, 20, 3], [1], [64], [2, 2, 2, 2, 2, 2, 2, 2], [31, 33])
SIZES = ((2, 1), (1, 2), (4, 1), (1, 4), (1, 3), (2, 2), (2, 3), (3, 4))


def make_batch(lengths, pad_to=None):
    generator = np.random.default_rng(0)
    samples = []
    for number, length in enumerate(lengths):
        ids = generator.integers(1, 100, length).astype(np.int32)
        labels = np.where(generator.random(length) < 0.5, ids + 100, IGNORE).astype(np.int32)
        samples.append(Sample(ids, labels, source=number % 2))
    return pack(samples, pad_to=pad_to)


def all_ranks(context, ulysses):
    return [SequenceRanks(c, context, "", u, ulysses, "") for c in range(context) for u in range(ulysses)]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_shares_are_the_batch(lengths, sizes):
    batch = make_batch(lengths)
    parts = [split_tokens(batch, ranks) for ranks in all_ranks(*sizes)]
    assert len({len(part.input_ids) for part in parts}) == 1
    assert sum(part.num_tokens for part in parts) == batch.num_tokens

    def targets(item):
        columns = (item.input_ids, item.labels, item.position_ids)
        rows = [column[item.target_index].tolist() for column in columns]
        return sorted(zip(*rows, item.target_segment.tolist(), strict=True))

    assert sorted(row for part in parts for row in targets(part)) == targets(batch)
    for part in parts:
        assert part.cu_seqlens[0] == 0 and part.cu_seqlens[-1] == len(part.input_ids)
        assert part.segment_sources[: part.num_sequences].tolist() == batch.segment_sources.tolist()
        assert part.num_sequences == batch.num_sequences == len(lengths)
        assert part.max_seqlen == part.cu_seqlens.diff().max()
        for begin, end in pairwise(part.cu_seqlens.tolist()):
            assert (part.position_ids[begin:end].diff() == 1).all(), "a piece is not of one sample"
        whole = part.sequence
        assert whole is not None and whole.length == len(batch.input_ids)
        assert whole.cu_seqlens[-1] == len(part.input_ids) * sizes[0] * sizes[1]


def test_a_batch_of_its_own_is_left_alone():
    batch = make_batch([3, 4])
    assert split_tokens(batch, None) is batch


def test_padding_is_as_little_as_divides():
    assert [padded_length(n, SequenceRanks(0, 1, "", 0, 4, "")) for n in (1, 4, 5)] == [4, 4, 8]
    assert [padded_length(n, SequenceRanks(0, 2, "", 0, 1, "")) for n in (1, 4, 5)] == [4, 4, 8]
    assert [padded_length(n, SequenceRanks(0, 2, "", 0, 3, "")) for n in (1, 12, 13)] == [12, 12, 24]


def test_inputs_beside_the_tokens_stay_whole_with_the_tokens_that_they_belong_to():
    batch = make_batch([3, 4])
    pixels, kinds = torch.randn(2, 7), torch.tensor([[0, 1, 1, 0, 0, 1, 0]])
    rows = torch.arange(28).view(4, 1, 7)
    extras = {"pixel_values": pixels, "mm_token_type_ids": kinds, "position_ids": rows}
    for number, ranks in enumerate(all_ranks(1, 2)):
        part = split_tokens(replace(batch, extras=extras), ranks)
        assert torch.equal(part.extras["pixel_values"], pixels)
        assert part.extras["mm_token_type_ids"].tolist() == [[*kinds[0].tolist(), 0]]
        assert torch.equal(part.extras["position_ids"], torch.cat([rows, torch.zeros(4, 1, 1)], -1))
        row = part.sequence.row
        assert row.input_ids.tolist() == [*batch.input_ids.tolist(), 0]
        assert row.held.tolist() == list(range(4 * number, 4 * number + 4))
        assert torch.equal(row.input_ids[row.held], part.input_ids)
    assert split_tokens(batch, all_ranks(1, 2)[0]).sequence.row is None


def gather_on_ranks(context, ulysses):
    import torch.distributed as dist

    from tutti.config.layout import Layout
    from tutti.core.dist import World
    from tutti.parallel.mesh import build_mesh
    from tutti.parallel.sequence import sequence_ranks

    world = context * ulysses
    layout = Layout(world, 1, 1, 1, 1, 1, ulysses, context, 1, 1, 1)
    ranks = sequence_ranks(build_mesh(layout, World(dist.get_rank(), world, 0, torch.device("cpu"))))
    batch = make_batch([7, 1, 5])
    part = split_tokens(batch, ranks)
    own = part.input_ids.double().requires_grad_()
    gathered = gather_tokens(own, part.sequence)
    assert torch.equal(gathered, batch.input_ids.double())
    (gathered.square().sum() * (dist.get_rank() + 1)).backward()
    factor = world * (world + 1) / 2
    is_padding = held_tokens(padded_length(len(batch.input_ids), ranks), ranks) >= len(batch.input_ids)
    assert torch.equal(own.grad, 2 * factor * part.input_ids.masked_fill(is_padding, 0))


def test_gathered_tokens_are_in_the_batch_s_order_and_gradients_are_summed():
    run_ranks(4, gather_on_ranks, 2, 2)


def test_evaluation_equals_one_process(tmp_path):
    data = Path(__file__).parents[2] / "data" / "quickstart"
    axes = {"context_parallel_size": 2, "ulysses_parallel_size": 2, "data_parallel_mode": "fsdp2"}
    common = {"eval_steps": 2, "max_steps": 2, "data.eval_path": str(data / "chat_eval.jsonl")}
    lines = [
        train_family(tmp_path / str(world), "qwen3", world, **common, **train) for world, train in ((1, {}), (4, axes))
    ]
    want, got = (next(line for line in each if "eval_loss" in line) for each in lines)
    assert got["eval_loss"] == pytest.approx(want["eval_loss"], rel=1e-5)
    assert got["eval_tokens"] == want["eval_tokens"]
