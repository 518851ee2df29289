"""Muon: momentum whose matrices are orthogonalised before they are added to the weights (arXiv 2502.16982).

The weight matrices of the repeated blocks get an update with singular values of about one, instead of Adam's
elementwise update; everything else (embeddings, head, norms, biases, projectors of towers) is updated by AdamW. A
matrix's update is scaled by 0.2 sqrt(max(rows, columns)), to the size of AdamW's, so that train.lr and
train.weight_decay suit both. A stack of experts [E, a, b] is E matrices; a matrix that holds several projections is one
matrix.

Orthogonalising needs the full matrix, and matrices are sharded. With F shards, each rank of the group orthogonalises
one of F equally shaped matrices at a time:

1. all-to-all: every rank sends its shard of matrix j to rank j (in the experts' own mesh, if experts are sharded).
2. If the matrix is also split over tensor ranks, these gather the rest of it and each orthogonalise all of it.
3. Five Newton-Schulz steps on the matrix, in the compute dtype.
4. The shards return the same way.

So the communicated bytes are those of two reduce-scatters, the work is divided over the shards, and the result does not
depend on the layout. Replicas (ddp, HSDP) and tensor ranks each repeat the work.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tutti.core.collectives import RankGroup, all_to_all, gather_rows
from tutti.core.tensors import local_part

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic a x + b x^3 + c x^5 on singular values, steepest at zero
(https://kellerjordan.github.io/posts/muon)."""

NUM_STEPS = 5
EPS = 1e-7
SIZE_OF_ADAM = 0.2


class Muon(torch.optim.AdamW):
    """Muon on the parameter groups with `matrices`, and torch's AdamW on the others, in one optimizer.

    State of a matrix: `momentum_buffer`. dtype: of the orthogonalisation. As with torch's fused AdamW, a step changes
    nothing if `found_inf`, a tensor on the device, is 1.
    """

    def __init__(self, params: Iterable[Any], *, momentum: float, dtype: torch.dtype, **adam: Any) -> None:
        self._momentum, self._dtype = momentum, dtype
        super().__init__(params, **adam)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient. A collective call if matrices are sharded."""
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if not group["matrices"]]
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group["matrices"]:
                self._step_matrices(group)
        return loss

    def _step_matrices(self, group: dict[str, Any]) -> None:
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        refused = getattr(self, "found_inf", None)
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}
        for alike in _alike(parameters):
            momenta = [self._advance(parameter, refused) for parameter in alike]
            updates = _orthogonal_parts(momenta, alike[0], self._dtype)
            for parameter, update in zip(alike, updates, strict=True):
                rate = group["lr"] * SIZE_OF_ADAM * math.sqrt(max(parameter.shape[-2:]))
                weight, decay = local_part(parameter), group["lr"] * group["weight_decay"]
                if refused is None:
                    weight.mul_(1 - decay).add_(update, alpha=-rate)
                else:
                    taken = 1 - refused
                    weight.mul_(1 - decay * taken).add_(update.float() * (-rate * taken))

    def _advance(self, parameter: Tensor, refused: Tensor | None) -> Tensor:
        """This rank's shard of Nesterov's momentum after the step's gradient, which is ignored if `refused`."""
        assert parameter.grad is not None
        grad, buffer = local_part(parameter.grad), local_part(self.state[parameter]["momentum_buffer"])
        if refused is None:
            buffer.lerp_(grad, 1 - self._momentum)
        else:
            grad = grad.masked_fill(refused.bool(), 0.0)
            buffer.lerp_(grad, ((1 - self._momentum) * (1 - refused)).to(buffer.dtype))
        return grad.lerp(buffer, self._momentum)


def block_matrices(model: nn.Module) -> set[nn.Parameter]:
    """The weights of linear layers, and stacks of them, in the repeated blocks of `model`."""
    found: set[nn.Parameter] = set()
    for blocks in model.modules():
        if not isinstance(blocks, nn.ModuleList):
            continue
        for module in blocks.modules():
            if not isinstance(module, nn.Embedding | nn.modules.conv._ConvNd):
                found.update(p for name, p in module.named_parameters(recurse=False) if _is_matrix(name, p))
    return found


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """True for `weight` [a, b], an adapter's factor, or a stack [E, a, b], but not for other tables."""
    if min(parameter.shape[-2:], default=0) < 2 or parameter.ndim not in (2, 3):
        return False
    return parameter.ndim == 3 or name == "weight" or "_lora_" in name


def orthogonalise(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest matrix with singular values of about one, of [a, b] or each of [E, a, b], in `dtype`."""
    a, b, c = COEFFICIENTS
    x = matrices.to(dtype)
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=EPS)
    add = torch.addmm if x.ndim == 2 else torch.baddbmm
    for _ in range(NUM_STEPS):
        gram = x @ x.mT
        x = add(x, add(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


class _Split(NamedTuple):
    """A dimension (-2 or -1) that is split over ranks in consecutive parts, as by torch.chunk."""

    ranks: RankGroup
    dim: int

    def widths(self, total: int) -> list[int]:
        """The length that each rank holds of `total`."""
        width = -(-total // self.ranks.size)
        return [max(0, min(width, total - width * rank)) for rank in range(self.ranks.size)]


def _splits(parameter: Tensor) -> list[_Split]:
    """The splits of a parameter's matrices, the most recent first."""
    if not isinstance(parameter, DTensor):
        return []
    found, mesh = [], parameter.device_mesh
    for axis, placement in enumerate(parameter.placements):
        if mesh.size(axis) > 1 and not placement.is_replicate():
            dim = placement.dim - parameter.ndim  # type: ignore[attr-defined]
            if dim >= -2:
                name = mesh.get_group(axis).group_name
                found.append(_Split(RankGroup(mesh.get_local_rank(axis), mesh.size(axis), name), dim))
    return found


def _length(parameter: Tensor, splits: Sequence[_Split], dim: int) -> int:
    """The length of `dim` in this rank's part of `parameter`, if split only in these ways."""
    length = parameter.shape[dim]
    for split in reversed(splits):
        if split.dim == dim:
            length = split.widths(length)[split.ranks.rank]
    return length


def _orthogonal_parts(parts: Sequence[Tensor], like: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """This rank's parts of orthogonalised matrices, from its `parts` of the matrices.

    All are split as the parameter `like`; there are at most as many as ranks in its first split. A collective call.
    """
    splits = _splits(like)
    if not splits:
        return [orthogonalise(part, dtype) for part in parts]
    (ranks, dim), others = splits[0], splits[1:]
    home, device = parts[0].device, like.device_mesh.device_type  # type: ignore[attr-defined]
    parts = [part.to(device, dtype) for part in parts]
    widths = splits[0].widths(_length(like, others, dim))
    rest = parts[0].movedim(dim, 0).shape[1:]
    is_mine = ranks.rank < len(parts)
    sent = [part.numel() for part in parts] + [0] * (ranks.size - len(parts))
    received = [width * math.prod(rest) if is_mine else 0 for width in widths]
    rows = all_to_all(torch.cat([part.movedim(dim, 0).flatten() for part in parts]), sent, received, ranks.group)
    if is_mine:
        matrix = rows.view(-1, *rest).movedim(0, dim)
        rows = _over_others(matrix, like, others, dtype).movedim(dim, 0).flatten()
    returned = all_to_all(rows, received, sent, ranks.group).split(sent)
    return [
        piece.view(part.shape[dim], *rest).movedim(0, dim).to(home)
        for part, piece in zip(parts, returned, strict=False)
    ]


def _over_others(part: Tensor, like: Tensor, splits: Sequence[_Split], dtype: torch.dtype) -> Tensor:
    """This rank's part of an orthogonalised matrix of `like`, split in these ways. A collective call."""
    if not splits:
        return orthogonalise(part, dtype)
    (ranks, dim), others = splits[0], splits[1:]
    widths = splits[0].widths(_length(like, others, dim))
    rows = part.movedim(dim, 0)
    padded = torch.cat([rows, rows.new_zeros(widths[0] - len(rows), *rows.shape[1:])])
    pieces = gather_rows(padded, ranks.group, ranks.size).split(widths[0])
    matrix = torch.cat([piece[:width] for piece, width in zip(pieces, widths, strict=True)]).movedim(0, dim)
    return _over_others(matrix, like, others, dtype).split(widths, dim)[ranks.rank]


def _alike(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """The parameters in lists of equal shape and split, none longer than the number of ranks that share the work."""
    lists: dict[Any, list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        place = (parameter.device_mesh, parameter.placements) if isinstance(parameter, DTensor) else None
        lists[place, parameter.shape, parameter.dtype].append(parameter)
    for alike in lists.values():
        splits = _splits(alike[0])
        length = splits[0].ranks.size if splits else 1
        yield from (alike[start : start + length] for start in range(0, len(alike), length))
