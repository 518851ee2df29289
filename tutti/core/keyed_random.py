"""Random numbers that depend only on what they are used for.

A random number that belongs to a sample (noise, a flip, a dropped caption) has a key such as (epoch, name of the
sample, "noise"). Together with the run's seed the key determines a generator of its own. So the number is the same
whichever rank and micro batch the sample is in, and however often the run was restarted.
"""

from __future__ import annotations

import torch

from tutti.core.tensors import seed_of


def generator(seed: int, *key: object) -> torch.Generator:
    """A generator on the host, determined by `seed` and `key`. key: plain values (numbers, texts, tuples of them); 1
    and "1" differ."""
    return torch.Generator().manual_seed(seed_of(repr((seed, key))))
