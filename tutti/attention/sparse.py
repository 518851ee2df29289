"""Native Sparse Attention (arXiv 2502.11089) within the samples of a packed batch.

Each query looks at the tokens before it in three ways, and learned gates add up what they give:

- *compressed*: keys and values of overlapping blocks of `block` tokens, each block made into one by a learned network.
- *selected*: the tokens of the `selected` blocks of `selected_block` tokens that the compressed keys score highest, for
  all query heads of a key/value head together; the first block, the query's own and the one before are always among
  them.
- *sliding*: the last `window` tokens.

On CUDA with Triton, kernels do it (`tutti.attention.sparse_triton`), elsewhere tensor operations
(`tutti.attention.sparse_tensors`), sample by sample: there, up to selected * selected_block tokens a sample's selected
branch sees everything, and runs as ordinary attention.

Shapes: T tokens of a batch, n of a sample, H query heads, K key/value heads, D head dimension, E value dimension, M
compressed blocks, S selected ones.
"""

from __future__ import annotations

import logging
import math
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from tutti.attention import varlen
from tutti.attention.packed_cpu import packed_attention
from tutti.attention.sparse_tensors import attend_compressed, selected_attention
from tutti.attention.spec import AttentionSpec, SparseSizes
from tutti.core.compat import FakeTensor, has_triton

log = logging.getLogger(__name__)

NAME = "native_sparse"
"""The attribute of an attention layer that holds its `NativeSparse`, and the key of a model's config with its sizes."""

_TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.04}
"""The difference from tensor operations, relative to the largest value, that roundings can make of kernels' results."""


class NativeSparse(nn.Module):
    """The parameters that native sparse attention adds to one attention layer, and its kernel.

    gate: from the layer's input to three numbers in (0, 1) a head. The networks of keys and of values make a block into
    its mean plus a learned change, which is 0 at first; each gate starts near 1/3, so that a fresh layer averages
    attention of three kinds.
    """

    def __init__(self, hidden: int, num_heads: int, width: int, value_width: int, sizes: SparseSizes, std: float):
        super().__init__()
        self.sizes, self.std = sizes, std
        self.gate = nn.Linear(hidden, 3 * num_heads)
        self.keys = _Compress(sizes.block, width)
        self.values = _Compress(sizes.block, value_width)
        self._gates: Tensor | None = None

    def watch(self, layer: nn.Module) -> None:
        """Read the gates off the input of `layer`, whose attention this is, each time that it runs."""
        layer.register_forward_pre_hook(self._read_input, with_kwargs=True)

    def _read_input(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        self._gates = torch.sigmoid(self.gate(hidden)[0]).view(hidden.shape[1], -1, 3).transpose(0, 1)

    def take_gates(self) -> Tensor:
        """The gates of the layer's present input [H, T, 3]."""
        gates, self._gates = self._gates, None
        assert gates is not None, "the attention layer ran without its input being seen"
        return gates

    def _init_weights(self, module: nn.Module) -> None:
        """Set the values that a fresh layer starts with, as transformers' classes do for their modules."""
        if isinstance(module, _Compress):
            nn.init.zeros_(module.position)
            nn.init.normal_(module.up.weight, std=self.std)
            nn.init.zeros_(module.down.weight)
        elif module is self:
            nn.init.normal_(self.gate.weight, std=self.std)
            nn.init.constant_(self.gate.bias, -math.log(2.0))

    @torch.compiler.disable  # sizes depend on what is selected
    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, gates: Tensor, borders: Tensor, scale: float
    ) -> Tensor:
        """Attention within the samples that begin and end at `borders` (on the host).

        query [H, T, D], key [K, T, D], value [K, T, E], gates [H, T, 3] -> [T, H, E].
        """
        if _kernels_work(query, key, value, self.sizes, scale):
            return self._by_kernels(query, key, value, gates, borders, scale)
        sizes, places = self.sizes, borders.tolist()
        sliding = packed_attention(query, key, value, borders, AttentionSpec(scale, window=sizes.window))
        short = _short_samples(places, sizes.reach)
        dense = _dense(query, key, value, short, scale) if short else None
        parts, taken = [], 0
        for begin, end in pairwise(places):
            heads = (query[:, begin:end], key[:, begin:end], value[:, begin:end])
            blocks = self.compress(*heads[1:])
            compressed, chosen = attend_compressed(heads[0], *blocks, end - begin, sizes, scale)
            if end - begin <= sizes.reach:
                assert dense is not None
                selected, taken = dense[taken : taken + end - begin], taken + end - begin
            else:
                selected = selected_attention(*heads, chosen, sizes.selected_block, scale).transpose(0, 1)
            parts.append((compressed.transpose(0, 1), selected))
        branches = (torch.cat(part) for part in zip(*parts, strict=True))
        weights = gates.transpose(0, 1)[..., None].unbind(2)
        return sum(weight * out for weight, out in zip(weights, (*branches, sliding), strict=True))  # type: ignore[return-value]

    def _by_kernels(
        self, query: Tensor, key: Tensor, value: Tensor, gates: Tensor, borders: Tensor, scale: float
    ) -> Tensor:
        from tutti.attention import sparse_triton

        layout = sparse_triton.layout_of(borders, self.sizes, query.device)
        spec = AttentionSpec(scale, window=self.sizes.window)
        if varlen.fits(query, value, spec):
            sliding = varlen.varlen_attention(query, key, value, layout.cu_seqlens, layout.longest, spec)
        else:
            sliding = packed_attention(query, key, value, borders, spec)
        compressed = self.compress(*(sparse_triton.row_to_compress(item, layout) for item in (key, value)))
        heads = (query, key, value)
        return sparse_triton.attend(heads, compressed, sliding, gates, layout, self.sizes, scale)[0]

    def compress(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The compressed keys [K, M, D] and values [K, M, E] of one sample's."""
        return self.keys(key, self.sizes), self.values(value, self.sizes)

    def compress_new(self, key: Tensor, value: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The compressed keys and values of a sample that has grown since it had `keys` and `values`."""
        count = self.sizes.num_compressed(key.shape[1])
        if keys.shape[1] == count:
            return keys, values
        start = keys.shape[1] * self.sizes.stride
        new = self.compress(key[:, start:], value[:, start:])
        return torch.cat([keys, new[0]], 1), torch.cat([values, new[1]], 1)

    def attend_last(
        self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, gates: Tensor, scale: float
    ) -> Tensor:
        """Attention of a sample's last token, query [H, 1, D], to all of it: gates [H, 3] -> [H, E].

        keys, values: the compressed ones.
        """
        sizes, length = self.sizes, key.shape[1]
        compressed, chosen = attend_compressed(query, keys, values, length, sizes, scale, first=length - 1)
        places = chosen[:, 0, :, None] * sizes.selected_block + torch.arange(sizes.selected_block, device=query.device)
        places = places.flatten(1)  # those of a slot that is empty are negative
        hidden = (places < 0) | (places >= length)
        index = places.clamp(0, length - 1)[..., None]
        selected = _attend_one(
            query,
            key.gather(1, index.expand(-1, -1, key.shape[2])),
            value.gather(1, index.expand(-1, -1, value.shape[2])),
            hidden,
            scale,
        )
        latest = slice(max(0, length - sizes.window), length)
        sliding = _attend_one(query, key[:, latest], value[:, latest], None, scale)
        branches = torch.stack([compressed[:, 0], selected, sliding], -1)
        return (branches * gates[:, None].to(branches.dtype)).sum(-1)


class _Compress(nn.Module):
    """A network from the keys or values of a block, with its own embedding of the places in it, to a single one."""

    def __init__(self, block: int, width: int):
        super().__init__()
        self.position = nn.Parameter(torch.empty(block, width))
        self.up = nn.Linear(block * width, width, bias=False)
        self.down = nn.Linear(width, width, bias=False)

    def forward(self, tokens: Tensor, sizes: SparseSizes) -> Tensor:
        """[K, n, D] -> [K, M, D]."""
        if tokens.shape[1] < sizes.block:
            # Parameters have a gradient in every pass, which ranks that wait for one another rely on.
            used = sum(parameter.sum() for parameter in self.parameters())
            return (tokens[:, :0] + 0.0 * used).to(tokens.dtype)
        blocks = tokens.unfold(1, sizes.block, sizes.stride).transpose(2, 3) + self.position
        change: Tensor = self.down(nn.functional.gelu(self.up(blocks.flatten(2))))
        return blocks.mean(2) + change


def _kernels_work(query: Tensor, key: Tensor, value: Tensor, sizes: SparseSizes, scale: float) -> bool:
    """True where there are kernels for such tensors, heads first, that give what the tensor operations here do."""
    if not (query.is_cuda and has_triton()) or isinstance(query, FakeTensor):
        return False
    heads = (len(query), len(key), query.shape[-1], value.shape[-1])
    return _kernels_tried(query.device, query.dtype, heads, sizes, scale)


@cache
def _kernels_tried(
    device: torch.device, dtype: torch.dtype, heads: tuple[int, int, int, int], sizes: SparseSizes, scale: float
) -> bool:
    """In a thread, whose trial no context of the caller takes part in: neither checkpointing nor offloading is to see
    its tensors."""
    from tutti.attention import sparse_triton

    try:
        with ThreadPoolExecutor(1) as thread:
            difference = thread.submit(sparse_triton.try_kernels, device, dtype, heads, sizes, scale).result()
    except Exception as error:  # compilers fail in many ways
        log.warning("the kernels of native sparse attention cannot be used here (%s): it is slower without", error)
        return False
    if difference is None:
        log.warning("native sparse attention has no kernels for heads %s and %s: it is slower without", heads, sizes)
        return False
    if not difference <= _TOLERANCE[dtype]:
        log.warning("the kernels of native sparse attention give other values here (by %s): left unused", difference)
        return False
    return True


def _attend_one(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None, scale: float) -> Tensor:
    """Attention of one query a head, [H, 1, D], to key [K, m, D] and value [K, m, E] but for what is hidden [K, m]:
    [H, E]."""
    grouped = query.view(key.shape[0], -1, query.shape[-1])
    scores = (grouped @ key.transpose(1, 2)).float() * scale
    if hidden is not None:
        scores.masked_fill_(hidden[:, None], -torch.inf)
    return (torch.softmax(scores, -1).to(value.dtype) @ value).flatten(0, 1)


def _short_samples(places: list[int], reach: int) -> list[tuple[int, int]]:
    return [(begin, end) for begin, end in pairwise(places) if end - begin <= reach]


def _dense(query: Tensor, key: Tensor, value: Tensor, samples: list[tuple[int, int]], scale: float) -> Tensor:
    """Causal attention within some of the samples, end to end: [their tokens, H, E]."""
    heads = (query, key, value)
    if sum(end - begin for begin, end in samples) < query.shape[1]:
        heads = tuple(torch.cat([item[:, begin:end] for begin, end in samples], 1) for item in heads)  # type: ignore[assignment]
    borders = torch.tensor([0, *(end - begin for begin, end in samples)]).cumsum(0)
    return packed_attention(*heads, borders, AttentionSpec(scale))
