"""A rehearsal: which tensors are real, what is said about values, and whose memory is counted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensor
from torch.nn.functional import grouped_mm

from tutti.attention.packed_cpu import packed_attention
from tutti.attention.spec import AttentionSpec
from tutti.check.rehearsal import rehearse
from tutti.core.device import on_accelerator
from tutti.parallel.activation_offload import to_host

MIB = 2**20


def has_values(tensor: Tensor) -> bool:
    return not isinstance(tensor, FakeTensor)


def test_integers_are_real_and_what_is_made_of_shapes_is_not():
    with rehearse():
        borders = torch.tensor([0, 3, 5])
        hidden = torch.empty(5, 4, dtype=torch.bfloat16)
        loaded = torch.empty_like(torch.empty(7, dtype=torch.uint8, device="meta"), device="cpu")
        picked = hidden.index_select(0, borders.diff())
        assert on_accelerator(hidden) and hidden.device.type == "cpu"
    assert borders.diff().tolist() == [3, 2]
    assert not has_values(hidden) and hidden.device.type == "cpu"
    assert not has_values(loaded) and loaded.shape == (7,)
    assert not has_values(picked) and picked.shape == (2, 4)
    assert has_values(torch.ones(1)) and not on_accelerator(torch.ones(1))


def test_what_is_said_of_values():
    with rehearse():
        scores = torch.empty(6, 4, dtype=torch.float32)
        chosen = scores.topk(3).indices
        assert torch.bincount(chosen.flatten(), minlength=4).tolist() == [4, 5, 4, 5]
        assert bool(scores.sum().isfinite()) and scores.sum().item() == 1
        with pytest.raises(DynamicOutputShapeException):
            scores.nonzero()


def test_memory_is_of_storages_while_they_live():
    with rehearse() as memory:
        first = torch.zeros(MIB, dtype=torch.uint8, device="meta").new_empty(MIB, device="cpu")
        second = first.view(2, -1)[1]
        del first
        assert memory.now == memory.peak == MIB, "a view keeps the whole storage"
        third = second + 1
        del second
        assert (memory.now, memory.peak) == (MIB // 2, 3 * MIB // 2)
        memory.restart()
        host = to_host(third, False)
        assert memory.now == MIB // 2, "the host's memory counts"
        del host, third
        assert memory.now == 0
        assert memory.peak == MIB // 2


def test_memory_that_is_emptied_and_filled_is_told_apart():
    with rehearse() as memory:
        held = torch.empty(MIB, dtype=torch.bfloat16)
        gathered = torch.empty(MIB, dtype=torch.float32)
        storage = gathered.untyped_storage()
        assert memory.at_peak([held, gathered]) == 6 * MIB
        storage.resize_(0)
        assert (memory.now, memory.gathered, memory.peak, memory.gathered_at_peak) == (2 * MIB, 0, 6 * MIB, 4 * MIB)
        late = torch.empty(MIB, dtype=torch.float64)
        storage.resize_(4 * MIB)
        assert (memory.now, memory.gathered, memory.peak) == (14 * MIB, 4 * MIB, 14 * MIB)
        del late
        assert memory.now == 6 * MIB
    storage.resize_(0)
    assert memory.now == 6 * MIB, "nothing is counted when the rehearsal is over"


def test_a_cpu_saves_attentions_probabilities_and_an_accelerator_none():
    borders, spec = torch.tensor([0, 5, 48]), AttentionSpec(0.3)
    real = [torch.randn(heads, 48, 128) for heads in (4, 2, 2)]
    saved = torch.ops.tutti.packed_attention(*real, borders, None, True, [float(item) for item in spec])[1]
    assert saved.numel() > 0
    for on_cpu in (True, False):
        with rehearse(on_cpu=on_cpu) as memory:
            shapes = [(heads, 48, 128) for heads in (4, 2, 2)]
            query, key, value = (torch.empty(shape, dtype=torch.float32).requires_grad_() for shape in shapes)
            before = memory.now
            out = packed_attention(query, key, value, borders, spec)
            assert memory.now - before == out.nbytes + saved.nbytes * on_cpu
            out.sum().backward()
            assert query.grad is not None and query.grad.shape == query.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_products_have_the_shapes_that_a_cpu_gives_them(dtype):
    ends = torch.tensor([3, 3, 8], dtype=torch.int32)

    def products(make):
        rows, weight = make((8, 16), dtype=dtype).requires_grad_(), make((3, 16, 24), dtype=dtype).requires_grad_()
        out = grouped_mm(rows, weight, offs=ends)
        (out * out).sum().backward()
        return out, rows.grad, weight.grad

    with rehearse(on_cpu=True):
        rehearsed = products(torch.empty)
    for got, want in zip(rehearsed, products(torch.ones), strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype
