"""Tensor parallelism (arXiv 1909.08053) with sequence-parallel norms (arXiv 2205.05198): matrices split over ranks.

The ranks of a tensor group get the same packed row of T tokens:

1. The embedding's rows are split: each rank looks up the tokens for which it has rows, and a reduce-scatter leaves the
   sums with the rank that a token belongs to. The row keeps its length, so that positions and masks do not change.
2. From the first block on, a rank has its own T / G contiguous tokens: residuals and norms run on these.
3. A region (attention or MLP; see `tutti.parallel.tp_plan`) gathers all tokens, multiplies with this rank's columns of
   its first matrices (for attention: this rank's heads) and with its rows of the last one; a reduce-scatter leaves the
   ranks' sums with the rank that a token belongs to. That is one gather and one scatter per region, forward and
   backward. Experts are not split: each rank sends its own tokens through them. Either all ranks hold them, or they are
   divided among ranks of a separate grid (`tutti.parallel.expert`).
4. The last hidden states are gathered once, for a head that is split by the vocabulary (`tutti.train.loss`).

The gradient of every collective is its adjoint (`tutti.core.collectives`), and each rank is responsible for its share
of the loss, so that the loss of the batch is the sum over ranks. One rule then holds for all parameters: the gradient
of a split one is complete on the rank that holds the part; that of any other is summed over the ranks, once per step
(`tutti.parallel.grads.sum_replicated`).

Parameters are DTensors on the tensor axis, so that FSDP can split them further and loading, checkpoints and norms know
each rank's part. While a unit runs, its modules see plain tensors, this rank's parts: the models' own code and
torch.compile never see a DTensor, and autograd turns the parts' gradients into DTensors again.

Shapes: G ranks, T tokens (a multiple of G), t = T / G of a rank, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from tutti.core.collectives import RankGroup, gather_rows, gather_tensor, scatter_tensor
from tutti.core.modules import Forward, attach, attached, wrap_forward
from tutti.parallel.mesh import Mesh
from tutti.parallel.tp_plan import GATHERED, SLICED, Linear, TensorPlan


def tensor_ranks(mesh: Mesh) -> RankGroup | None:
    """The tensor group of this rank; None if matrices are not split."""
    if mesh.size("tensor") == 1:
        return None
    return RankGroup(mesh.rank("tensor"), mesh.size("tensor"), mesh.group("tensor").group_name)


class LinearShard(NamedTuple):
    """The part of a split projection that a rank computes.

    outputs: a slice of the weight's rows, if the rank holds more than it computes. inputs: the ranks that hold the
    other columns, over which products have to be summed; None if the rank holds all columns.
    """

    outputs: slice | None = None
    inputs: RankGroup | None = None

    def rows(self, tensor: Tensor) -> Tensor:
        """The rows of a tensor [out, ...] for this part's outputs."""
        return tensor if self.outputs is None else tensor[self.outputs]

    def total(self, part: Tensor) -> Tensor:
        """Sum `part` over the ranks that hold the inputs, without gradient."""
        if self.inputs is None:
            return part
        return gather_rows(part[None], self.inputs.group, self.inputs.size).sum(0)


WHOLE = LinearShard()


class Change(Protocol):
    """A trained change to a projection's frozen weight; the module holds its parameters (`tutti.model.lora`)."""

    def by_output(self, module: Any) -> list[Tensor]:
        """Parameters with a row for each output."""
        ...

    def by_input(self, module: Any) -> list[Tensor]:
        """Parameters with a column for each input."""
        ...

    def product(self, module: Any, inputs: Tensor, shard: LinearShard) -> Tensor:
        """The product of the changed weight with `inputs` [.., in], without the bias."""
        ...


def _change(module: Any) -> Change | None:
    return attached(module).adapters.get("weight")


_TOKENS, _FEATURES = -2, -1
"""The numbers of dimensions of hidden states, with and without a batch dimension of one."""


def split_tensors(root: nn.Module, plan: TensorPlan, mesh: Mesh) -> None:
    """Split the parameters of `root` according to `plan`, and put collectives around the parts of its blocks, in place.

    Parameters become DTensors on the tensor axis; they may be on the meta device. `use_local` must be called
    afterwards.
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
        if hasattr(
            attention, "num_key_value_groups"
        ):  # the factor with which the model's attention repeats keys and values
            attention.num_key_value_groups = attention.num_key_value_groups * num_heads // ranks.size
    counting: tuple[Any, ...] = plan.counting
    for attention in counting:
        attention.num_heads = attention.num_heads // ranks.size
        if (groups := getattr(attention, "num_key_value_heads", 0)) > 0:
            attention.num_key_value_heads = max(1, groups // ranks.size)
    for linear in plan.linears:
        if linear in shared:
            continue
        split.update((id(parameter), Shard(linear.dim)) for parameter in _split_parameters(linear))
    _localize_embedding(plan.embedding, ranks)
    for linear in plan.linears:
        _localize_linear(linear, ranks)
    for region in plan.regions:
        wrap_forward(region.module, "tokens", partial(_on_all_tokens, ranks=ranks, reduces=region.reduces))
    for number, block in enumerate(plan.blocks):
        wrap_forward(block, "tokens", partial(_from_own_tokens, ranks=ranks, is_first=number == 0))
    if plan.reshaping is not None:
        wrap_forward(plan.blocks[-1], "row", partial(_in_a_row, ranks=ranks))
        wrap_forward(plan.reshaping, "tokens", partial(_out_of_a_row, ranks=ranks))
    divide(root, split, mesh.grid["tensor"])


def _split_parameters(linear: Linear) -> Iterator[Tensor]:
    """The projection's parameters that are split like its weight, including the weight."""
    module, change = linear.module, _change(linear.module)
    yield module.weight
    if linear.dim == 0 and module.bias is not None:
        yield module.bias
    if change is not None:
        yield from change.by_input(module) if linear.dim == 1 else change.by_output(module)


def _project(module: Any, hidden: Tensor, shard: LinearShard) -> Tensor:
    """The product of the module's weight, with its trained change if any, with `hidden` [.., in]; without the bias."""
    change = _change(module)
    if change is None:
        return nn.functional.linear(hidden, shard.rows(module.weight))
    return change.product(module, hidden, shard)


def divide(root: nn.Module, split: dict[int, Placement], mesh: DeviceMesh) -> None:
    """Make every parameter below `root` a DTensor, split along the last axis of `mesh` if `split` has its id, else
    replicated.

    Divided experts are DTensors already and are skipped. Tied parameters stay tied.
    """
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
        parts = whole.chunk(mesh.shape[-1], placement.dim)
        own = parts[mesh.get_local_rank(mesh.ndim - 1)].clone(memory_format=torch.contiguous_format)
    else:
        own = whole
    placements = [*[Replicate()] * (mesh.ndim - 1), placement]
    tensor = DTensor.from_local(
        own, mesh, placements, run_check=False, shape=whole.shape, stride=whole.contiguous().stride()
    )
    return nn.Parameter(tensor, requires_grad=parameter.requires_grad)


def _localize_embedding(embedding: Any, ranks: RankGroup) -> None:
    """Make the embedding look up only the ids for which this rank has rows, and return the embeddings of its own
    tokens, in a row whose other entries are not used."""
    total = embedding.weight.shape[0]
    first = ranks.start(total)
    num_rows = ranks._replace(rank=ranks.rank + 1).start(total) - first
    if embedding.padding_idx is not None:
        inside = first <= embedding.padding_idx < first + num_rows
        embedding.padding_idx = embedding.padding_idx - first if inside else None

    def localized(forward: Forward) -> Forward:
        @wraps(forward)
        def look_up(ids: Tensor) -> Tensor:
            rows = ids - first
            elsewhere = (rows < 0) | (rows >= num_rows)
            found = forward(rows.masked_fill(elsewhere, 0)).masked_fill(elsewhere[..., None], 0)
            return _padded(scatter_tensor(found, ranks, _TOKENS), ranks)

        return look_up

    wrap_forward(embedding, "shard", localized)


def _localize_linear(linear: Linear, ranks: RankGroup) -> None:
    module: Any = linear.module
    if linear.style in GATHERED:
        wrap_forward(module, "shard", lambda project: lambda hidden: gather_tensor(project(hidden), ranks, _FEATURES))
    if linear.dim == 1:
        shard = LinearShard(inputs=ranks)

        def reduce(hidden: Tensor) -> Tensor:
            hidden = ranks.own(hidden, _FEATURES) if linear.style in SLICED else hidden
            out = scatter_tensor(_project(module, hidden, shard), ranks, _TOKENS)
            return out if module.bias is None else out + module.bias

        wrap_forward(module, "shard", lambda _: reduce)


def _share_head(linear: Linear, ranks: RankGroup) -> None:
    """Make a replicated projection compute only the one head that this rank's queries read."""
    module: Any = linear.module
    sharers = ranks.size // linear.units
    width = module.weight.shape[0] // linear.units
    start = ranks.rank // sharers * width
    shard = LinearShard(outputs=slice(start, start + width))

    def project(hidden: Tensor) -> Tensor:
        out = _project(module, hidden, shard)
        return out if module.bias is None else out + shard.rows(module.bias)

    wrap_forward(module, "shard", lambda _: project)


def _on_all_tokens(forward: Forward, ranks: RankGroup, *, reduces: bool) -> Forward:
    """A region's forward with a rank's own tokens [1, t, H] as first input and (first) output; other inputs of that
    shape (Zamba's embeddings, Bloom's residual) are gathered too."""

    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        own = args[0] if args else kwargs["hidden_states"]

        def gather(item: Any) -> Any:
            along = isinstance(item, Tensor) and item.shape == own.shape
            return gather_tensor(item, ranks, _TOKENS) if along else item

        out = forward(*map(gather, args), **{name: gather(item) for name, item in kwargs.items()})
        if reduces:
            return out
        if isinstance(out, tuple):
            return ranks.own(out[0], _TOKENS), *out[1:]
        return ranks.own(out, _TOKENS)

    return run


def _from_own_tokens(forward: Forward, ranks: RankGroup, *, is_first: bool) -> Forward:
    """A block's forward on this rank's tokens. The first block cuts them from the whole row [1, T, H]; other inputs
    along the tokens besides positions (embeddings of each layer) are cut too."""

    @wraps(forward)
    def run(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        own = ranks.own(hidden, _TOKENS) if is_first else hidden
        length = own.shape[_TOKENS] * ranks.size

        def cut(item: Any) -> Any:
            along = isinstance(item, Tensor) and item.ndim == 3 and item.shape[1] == length
            return ranks.own(item, _TOKENS) if along and item.is_floating_point() else item

        given = {name: item if name.startswith("position") else cut(item) for name, item in kwargs.items()}
        return forward(own, *map(cut, args), **given)

    return run


def _padded(own: Tensor, ranks: RankGroup) -> Tensor:
    """A row [.., T, H] with this rank's `own` tokens [.., t, H] in their place, and ones elsewhere: a model might
    take the root of zeros (Gemma 3n), whose gradient is infinite."""
    length = own.shape[_TOKENS]
    return nn.functional.pad(own, (0, 0, ranks.rank * length, (ranks.size - 1 - ranks.rank) * length), value=1.0)


def _in_a_row(forward: Forward, ranks: RankGroup) -> Forward:
    """The last block's forward, returning as many hidden states as there were before the first block."""

    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        return (_padded(out[0], ranks), *out[1:]) if isinstance(out, tuple) else _padded(out, ranks)

    return run


def _out_of_a_row(forward: Forward, ranks: RankGroup) -> Forward:
    """A decoder's forward, returning only this rank's own last hidden states."""

    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.last_hidden_state = ranks.own(out.last_hidden_state, _TOKENS)
        return out

    return run


def use_local(units: Iterable[nn.Module], skip: Iterable[nn.Module] = (), dtype: torch.dtype | None = None) -> None:
    """Make the parameters of each of `units` (inner ones first) plain tensors while it runs.

    A parameter belongs to the innermost unit around it, as with FSDP, which gathers it just before the unit runs. skip:
    modules within units that handle their own parameters. dtype: cast parameters to it (None: no cast).
    """
    taken = set(skip)
    for unit in units:
        modules = list(_outside_of(unit, taken))
        taken.add(unit)
        attach(unit, local_parameters=partial(local_parameters, modules, dtype))
        wrap_forward(unit, "local parameters", partial(with_local_parameters, unit=unit))


def _outside_of(module: nn.Module, units: set[nn.Module]) -> Iterator[nn.Module]:
    """`module` and the modules below it, except within `units`."""
    yield module
    for child in module.children():
        if child not in units:
            yield from _outside_of(child, units)


def with_local_parameters(forward: Forward, unit: nn.Module) -> Forward:
    """`forward` with the parameters of `unit`, on which `use_local` was called, as plain tensors."""
    localize = attached(unit).local_parameters
    assert localize is not None, f"{type(unit).__name__} is no unit"

    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        with localize():
            return forward(*args, **kwargs)

    return run


def is_cast(parameter: Tensor, dtype: torch.dtype) -> bool:
    """True if `parameter` is cast where it is used in a model that computes in `dtype`."""
    return parameter.is_floating_point() and parameter.dtype != dtype


@contextmanager
def local_parameters(modules: Iterable[nn.Module], dtype: torch.dtype | None = None) -> Iterator[None]:
    """Replace the modules' DTensors by their local parts within this context, with floats cast to `dtype`; tied ones
    become one tensor."""
    replaced: list[tuple[dict[str, Any], str, Any]] = []
    made: dict[int, Tensor] = {}
    for module in modules:
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            cast = dtype is not None and is_cast(parameter, dtype)
            if cast or isinstance(parameter, DTensor):
                replaced.append((module._parameters, name, parameter))
                if id(parameter) not in made:
                    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                    made[id(parameter)] = local.to(dtype) if cast else local
    try:
        for parameters, name, parameter in replaced:
            parameters[name] = made[id(parameter)]
        yield
    finally:
        for parameters, name, parameter in replaced:
            parameters[name] = parameter
