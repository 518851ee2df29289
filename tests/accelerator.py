"""A simulated accelerator for machines without one: to torch it is a device, but the CPU does its work.

Its tensors report the device `npu` and hold a CPU tensor, on which each operator runs. So a program computes the same
as on the CPU, and mistakes that only matter on an accelerator become visible:

- an operator gets tensors of both devices, which is an error;
- the host waits for the device, because it reads or copies a value (`waits` counts them by place);
- the host reads memory before a `non_blocking` copy to it has finished: until it waits, the memory holds other values.

torch's kernel of variable-length attention, which is CUDA's, is emulated in fp32, and the tensors say `is_cuda`, so
that attention takes the path that it takes there. A device cannot be taken back: `pretend_accelerator` in a process of
its own (`tests.harness.run_ranks`). `PRETEND_ACCELERATOR=1 pytest tests/train/test_media_run.py` runs any tests there.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
import torch.distributed.fsdp._fully_shard._fsdp_init as fsdp_init
import torch.distributed.fsdp._fully_shard._fsdp_param as fsdp_param
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from tests.attention.test_varlen import emulated_backward, emulated_forward
from tutti.check.rehearsal import body_of

NAME = "npu"
BACKEND = "cpu:gloo,npu:hccl"
"""The backends that `init_process_group` is asked for; both are gloo."""

aten = torch.ops.aten

_ASKS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.bincount.default,
    aten.masked_select.default,
    aten._unique2.default,
}
"""Operators that return a result on the host, or whose result's shape depends on values."""

_COPIES = {aten.copy_.default, aten._to_copy.default}

_TAKES_BOTH = _COPIES | {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}
"""Operators that accept tensors of both devices: copies, and indexing, whose indices may be on the host."""

waits: Counter[str] = Counter()
"""Number of times that the host waited for the device, by the function that caused it: `train/step.py reduce`."""


def _wait() -> None:
    frames = (frame for frame in reversed(traceback.extract_stack()) if "/tutti/" in frame.filename)
    frame = next(frames, None)
    waits["" if frame is None else f"{frame.filename.rsplit('/tutti/', 1)[1]} {frame.name}"] += 1
    _finish_copies()


_pending: list[tuple[Tensor, Tensor]] = []
"""Pending copies to the host: destination, and the values that will be there."""


def _begin_copy(target: Tensor, source: Tensor) -> None:
    _pending.append((target, source.clone()))
    target.fill_(float("nan") if target.is_floating_point() else True)


def _finish_copies(read: Sequence[Tensor] | None = None) -> None:
    """End all copies, or those to memory that the device is about to `read` itself, in the order of its work."""
    places = None if read is None else {item.untyped_storage().data_ptr() for item in read}
    pending, _pending[:] = list(_pending), []
    for target, source in pending:
        if places is None or target.untyped_storage().data_ptr() in places:
            target.copy_(source)
        else:
            _pending.append((target, source))


_storages: WeakValueDictionary[int, Any] = WeakValueDictionary()
"""The storages of the tensors held, by those of ours."""

_pinned: WeakValueDictionary[int, Any] = WeakValueDictionary()
"""The storages in locked pages, by themselves."""


class OnDevice(Tensor):
    """A tensor of the pretended accelerator. held: the tensor of the CPU that has its values."""

    held: Tensor
    is_cuda = True  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
        )
        made.held = held
        _storages[made.untyped_storage()._cdata] = held.untyped_storage()
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"OnDevice({self.held})"

    def tolist(self) -> Any:
        return self.cpu().tolist()


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operator on the tensors that ours hold. The result is ours if `device` says so, or else a tensor given."""
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    ours = any(isinstance(leaf, OnDevice) for leaf in leaves)
    here = ours
    if kwargs.get("device") is not None:
        here = torch.device(kwargs["device"]).type == NAME
        kwargs = kwargs | {"device": torch.device("cpu")} if here else kwargs
    elif function is aten.copy_.default:
        here = isinstance(args[0], OnDevice)
    to_host = ours and not here and function in _COPIES
    is_later = to_host and (kwargs.get("non_blocking") or (function is aten.copy_.default and args[2:] == (True,)))
    if (ours and function in _ASKS) or (to_host and not is_later):
        _wait()
    hosts = [leaf for leaf in leaves if leaf.ndim and not isinstance(leaf, OnDevice)]
    if ours and hosts and function not in _TAKES_BOTH and function.namespace == "aten":
        shapes = ", ".join(f"{tuple(leaf.shape)} on {leaf.device.type}" for leaf in leaves)
        # In a backward pass, an error would end the process without a message.
        print(f"{function}: {shapes}", *traceback.format_stack(), file=sys.stderr, flush=True)
        raise RuntimeError(f"{function} was given tensors of two devices: {shapes}")
    plain_args, plain_kwargs = tree_map(_held, (args, kwargs))
    with _disable_current_modes():
        if here:
            _finish_copies(hosts)
        result = function(*plain_args, **plain_kwargs)
        if is_later:
            _begin_copy(result, plain_args[0 if function is aten._to_copy.default else 1])
    return return_and_correct_aliasing(function, args, kwargs, tree_map(_ours, result)) if here else result


def _held(leaf: Any) -> Any:
    if isinstance(leaf, OnDevice):
        return leaf.held
    return _storages[leaf._cdata] if isinstance(leaf, torch.UntypedStorage) and leaf.device.type == NAME else leaf


def _ours(leaf: Any) -> Any:
    return OnDevice(leaf) if type(leaf) is Tensor else leaf


class _Mode(TorchDispatchMode):
    """Makes tensors on the device, and runs the bodies of the program's own operators there."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(type(leaf) not in (Tensor, torch.nn.Parameter, OnDevice) for leaf in leaves):
            return NotImplemented  # a DTensor, whose parts come back here
        kwargs.pop("pin_memory", None)
        if function.namespace == "tutti":
            with self:
                return body_of(function)(*args, **kwargs)
        device = kwargs.get("device")
        is_made_here = device is not None and torch.device(device).type == NAME
        if is_made_here or any(isinstance(leaf, OnDevice) for leaf in leaves):
            return _run(function, args, kwargs)
        return function(*args, **kwargs)


class _Varlen(torch.autograd.Function):
    """torch's variable-length kernel."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        out, lse, _ = _emulate(emulated_forward, args)
        ctx.save_for_backward(*args[:5], out, lse)
        ctx.rest = args[5:]
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, *borders, out, lse = ctx.saved_tensors
        *longest, causal, scale, window = ctx.rest
        args = (grad.contiguous(), query, key, value, out, lse, *borders, *longest, causal, None, scale, window)
        return *_emulate(emulated_backward, args), *[None] * (len(borders) + len(ctx.rest))


def _emulate(kernel: Any, args: Sequence[Any]) -> tuple[Any, ...]:
    """Run `kernel` in fp32, then round all results except the log of the softmax's denominator."""
    with _disable_current_modes():
        held = [_held(item) for item in args]
        wide = [item.float() if isinstance(item, Tensor) and item.is_floating_point() else item for item in held]
        results = list(kernel(*wide))
    for place, result in enumerate(results):
        if isinstance(result, Tensor):
            is_lse = kernel is emulated_forward and place == 1
            results[place] = OnDevice(result if is_lse else result.to(held[0].dtype))
    return tuple(results)


def _pin_memory(tensor: Tensor) -> Tensor:
    pinned = tensor.clone()
    _pinned[pinned.untyped_storage()._cdata] = pinned.untyped_storage()
    return pinned


def _is_pinned(tensor: Tensor) -> bool:
    return tensor.untyped_storage()._cdata in _pinned


class _Stream:
    """A stream or an event of the device."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: Any) -> None: ...
    def wait_stream(self, other: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def wait(self, stream: Any = None) -> None: ...
    def record(self, stream: Any = None) -> None: ...
    def record_event(self, event: Any = None) -> Any:
        return event or _Stream()

    def synchronize(self) -> None:
        _wait()

    def query(self) -> bool:
        return True


class _Module:
    """`torch.npu`."""

    Stream = Event = _Stream

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def set_device(self, device: Any) -> None: ...
    def manual_seed_all(self, seed: int) -> None: ...
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def current_stream(self, device: Any = None) -> _Stream:
        return _Stream()

    def stream(self, stream: _Stream | None) -> _Stream:
        return stream or _Stream()

    def synchronize(self, device: Any = None) -> None:
        _wait()

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def memory_allocated(self, device: Any = None) -> int:
        return 0


def pretend_accelerator() -> None:
    """Make this process run on the simulated accelerator from now on; its next process group must use `BACKEND`."""
    import tutti.attention.varlen as varlen
    import tutti.train.logging.step_logger as step_logger

    os.environ["TEST_BACKEND"] = BACKEND
    os.environ["LOCAL_RANK"] = "0"  # each rank sees one device, its own
    module: Any = _Module()
    _setup_privateuseone_for_python_backend(NAME, backend_module=module)
    torch._C._set_only_lift_cpu_tensors(True)
    dist.Backend.register_backend("hccl", dist.ProcessGroupGloo, devices=[NAME])
    replaced: list[tuple[Any, str, Any]] = [
        (torch.accelerator, "synchronize", module.synchronize),
        (torch.accelerator, "empty_cache", lambda: None),
        (torch.cuda, "synchronize", module.synchronize),
        (torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=8, minor=0)),
        (Tensor, "pin_memory", _pin_memory),
        (Tensor, "is_pinned", _is_pinned),
        (fsdp_param, "free_storage", lambda tensor: None),  # storages of ours have no memory
        (fsdp_init, "_move_states_to_device", lambda *args: None),  # which sets `data`
        (fsdp_param, "alloc_storage", lambda tensor: None),
        (varlen, "varlen_forward", lambda *args: (*_Varlen.apply(*args), None)),
        (varlen, "varlen_backward", lambda *args: _emulate(emulated_backward, args)),
        (step_logger, "peak_flops", lambda device: 1e12),
    ]
    for owner, name, value in replaced:
        setattr(owner, name, value)
    _Mode().__enter__()
