"""Batch-invariant computation: what the model says of a sample does not depend, bit for bit, on the rest of its batch.

Floating-point sums depend on their order, and the order on a tensor's shape: matrix products pick their tiles by the
number of rows, vectorised functions treat the last few elements of a thread's share otherwise, reductions and grouped
products split by size. No list of such kernels is ever complete. So instead of replacing them, everything is computed
sample by sample: a packed batch is cut at its samples' borders before each block (and before whatever else the decoder
runs, such as rotary embeddings and the final norm), each sample goes through on its own, in memory of its own, and the
results are laid end to end again. All that a kernel could go by, shape and alignment, is then the sample's. The head is
applied to each sample's rows alike (`tutti.train.loss`).

It is done within the units that FSDP gathers, so parameters travel once a batch, as ever. The price is that of products
with fewer rows: what packing gains for short samples is lost again.

Shapes: T tokens of S samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from tutti.core.batch import Batch


def separate_samples(root: nn.Module, blocks: Iterable[nn.Module]) -> None:
    """Have `blocks`, and all modules below `root` that are not around them, run one sample after the other, in place.

    `root` is called with a `Batch` first.
    """
    borders = _Borders()
    root.register_forward_pre_hook(borders.note)
    known = set(blocks)
    for module in (*known, *_beside(root, known)):
        module.forward = _by_sample(module.forward, borders)


def _beside(module: nn.Module, blocks: set[nn.Module]) -> Iterator[nn.Module]:
    """The outermost modules below `module` with no block in or around them."""
    for child in module.children():
        if child in blocks:
            continue
        if any(inner in blocks for inner in child.modules()):
            yield from _beside(child, blocks)
        else:
            yield child


class _Borders:
    """The samples of the batch that is being run: their lengths, and the int32 [2] borders of each for itself."""

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self.each: list[Tensor] = []

    def note(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A forward hook of the root. Waits for the device, to learn the lengths."""
        (batch,) = args
        assert isinstance(batch, Batch) and batch.whole is None, "ranks that share samples cannot separate them"
        self.lengths = batch.cu_seqlens.diff().tolist()
        self.each = [pair - pair[0] for pair in batch.cu_seqlens.unfold(0, 2, 1)]


def _by_sample(forward: Callable[..., Any], borders: _Borders) -> Callable[..., Any]:
    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        lengths = borders.lengths
        leaves, spec = tree_flatten((args, kwargs))
        columns = [_cut(leaf, lengths) for leaf in leaves]
        outputs = []
        for number, own in enumerate(zip(*columns, strict=True)):
            own_args, own_kwargs = tree_unflatten(list(own), spec)
            outputs.append(forward(*own_args, **_with_borders(own_kwargs, borders.each[number], lengths[number])))
        return _join(outputs, lengths)

    return run


def _with_borders(kwargs: dict[str, Any], borders: Tensor, length: int) -> dict[str, Any]:
    values = {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": length, "max_length_k": length}
    return {name: values.get(name, value) for name, value in kwargs.items()}


def _token_dims(tensor: Tensor, length: int) -> tuple[int, ...]:
    """The dimensions of a tensor that run along a row of `length` tokens: [T, ..], [1, T, ..], positions [3, 1, T], and
    masks [1, .., T, T]."""
    shape = tensor.shape
    if tensor.ndim == 4 and shape[2] == shape[3] == length:
        return 2, 3
    if tensor.ndim >= 2 and shape[0] == 1 and shape[1] == length:
        return (1,)
    if tensor.ndim == 3 and shape[1] == 1 and shape[2] == length:
        return (2,)
    return (0,) if tensor.ndim and shape[0] == length else ()


def _cut(leaf: Any, lengths: list[int]) -> list[Any]:
    """An argument for each of the samples: its own part, in its own memory, of what lies along the tokens."""
    dims = _token_dims(leaf, sum(lengths)) if isinstance(leaf, Tensor) else ()
    if not dims:
        return [leaf] * len(lengths)
    parts = list(leaf.split(lengths, dims[0]))
    for dim in dims[1:]:
        parts = [part.split(lengths, dim)[number] for number, part in enumerate(parts)]
    return [part.clone(memory_format=torch.contiguous_format) for part in parts]


def _join(outputs: list[Any], lengths: list[int]) -> Any:
    """The samples' outputs as one output of all tokens."""
    leaves, specs = zip(*map(tree_flatten, outputs), strict=True)
    joined = []
    for column in zip(*leaves, strict=True):
        dims = _token_dims(column[0], lengths[0]) if isinstance(column[0], Tensor) else ()
        joined.append(torch.cat(column, dims[0]) if dims else column[0])
    return tree_unflatten(joined, specs[0])
