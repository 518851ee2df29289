"""Batch-invariant computation: the result for a sample does not depend, bit for bit, on the rest of its batch.

Floating-point sums depend on their order, and the order depends on a tensor's shape: matrix products choose tiles by
the number of rows, vectorized functions treat the last few elements of a thread's share differently, reductions and
grouped products split by size. A list of such kernels would never be complete. So instead of replacing kernels,
everything is computed sample by sample. Before each block (and before the rest of the decoder, such as rotary
embeddings and the final norm) a packed batch is cut at its samples' borders; each sample goes through separately, in
memory of its own; and the results are concatenated again. Shape and alignment, all that a kernel could depend on, are
then the sample's. The head is applied to each sample's rows in the same way (`tutti.train.loss`).

The cuts are within the units that FSDP gathers, so parameters are gathered once per batch as usual. The price is that
of products with fewer rows, so that packing gains nothing for short samples.

If ranks share samples, each sample is split among them as if it were alone (`tutti.parallel.sequence`). So every
collective is about one sample, and the order of its sums depends only on that sample's length. Ranks that have
different samples meet within a block when tokens are sent to experts, and when FSDP gathers a part of the block
separately. So all ranks run the same number of samples, padded with samples of one token, and experts compute a
separate product for the rows of each rank.

torch.compile is not supported: which of its kernels a sample gets depends on the lengths it was compiled for before.

Shapes: T tokens of S samples.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, MutableMapping
from functools import partial, wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tutti.core.batch import Batch
from tutti.core.compat import tree_flatten, tree_unflatten
from tutti.core.modules import Forward, wrap_forward
from tutti.parallel.sequence import add_fillers


def separate_samples(root: nn.Module, blocks: Iterable[nn.Module]) -> None:
    """Make `blocks`, and the modules below `root` that do not contain blocks, run one sample after the other, in place.

    `root` is called with a `Batch` as its first argument.
    """
    samples = _Samples()
    root.register_forward_pre_hook(samples.note)
    known = set(blocks)
    for module in (*known, *_beside(root, known)):
        wrap_forward(module, "by sample", partial(_by_sample, samples=samples))


def _beside(module: nn.Module, blocks: set[nn.Module]) -> Iterator[nn.Module]:
    """Yield the outermost modules below `module` that neither are nor contain blocks."""
    for child in module.children():
        if child in blocks:
            continue
        if any(inner in blocks for inner in child.modules()):
            yield from _beside(child, blocks)
        else:
            yield child


def equal_counts(batch: Batch, groups: Iterable[dist.ProcessGroup], device: torch.device) -> Batch:
    """`batch` (on the host), padded to the number of samples of the other ranks of `groups`; a collective call of
    each group."""
    count = torch.tensor(len(batch.segment_sources), device=device)
    for group in groups:
        if group.size() > 1:
            dist.all_reduce(count, dist.ReduceOp.MAX, group=group)
    return add_fillers(batch, int(count) - len(batch.segment_sources))


class _Samples:
    """The samples of the current batch.

    lengths: the number of this rank's tokens of each sample; with tensor parallelism, which divides tokens within a
    block, those that it has alone. known: the arguments for attention to each sample. shared: objects that blocks write
    keys and values into for later blocks, by id, replaced by one for each sample.
    """

    def __init__(self) -> None:
        self.lengths: list[list[int]] = []
        self.known: list[dict[str, Any]] = []
        self.shared: dict[int, tuple[Any, list[Any]]] = {}

    def note(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A forward hook of the root."""
        (batch,) = args
        assert isinstance(batch, Batch)
        self.shared = {}
        if batch.sequence is None:
            host = batch.cu_seqlens if batch.borders is None else batch.borders
            given = host.diff().tolist()
            borders = [pair - pair[0] for pair in batch.cu_seqlens.unfold(0, 2, 1)]
            own = [torch.tensor([0, length], dtype=host.dtype) for length in given]
            self.lengths = [given]
            self.known = [_known(*each) for each in zip(borders, own, given, strict=True)]
            return
        parts, divided = batch.sequence.parts, batch.sequence.ranks.tensor_size
        given = [part.share for part in parts]
        self.lengths = [given, [length // divided for length in given]]
        self.known = [_known(part.cu_seqlens, part.borders, part.max_seqlen) | {"whole": part} for part in parts]

    def cut(self, leaf: Any) -> list[Any]:
        """Split an argument into one for each sample: its own part, in its own memory, of what lies along the
        tokens."""
        for lengths in self.lengths if isinstance(leaf, Tensor) else ():
            dims = _token_dims(leaf, sum(lengths))
            if dims:
                parts = list(leaf.split(lengths, dims[0]))
                for dim in dims[1:]:
                    parts = [part.split(lengths, dim)[number] for number, part in enumerate(parts)]
                return [part.clone(memory_format=torch.contiguous_format) for part in parts]
        if isinstance(leaf, MutableMapping):
            if id(leaf) not in self.shared:
                assert not leaf, "what blocks share is filled by something else"
                self.shared[id(leaf)] = leaf, [copy.copy(leaf) for _ in self.known]
            return self.shared[id(leaf)][1]
        return [leaf] * len(self.known)

    def join(self, outputs: list[Any]) -> Any:
        """Concatenate the samples' outputs to one output of all tokens."""
        leaves, specs = zip(*map(tree_flatten, outputs), strict=True)
        return tree_unflatten([self._join(column) for column in zip(*leaves, strict=True)], specs[0])

    def _join(self, column: tuple[Any, ...]) -> Any:
        for lengths in self.lengths if isinstance(column[0], Tensor) else ():
            dims = _token_dims(column[0], lengths[0])
            if dims:
                return torch.cat(column, dims[0])
        return column[0]


def _known(cu_seqlens: Tensor, borders: Tensor, longest: int) -> dict[str, Any]:
    return {
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": longest,
        "max_length_k": longest,
        "borders": borders,
    }


def _by_sample(forward: Forward, samples: _Samples) -> Forward:
    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        outputs = []
        for known, *own in zip(samples.known, *map(samples.cut, leaves), strict=True):
            own_args, own_kwargs = tree_unflatten(own, spec)
            outputs.append(forward(*own_args, **{name: known.get(name, value) for name, value in own_kwargs.items()}))
        return samples.join(outputs)

    return run


def _token_dims(tensor: Tensor, length: int) -> tuple[int, ...]:
    """The dimensions of a tensor that lie along a row of `length` tokens: [T, ..], [1, T, ..], positions [3, 1, T],
    several streams of hidden states [.., 1, T, H], and masks [1, .., T, T]."""
    shape = tensor.shape
    if tensor.ndim == 4 and shape[2] == shape[3] == length:
        return 2, 3
    if tensor.ndim >= 2 and shape[0] == 1 and shape[1] == length:
        return (1,)
    if tensor.ndim in (3, 4) and shape[1] == 1 and shape[2] == length:
        return (2,)
    return (0,) if tensor.ndim and shape[0] == length else ()
