"""A rehearsal: the program runs as it is on tensors that have shapes and no values, and their memory is counted.

One process can tell what a step on many ranks takes of each, without the memory and in little time, if nothing is
computed. torch has the two halves of that: fake tensors, and process groups that send nothing (the `fake` backend).
But a program may ask for the values in a tensor. It does so all the time with integers (the borders of samples, the
places of targets, the tokens of each expert), and hardly ever with floating-point numbers. So here integers are real;
a floating-point tensor is fake from its creation, and so is all that is made from it, or from a tensor on the meta
device. Two questions to tensors without values are left, and answered by convention:

- how many there are of each (`bincount`: of the tokens that chose an expert) is an even share;
- what a single number is, is one: the gradient is finite, and an optimizer's step is the first.

Anything else that takes values raises torch's error for fake tensors. Of our own operators the bodies run, since there
may be communication in them, except for those that only compute (`_COMPUTE`): of these torch takes the fake forms that
are registered with them. What is sent has arrived at once.

Memory is that of all storages that fake tensors have, from their first tensor to their last. Fake tensors are a CPU's,
since there need not be another device; code that chooses by the device asks `tutti.core.device.on_accelerator`, and is
told that it is one, unless a CPU's memory is asked for.
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
"""Operators of our own that only compute. All others communicate."""

_HOST = {"tutti::to_host"}
"""Those whose results lie in host memory, and take none of the device's: in a rehearsal both are a CPU."""


def body_of(operator: Any) -> Callable[..., Any]:
    """The function that an operator of our own (torch.library.custom_op) was made of, which a mode may run and see."""
    own = get_opdef(operator)
    assert own is not None, f"{operator} is no custom operator"
    return own._init_fn


@dataclass
class _Storage:
    """One storage that is alive. born: when, in operators. resized: whether it ever was, as gathered parameters are."""

    alive: weakref.ref[torch.UntypedStorage]
    size: int
    born: int
    resized: bool = False


class Memory:
    """Bytes of the storages of fake tensors. now: of those alive. peak: at most, since the start or `restart`.

    gathered: what `now` has of storages that are emptied and filled again and again, as `fully_shard` does with
    gathered parameters; gathered_at_peak: of `peak`.
    """

    def __init__(self) -> None:
        self.now = self.gathered = 0
        self._found: dict[int, _Storage] = {}
        self._time = 0
        self.restart()

    def restart(self) -> None:
        self.peak, self.gathered_at_peak, self._peak_time = self.now, self.gathered, self._time

    def at_peak(self, tensors: Iterable[Tensor]) -> int:
        """Bytes of those of `tensors`, still alive, whose memory there was when the peak was reached."""
        return sum(
            tensor.numel() * tensor.element_size()
            for tensor in tensors
            if self._found[tensor.untyped_storage()._cdata].born <= self._peak_time
        )

    def note(self, tensor: Tensor) -> None:
        """Something gave `tensor`, of a storage that is known or not."""
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
    """Make what runs in the context, and in the backward passes it starts, be a rehearsal, and count its memory.

    on_cpu: as a CPU would run it, rather than an accelerator.
    """
    memory = Memory()
    kind: Any = torch.UntypedStorage
    resize_ = kind.resize_

    def resize_and_note(storage: torch.UntypedStorage, size: int) -> Any:
        out = resize_(storage, size)
        memory.resized(storage)
        return out

    kind.resize_ = resize_and_note  # it is no operator, which a mode would see
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
            return NotImplemented  # what it does with its local parts comes by here again
        kwargs = kwargs or {}
        if get_dispatch_mode(DispatchModeKey.FAKE) is not None:
            return func(*args, **kwargs)  # DTensor works out the shape of a whole, which nobody holds
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
    """Indices with the places that a mask chooses in place of the mask, where it has values."""
    places: list[Tensor | None] = []
    for index in indices:
        if index is None or index.dtype != torch.bool or isinstance(index, FakeTensor):
            places.append(index)
        else:
            places += index.nonzero().unbind(-1)
    return places


def _arrived() -> Any:
    """The handle of a message that has been received: what waits to be, is kept."""
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
    """Attention's output and the probabilities that are saved, whose number the samples' borders tell."""
    size = num_saved(query, borders.tolist(), AttentionSpec.unpack(spec), sinks) if keep else 0
    return query.new_empty(query.shape[1], query.shape[0], value.shape[-1]), query.new_empty(size)


def _grouped(
    left: Tensor, right: Tensor, offs: Tensor, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """A grouped product, which torch has a form without values of in bf16 alone: [S, k] [E, k, n] -> [S, n], and of its
    gradients [k, S] [S, n] -> [E, k, n]."""
    shape = (len(offs), len(left), right.shape[-1]) if right.ndim == 2 else (len(left), right.shape[-1])
    return left.new_empty(shape, dtype=out_dtype or left.dtype)


_CONVENTIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.bincount.default: _even_counts,
    torch.ops.aten._local_scalar_dense.default: lambda tensor: 1,
    torch.ops.tutti.packed_attention.default: _attend,
    torch.ops.aten._grouped_mm.default: _grouped,
}
"""Answers of tensors without values about their values."""
