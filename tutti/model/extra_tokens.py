"""Tokens beyond the vocabulary for parts of an image that a model generates."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ExtraTokens(nn.Module):
    """The embeddings of `number` tokens, the first of which is `first`, beyond the vocabulary.

    kept: tokens that remain when a prompt is hidden, in addition to the placeholders of media.
    """

    kept: frozenset[int] = frozenset()

    def __init__(self, first: int, number: int, hidden_size: int) -> None:
        super().__init__()
        self.first, self.number = first, number
        self.embed = nn.Embedding(number, hidden_size)

    @property
    def num_ids(self) -> int:
        """The number of token ids that rows may contain before such tokens are inserted."""
        return self.first

    def holds(self, ids: Tensor) -> Tensor:
        """Returns bool, in the shape of `ids`: which of the ids are such tokens."""
        return (ids >= self.first) & (ids < self.first + self.number)

    def put(self, ids: Tensor, embedded: Tensor) -> Tensor:
        """The embeddings [B, T, H] of tokens, with those of such tokens inserted."""
        vectors = self.embed((ids - self.first).clamp(min=0)).to(embedded.dtype)
        return torch.where((ids >= self.first)[..., None], vectors, embedded)
