"""Counting communication: bytes and messages that a rank sends, by mesh axis.

Volume decides whether a layout scales, and code can easily send too much without computing anything wrong. So it is
counted at the lowest level: every collective, whoever calls it (our own code, `fully_shard`, DTensor), ends in one of
torch's `c10d` operators, and a dispatch mode sees all of them, in forward and backward passes.

- The process group identifies the axis. Every axis of the mesh has its own group (see `tutti.parallel.mesh`); other
  groups within a pipeline count as its connections, and all remaining ones as `other`.
- Our own operators hide what their bodies do from a mode: it runs the body itself, and observes it.
- Tensors may be fake, and the process group too (torch's `FakeTensorMode` and its `fake` backend). Then a step of
  thousands of ranks is counted in one process, in which nothing is sent.

Bytes are those of the optimal algorithms: in a group of n ranks each sends (n - 1) / n of the whole in an all-gather or
a reduce-scatter, twice that in an all-reduce, and in an all-to-all what is for others. A message is one call; calls in
a group of one rank send nothing and are not counted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from tutti.check.rehearsal import body_of
from tutti.core.compat import TorchDispatchMode, resolve_process_group, tree_leaves
from tutti.parallel.mesh import Mesh

OTHER = "other"
"""The name for groups that are not an axis of the mesh, mostly those of all ranks."""

_LABELS = {"shard": "fsdp", "copies": "replicate"}
"""Axes that are counted as part of another one."""


class Sent(NamedTuple):
    """bytes: sent by this rank. messages: number of calls."""

    bytes: int = 0
    messages: int = 0

    def __add__(self, other: Any) -> Sent:
        return Sent(self.bytes + other.bytes, self.messages + other.messages)


class Traffic:
    """The bytes and messages that this rank has sent so far.

    by_kind: for each axis (fsdp, replicate, expert, expert_shard, tensor, ulysses, context, pipeline, other) and kind
    (all-gather, reduce-scatter, all-reduce, all-to-all, send, broadcast, reduce, gather, scatter, barrier).
    """

    def __init__(self) -> None:
        self.by_kind: dict[tuple[str, str], Sent] = defaultdict(Sent)

    @property
    def sent(self) -> dict[str, Sent]:
        """The totals by axis, without axes that sent nothing."""
        sums: dict[str, Sent] = defaultdict(Sent)
        for (axis, _), sent in self.by_kind.items():
            sums[axis] += sent
        return dict(sums)


@contextmanager
def count_traffic(mesh: Mesh) -> Iterator[Traffic]:
    """Count what this rank sends within this context, in this thread and the backward passes it starts."""
    traffic = Traffic()
    with _Counter(mesh, traffic):
        yield traffic


class _Call(NamedTuple):
    """One of torch's operators. given: the index of the argument with the rank's input (a tensor, or lists of them)."""

    kind: str
    given: int


_CALLS = {
    "c10d::_allgather_base_": _Call("all-gather", 1),
    "c10d::allgather_": _Call("all-gather", 1),
    "c10d::allgather_coalesced_": _Call("all-gather", 1),
    "c10d::allgather_into_tensor_coalesced_": _Call("all-gather", 1),
    "_c10d_functional::all_gather_into_tensor": _Call("all-gather", 0),
    "_c10d_functional::all_gather_into_tensor_out": _Call("all-gather", 0),
    "_c10d_functional::all_gather_into_tensor_coalesced": _Call("all-gather", 0),
    "c10d::_reduce_scatter_base_": _Call("reduce-scatter", 1),
    "c10d::reduce_scatter_": _Call("reduce-scatter", 1),
    "c10d::reduce_scatter_tensor_coalesced_": _Call("reduce-scatter", 1),
    "_c10d_functional::reduce_scatter_tensor": _Call("reduce-scatter", 0),
    "_c10d_functional::reduce_scatter_tensor_out": _Call("reduce-scatter", 0),
    "_c10d_functional::reduce_scatter_tensor_coalesced": _Call("reduce-scatter", 0),
    "c10d::allreduce_": _Call("all-reduce", 0),
    "c10d::allreduce_coalesced_": _Call("all-reduce", 0),
    "_c10d_functional::all_reduce": _Call("all-reduce", 0),
    "_c10d_functional::all_reduce_": _Call("all-reduce", 0),
    "_c10d_functional::all_reduce_coalesced": _Call("all-reduce", 0),
    "_c10d_functional::all_reduce_coalesced_": _Call("all-reduce", 0),
    "c10d::alltoall_base_": _Call("all-to-all", 1),
    "c10d::alltoall_": _Call("all-to-all", 1),
    "_c10d_functional::all_to_all_single": _Call("all-to-all", 0),
    "c10d::send": _Call("send", 0),
    "c10d::broadcast_": _Call("broadcast", 0),
    "_c10d_functional::broadcast": _Call("broadcast", 0),
    "_c10d_functional::broadcast_": _Call("broadcast", 0),
    "c10d::reduce_": _Call("reduce", 0),
    "c10d::gather_": _Call("gather", 1),
    "c10d::gather_into_tensor_": _Call("gather", 1),
    "c10d::scatter_": _Call("scatter", 1),
    "c10d::barrier": _Call("barrier", 0),
}

_SILENT = {
    "c10d::recv_",
    "c10d::recv_any_source_",
    "c10d::check_for_nan",
    "_c10d_functional::wait_tensor",
    "_c10d_functional::_wrap_tensor_autograd",
}
"""Related operators that send nothing."""

_RESOLVE = (torch.ops.aten.resolve_conj.default, torch.ops.aten.resolve_neg.default)
"""Operators at the start of reading a tensor's values; they copy nothing unless it is conjugated or negated."""


class _Counter(TorchDispatchMode):
    def __init__(self, mesh: Mesh, traffic: Traffic) -> None:
        super().__init__()
        self._traffic = traffic
        self._pipeline = set(dist.get_process_group_ranks(mesh.group("pipeline")))
        self._axes = {
            part.get_group(dim).group_name: _LABELS.get(axis, axis)
            for part in (mesh.expert_fsdp, mesh.expert, mesh.fsdp, mesh.grid)
            for dim, axis in enumerate(part.mesh_dim_names or ())
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its operations on local parts arrive here again
        name, namespace = func.name().partition(".")[0], func.namespace
        if func in _RESOLVE and not (args[0].is_conj() or args[0].is_neg()):
            return args[0]  # so that real borders of samples can be read within a fake mode, which would hide them
        if namespace == "tutti":
            with self:
                return body_of(func)(*args, **(kwargs or {}))
        if namespace in ("c10d", "_c10d_functional") and name not in _SILENT:
            assert name in _CALLS, f"what {name} sends is not known"
            self._count(_CALLS[name], args)
        return func(*args, **(kwargs or {}))

    def _count(self, call: _Call, args: Sequence[Any]) -> None:
        group = _group_of(args)
        if group.size() == 1:
            return
        axis = self._axes.get(group.group_name)
        if axis is None:
            inside = self._pipeline.issuperset(dist.get_process_group_ranks(group))
            axis = "pipeline" if inside else OTHER
        self._traffic.by_kind[axis, call.kind] += Sent(_num_bytes(call, args, group), 1)


def _group_of(args: Sequence[Any]) -> dist.ProcessGroup:
    """The process group argument of an operator, boxed or by name (the last of its strings)."""
    boxed = [item for item in args if isinstance(item, torch.ScriptObject)]
    if boxed:
        return dist.ProcessGroup.unbox(boxed[0])
    return resolve_process_group([item for item in args if isinstance(item, str)][-1])


def _num_bytes(call: _Call, args: Sequence[Any], group: dist.ProcessGroup) -> int:
    given = [item for item in tree_leaves(args[call.given]) if isinstance(item, Tensor)]
    whole, size = sum(item.numel() * item.element_size() for item in given), group.size()
    match call.kind:
        case "all-gather":
            return (size - 1) * whole
        case "reduce-scatter" | "broadcast" | "reduce" | "scatter":
            return (size - 1) * whole // size
        case "all-reduce":
            return 2 * (size - 1) * whole // size
        case "all-to-all":
            return whole - _kept(args, given, whole, group)
        case "send" | "gather":
            return whole
    return 0


def _kept(args: Sequence[Any], given: Sequence[Tensor], whole: int, group: dist.ProcessGroup) -> int:
    """Bytes of an all-to-all that stay on the rank: of one tensor cut by the last list of sizes, or of several
    tensors."""
    size, rank = group.size(), group.rank()
    if len(given) > 1:
        return given[rank].numel() * given[rank].element_size()
    lists = [item for item in args if isinstance(item, list)]
    parts = lists[-1] or [1] * size
    return whole * parts[rank] // (sum(parts) or 1)
