"""The operations of training a diffusion transformer, counted by running its class on the meta device.

The number of weights is not enough: captions and images often have separate weights, and modulation runs once per image
rather than once per token. So one forward pass for a shape of latents runs on the meta device, and torch counts
products and attention. A backward pass costs twice that, less what is frozen.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tutti.model.denoiser import make_net
from tutti.model.diffusion import EncodedText, family_of, predict


class DenoiserFlops:
    """Counts the operations of training a transformer with this config. parameters: its own, some of which may be
    frozen."""

    def __init__(self, net: dict[str, Any], parameters: Iterable[nn.Parameter]) -> None:
        sizes = [(item.numel(), item.requires_grad) for item in parameters if item.ndim >= 2]
        trained = sum(size for size, is_trained in sizes if is_trained) / max(1, sum(size for size, _ in sizes))
        self._described = json.dumps(net, sort_keys=True)
        self._passes = 2.0 + trained  # forward, backward for inputs, and backward for trained weights

    def __call__(self, shape: torch.Size, length: int, width: int, pooled: int | None) -> float:
        """The operations for latents of `shape` [B, C, (F,) H, W], with text of `length` tokens of `width`, and
        pooled text of width `pooled`."""
        return shape[0] * self._passes * _forward(self._described, tuple(shape[1:]), length, width, pooled)


@cache
def _forward(described: str, shape: tuple[int, ...], length: int, width: int, pooled: int | None) -> float:
    """The operations of a forward pass for one image."""
    family = family_of(json.loads(described)["_class_name"])
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        mask = None if family.mask is None else torch.ones(1, length, dtype=torch.bool)
        text = EncodedText(torch.empty(1, length, width), mask, None if pooled is None else torch.empty(1, pooled))
        predict(family, _without_storage(described), torch.empty(1, *shape), torch.empty(1), text)
    return float(counter.get_total_flops())


@cache
def _without_storage(described: str) -> Any:
    """The transformer with this config, on the meta device."""
    return make_net(json.loads(described))
