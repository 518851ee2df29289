"""Direct preference optimization: the model learns to make the chosen of two answers more likely than the rejected one.

In DPO (arXiv 2305.18290) the reward of an answer y is beta * (log p(y) - log p_ref(y)), its log-probability relative to
a reference model, and the loss maximizes the likelihood that the chosen answer wins, with probability
sigmoid(difference of rewards). `log p(y)` is the sum over the answer's trained tokens. Variants:

- label smoothing (conservative DPO): the labels are swapped with this probability;
- ipo (arXiv 2310.12036): the squared distance of the difference from 1 / (2 beta), which keeps it from growing without
  bound if one answer always wins. Log-probabilities are means over an answer's tokens here, as is usual.

The sums over tokens come from losses of single targets that are computed in chunks (`tutti.train.loss`); autograd
derives each target's weight from the formula below. If ranks share a batch, each has some of an answer's tokens and
knows the sum over the rest. The reference model's log-probabilities come with the batch
(`tutti.train.tasks.reference`). They are computed without dropout, so the model also trains without it: noise in its
log-probabilities would count as reward.

Shapes: P pairs, N targets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tutti.config import Config
from tutti.data.loader import Data
from tutti.train.head import Head
from tutti.train.tasks import Prepare, Sums, Task

if TYPE_CHECKING:
    from tutti.parallel.pipeline.executor import Executor
    from tutti.train.run_parts import Run

REFERENCE = "reference_log_probs"
"""The name, in a batch's payload, of fp32 [P, 2]: the reference model's log-probabilities of the chosen and the
rejected answers."""


@dataclass(frozen=True)
class DirectPreference(Task):
    """Sums over pairs. beta, label_smoothing, variant: train.dpo_beta, dpo_label_smoothing and dpo_loss.

    rewards: of the chosen and of the rejected answers. correct: pairs whose chosen answer has the larger reward.
    """

    sums: ClassVar = {"rewards": 2, "correct": 1}
    may_drop: ClassVar = False
    beta: float = 0.1
    label_smoothing: float = 0.0
    variant: Literal["sigmoid", "ipo"] = "sigmoid"

    def loss(self, hidden: Tensor, head: Head) -> Sums:
        losses, rewards = self.compare(answer_log_probs(hidden, head), head)
        loss, share = head.share_of(losses)
        sources = head.batch.segment_sources[: head.batch.num_sequences : 2]
        return {
            "loss": loss,
            "rewards": rewards.sum(0) * share,
            "correct": (rewards[:, 0] > rewards[:, 1]).sum() * share,
            **self.by_source(losses.detach() * share, sources),
        }

    def compare(self, log_probs: Tensor, head: Head) -> tuple[Tensor, Tensor]:
        """The losses [P] (differentiable) and the detached rewards [P, 2] of answers with log-probabilities [P, 2].

        Without a reference, the model is its own reference, and no answer is preferred.
        """
        reference = head.batch.payload.get(REFERENCE)
        ratios = log_probs - (log_probs.detach() if reference is None else reference)
        if self.variant == "ipo":
            ones = torch.ones(len(head.batch.target_segment), dtype=ratios.dtype, device=ratios.device)
            ratios = ratios / head.segment_sums(ones).view(-1, 2)
        margins = ratios[:, 0] - ratios[:, 1]
        if self.variant == "ipo":
            losses = (margins - 1 / (2 * self.beta)).square()
        else:
            right, wrong = logsigmoid(self.beta * margins), logsigmoid(-self.beta * margins)
            losses = -(1 - self.label_smoothing) * right - self.label_smoothing * wrong
        return losses, self.beta * ratios.detach()

    def metrics(self, sums: Mapping[str, Any], num_targets: int) -> dict[str, float]:
        chosen, rejected = (value / num_targets for value in sums["rewards"])
        return {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margin": chosen - rejected,
            "rewards/accuracy": sums["correct"] / num_targets,
        }

    def check(self, config: Config, data: Data) -> None:
        if data.digest is None and config.train.dpo_reference == "precompute":
            raise ValueError(
                "train.dpo_reference: precompute goes over the training data beforehand, and streamed data "
                "(data.datasets_type) is read as it is trained on: set on_the_fly"
            )

    def prepare(self, run: Run, executor: Executor) -> Prepare:
        from tutti.train.tasks.reference import make_reference  # imports the objective, which imports the tasks

        return make_reference(run, executor)


def answer_log_probs(hidden: Tensor, head: Head) -> Tensor:
    """Log-probabilities of the answers of all pairs of the batch, fp32 [P, 2]; the same on all ranks that share the
    batch."""
    return -head.segment_sums(head.target_losses(hidden)).view(-1, 2)


def make_task(config: Config) -> DirectPreference:
    train = config.train
    return DirectPreference(beta=train.dpo_beta, label_smoothing=train.dpo_label_smoothing, variant=train.dpo_loss)
