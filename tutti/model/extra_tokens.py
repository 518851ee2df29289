"""Tokens beyond a vocabulary, which stand for parts of a picture that a model draws."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ExtraTokens(nn.Module):
    """The embeddings of `number` tokens from `first` on, beyond the vocabulary.

    kept: tokens that stay where a prompt is hidden, beside the places of media.
    """

    kept: frozenset[int] = frozenset()

    def __init__(self, first: int, number: int, hidden_size: int) -> None:
        super().__init__()
        self.first, self.number = first, number
        self.embed = nn.Embedding(number, hidden_size)

    @property
    def num_ids(self) -> int:
        """The number of token ids that rows may hold before such tokens are put into them."""
        return self.first

    def holds(self, ids: Tensor) -> Tensor:
        """bool, of the shape of `ids`: which of the tokens are such."""
        return (ids >= self.first) & (ids < self.first + self.number)

    def put(self, ids: Tensor, embedded: Tensor) -> Tensor:
        """The embeddings [B, T, H] of tokens, those of such tokens put in their places."""
        vectors = self.embed((ids - self.first).clamp(min=0)).to(embedded.dtype)
        return torch.where((ids >= self.first)[..., None], vectors, embedded)
