"""Evaluation: the mean loss over all trained tokens (or pairs) of the evaluation data, and the share of right answers
of a classifier, or of pairs in the right order."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

from tutti.core.batch import GlobalBatch
from tutti.core.dist import World
from tutti.parallel.pipeline.executor import Executor
from tutti.train.objective import Objective


def evaluate(objective: Objective, batches: Iterable[GlobalBatch], executor: Executor, world: World) -> dict[str, Any]:
    """`eval_loss` (token mean), `eval_tokens` and, where the objective predicts, `eval_accuracy`, over all ranks.

    Leaves the model in training mode. A collective call.
    """
    sums = torch.zeros(2, dtype=torch.float64)
    num_targets = trained_tokens = 0
    objective.eval()
    with torch.no_grad():
        for batch in batches:
            num_targets += batch.num_targets
            trained_tokens += batch.trained_tokens
            for out in executor.evaluate(batch.micro_batches):
                correct = out.num_correct if out.num_correct is not None else torch.zeros(())
                sums += torch.stack([out.loss.double().cpu(), correct.double().cpu()])
    objective.train()
    if world.size > 1:
        sums = sums.to(world.device)
        dist.all_reduce(sums)
    loss, correct = sums.tolist()
    result: dict[str, Any] = {"eval_loss": loss / num_targets, "eval_tokens": trained_tokens}
    if objective.predicts:
        result["eval_accuracy"] = correct / num_targets
    return result
