"""The key/value cache of sequences that are being generated, and the attention that reads it.

The sequences have different lengths, without padding on the left: each starts at position 0 of its row in the cache. A
model runs in two kinds of passes, both on a packed row [1, T] as in training (`tutti.attention.interface`):

- *prefill*: the prompts of new sequences, end to end, attend within themselves; their keys and values are copied to new
  rows.
- *decode*: one token per sequence. It is written to the end of the sequence's row, and attends to this row: one batched
  product over all rows up to the longest, with positions beyond a row's length masked.

So a sequence's logits do not depend on its neighbors, except through the rounding of matrix products. Rows of finished
sequences are dropped, and new sequences may join between any two passes. A row never has more positions than the
largest sequence in the cache may need, so that a budget of rows times positions holds.

The cache reaches the attention as a keyword argument, which transformers passes from a model's forward to its attention
function; the model itself runs without a cache of its own.

Shapes: B rows, C positions per row, H query heads, K key/value heads, G = H / K, D head dimension, E value dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from tutti.attention.interface import packed_forward, packed_mask, spec_of
from tutti.attention.packed_cpu import probabilities
from tutti.attention.sparse import NAME as SPARSE
from tutti.attention.sparse import NativeSparse
from tutti.attention.spec import AttentionSpec
from tutti.core.compat import AttentionMaskInterface

CACHED = "tutti_cached"
"""The name under which this attention is registered with transformers."""

_GROWTH = 64

Slot = tuple[int, int]
"""A layer's index, and the index of its attention call within a pass."""


def register() -> str:
    """Register the attention with transformers, and return its name."""
    AttentionInterface.register(CACHED, _cached_forward)
    AttentionMaskInterface.register(CACHED, packed_mask)
    return CACHED


class KVCache:
    """Keys and values of B sequences, of `lengths` tokens each."""

    def __init__(self, device: torch.device) -> None:
        self.lengths: list[int] = []
        self._sizes: list[int] = []
        self._ahead: list[int] = []
        self._device = device
        self._layers: dict[Slot, tuple[Tensor, Tensor]] = {}
        self._calls: dict[int, int] = {}
        self._capacity = 0
        self._new: list[int] = []
        self._places = torch.empty(0, dtype=torch.int64, device=device)
        self._hidden: dict[tuple[int, int], Tensor] = {}
        self._compressed: dict[Slot, list[tuple[Tensor, Tensor]]] = {}

    @property
    def places(self) -> int:
        """The capacity: rows times the largest size that one of them may reach."""
        return len(self.lengths) * self._capacity

    def prefill(
        self, prompts: Sequence[Sequence[int]], sizes: Sequence[int], ahead: Sequence[int] | None = None
    ) -> dict[str, Any]:
        """Make room for new sequences; returns the arguments of the model's forward that run their `prompts`.

        sizes: the maximum length of each, prompt and answer; the cache never takes more positions per row. ahead: for
        each prompt, the difference between the position that follows it and its length, if images have positions of
        their own. The resulting logits are those that follow each prompt: [1, number of prompts, V].
        """
        self._new, self._calls = [len(prompt) for prompt in prompts], {}
        self.lengths += self._new
        self._sizes += sizes
        self._ahead += ahead or [0] * len(prompts)
        self._reserve(len(self.lengths), max(self.lengths) + 1)
        borders = torch.tensor([0, *self._new]).cumsum(0)
        return {
            "input_ids": torch.tensor([[token for prompt in prompts for token in prompt]], device=self._device),
            "position_ids": torch.cat([torch.arange(length) for length in self._new])[None].to(self._device),
            "cu_seq_lens_q": borders.to(self._device, torch.int32),
            "borders": borders,
            "max_length_q": max(self._new),
            "logits_to_keep": (borders[1:] - 1).to(self._device),
            "use_cache": False,
            "kv_cache": self,
        }

    def decode(self, tokens: Sequence[int]) -> dict[str, Any]:
        """Make room for one more token of every sequence; returns the arguments of the model's forward that run
        `tokens` [B].

        The resulting logits are [1, B, V].
        """
        self._new, self._calls = [], {}
        self._reserve(len(self.lengths), max(self.lengths) + 1)
        self._places = torch.tensor(self.lengths, device=self._device)
        self._hidden = {}
        self.lengths = [length + 1 for length in self.lengths]
        return {
            "input_ids": torch.tensor(tokens, device=self._device)[None],
            "position_ids": (self._places + torch.tensor(self._ahead, device=self._device))[None],
            "use_cache": False,
            "kv_cache": self,
        }

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all sequences except those in `rows` (ascending)."""
        index = torch.tensor(rows, dtype=torch.int64, device=self._device)
        self.lengths = [self.lengths[row] for row in rows]
        self._sizes = [self._sizes[row] for row in rows]
        self._ahead = [self._ahead[row] for row in rows]
        self._capacity = min(self._capacity, max(self._sizes, default=0))
        if not rows:
            self._layers = {}
        self._compressed = {
            slot: [parts[row] for row in rows if row < len(parts)] for slot, parts in self._compressed.items()
        }
        self._layers = {
            slot: tuple(part[:, :, : self._capacity].index_select(0, index) for part in parts)  # type: ignore[misc]
            for slot, parts in self._layers.items()
        }

    @property
    def prefilling(self) -> bool:
        """True while new prompts are run."""
        return bool(self._new)

    def slot(self, layer: int) -> Slot:
        """The slot of the layer's next attention call in this pass; some layers call it twice (DiffLlama)."""
        self._calls[layer] = self._calls.get(layer, -1) + 1
        return layer, self._calls[layer]

    def store(self, slot: Slot, key: Tensor, value: Tensor) -> None:
        """Copy keys [K, T, D] and values [K, T, E] of the new prompts to their rows."""
        if slot not in self._layers:
            self._layers[slot] = tuple(  # type: ignore[assignment]  # two of them
                part.new_zeros(len(self.lengths), part.shape[0], self._capacity, part.shape[2]) for part in (key, value)
            )
        keys, values = self._layers[slot]
        first = len(self.lengths) - len(self._new)
        borders = [0, *torch.tensor(self._new).cumsum(0).tolist()]
        for row, (begin, end) in enumerate(pairwise(borders), start=first):
            keys[row, :, : end - begin] = key[:, begin:end]
            values[row, :, : end - begin] = value[:, begin:end]

    def attend(
        self, slot: Slot, query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec, sinks: Tensor | None
    ) -> Tensor:
        """Write one more token of every row, key [K, B, D] and value [K, B, E], and attend to the rows.

        query [H, B, D] -> [B, H, E].
        """
        keys, values = self._write(slot, key, value)
        num_rows, kv_heads = keys.shape[:2]
        heads, longest = query.shape[0], max(self.lengths)
        weights, _ = probabilities(
            query.transpose(0, 1).reshape(num_rows * kv_heads, heads // kv_heads, -1),
            keys[:, :, :longest].flatten(0, 1),
            self._bias(longest, kv_heads, spec, query),
            None if sinks is None else sinks.repeat(num_rows),
            spec,
        )
        return torch.bmm(weights[..., :longest], values[:, :, :longest].flatten(0, 1)).view(num_rows, heads, -1)

    def attend_sparsely(
        self, slot: Slot, query: Tensor, key: Tensor, value: Tensor, sparse: NativeSparse, scale: float
    ) -> Tensor:
        """As `attend`, with native sparse attention; row by row, since each selects its own tokens."""
        keys, values = self._write(slot, key, value)
        gates = sparse.take_gates()
        compressed = self._compressed.setdefault(slot, [])
        outs = []
        for row, length in enumerate(self.lengths):
            held = keys[row, :, :length], values[row, :, :length]
            if row == len(compressed):
                compressed.append(sparse.compress(*held))
            compressed[row] = sparse.compress_new(*held, *compressed[row])
            outs.append(sparse.attend_last(query[:, row : row + 1], *held, *compressed[row], gates[:, row], scale))
        return torch.stack(outs)

    def _write(self, slot: Slot, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write one more token of every row, key [K, B, D] and value [K, B, E]; returns all keys and values of the
        slot."""
        keys, values = self._layers[slot]
        rows = torch.arange(len(self.lengths), device=self._device)
        keys[rows, :, self._places] = key.transpose(0, 1)
        values[rows, :, self._places] = value.transpose(0, 1)
        return keys, values

    def _bias(self, longest: int, kv_heads: int, spec: AttentionSpec, like: Tensor) -> Tensor:
        """The bias [B * K, 1, longest], 0 where a row's token may attend and -inf elsewhere; computed once per pass."""
        key = (spec.window, kv_heads)
        if key not in self._hidden:
            distance = self._places[:, None] - torch.arange(longest, device=self._device)
            hidden = distance < 0
            if spec.window:
                hidden |= distance >= spec.window
            bias = torch.zeros(hidden.shape, dtype=like.dtype, device=self._device).masked_fill_(hidden, -torch.inf)
            self._hidden[key] = bias.repeat_interleave(kv_heads, 0)[:, None]
        return self._hidden[key]

    def _reserve(self, num_rows: int, num_places: int) -> None:
        """Make room for this many rows and positions. Unused ones are zero: garbage times a weight of 0 could be
        NaN."""
        if num_places > self._capacity:
            self._capacity = min(max(num_places + _GROWTH, self._capacity * 5 // 4), max(self._sizes))
        for slot, parts in self._layers.items():
            self._layers[slot] = tuple(  # type: ignore[assignment]  # two of them
                _grown(part, num_rows, self._capacity) for part in parts
            )


def _grown(part: Tensor, num_rows: int, num_places: int) -> Tensor:
    if part.shape[0] == num_rows and part.shape[2] == num_places:
        return part
    grown = part.new_zeros(num_rows, part.shape[1], num_places, part.shape[3])
    grown[: part.shape[0], :, : part.shape[2]] = part
    return grown


def _cached_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature: query [1, H, T, D], key and value [1, K, T, D] -> [1, T, H, E]."""
    cache: KVCache = kwargs.pop("kv_cache")
    slot = cache.slot(module.layer_idx)  # type: ignore[arg-type]
    if cache.prefilling:
        cache.store(slot, key[0], value[0])
        return packed_forward(module, query, key, value, attention_mask, scaling, dropout, **kwargs)
    spec = spec_of(module, query, scaling, kwargs)
    sparse: NativeSparse | None = getattr(module, SPARSE, None)
    if sparse is not None:
        return cache.attend_sparsely(slot, query[0], key[0], value[0], sparse, spec.scale)[None], None
    return cache.attend(slot, query[0], key[0], value[0], spec, kwargs.get("s_aux"))[None], None
