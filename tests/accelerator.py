"""A pretended accelerator, for machines that have none: torch takes it for a device, and the CPU does its work.

Its tensors say that they are on `npu` and hold a tensor of the CPU, on which each operator runs. So a program computes
there what it computes on the CPU, and what an accelerator would not forgive is seen:

- an operator is given tensors of both (`RuntimeError`);
- the host waits for the device, because it asks for a value, or copies to it from the device (`Waits`);
- the host reads what is still being copied to it (`non_blocking`): until it waits, there are other values.

torch's kernel of variable-length attention, which is CUDA's, is emulated, so that attention takes the path that it
takes there; everything that asks `tensor.is_cuda` goes by that. A device cannot be taken back: pretend in a process of
its own (`tests.harness.run_ranks`).
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
import torch.distributed.fsdp._fully_shard._fsdp_param as fsdp_param
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from tests.attention.test_varlen import emulated_backward, emulated_forward
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "npu"
aten = torch.ops.aten

_ASKS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.is_nonzero.default}
"""Operators whose result, or the shape of it, is on the host."""

_MOVES = {aten.copy_.default, aten._to_copy.default, aten.index.Tensor, aten.index_put_.default}
"""Operators that take tensors of both devices."""


class Waits(Counter[str]):
    """How often the host waited for the device, by the line of the program that had it wait: `train/step.py _update`."""

    def note(self) -> None:
        frames = (frame for frame in reversed(traceback.extract_stack()) if "/tutti/" in frame.filename)
        frame = next(frames, None)
        self["" if frame is None else f"{frame.filename.rsplit('/tutti/', 1)[1]} {frame.name}"] += 1


waits = Waits()


class _Copies:
    """Copies to the host that it has not waited for: where they go to, and what will be there."""

    def __init__(self) -> None:
        self._pending: list[tuple[Tensor, Tensor]] = []

    def begin(self, target: Tensor, source: Tensor) -> None:
        self._pending.append((target, source.clone()))
        target.fill_(float("nan") if target.is_floating_point() else True)

    def end(self, read: Sequence[Tensor] | None = None) -> None:
        """All of them are done, or those of memory that the device is about to read itself."""
        places = None if read is None else {item.untyped_storage().data_ptr() for item in read}
        pending, self._pending = self._pending, []
        for target, source in pending:
            if places is None or target.untyped_storage().data_ptr() in places:
                target.copy_(source)
            else:
                self._pending.append((target, source))


copies = _Copies()

_storages: WeakValueDictionary[int, Any] = WeakValueDictionary()
"""The storages of the tensors held, by those of ours."""


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
    """Run an operator on the tensors that ours hold. The result is ours if `device` says so, or a tensor given is."""
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    ours = any(isinstance(leaf, OnDevice) for leaf in leaves)
    here = ours
    if kwargs.get("device") is not None:
        device = torch.device(kwargs["device"])
        here = device.type == NAME
        kwargs = kwargs | {"device": torch.device("cpu")} if here else kwargs
    elif function is aten.copy_.default:
        here = isinstance(args[0], OnDevice)
    to_host = ours and not here and function in (aten.copy_.default, aten._to_copy.default)
    later = to_host and (kwargs.get("non_blocking") or function is aten.copy_.default and args[2:] == (True,))
    if ours and function in _ASKS or to_host and not later:
        waits.note()
        copies.end()
    strangers = [leaf for leaf in leaves if leaf.ndim and not isinstance(leaf, OnDevice)]
    if ours and strangers and function not in _MOVES and function.namespace == "aten":
        shapes = [(tuple(leaf.shape), leaf.device.type) for leaf in leaves]
        raise RuntimeError(f"{function}: tensors of {NAME} and of the CPU: {shapes}")
    plain = tree_map(_held, (args, kwargs))
    with _disable_current_modes():
        if here:
            copies.end(strangers)
        result = function(*plain[0], **plain[1])
        if later:
            copies.begin(result, plain[0][0] if function is aten._to_copy.default else plain[0][1])
    if not here:
        return result
    result = tree_map(lambda leaf: OnDevice(leaf) if type(leaf) is Tensor else leaf, result)
    return return_and_correct_aliasing(function, args, kwargs, result)


def _held(leaf: Any) -> Any:
    if isinstance(leaf, OnDevice):
        return leaf.held
    return _storages[leaf._cdata] if isinstance(leaf, torch.UntypedStorage) and leaf.device.type == NAME else leaf


class _Mode(TorchDispatchMode):
    """Brings tensors that are made for the device to it, and runs the bodies of the program's own operators there."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(type(leaf) not in (Tensor, torch.nn.Parameter, OnDevice) for leaf in leaves):
            return NotImplemented  # a DTensor, whose parts come back here
        if function is aten._pin_memory.default:
            return args[0].clone()
        if function is aten.is_pinned.default:
            return False
        kwargs.pop("pin_memory", None)
        if function.namespace == "tutti":
            from tutti.check.rehearsal import body_of

            with self:
                return body_of(function)(*args, **kwargs)
        device = kwargs.get("device")
        made_here = device is not None and torch.device(device).type == NAME
        if made_here or any(isinstance(leaf, OnDevice) for leaf in leaves):
            return _run(function, args, kwargs)
        return function(*args, **kwargs)


class _Stream:
    """A stream or an event of the device, which has always finished."""

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
        waits.note()
        copies.end()

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
        waits.note()
        copies.end()

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def memory_allocated(self, device: Any = None) -> int:
        return 0


def pretend_accelerator() -> None:
    """Have this process run on a pretended accelerator from now on."""
    import tutti.attention.varlen as varlen
    import tutti.train.logging.step_logger as step_logger

    module = _Module()
    _setup_privateuseone_for_python_backend(NAME, backend_module=module)
    torch._C._set_only_lift_cpu_tensors(True)
    torch.accelerator.synchronize = module.synchronize  # type: ignore[assignment]
    torch.cuda.synchronize = module.synchronize  # type: ignore[assignment]
    torch.accelerator.empty_cache = lambda: None  # type: ignore[assignment]
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(major=9)  # type: ignore[assignment]
    dist.Backend.register_backend("hccl", dist.ProcessGroupGloo, devices=[NAME])
    fsdp_param.free_storage = fsdp_param.alloc_storage = lambda tensor: None  # those of ours have no memory
    varlen.varlen_forward = lambda *args: (*_Varlen.apply(*args), None)
    varlen.varlen_backward = lambda *args: _on_held(emulated_backward, args)
    step_logger.peak_flops = lambda device: 1e12
    _Mode().__enter__()


class _Varlen(torch.autograd.Function):
    """torch's variable-length kernel: emulated in fp32 on the tensors that ours hold, given back in their dtype."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        out, lse, _ = _on_held(emulated_forward, args)
        ctx.save_for_backward(*args[:5], out, lse)
        ctx.rest = args[5:]
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        query, key, value, *borders, out, lse = ctx.saved_tensors
        *longest, causal, scale, window = ctx.rest
        args = (grad.contiguous(), query, key, value, out, lse, *borders, *longest, causal, None, scale, window)
        return *_on_held(emulated_backward, args), *[None] * (len(borders) + len(ctx.rest))


def _on_held(emulated: Any, args: Sequence[Any]) -> tuple[Any, ...]:
    with _disable_current_modes():
        held = [item.held if isinstance(item, OnDevice) else item for item in args]
        wide = [item.float() if isinstance(item, Tensor) and item.is_floating_point() else item for item in held]
        results = list(emulated(*wide))
    lse_at = 1 if emulated is emulated_forward else None
    for place, result in enumerate(results):
        if isinstance(result, Tensor):
            results[place] = OnDevice(result if place == lse_at else result.to(held[0].dtype))
    return tuple(results)
