"""Evaluation: the objective's sums over all of the evaluation data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from tutti.core.batch import GlobalBatch
from tutti.core.dist import World
from tutti.parallel.pipeline.executor import Executor
from tutti.train.objective import Objective
from tutti.train.step import add_sums, reduce_sums, zero_sums


def evaluate(objective: Objective, batches: Iterable[GlobalBatch], executor: Executor, world: World) -> dict[str, Any]:
    """`eval_loss` (mean over targets), `eval_tokens` and, where the task counts what is correct, `eval_accuracy`.

    Leaves the model in training mode. A collective call.
    """
    total = zero_sums(objective.sizes, world.device)
    num_targets = trained_tokens = 0
    objective.eval()
    with torch.no_grad():
        for batch in batches:
            num_targets += batch.num_targets
            trained_tokens += batch.trained_tokens
            for sums in executor.evaluate(batch.micro_batches):
                add_sums(total, sums)
    objective.train()
    reduced = reduce_sums(total, world)
    result: dict[str, Any] = {"eval_loss": reduced["loss"] / num_targets, "eval_tokens": trained_tokens}
    if "correct" in reduced:
        result["eval_accuracy"] = reduced["correct"] / num_targets
    return result
