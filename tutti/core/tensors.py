"""Small things about tensors that many modules need: a DTensor's local part, and seeds made from names."""

from __future__ import annotations

import hashlib

from torch import Tensor
from torch.distributed.tensor import DTensor


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, or the tensor itself; without gradient, sharing its memory."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor.detach()


def seed_of(text: str) -> int:
    """A seed for random generators, in 63 bits, which differs with `text` and with nothing else."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
