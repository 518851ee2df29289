"""Reward modelling: a model with one number as its output scores the chosen answer above the rejected one.

The Bradley-Terry model (Christiano et al., arXiv 1706.03741; Ouyang et al., arXiv 2203.02155) takes the difference of
two answers' scores as the log-odds that the first is preferred: the loss of a pair is -log sigmoid(chosen - rejected).
A score is read at an answer's last token. Only differences are learnt, so that scores have no zero of their own.

The model is a sequence classifier with one label, and is exported as such. Shapes: P pairs, N = 2 P targets.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from tutti.config import Config
from tutti.train.head import Head
from tutti.train.tasks import Sums, Task


class RewardModelling(Task):
    """Sums over pairs. margin: by how much the chosen answers are scored higher. correct: pairs where they are."""

    sums: ClassVar = {"margin": 1, "correct": 1}

    def loss(self, hidden: Tensor, head: Head) -> Sums:
        scores = head.segment_sums(head.logits(hidden).float()[:, 0]).view(-1, 2)
        margins = scores[:, 0] - scores[:, 1]
        losses = -logsigmoid(margins)
        loss, share = head.share_of(losses)
        sources = head.batch.segment_sources[: head.batch.num_sequences : 2]
        return {
            "loss": loss,
            "margin": margins.detach().sum() * share,
            "correct": (margins > 0).sum() * share,
            **self.by_source(losses.detach() * share, sources),
        }

    def metrics(self, sums: Mapping[str, Any], num_targets: int) -> dict[str, float]:
        return {"accuracy": sums["correct"] / num_targets, "margin": sums["margin"] / num_targets}


def make_task(config: Config) -> RewardModelling:
    return RewardModelling()
