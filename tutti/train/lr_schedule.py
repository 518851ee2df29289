"""The learning rate of every step, as a pure function of the step.

Over the first w = int(T * lr_warmup_ratio) of T steps the rate rises in a straight line from `lr_start` to `lr`. Then
it stays (constant), or falls to `lr_min`, which it reaches at step d = int(T * lr_decay_ratio) and keeps: in a straight
line (linear) or along half a cosine wave (cosine). Nothing is remembered from step to step, so a resumed run needs no
schedule state, and any step's rate can be asked for beforehand.

The edges: without warm-up step 0 already has the full rate. Where the decay would end inside the warm-up (d <= w), the
warm-up is run to its end and the rate drops to `lr_min` after it.
"""

from __future__ import annotations

import math

from tutti.config import TrainConfig


def learning_rate(step: int, total_steps: int, train: TrainConfig) -> float:
    """The rate that optimizer step `step` (from 0) of `total_steps` is taken with."""
    warmup_end = int(total_steps * train.lr_warmup_ratio)
    decay_end = int(total_steps * train.lr_decay_ratio)
    if step < warmup_end:
        return train.lr_start + (train.lr - train.lr_start) * step / warmup_end
    if train.lr_decay_style == "constant":
        return train.lr
    lr_min = min(train.lr_min, train.lr)  # a peak below the default of lr_min is kept
    if step >= decay_end:
        return lr_min
    progress = (step - warmup_end) / (decay_end - warmup_end)
    remaining = 1 - progress if train.lr_decay_style == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return lr_min + (train.lr - lr_min) * remaining
