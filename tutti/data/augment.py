"""Augmentation of training images: mirroring, shifting and scaling, different each time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tutti.core.keyed_random import generator


@dataclass(frozen=True)
class Augment:
    """Image augmentation. flip: mirror half of the images. shift: maximum shift, as a share of the side. scale: the
    scale factor is between 1 / (1 + scale) and 1 + scale."""

    flip: bool = False
    shift: float = 0.0
    scale: float = 0.0

    @classmethod
    def read(cls, entry: Mapping[str, Any]) -> Augment:
        """Parse data.augment. ValueError: it is invalid."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name, value in entry.items():
            if name not in known:
                raise ValueError(f"data.augment: has no {name}; it has {', '.join(known)}")
            if name == "flip":
                if not isinstance(value, bool):
                    raise ValueError(f"data.augment: flip must be true or false, got {value!r}")
            elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
                raise ValueError(f"data.augment: {name} must be a number from 0 to below 1, got {value!r}")
        return cls(**entry)

    def __bool__(self) -> bool:
        return self != Augment()

    def maps(self, seed: int, epoch: int, names: Sequence[Any]) -> Tensor:
        """The affine maps fp32 [N, 2, 3] of images whose samples have these names, from positions in the output to
        positions in the input, both in -1 to 1 (as in `affine_grid`)."""
        found = torch.zeros(len(names), 2, 3)
        for number, name in enumerate(names):
            mirrored, right, down, size = torch.rand(4, generator=generator(seed, epoch, name, "augment")).tolist()
            factor = math.exp((2 * size - 1) * math.log1p(self.scale))
            found[number, 0, 0] = -factor if self.flip and mirrored < 0.5 else factor
            found[number, 1, 1] = factor
            found[number, :, 2] = 2 * self.shift * torch.tensor([2 * right - 1, 2 * down - 1])
        return found


def warp(pixels: Tensor, maps: Tensor) -> Tensor:
    """Apply affine `maps` [N, 2, 3] to images [N, C, height, width] with bilinear interpolation."""
    grid = nn.functional.affine_grid(maps.to(pixels.dtype), list(pixels.shape), align_corners=False)
    return nn.functional.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
