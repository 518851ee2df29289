"""Small helpers for tensors: the local part of a DTensor, and seeds derived from names."""

from __future__ import annotations

import hashlib

from torch import Tensor
from torch.distributed.tensor import DTensor


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, or the tensor itself; without gradient, sharing its memory."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor.detach()


def seed_of(text: str) -> int:
    """A 63-bit seed for random generators that depends only on `text`."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
