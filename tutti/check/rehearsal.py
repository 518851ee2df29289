"""A rehearsal: the real program runs on tensors that have shapes but no values, and their memory is counted.

One process can measure what a step on many ranks takes, without the memory and quickly, if nothing is computed. torch
has two tools for that: fake tensors, and process groups that send nothing (the `fake` backend). But a program may read
the values of a tensor. It often does so with integers (the boundaries of samples, the positions of targets, the tokens
of each expert), and almost never with floating-point numbers. So here integers are real; a floating-point tensor is
fake from its creation, and so is everything made from it, or from a tensor on the meta device. Two remaining reads of
fake tensors have fixed answers:

- counts (`bincount`: of the tokens that chose an expert) are equal;
- a single number is 1: the gradient is finite, and an optimizer's step is the first.

Anything else that reads values raises torch's error for fake tensors. The bodies of our own operators run, because they
may communicate, except for those that only compute (`_COMPUTE`), whose registered fake forms are used. Messages arrive
at once.

Memory is counted over all storages of fake tensors, from their first tensor to their last. Fake tensors are on the CPU,
since there may be no other device; code that depends on the device asks `tutti.core.device.on_accelerator`, which is
true here unless a CPU's memory is requested.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tutti.attention.packed_cpu import num_saved
from tutti.attention.spec import AttentionSpec
from tutti.core.compat import (
    DispatchModeKey,
    FakeTensor,
    FakeTensorMode,
    TorchDispatchMode,
    get_dispatch_mode,
    get_opdef,
    tree_leaves,
    work_from_future,
)
from tutti.core.device import presume_accelerator

_COMPUTE = {
    "tutti::packed_attention",
    "tutti::packed_attention_backward",
    "tutti::attend_blocks",
    "tutti::attend_blocks_backward",
    "tutti::loss_and_gradient",
    "tutti::to_host",
    "tutti::rms_norm",
    "tutti::rms_norm_backward",
    "tutti::gated",
    "tutti::gated_backward",
    "tutti::rotate",
}
"""Our operators that only compute. All others communicate."""

_HOST = {"tutti::to_host"}
"""Operators whose results are in host memory and take no device memory: in a rehearsal both are a CPU."""


def body_of(operator: Any) -> Callable[..., Any]:
    """The Python function of one of our operators (torch.library.custom_op), which a dispatch mode can run and see
    into."""
    own = get_opdef(operator)
    assert own is not None, f"{operator} is no custom operator"
    return own._init_fn


@dataclass
class _Storage:
    """A live storage. born: counted in operators. resized: true if it ever was, as gathered parameters are."""

    alive: weakref.ref[torch.UntypedStorage]
    size: int
    born: int
    resized: bool = False


class Memory:
    """Bytes of the storages of fake tensors. now: of live ones. peak: the maximum since the start or `restart`.

    gathered: the part of `now` in storages that are emptied and refilled repeatedly, as `fully_shard` does with
    gathered parameters; gathered_at_peak: that part of `peak`.
    """

    def __init__(self) -> None:
        self.now = self.gathered = 0
        self._found: dict[int, _Storage] = {}
        self._time = 0
        self.restart()

    def restart(self) -> None:
        self.peak, self.gathered_at_peak, self._peak_time = self.now, self.gathered, self._time

    def at_peak(self, tensors: Iterable[Tensor]) -> int:
        """Bytes of those of `tensors`, all still alive, that were allocated when the peak was reached."""
        return sum(
            tensor.numel() * tensor.element_size()
            for tensor in tensors
            if self._found[tensor.untyped_storage()._cdata].born <= self._peak_time
        )

    def note(self, tensor: Tensor) -> None:
        """Record that an operator returned `tensor`, of a known or new storage."""
        self._time += 1
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._found:
            self._found[key] = _Storage(weakref.ref(storage, partial(self._end, key)), 0, self._time)
            self._resize(self._found[key], storage.nbytes())

    def resized(self, storage: torch.UntypedStorage) -> None:
        found = self._found.get(storage._cdata)
        if found is not None:
            if not found.resized:
                found.resized = True
                self.gathered += found.size
                self.gathered_at_peak += found.size if found.born <= self._peak_time else 0
            self._resize(found, storage.nbytes())

    def _resize(self, found: _Storage, size: int) -> None:
        more, found.size = size - found.size, size
        self.now += more
        if found.resized:
            self.gathered += more
        if self.now > self.peak:
            self.restart()

    def _end(self, key: int, _: Any) -> None:
        self._resize(self._found.pop(key), 0)


@contextmanager
def rehearse(*, on_cpu: bool = False) -> Iterator[Memory]:
    """Rehearse what runs in the context, and in the backward passes it starts, and count its memory.

    on_cpu: as a CPU would run it, instead of an accelerator.
    """
    memory = Memory()
    kind: Any = torch.UntypedStorage
    resize_ = kind.resize_

    def resize_and_note(storage: torch.UntypedStorage, size: int) -> Any:
        out = resize_(storage, size)
        memory.resized(storage)
        return out

    kind.resize_ = resize_and_note  # it is not an operator, so a dispatch mode does not see it
    try:
        with nullcontext() if on_cpu else presume_accelerator(), _Rehearsal(memory):
            yield memory
    finally:
        kind.resize_ = resize_


class _Rehearsal(TorchDispatchMode):
    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._memory = memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # operations on its local parts arrive here again
        kwargs = kwargs or {}
        if get_dispatch_mode(DispatchModeKey.FAKE) is not None:
            return func(*args, **kwargs)  # DTensor computes the shape of a full tensor, which no rank holds
        out = self._run(func, types, args, kwargs)
        for leaf in () if func.name() in _HOST else tree_leaves(out):
            if isinstance(leaf, FakeTensor) and leaf.device.type != "meta":
                self._memory.note(leaf)
        return out

    def _run(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            out = func(*args, **kwargs)
            return _arrived() if func.name() == "c10d::send" else out
        if func.namespace == "tutti" and func.name() not in _COMPUTE:
            with self:
                return body_of(func)(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func in _INDEXING:
            args = (args[0], _as_places(args[1]), *args[2:])
        if any(isinstance(tensor, FakeTensor) or tensor.is_meta for tensor in tensors):
            convention = _CONVENTIONS.get(func)
            return self._fake.dispatch(func, types, args, kwargs) if convention is None else convention(*args, **kwargs)
        dtype = kwargs.get("dtype")
        if dtype is None or not dtype.is_floating_point:
            return func(*args, **kwargs)
        with self._fake:
            return func(*args, **kwargs)


_INDEXING = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default}


def _as_places(indices: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Indices, with masks that have values replaced by the positions they select."""
    places: list[Tensor | None] = []
    for index in indices:
        if index is None or index.dtype != torch.bool or isinstance(index, FakeTensor):
            places.append(index)
        else:
            places += index.nonzero().unbind(-1)
    return places


def _arrived() -> Any:
    """The handle of a message that has already arrived."""
    future: torch.futures.Future[Any] = torch.futures.Future()
    future.set_result([])
    return work_from_future(future).boxed()


def _even_counts(tensor: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Tensor:
    total = tensor.numel()
    borders = [total * number // minlength for number in range(minlength + 1)]
    return torch.tensor(borders).diff()


def _attend(
    query: Tensor, key: Tensor, value: Tensor, borders: Tensor, sinks: Tensor | None, keep: bool, spec: list[float]
) -> tuple[Tensor, Tensor]:
    """Attention's output and the saved probabilities, whose number follows from the samples' boundaries."""
    size = num_saved(query, borders.tolist(), AttentionSpec.unpack(spec), sinks) if keep else 0
    return query.new_empty(query.shape[1], query.shape[0], value.shape[-1]), query.new_empty(size)


def _grouped(
    left: Tensor, right: Tensor, offs: Tensor, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """A grouped matrix product: [S, k] [E, k, n] -> [S, n], and its gradients' [k, S] [S, n] -> [E, k, n]. torch's
    own fake form is for bf16 only."""
    shape = (len(offs), len(left), right.shape[-1]) if right.ndim == 2 else (len(left), right.shape[-1])
    return left.new_empty(shape, dtype=out_dtype or left.dtype)


_CONVENTIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.bincount.default: _even_counts,
    torch.ops.aten._local_scalar_dense.default: lambda tensor: 1,
    torch.ops.tutti.packed_attention.default: _attend,
    torch.ops.aten._grouped_mm.default: _grouped,
}
"""The fixed answers to reads of tensors without values."""
