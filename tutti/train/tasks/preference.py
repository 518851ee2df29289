"""Preference training: of two answers to a prompt the model is to find the chosen one likelier than the rejected one.

Direct preference optimization (DPO, arXiv 2305.18290) takes how much likelier than under a reference model an answer y
has become as its reward, beta * (log p(y) - log p_ref(y)), and maximizes the likelihood that the chosen answer wins
when answers win as often as sigmoid(difference of rewards) says. `log p(y)` is the sum over the answer's trained
tokens. The variants:

- label smoothing (conservative DPO): with that probability the labels are the wrong way round;
- ipo (arXiv 2310.12036): the difference is pulled to 1 / (2 beta) by its squared error, so that it cannot grow without
  bounds where one answer always wins. Log-probabilities are means over an answer's tokens here, as is usual.

The sums over tokens come from losses of single targets that are computed in chunks (`tutti.train.loss`), and autograd
finds each target's weight through the formula below. Where ranks share a batch, each has some of an answer's tokens and
knows the rest's sum.

Shapes: P pairs, N targets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tutti.config import Config
from tutti.core.batch import Batch
from tutti.parallel.sequence import sum_shares


class Comparison(NamedTuple):
    """losses [P]: to differentiate. rewards [P, 2]: of the chosen and the rejected answers, detached."""

    losses: Tensor
    rewards: Tensor


@dataclass(frozen=True)
class Preference:
    """How answers are compared: train.dpo_beta, dpo_label_smoothing and dpo_loss."""

    beta: float
    label_smoothing: float
    loss: Literal["sigmoid", "ipo"]

    def compare(self, log_probs: Tensor, batch: Batch) -> Comparison:
        """The pairs of `batch`, whose answers have these log-probabilities [P, 2].

        Where those by the reference model are not known, the model is its own reference, and nothing is preferred.
        """
        assert batch.pairs is not None
        reference = batch.pairs.reference
        ratios = log_probs - (log_probs.detach() if reference is None else reference)
        if self.loss == "ipo":
            ratios = ratios / answer_sums(torch.ones_like(batch.pairs.segment, dtype=ratios.dtype), batch)
        margins = ratios[:, 0] - ratios[:, 1]
        if self.loss == "ipo":
            losses = (margins - 1 / (2 * self.beta)).square()
        else:
            right, wrong = logsigmoid(self.beta * margins), logsigmoid(-self.beta * margins)
            losses = -(1 - self.label_smoothing) * right - self.label_smoothing * wrong
        return Comparison(losses, self.beta * ratios.detach())


def make_preference(config: Config) -> Preference | None:
    """How `config` has answers compared; None where it trains on no pairs."""
    if config.data.data_type != "dpo":
        return None
    train = config.train
    return Preference(train.dpo_beta, train.dpo_label_smoothing, train.dpo_loss)


def answer_sums(values: Tensor, batch: Batch) -> Tensor:
    """`values` [N] of the targets of a batch of pairs, summed by answer: [P, 2]."""
    pairs = batch.pairs
    assert pairs is not None
    sums = values.new_zeros(2 * len(pairs.source)).index_add(0, pairs.segment, values)
    return sum_shares(sums, batch.sequence).view(-1, 2)


def reward_metrics(sums: list[float], num_pairs: int) -> dict[str, float]:
    """Figures of a line of metrics, from the sums over pairs of chosen rewards, rejected ones, and right orders."""
    chosen, rejected, right = (value / num_pairs for value in sums)
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margin": chosen - rejected,
        "rewards/accuracy": right,
    }
