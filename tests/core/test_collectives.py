"""Collectives: the backward pass is the adjoint of the forward, and fake versions return the real shapes."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.harness import run_ranks
from tutti.core.collectives import (
    RankGroup,
    all_to_all,
    finish_all_to_all,
    gather_over,
    gather_rows,
    gather_tensor,
    scatter_rows,
    scatter_tensor,
    start_all_to_all,
    sum_over,
)

Map = Callable[[Tensor], Tensor]


def maps(rank: int, size: int) -> dict[str, tuple[tuple[int, ...], Map]]:
    """Each collective over all ranks, with the shape of this rank's input."""
    group = dist.group.WORLD.group_name
    ranks = RankGroup(rank, size, group)
    # Rank r sends (r + s) % 3 rows to rank s: some none, and nobody as many as are received.
    table = [[(mine + other) % 3 for other in range(size)] for mine in range(size)]
    sent, received = table[rank], [row[rank] for row in table]
    return {
        "gather_rows": ((3, 2), lambda x: gather_rows(x, group, size)),
        "scatter_rows": ((3 * size, 2), lambda x: scatter_rows(x, group, size)),
        "gather_tensor": ((2, 3, 5), lambda x: gather_tensor(x, ranks, 1)),
        "scatter_tensor": ((2, 5, 3 * size), lambda x: scatter_tensor(x, ranks, -1)),
        "gather_over": ((3, 2), lambda x: gather_over(x, [group])),
        "all_to_all": ((2 * size, 3), lambda x: all_to_all(x, [], [], group)),
        "uneven": ((sum(sent), 3), lambda x: all_to_all(x, sent, received, group)),
        "in two halves": ((size, 4), lambda x: finish_all_to_all(start_all_to_all(x, group))),
    }


def products(size: int) -> dict[str, tuple[float, float]]:
    """<A x, y> and <x, A^T y> of each map, this rank's parts of the two sums."""
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(rank)
    found = {}
    for name, (shape, apply) in maps(rank, size).items():
        given = torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
        with warnings.catch_warnings(action="error", category=FutureWarning):  # of names that torch has replaced
            out = apply(given)
            other = torch.randn(out.shape, dtype=torch.float64, generator=generator)
            out.backward(other)
        assert given.grad is not None
        found[name] = (out * other).sum().item(), (given * given.grad).sum().item()
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_the_gradient_is_the_adjoint(size: int) -> None:
    by_rank = run_ranks(size, products, size)
    for name in by_rank[0]:
        forward, backward = (sum(found[name][side] for found in by_rank) for side in (0, 1))
        assert forward == pytest.approx(backward, rel=1e-12) and abs(forward) > 1e-3, name


def values(size: int) -> dict[str, list]:
    """The results of each map for the numbers 100 * rank + 0, 1, 2, ..."""
    rank = dist.get_rank()
    return {
        name: apply(100 * rank + torch.arange(torch.Size(shape).numel()).view(shape)).tolist()
        for name, (shape, apply) in maps(rank, size).items()
        if name != "in two halves"
    }


def test_where_rows_go() -> None:
    first, second = run_ranks(2, values, 2)
    rows = [(100 * rank + torch.arange(6).view(3, 2)).tolist() for rank in (0, 1)]
    for name in ("gather_rows", "gather_over"):
        assert first[name] == second[name] == rows[0] + rows[1]
    assert first["scatter_rows"] + second["scatter_rows"] == (100 + 2 * torch.arange(12).view(6, 2)).tolist()
    parts = [100 * rank + torch.arange(30).view(2, 3, 5) for rank in (0, 1)]
    assert first["gather_tensor"] == torch.cat(parts, 1).tolist()
    assert first["scatter_tensor"] == (100 + 2 * torch.arange(60).view(2, 5, 6)[..., :3]).tolist()
    assert first["all_to_all"] == [[0, 1, 2], [3, 4, 5], [100, 101, 102], [103, 104, 105]]
    assert second["all_to_all"] == [[6, 7, 8], [9, 10, 11], [106, 107, 108], [109, 110, 111]]
    # Rank 0 sends 0 rows to itself and 1 to rank 1, which sends 1 to rank 0 and 2 to itself.
    assert first["uneven"] == [[100, 101, 102]]
    assert second["uneven"] == [[0, 1, 2], [103, 104, 105], [106, 107, 108]]


def halves(size: int) -> bool:
    """True if an exchange in two halves gives the same result as a single exchange."""
    group, rows = dist.group.WORLD.group_name, torch.arange(8.0).view(size, -1) + dist.get_rank()
    return torch.equal(finish_all_to_all(start_all_to_all(rows, group)), all_to_all(rows, [], [], group))


def test_two_halves_are_one_exchange() -> None:
    assert run_ranks(2, halves, 2) == [True, True]


def summed(size: int) -> tuple[list[float], list[float]]:
    """The sum of 1, 2, ... over ranks, and the gradient of its square, which every rank computes."""
    given = torch.tensor([1.0 + dist.get_rank()], requires_grad=True)
    total = sum_over(given, [dist.group.WORLD.group_name])
    total.square().sum().backward()
    assert given.grad is not None
    return total.tolist(), given.grad.tolist()


@pytest.mark.parametrize("size", [2, 4])
def test_a_sum_is_one_value_that_counts_once(size: int) -> None:
    total = size * (size + 1) / 2
    assert run_ranks(size, summed, size) == [([total], [2 * total])] * size


def fake_shapes(size: int) -> dict[str, bool]:
    """True for each operator whose fake version returns the shape and dtype of the real result."""
    rank, same = dist.get_rank(), {}
    for name, (shape, apply) in maps(rank, size).items():
        real = apply(torch.ones(shape, dtype=torch.bfloat16))
        with FakeTensorMode():
            made = torch.empty(shape, dtype=torch.bfloat16)
            fake = real if name == "in two halves" else apply(made)  # which is no operator
        same[name] = (fake.shape, fake.dtype) == (real.shape, real.dtype)
    return same


def test_shapes_without_values() -> None:
    for same in run_ranks(2, fake_shapes, 2):
        assert all(same.values()), same
