"""The output head as tasks see it: from hidden states at the targets to losses or logits.

A task asks for the cross-entropy of targets, for their single losses, or for logits, and need not know how the head
lies among the ranks: whole, split by the vocabulary over tensor ranks, or applied to each sample apart from the others.
Every sum that a task hands on is a rank's share of it, so that adding up all ranks' gives the sum of the whole batch.

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

    tensor: the ranks that split the model's matrices; they have the same targets. shard: this rank's rows of the
    vocabulary, where they split the head as well. pieces: how many targets each segment on this rank has, where the
    head is applied to each apart from the others. codes: what the model has for codes of pictures (`CodeDecoder`), if
    it draws by them. feature_head, features: what predicts the features of pictures (`FeatureHead`), and those of the
    micro batch [R, D], where there are such. flow: what draws by diffusion (`FlowDecoder`), and states: the hidden
    states [t, H] of all this rank's tokens, which lead it.
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
        """This rank's share of a sum that all tensor ranks compute alike."""
        return 1.0 if self.tensor is None else 1.0 / self.tensor.size

    @property
    def targets(self) -> Tensor:
        """int64 [N]: the labels of the batch's targets."""
        return self.batch.labels.index_select(0, self.batch.target_index)

    def cross_entropy(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The summed cross-entropy of the targets (to differentiate) and each target's own, fp32 [N], detached; a
        rank's share of them."""
        return self._shared(*self._apply(linear_cross_entropy, hidden))

    def cross_entropy_of(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """As `cross_entropy`, of some of the targets alone, int64 [n], from the hidden states [n, H] that predict
        them."""
        return self._by_vocabulary(hidden, targets, self.transform)

    def code_cross_entropy(self, hidden: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """As `cross_entropy_of`, of codes of pictures, int64 [n]."""
        head = self.codes.head
        if head is None:  # they are tokens of the vocabulary
            return self._by_vocabulary(hidden, codes + self.codes.first, self.transform._replace(masked=None))
        loss, losses = linear_cross_entropy(self.codes.middle(hidden), head.weight, codes, bias=head.bias)
        return loss * self.share, losses * self.share

    def feature_losses(self, hidden: Tensor, numbers: Tensor) -> Tensor:
        """The losses fp32 [n], to differentiate, of features by their `numbers`, int64 [n], among those of the micro
        batch, from the hidden states [n, H] that predict them; a rank's share of them."""
        predicted = self.feature_head(hidden)
        if self.features is None:  # there are none: gradients of zero, which other ranks wait for
            return feature_losses(predicted, predicted)
        return feature_losses(predicted, self.features.index_select(0, numbers)) * self.share

    def target_losses(self, hidden: Tensor) -> Tensor:
        """Each target's cross-entropy, fp32 [N], to differentiate; the same on all tensor ranks."""
        return self._apply(target_losses, hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [N, V] (of all the vocabulary), the same on all tensor ranks."""
        if self.pieces is None:
            logits = nn.functional.linear(hidden, self.layer.weight, self.layer.bias)
        else:
            parts = (part.clone() for part in hidden.split(self.pieces))
            logits = torch.cat([nn.functional.linear(part, self.layer.weight, self.layer.bias) for part in parts])
        if self.shard is not None and self.tensor is not None:
            # The last ranks may have less of the vocabulary than the others.
            most = -(-self.layer.out_features // self.tensor.size)
            logits = nn.functional.pad(logits, (0, most - logits.shape[-1]), value=-torch.inf)
            logits = gather_tensor(logits, self.tensor, 1)[:, : self.layer.out_features]
        return self.transform(logits)

    def segment_sums(self, values: Tensor) -> Tensor:
        """`values` [N] of the targets, summed by segment of the whole batch, padding left out; the same on all ranks
        that share the batch. Each rank's backward pass sees to its own targets. A collective call where ranks do."""
        sums = values.new_zeros(len(self.batch.segment_sources)).index_add(0, self.batch.target_segment, values)
        return sum_shares(sums, self.batch.sequence)[: self.batch.num_sequences]

    def share_of(self, losses: Tensor) -> tuple[Tensor, float]:
        """The sum of losses [P] that every rank that shares the batch has computed alike: this rank's share of it, with
        the gradient of this rank's own targets, and the factor that makes such a share of what is only counted."""
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
        """A rank's share of what the head makes: all of it where ranks split the head, and have other parts of it."""
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
