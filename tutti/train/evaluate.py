"""Evaluation: the objective's sums over all of the evaluation data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch

from tutti.core.batch import GlobalBatch
from tutti.core.dist import World
from tutti.parallel.pipeline.executor import Executor
from tutti.train.objective import Objective
from tutti.train.step import add_sums, losses_by_source, reduce_sums, zero_sums


def evaluate(
    objective: Objective,
    batches: Iterable[GlobalBatch],
    executor: Executor,
    world: World,
    *,
    interrupted: Callable[[], bool] = lambda: False,
) -> dict[str, Any] | None:
    """Evaluate on `batches`; returns `eval_loss` (mean over targets), `eval_tokens`, and `eval_accuracy` if the task
    counts correct predictions.

    With several sources, it also returns the loss of each: `eval_source_loss/<name>`. The model is left in training
    mode. interrupted: called before each batch, with the same answer on all ranks; if True, None is returned. A
    collective call.
    """
    total = zero_sums(objective.sizes, world.device)
    targets: Counter[str] = Counter()
    trained_tokens, is_over = 0, False
    objective.eval()
    with torch.no_grad():
        for batch in batches:
            if is_over := interrupted():
                break
            targets.update(batch.source_targets)
            trained_tokens += batch.trained_tokens
            for sums in executor.evaluate(batch.micro_batches):
                add_sums(total, sums)
    objective.train()
    if is_over:
        return None
    reduced = reduce_sums(total, world)
    num_targets = targets.total()
    loss = objective.task.mean_loss(reduced, num_targets)
    result: dict[str, Any] = {"eval_loss": loss, "eval_tokens": trained_tokens}
    if "correct" in reduced:
        result["eval_accuracy"] = reduced["correct"] / num_targets
    if len(targets) > 1:
        losses = losses_by_source(reduced["source_loss"], targets)
        result |= {f"eval_source_loss/{name}": loss for name, loss in losses.items()}
    return result
