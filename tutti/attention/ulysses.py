"""Ulysses (arXiv 2309.14509): ranks that hold different tokens hold different heads instead while attention runs.

Before attention each of the U ranks has all heads of its T / U tokens. One all-to-all gives it all T tokens of its H /
U heads, on which any attention kernel runs as on a single rank, and a second all-to-all returns the outputs. That is
two exchanges per layer in each pass, and a rank sends less than 1 / U of what one process would hold.

Queries, keys and values, whatever their widths, travel in one message to each rank. If U does not divide the number of
key/value heads, they are repeated as little as necessary to make it even. So U only has to divide the H query heads;
which query head reads which key/value head does not change. A learned score per head (attention sinks) is cut to the
rank's heads.

`overlap_values` (train.async_enabled) hides the values' part of the exchange: the value projection runs first, its
output starts traveling at once, and meanwhile query and key are projected, normalized and rotated. In the backward pass
the values' gradient travels in the same way. This works for any model with a separate `v_proj` whose output reaches
attention unchanged. Queries and keys are not sent early: their norms and rotary embedding, between projection and
attention, are the model's own code and run on the rank's own tokens.

Shapes: U ranks, T tokens of all of them, t = T / U, H query heads, K key/value heads, D head dimension, E of values.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tutti.core.batch import SequenceRanks
from tutti.core.collectives import Journey, all_to_all, finish_all_to_all, start_all_to_all
from tutti.core.modules import attach, wrap_forward

log = logging.getLogger(__name__)


def tokens_to_heads(
    query: Tensor, key: Tensor, value: Tensor, ranks: SequenceRanks, early: EarlyValues | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Exchange query, key and value [heads, t, ...] with all heads of this rank's tokens for [heads / U, T, ...] with
    all tokens of this rank's heads.

    early: the exchange of the values, which may already be in progress.
    """
    size = ranks.ulysses_size
    if size == 1:
        return query, key, value
    arrived = None if early is None else early.take(value)
    tensors = [query, key] if arrived is not None else [query, key, value]
    parts = [_by_rank(tensor, size) for tensor in tensors]
    received = all_to_all(torch.cat(parts, dim=1), [], [], ranks.ulysses_group).split(
        [part.shape[1] for part in parts], dim=1
    )
    whole = [_join(item, tensor) for item, tensor in zip(received, tensors, strict=True)]
    if arrived is not None:
        whole.append(_join(arrived, value))
    query, key, value = whole
    return query, key, value


def heads_to_tokens(out: Tensor, ranks: SequenceRanks) -> Tensor:
    """Exchange attention's output [T, H / U, E] of this rank's heads for [t, H, E] of its tokens."""
    size = ranks.ulysses_size
    if size == 1:
        return out
    total, heads, width = out.shape
    received = all_to_all(out.reshape(size, -1), [], [], ranks.ulysses_group)
    return received.view(size, total // size, heads, width).transpose(0, 1).reshape(total // size, size * heads, width)


def own_heads(per_head: Tensor | None, ranks: SequenceRanks) -> Tensor | None:
    """This rank's H / U entries of a parameter [H]."""
    return None if per_head is None else per_head.chunk(ranks.ulysses_size)[ranks.ulysses_rank]


def _by_rank(tensor: Tensor, size: int) -> Tensor:
    """Arrange [heads, t, D] as [U, n], with the heads of rank u in row u, after repeating heads until they divide
    evenly."""
    heads = tensor.shape[0]
    repeats = next(count for count in range(1, size + 1) if heads * count % size == 0)
    if repeats > 1:
        tensor = tensor.repeat_interleave(repeats, dim=0)
    return tensor.reshape(size, -1)


def _join(received: Tensor, sent: Tensor) -> Tensor:
    """Join [U, n], in which row u has the tokens of rank u, to [heads / U, T, D]; `sent` is what was passed to
    `_by_rank`."""
    size, tokens, width = received.shape[0], *sent.shape[1:]
    return received.reshape(size, -1, tokens, width).transpose(0, 1).reshape(-1, size * tokens, width)


class EarlyValues:
    """The early exchange of one attention layer's values, which are projected first and sent while queries and keys are
    computed.

    In each forward pass: `set_out` is called when `q_proj` begins, `projected` replaces `v_proj`'s forward, and
    attention calls `take`.
    """

    def __init__(self, layer: nn.Module, ranks: SequenceRanks) -> None:
        self._ranks = ranks
        project: Any = layer.v_proj
        self._width = _value_width(layer)
        self._project = project.forward
        self._hidden: Tensor | None = None
        self._values: Tensor | None = None
        self._version = 0
        self._started: tuple[Tensor, Journey] | None = None
        layer.q_proj.register_forward_pre_hook(self.set_out)  # type: ignore[union-attr]
        wrap_forward(project, "early values", lambda _: self.projected)

    def set_out(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        (self._hidden,) = args
        self._values = self._project(self._hidden)
        self._version = self._values._version
        heads_first = self._values.view(*self._values.shape[1:-1], -1, self._width).transpose(0, 1)
        self._started = start_all_to_all(_by_rank(heads_first, self._ranks.ulysses_size), self._ranks.ulysses_group)

    def projected(self, hidden: Tensor) -> Tensor:
        return self._values if hidden is self._hidden and self._values is not None else self._project(hidden)

    def take(self, value: Tensor) -> Tensor | None:
        """The exchanged values [U, n], or None if `value` [K, t, E] is not what was sent, because the model changed
        it."""
        values, started = self._values, self._started
        self._hidden = self._values = self._started = None
        if values is None or started is None:
            return None
        arrived = finish_all_to_all(started)
        laid_out = value.data_ptr() == values.data_ptr() and value.transpose(0, 1).is_contiguous()
        same = laid_out and value.shape[-1] == self._width and values._version == self._version
        return arrived if same else None


def _value_width(layer: Any) -> int:
    """The width of a head's values (with as many heads as keys), in attention with `projects_values`."""
    keys, values = (getattr(item, "out_features", None) for item in (layer.k_proj, layer.v_proj))
    return layer.head_dim if keys is None or values is None else values // (keys // layer.head_dim)


def overlap_values(blocks: Iterable[nn.Module], ranks: SequenceRanks) -> None:
    """Make the attention layers in `blocks` send their values early, where possible.

    Logs a line if none of them can.
    """
    found = [layer for block in blocks for layer in block.modules() if projects_values(layer)]
    for layer in found:
        attach(layer, early_values=EarlyValues(layer, ranks))
    if not found:
        log.info(
            "train.async_enabled: this model does not project its values on their own, so that their exchange cannot "
            "begin before attention does; it runs as without"
        )


def projects_values(layer: nn.Module) -> bool:
    """True if `layer` is attention with separate modules for projecting queries, keys and values."""
    projections: Sequence[Any] = [getattr(layer, name, None) for name in ("q_proj", "k_proj", "v_proj")]
    return all(isinstance(item, nn.Module) for item in projections) and isinstance(
        getattr(layer, "head_dim", None), int
    )
