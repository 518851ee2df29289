"""Sequence classification: the cross-entropy of a text's class at its last token, and how often it is ranked first."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from tutti.config import Config
from tutti.train.head import Head
from tutti.train.tasks import Sums
from tutti.train.tasks.language import LanguageModelling


class Classification(LanguageModelling):
    """Sums over texts. correct: texts whose class has the largest logit."""

    sums: ClassVar = {"correct": 1}

    def loss(self, hidden: Tensor, head: Head) -> Sums:
        right = head.logits(hidden.detach()).argmax(-1) == head.targets
        return super().loss(hidden, head) | {"correct": right.sum() * head.share}


def make_task(config: Config) -> Classification:
    return Classification()
