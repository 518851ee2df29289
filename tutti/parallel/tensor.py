"""Tensor parallelism (arXiv 1909.08053) with sequence-parallel norms (arXiv 2205.05198): matrices split over ranks.

The ranks of a tensor group are given the same packed row of T tokens:

1. The embedding's rows are split: each rank looks up the tokens that it has rows for, and the sums are left to the rank
   that a token belongs to (reduce-scatter). The row keeps its length, so that positions and masks are made as ever.
2. From the first block on a rank has its own T / G tokens, contiguous ones: residuals and norms run on these.
3. A region (attention, MLP; see `tutti.parallel.tp_plan`) gathers all tokens, multiplies with this rank's columns of
   its first matrices (for attention: this rank's heads), and with its rows of the last one; the ranks' sums are left to
   the rank that a token belongs to (reduce-scatter). That is one gather and one scatter a region, forward and backward.
   Experts are not split: each rank sends its own tokens through them, which all ranks hold, or which are divided among
   ranks of a grid of their own (`tutti.parallel.expert`).
4. The last hidden states are gathered once, for a head that is split by the vocabulary (`tutti.train.loss`).

Every collective's gradient is its exact adjoint, and each rank answers for its share of the loss, so that the loss of
the batch is the sum over ranks, and one rule holds for all parameters: the gradient of what is split is complete on the
rank that holds it, that of what is not is the sum over the ranks, taken once a step (`add_up_whole`).

Parameters are DTensors on the tensor axis, for FSDP to split further and for loading, checkpoints and norms to know
what a rank holds. While a unit runs, its modules see plain tensors, this rank's parts: the models' own code and
torch.compile meet no DTensor, and autograd turns the parts' gradients into DTensors again.

Shapes: G ranks, T tokens (a multiple of G), t = T / G of a rank, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from tutti.parallel.mesh import Mesh
from tutti.parallel.sequence import process_group
from tutti.parallel.tp_plan import GATHERED, SLICED, Linear, TensorPlan


class TensorRanks(NamedTuple):
    """The ranks that split matrices, and this rank's place among them; plain data, for compiled code."""

    rank: int
    size: int
    group: str

    def own(self, tensor: Tensor, dim: int) -> Tensor:
        """This rank's share of what all of them hold."""
        return tensor.chunk(self.size, dim)[self.rank]

    def start(self, total: int) -> int:
        """Where this rank's share of `total` rows begins."""
        return min(total, -(-total // self.size) * self.rank)


def tensor_ranks(mesh: Mesh) -> TensorRanks | None:
    """The tensor group of this rank; None where matrices are not split."""
    if mesh.size("tensor") == 1:
        return None
    return TensorRanks(mesh.rank("tensor"), mesh.size("tensor"), mesh.group("tensor").group_name)


@torch.library.custom_op("tutti::gather_rows", mutates_args=())
def gather_rows(part: Tensor, group: str, size: int) -> Tensor:
    """[n, ...] of each rank -> [G * n, ...] of all, in rank order. The gradient is `scatter_rows`."""
    whole = part.new_empty(part.shape[0] * size, *part.shape[1:])
    dist.all_gather_into_tensor(whole, part.contiguous(), group=process_group(group))
    return whole


@torch.library.custom_op("tutti::scatter_rows", mutates_args=())
def scatter_rows(whole: Tensor, group: str, size: int) -> Tensor:
    """[G * n, ...] of each rank -> [n, ...], this rank's rows summed over the ranks. The gradient is `gather_rows`."""
    part = whole.new_empty(whole.shape[0] // size, *whole.shape[1:])
    dist.reduce_scatter_tensor(part, whole.contiguous(), group=process_group(group))
    return part


@gather_rows.register_fake
def _(part: Tensor, group: str, size: int) -> Tensor:
    return part.new_empty(part.shape[0] * size, *part.shape[1:])


@scatter_rows.register_fake
def _(whole: Tensor, group: str, size: int) -> Tensor:
    return whole.new_empty(whole.shape[0] // size, *whole.shape[1:])


def _keep_group(ctx: Any, inputs: tuple[Tensor, str, int], output: Tensor) -> None:
    _, ctx.group, ctx.size = inputs


gather_rows.register_autograd(
    lambda ctx, grad: (scatter_rows(grad, ctx.group, ctx.size), None, None), setup_context=_keep_group
)
scatter_rows.register_autograd(
    lambda ctx, grad: (gather_rows(grad, ctx.group, ctx.size), None, None), setup_context=_keep_group
)


def gather_tensor(tensor: Tensor, ranks: TensorRanks, dim: int) -> Tensor:
    """All ranks' parts of `tensor`, joined along `dim`. Differentiable."""
    return gather_rows(tensor.movedim(dim, 0), ranks.group, ranks.size).movedim(0, dim)


def scatter_tensor(tensor: Tensor, ranks: TensorRanks, dim: int) -> Tensor:
    """This rank's part along `dim` of the sum of `tensor` over the ranks. Differentiable."""
    return scatter_rows(tensor.movedim(dim, 0), ranks.group, ranks.size).movedim(0, dim)


class LinearShard(NamedTuple):
    """What a rank computes of a projection that is split.

    outputs: of the weight's rows that it holds, only these. inputs: the ranks that hold the other columns, so that
    what this one makes of its own is to be summed over them; None where it holds all.
    """

    outputs: slice | None = None
    inputs: TensorRanks | None = None

    def rows(self, tensor: Tensor) -> Tensor:
        """Of a tensor [out, ...], what belongs to this share's outputs."""
        return tensor if self.outputs is None else tensor[self.outputs]

    def total(self, part: Tensor) -> Tensor:
        """The sum of `part` over the ranks that hold the inputs. Without gradient."""
        if self.inputs is None:
            return part
        return gather_rows(part[None], self.inputs.group, self.inputs.size).sum(0)


WHOLE = LinearShard()


class Change(Protocol):
    """What is trained beside the frozen weight of a projection, as its module's `low_rank["weight"]`; its parameters
    are the module's (see `tutti.model.lora`)."""

    def by_output(self, module: Any) -> list[Tensor]:
        """Parameters that have a row for each output."""
        ...

    def by_input(self, module: Any) -> list[Tensor]:
        """Parameters that have a column for each input."""
        ...

    def product(self, module: Any, inputs: Tensor, share: LinearShard) -> Tensor:
        """What weight and change make of `inputs` [.., in], without the bias."""
        ...


def _change(module: Any) -> Change | None:
    return getattr(module, "low_rank", {}).get("weight")


_TOKENS, _FEATURES = -2, -1
"""The dimensions of hidden states, with and without a batch dimension of one."""


def split_tensors(root: nn.Module, plan: TensorPlan, mesh: Mesh) -> None:
    """Divide the parameters of `root` as `plan` says, and lay collectives around the parts of its blocks, in place.

    Parameters become DTensors on the tensor axis; they may be on the meta device. `use_local` has to follow.
    """
    ranks = tensor_ranks(mesh)
    if ranks is None:
        return
    split: dict[int, Placement] = {id(plan.embedding.weight): Shard(0)}
    if plan.head is not None:
        split.update({id(parameter): Shard(0) for parameter in plan.head.parameters()})
    split.update({id(parameter): Shard(0) for parameter in plan.per_head})
    shared = [linear for linear in plan.linears if linear.shared and linear.units < ranks.size]
    for linear in shared:
        _share_head(linear, ranks)
    attentions: dict[Any, int] = {linear.region: linear.units for linear in shared}
    for attention, num_heads in attentions.items():
        if hasattr(attention, "num_key_value_groups"):  # what the model's own attention repeats keys and values by
            attention.num_key_value_groups = attention.num_key_value_groups * num_heads // ranks.size
    for linear in plan.linears:
        if linear in shared:
            continue
        split.update((id(parameter), Shard(linear.dim)) for parameter in _split_parameters(linear))
    _localize_embedding(plan.embedding, ranks)
    for linear in plan.linears:
        _localize_linear(linear, ranks)
    for region in plan.regions:
        region.module.forward = _on_all_tokens(region.module.forward, ranks, reduces=region.reduces)
    plan.first.forward = _from_own_tokens(plan.first.forward, ranks)
    _divide(root, split, mesh.grid["tensor"])


def _split_parameters(linear: Linear) -> Iterator[Tensor]:
    """Those of the projection's parameters that are split as its weight is."""
    module, change = linear.module, _change(linear.module)
    yield module.weight
    if linear.dim == 0 and module.bias is not None:
        yield module.bias
    if change is not None:
        yield from change.by_input(module) if linear.dim == 1 else change.by_output(module)


def _project(module: Any, hidden: Tensor, share: LinearShard) -> Tensor:
    """What the module's weight, with what is trained beside it, makes of `hidden` [.., in]; without the bias."""
    change = _change(module)
    if change is None:
        return nn.functional.linear(hidden, share.rows(module.weight))
    return change.product(module, hidden, share)


def _divide(root: nn.Module, split: dict[int, Placement], mesh: DeviceMesh) -> None:
    """Make every parameter below `root` a DTensor, split as `split` says by its id, else whole; but for what is one
    already, divided experts. Tied ones stay one."""
    made: dict[int, nn.Parameter] = {}
    for module in root.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or isinstance(parameter, DTensor):
                continue
            if id(parameter) not in made:
                placement = split.get(id(parameter), Replicate())
                made[id(parameter)] = _divided(parameter, placement, mesh)
            module._parameters[name] = made[id(parameter)]


def _divided(parameter: nn.Parameter, placement: Placement, mesh: DeviceMesh) -> nn.Parameter:
    whole = parameter.detach()
    if isinstance(placement, Shard):
        parts = whole.chunk(mesh.size(), placement.dim)
        own = parts[mesh.get_local_rank()].clone(memory_format=torch.contiguous_format)
    else:
        own = whole
    tensor = DTensor.from_local(
        own, mesh, [placement], run_check=False, shape=whole.shape, stride=whole.contiguous().stride()
    )
    return nn.Parameter(tensor, requires_grad=parameter.requires_grad)


def _localize_embedding(embedding: Any, ranks: TensorRanks) -> None:
    """Look up what this rank has rows for; its own tokens' sums stay with it, in a row that is zero elsewhere.

    Only a rank's own tokens are read later, so that nothing else needs to be there.
    """
    forward = embedding.forward
    total = embedding.weight.shape[0]
    first = ranks.start(total)
    num_rows = ranks._replace(rank=ranks.rank + 1).start(total) - first
    if embedding.padding_idx is not None:
        inside = first <= embedding.padding_idx < first + num_rows
        embedding.padding_idx = embedding.padding_idx - first if inside else None

    @wraps(forward)
    def look_up(ids: Tensor) -> Tensor:
        rows = ids - first
        elsewhere = (rows < 0) | (rows >= num_rows)
        found = forward(rows.masked_fill(elsewhere, 0)).masked_fill(elsewhere[..., None], 0)
        own = scatter_tensor(found, ranks, _TOKENS)
        length = own.shape[_TOKENS]
        return nn.functional.pad(own, (0, 0, ranks.rank * length, (ranks.size - 1 - ranks.rank) * length))

    embedding.forward = look_up


def _localize_linear(linear: Linear, ranks: TensorRanks) -> None:
    module: Any = linear.module
    project = module.forward
    if linear.style in GATHERED:
        module.forward = lambda hidden: gather_tensor(project(hidden), ranks, _FEATURES)
    if linear.dim == 1:
        share = LinearShard(inputs=ranks)

        def reduce(hidden: Tensor) -> Tensor:
            hidden = ranks.own(hidden, _FEATURES) if linear.style in SLICED else hidden
            out = scatter_tensor(_project(module, hidden, share), ranks, _TOKENS)
            return out if module.bias is None else out + module.bias

        module.forward = reduce


def _share_head(linear: Linear, ranks: TensorRanks) -> None:
    """Have a projection that every rank holds whole compute one head alone: the one that this rank's queries read."""
    module: Any = linear.module
    sharers = ranks.size // linear.units
    width = module.weight.shape[0] // linear.units
    start = ranks.rank // sharers * width
    share = LinearShard(outputs=slice(start, start + width))

    def project(hidden: Tensor) -> Tensor:
        out = _project(module, hidden, share)
        return out if module.bias is None else out + share.rows(module.bias)

    module.forward = project


def _on_all_tokens(forward: Callable[..., Any], ranks: TensorRanks, *, reduces: bool) -> Callable[..., Any]:
    """A region's forward, from and to a rank's own tokens [1, t, H] as its first input and (first) output."""

    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if args:
            args = (gather_tensor(args[0], ranks, _TOKENS), *args[1:])
        else:
            kwargs["hidden_states"] = gather_tensor(kwargs["hidden_states"], ranks, _TOKENS)
        out = forward(*args, **kwargs)
        if reduces:
            return out
        if isinstance(out, tuple):
            return ranks.own(out[0], _TOKENS), *out[1:]
        return ranks.own(out, _TOKENS)

    return run


def _from_own_tokens(forward: Callable[..., Any], ranks: TensorRanks) -> Callable[..., Any]:
    """The first block's forward, on this rank's tokens of the whole row [1, T, H]."""

    @wraps(forward)
    def run(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return forward(ranks.own(hidden, _TOKENS), *args, **kwargs)

    return run


def use_local(units: Iterable[nn.Module], apart: Iterable[nn.Module]) -> None:
    """Have the parameters of each of `units` (inner ones before outer ones) be plain tensors while it runs.

    A parameter belongs to the innermost unit around it, as with FSDP, which gathers it just before the unit runs.
    apart: modules within units that see to their own parameters.
    """
    taken = set(apart)
    for unit in units:
        modules = list(_outside_of(unit, taken))
        taken.add(unit)
        unit.forward = _with_local_parameters(unit.forward, modules)


def _outside_of(module: nn.Module, units: set[nn.Module]) -> Iterator[nn.Module]:
    """`module` and what is below it, but not the units below it."""
    yield module
    for child in module.children():
        if child not in units:
            yield from _outside_of(child, units)


def _with_local_parameters(forward: Callable[..., Any], modules: Sequence[nn.Module]) -> Callable[..., Any]:
    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        with local_parameters(modules):
            return forward(*args, **kwargs)

    return run


@contextmanager
def local_parameters(modules: Iterable[nn.Module]) -> Iterator[None]:
    """The local parts of the modules' own DTensors in their place; tied ones are one tensor."""
    held: list[tuple[dict[str, Any], str, Any]] = []
    made: dict[int, Tensor] = {}
    for module in modules:
        for name, parameter in module._parameters.items():
            if isinstance(parameter, DTensor):
                held.append((module._parameters, name, parameter))
                if id(parameter) not in made:
                    made[id(parameter)] = parameter.to_local()
    try:
        for parameters, name, parameter in held:
            parameters[name] = made[id(parameter)]
        yield
    finally:
        for parameters, name, parameter in held:
            parameters[name] = parameter


def add_up_whole(parameters: Iterable[nn.Parameter], mesh: Mesh) -> None:
    """Add up over the tensor ranks the gradients of what each of them has whole, all in one message. Collective."""
    if mesh.size("tensor") == 1:
        return
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        if isinstance(parameter.grad, DTensor) and _is_whole(parameter.grad):
            grad = parameter.grad.to_local()
            by_dtype.setdefault(grad.dtype, []).append(grad)
    for grads in by_dtype.values():
        total = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(total, group=mesh.group("tensor"))
        for grad, part in zip(grads, total.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(part.view_as(grad))


def _is_whole(tensor: DTensor) -> bool:
    """Whether every tensor rank has all of what `split_tensors` made a DTensor."""
    axes = zip(tensor.device_mesh.mesh_dim_names or (), tensor.placements, strict=True)
    return any(axis == "tensor" and placement.is_replicate() for axis, placement in axes)
