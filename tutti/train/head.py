"""The output head as tasks see it: from hidden states at the targets to losses or logits.

A task asks for the cross-entropy summed over targets, for each target's loss, or for logits. It need not know how the
head is distributed: replicated, split by the vocabulary over tensor ranks, or applied to each sample separately. Every
sum that a task returns is a rank's share, so that adding the shares of all ranks gives the sum over the whole batch.

Shapes: N targets, H hidden size, V vocabulary or classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tutti.core.batch import Batch
from tutti.core.collectives import RankGroup, gather_tensor
from tutti.core.structure import LogitTransform
from tutti.model.feature_head import feature_losses
from tutti.parallel.sequence import sum_shares
from tutti.train.loss import VocabularyShard, linear_cross_entropy, target_losses


@dataclass(frozen=True)
class Head:
    """A model's head for one micro batch.

    tensor: the ranks of tensor parallelism, which have the same targets. shard: this rank's rows of the vocabulary, if
    the head is split. pieces: the number of targets of each segment on this rank, if the head is applied to each
    separately. codes: the model's `CodeDecoder` for image codes, if any. feature_head: the model's `FeatureHead`.
    features: the image features of the micro batch [R, D]. flow: the model's `FlowDecoder`. states: the hidden states
    [t, H] of all of this rank's tokens, which condition it.
    """

    layer: nn.Linear
    transform: LogitTransform
    batch: Batch
    tensor: RankGroup | None = None
    shard: VocabularyShard | None = None
    pieces: list[int] | None = None
    codes: Any = None
    feature_head: Any = None
    features: Tensor | None = None
    flow: Any = None
    states: Tensor | None = None

    @property
    def share(self) -> float:
        """This rank's share of a sum that all tensor ranks compute identically."""
        return 1.0 if self.tensor is None else 1.0 / self.tensor.size

    @property
    def targets(self) -> Tensor:
        """int64 [N]: the labels of the batch's targets."""
        return self.batch.labels.index_select(0, self.batch.target_index)

    def cross_entropy(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The cross-entropy summed over the targets (differentiable), and each target's own, fp32 [N], detached. Both
        are this rank's share."""
        return self._shared(*self._apply(linear_cross_entropy, hidden))

    def cross_entropy_of(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """As `cross_entropy`, for a subset of the targets, int64 [n], from the hidden states [n, H] that predict
        them."""
        return self._by_vocabulary(hidden, targets, self.transform)

    def code_cross_entropy(self, hidden: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """As `cross_entropy_of`, for image codes, int64 [n]."""
        head = self.codes.head
        if head is None:  # codes are ordinary tokens of the vocabulary
            return self._by_vocabulary(hidden, codes + self.codes.first, self.transform._replace(masked=None))
        loss, losses = linear_cross_entropy(self.codes.middle(hidden), head.weight, codes, bias=head.bias)
        return loss * self.share, losses * self.share

    def feature_losses(self, hidden: Tensor, numbers: Tensor) -> Tensor:
        """The losses fp32 [n] (differentiable) of the image features with these `numbers`, int64 [n], within the micro
        batch, from the hidden states [n, H] that predict them. They are this rank's share."""
        predicted = self.feature_head(hidden)
        if self.features is None:  # no features: return zero gradients, which other ranks wait for
            return feature_losses(predicted, predicted)
        return feature_losses(predicted, self.features.index_select(0, numbers)) * self.share

    def target_losses(self, hidden: Tensor) -> Tensor:
        """Each target's cross-entropy, fp32 [N] (differentiable), the same on all tensor ranks."""
        return self._apply(target_losses, hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [N, V] over the whole vocabulary, the same on all tensor ranks."""
        if self.pieces is None:
            logits = nn.functional.linear(hidden, self.layer.weight, self.layer.bias)
        else:
            parts = (part.clone() for part in hidden.split(self.pieces))
            logits = torch.cat([nn.functional.linear(part, self.layer.weight, self.layer.bias) for part in parts])
        if self.shard is not None and self.tensor is not None:
            # The last ranks may have fewer rows of the vocabulary than the others.
            most = -(-self.layer.out_features // self.tensor.size)
            logits = nn.functional.pad(logits, (0, most - logits.shape[-1]), value=-torch.inf)
            logits = gather_tensor(logits, self.tensor, 1)[:, : self.layer.out_features]
        return self.transform(logits)

    def segment_sums(self, values: Tensor) -> Tensor:
        """`values` [N] of the targets, summed by segment of the whole batch without padding; the same on all ranks that
        share the batch. In the backward pass each rank gets the gradients of its own targets. A collective call if
        ranks share the batch."""
        sums = values.new_zeros(len(self.batch.segment_sources)).index_add(0, self.batch.target_segment, values)
        return sum_shares(sums, self.batch.sequence)[: self.batch.num_sequences]

    def share_of(self, losses: Tensor) -> tuple[Tensor, float]:
        """For losses [P] that every rank sharing the batch computes identically: this rank's share of their sum, with
        the gradient of this rank's own targets, and the factor that turns a count into such a share."""
        split = self.batch.sequence.ranks.size if self.batch.sequence is not None else 1
        share = self.share / split
        total = losses.sum()
        own = total if self.shard is not None else total * self.share
        return own + (total.detach() * share - own.detach()), share

    def _by_vocabulary(self, hidden: Tensor, targets: Tensor, transform: LogitTransform) -> tuple[Tensor, Tensor]:
        weight, bias = self.layer.weight, self.layer.bias
        found = linear_cross_entropy(hidden, weight, targets, bias=bias, transform=transform, shard=self.shard)
        return self._shared(*found)

    def _shared(self, loss: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's share of the head's results: everything if ranks split the head, and so have different parts."""
        return (loss, losses) if self.shard is not None else (loss * self.share, losses * self.share)

    def _apply(self, function: Callable[..., Any], hidden: Tensor) -> Any:
        return function(
            hidden,
            self.layer.weight,
            self.targets,
            bias=self.layer.bias,
            transform=self.transform,
            shard=self.shard,
            pieces=self.pieces,
        )
