"""Activation offload: the tensors that a block saves for its backward pass move to host memory and return in time.

Saved-tensor hooks around each block's forward see everything that autograd saves, including custom operators. With
activation checkpointing, this is only the block's input. Two kinds of tensors stay on the device:

- parameters, which FSDP frees and gathers itself, and the inputs that all blocks share (rotary embeddings, borders);
- small tensors, for which starting a copy takes longer than the copy.

The algorithm:

1. Memory moves as whole storages: several saved views of one storage, or one tensor saved twice, are copied once.
2. Storages queue up as they are saved. At the end of a block, while more than train.activation_gpu_limit is on the
   device, the oldest ones are copied to pinned host memory on a side stream, overlapped with the next block's
   computation, and the device memory of those that left after the previous block is freed. So the device keeps what was
   saved last, which the backward pass needs first.
3. When the backward pass reaches a block, it waits for that block's storages, and those of the block before it start to
   return.

In a pipeline several micro batches are in progress at once. Storages that earlier ones have on the device stay there,
since their backward passes come first, but count towards the limit; a later micro batch moves everything beyond the
limit. If gradients of inputs are computed before those of parameters (zero bubble), the backward pass reaches a block
twice. In between, offloaded storages are only on the host; the second time, which needs few of them, they return one by
one.

The compute stream waits for an event before reusing memory that the side stream has read or written, so the host never
waits. On the CPU the same code makes plain copies, with nothing to overlap.
"""

from __future__ import annotations

import logging
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from tutti.core.compat import is_traceable_wrapper_subclass, tree_leaves
from tutti.core.modules import Forward, wrap_forward
from tutti.core.tensors import local_part

log = logging.getLogger(__name__)

SMALL = 2**14
"""Storages of fewer bytes are not moved."""


def offload_activations(root: nn.Module, blocks: Sequence[nn.Module], device_type: str, limit_gb: float) -> Offloader:
    """Make `blocks`, which `root` runs in order, move the tensors that they save in training to host memory, except
    for `limit_gb` * 10^9 bytes."""
    offloader = Offloader(torch.device(device_type), int(limit_gb * 1e9))
    root.register_forward_pre_hook(lambda *_: offloader.begin())
    root.register_forward_hook(lambda *_: offloader.end())
    for block in blocks:
        wrap_forward(block, "offload", partial(_offloaded, block=block, offloader=offloader))
    return offloader


def _offloaded(forward: Forward, block: nn.Module, offloader: Offloader) -> Forward:
    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not (block.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        shared = _Storages(item for item in tree_leaves((args[1:], kwargs)) if isinstance(item, Tensor))
        group = offloader.enter(_Staying(block, shared))
        with saved_tensors_hooks(lambda tensor: offloader.pack(tensor, group), offloader.unpack):
            out = forward(*args, **kwargs)
        offloader.leave()
        return out

    return run


class _Storages(frozenset[int]):
    """The identities of some tensors' storages, whether or not they currently have memory."""

    def __new__(cls, tensors: Iterable[Tensor]) -> _Storages:
        return super().__new__(cls, (local_part(tensor).untyped_storage()._cdata for tensor in tensors))


class _Staying:
    """The storages that stay on the device: those of a block's parameters while it runs, and those of inputs that
    all blocks share."""

    def __init__(self, block: nn.Module, shared: _Storages) -> None:
        self._block, self._shared = block, shared

    def __contains__(self, address: int) -> bool:
        return address in self._shared or address in _Storages(self._block.parameters())


class _Stored:
    """A saved storage, whose bytes are in `source` on the device, in `host`, or in `back` on the device.

    source: an alias of the first saved tensor, whose version counter detects writes. The others are bytes.
    """

    def __init__(self, source: Tensor) -> None:
        self.source: Tensor | None = source
        self.version = source._version
        self.address = source.untyped_storage()._cdata
        self.nbytes = source.untyped_storage().nbytes()
        self.device = source.device
        self.host: Tensor | None = None
        self.back: Tensor | None = None

    @property
    def key(self) -> tuple[int, int]:
        return self.address, self.version

    def require_unchanged(self, source: Tensor) -> None:
        if source._version != self.version:
            raise RuntimeError(
                f"a tensor of shape {tuple(source.shape)} that is needed for a gradient was changed in place after it "
                "was saved; train.enable_activation_offload cannot keep what it was"
            )


class _Group:
    """The storages that one block saved in one forward pass. A group lives as long as autograd keeps any of them."""

    def __init__(self, staying: _Staying, previous: _Group | None) -> None:
        self.staying: _Staying | None = staying
        self.previous = previous
        self.stored: list[weakref.ref[_Stored]] = []
        self.fetched = False
        self.event: Any = None

    def alive(self) -> list[_Stored]:
        """The storages that autograd still keeps, each once."""
        return list(dict.fromkeys(stored for item in self.stored if (stored := item()) is not None))

    def absent(self) -> list[_Stored]:
        """The storages that are only on the host."""
        return [stored for stored in self.alive() if stored.source is None and stored.back is None]


class _Saved(NamedTuple):
    """A view of a storage, which autograd keeps instead of a tensor."""

    stored: _Stored
    group: _Group
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: Any  # an int, which torch types as possibly symbolic

    def view(self, memory: Tensor) -> Tensor:
        whole = memory.new_empty(0, dtype=self.dtype)
        return whole.set_(memory.untyped_storage(), self.offset, self.shape, self.stride)


class Offloader:
    """Moves one model's activations. kept_bytes: currently on the device, for all forward passes whose backward pass
    is pending. moved_bytes: moved to the host so far."""

    def __init__(self, device: torch.device, limit: int) -> None:
        self._device, self._limit = device, limit
        self._beside = _SideStream(device)
        # Of the current forward pass:
        self._queue: deque[_Stored] = deque()
        self._known: dict[tuple[int, int], _Stored] = {}
        self._newest: _Group | None = None
        self._leaving: list[tuple[Any, list[_Stored], list[Tensor]]] = []
        # Of the current backward pass:
        self._arriving: dict[_Group, list[Tensor]] = {}
        self._current: _Group | None = None
        self._reported = False
        self.kept_bytes = self.moved_bytes = 0

    def begin(self) -> None:
        """Begin a forward pass; no backward pass is active."""
        for unused in self._arriving:
            self._beside.wait(unused.event)
        self._arriving.clear()
        self._come_to(None)

    def end(self) -> None:
        """End the forward pass; from here on only autograd keeps its tensors."""
        for stored in self._queue:
            weakref.finalize(stored, self._release, stored.nbytes).atexit = False
        self._queue.clear()
        self._known.clear()
        self._newest = None

    def _release(self, nbytes: int) -> None:
        self.kept_bytes -= nbytes

    def enter(self, staying: _Staying) -> _Group:
        """Begin a block's forward pass."""
        self._newest = _Group(staying, self._newest)
        return self._newest

    def pack(self, tensor: Tensor, group: _Group) -> Any:
        """The object that autograd keeps for `tensor`, which the block of `group` saves."""
        if not self._moves(tensor, group):
            return tensor
        key = tensor.untyped_storage()._cdata, tensor._version
        stored = self._known.get(key)
        if stored is None:
            stored = self._known[key] = _Stored(tensor.detach())
            self._queue.append(stored)
            self.kept_bytes += stored.nbytes
        group.stored.append(weakref.ref(stored))
        return _Saved(stored, group, tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset())

    def _moves(self, tensor: Tensor, group: _Group) -> bool:
        if isinstance(tensor, nn.Parameter) or is_traceable_wrapper_subclass(tensor):  # DTensors are gathered elsewhere
            return False
        if tensor.layout != torch.strided or tensor.device.type != self._device.type:
            return False
        storage = tensor.untyped_storage()
        assert group.staying is not None
        return storage.nbytes() >= SMALL and storage._cdata not in group.staying

    def leave(self) -> None:
        """End a block's forward pass: move what exceeds the limit."""
        self._settle()
        moving = []
        while self.kept_bytes > self._limit:  # earlier forward passes alone never exceed it
            stored = self._queue.popleft()
            self.kept_bytes -= stored.nbytes
            self.moved_bytes += stored.nbytes
            moving.append(stored)
        if moving:
            self._send(moving)
        assert self._newest is not None
        self._newest.staying = None

    @torch.no_grad()
    def _send(self, moving: list[_Stored]) -> None:
        sources: list[Tensor] = []
        with self._beside.copying():
            for stored in moving:
                assert stored.source is not None
                stored.require_unchanged(stored.source)
                sources.append(stored.source)
                as_bytes = stored.source.new_empty(0, dtype=torch.uint8).set_(stored.source.untyped_storage())
                stored.host = to_host(as_bytes, self._beside.pinned)
                stored.source = None
        self._leaving.append((self._beside.mark(), moving, sources))

    def _settle(self) -> None:
        """Free the device memory of storages that have been copied."""
        for event, moving, sources in self._leaving:
            self._beside.wait(event)
            for stored, source in zip(moving, sources, strict=True):
                stored.require_unchanged(source)
                self._known.pop(stored.key, None)
        self._leaving.clear()

    def unpack(self, saved: Any) -> Tensor:
        """The tensor for which autograd keeps `saved`; called in the backward pass."""
        if not isinstance(saved, _Saved):
            return saved
        stored, group = saved.stored, saved.group
        with torch.no_grad():
            if group is not self._current:
                self._need(group)
            if stored.source is not None:
                stored.require_unchanged(stored.source)
                return saved.view(stored.source)
            if stored.back is None:
                self._beside.wait(self._fetch([stored]))
            assert stored.back is not None
            return saved.view(stored.back)

    def _need(self, group: _Group) -> None:
        """The backward pass has reached the block of `group`."""
        self._report()
        self._settle()
        self._come_to(group)
        for each in (group, group.previous):
            if each is not None and not each.fetched:
                each.fetched, absent = True, each.absent()
                each.event = self._fetch(absent)
                # Kept until the compute stream waits, even if autograd drops them earlier.
                self._arriving[each] = [stored.back for stored in absent if stored.back is not None]
        self._beside.wait(group.event)
        self._arriving.pop(group, None)

    def _come_to(self, group: _Group | None) -> None:
        """Move on to the block of `group`: storages that returned for the previous one, and that autograd still
        keeps, leave the device again."""
        if self._current is not None:
            needed = {stored for each in (group, group and group.previous) if each for stored in each.alive()}
            for stored in self._current.alive():
                if stored not in needed:
                    stored.back = None
        self._current = group

    def _fetch(self, absent: Sequence[_Stored]) -> Any:
        """Start copying storages back; returns the event after which they are there."""
        # Allocated on the compute stream, which waits for the copies before it reads them.
        for stored in absent:
            assert stored.host is not None
            stored.back = stored.host.new_empty(stored.nbytes, device=stored.device)
        with self._beside.copying():
            for stored in absent:
                assert stored.back is not None and stored.host is not None
                stored.back.copy_(stored.host, non_blocking=True)
        return self._beside.mark()

    def _report(self) -> None:
        if self._reported:
            return
        self._reported = True
        same = ", which are the same memory here" if self._device.type == "cpu" else ""
        log.info(
            "activations at the first backward pass: %.3g GB moved to the host, %.3g GB kept on the device, of at most "
            "%.3g (train.activation_gpu_limit)%s",
            self.moved_bytes / 1e9,
            self.kept_bytes / 1e9,
            self._limit / 1e9,
            same,
        )


@torch.library.custom_op("tutti::to_host", mutates_args=())
def to_host(memory: Tensor, pinned: bool) -> Tensor:
    """A copy of `memory` on the host, in progress on the current stream; torch pools pinned memory."""
    host = memory.new_empty(memory.shape, device="cpu", pin_memory=pinned)
    return host.copy_(memory, non_blocking=True)


@to_host.register_fake
def _(memory: Tensor, pinned: bool) -> Tensor:
    return memory.new_empty(memory.shape, device="cpu")


class _SideStream:
    """A stream for copies next to the compute stream; on the CPU copies are made at once."""

    def __init__(self, device: torch.device) -> None:
        self._module: Any = None if device.type == "cpu" else torch.get_device_module(device)
        self._stream: Any = None if self._module is None else self._module.Stream()

    @contextmanager
    def copying(self) -> Iterator[None]:
        """Within this context, copies run after everything that the compute stream has been given so far."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(self._module.current_stream())
        with self._module.stream(self._stream):
            yield

    @property
    def pinned(self) -> bool:
        """True if host copies are page-locked."""
        return self._stream is not None

    def mark(self) -> Any:
        """An event after all copies so far."""
        return None if self._stream is None else self._stream.record_event()

    def wait(self, event: Any) -> None:
        """Make the compute stream wait for an event; the host does not wait."""
        if event is not None:
            self._module.current_stream().wait_event(event)
