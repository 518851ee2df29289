"""Random draws that depend on what they are for, and on nothing else.

A draw that belongs to a sample (noise, a flip, a dropped caption) has a key such as (epoch, name of the sample,
"noise"). With the run's seed it makes a generator of its own, so that the number comes out alike on whichever rank,
in whichever micro batch and after however many restarts the sample is trained on.
"""

from __future__ import annotations

import torch

from tutti.core.tensors import seed_of


def generator(seed: int, *key: object) -> torch.Generator:
    """A generator on the host that `seed` and `key` determine. key: plain values (numbers, texts, tuples of them), of
    which 1 and "1" differ."""
    return torch.Generator().manual_seed(seed_of(repr((seed, key))))
