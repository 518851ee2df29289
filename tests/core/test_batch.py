"""Batches of packed samples."""

import numpy as np
import torch
from torch._dynamo.testing import CompileCounter

from tutti.core.batch import EMPTY_LENGTH, IGNORE, Sample, pack


def test_a_batch_without_samples_is_padding_alone():
    batch = pack([])
    assert batch.num_tokens == batch.num_sequences == len(batch.target_index) == 0
    assert batch.labels.tolist() == [IGNORE] * EMPTY_LENGTH
    assert batch.segment_sources.tolist() == [-1]
    assert len(pack([], pad_to=40).input_ids) == 40


def test_no_number_of_samples_is_compiled_anew():
    counter = CompileCounter()

    @torch.compile(dynamic=True, backend=counter)
    def block(input_ids, cu_seqlens, max_seqlen):
        return input_ids[None, :, None] * max_seqlen + len(cu_seqlens)

    for lengths in ([5, 7, 9], [11, 3], [6], []):
        batch = pack([Sample(np.ones(n, np.int32), np.ones(n, np.int32)) for n in lengths])
        block(batch.input_ids, batch.cu_seqlens, batch.max_seqlen)
    assert counter.frame_count == 1
