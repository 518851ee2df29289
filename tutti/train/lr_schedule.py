"""The learning rate of every step, as a pure function of the step.

Over the first w = int(T * lr_warmup_ratio) of T steps the rate rises linearly from `lr_start` to `lr`. Then it stays
there (constant), or falls to `lr_min` linearly or along half a cosine wave, reaches it at step d = int(T *
lr_decay_ratio), and keeps it. There is no schedule state, so a resumed run needs none, and the rate of any step is
known beforehand.

Edge cases: without warmup, step 0 has the full rate. If the decay would end within the warmup (d <= w), the warmup runs
to its end and the rate then drops to `lr_min`.
"""

from __future__ import annotations

import math

from tutti.config import TrainConfig


def learning_rate(step: int, total_steps: int, train: TrainConfig) -> float:
    """The learning rate of optimizer step `step` (from 0) of `total_steps`."""
    warmup_end = int(total_steps * train.lr_warmup_ratio)
    decay_end = int(total_steps * train.lr_decay_ratio)
    if step < warmup_end:
        return train.lr_start + (train.lr - train.lr_start) * step / warmup_end
    if train.lr_decay_style == "constant":
        return train.lr
    lr_min = min(train.lr_min, train.lr)  # a peak below the default of lr_min stays
    if step >= decay_end:
        return lr_min
    progress = (step - warmup_end) / (decay_end - warmup_end)
    remaining = 1 - progress if train.lr_decay_style == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return lr_min + (train.lr - lr_min) * remaining
