"""Conversions between images and values in [-1, 1], which autoencoders use."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class Square:
    """A model's image size: squares of `side` pixels."""

    side: int

    def cut(self, image: Image.Image) -> Image.Image:
        """The center of the image, scaled to the size."""
        scale = self.side / min(image.size)
        width, height = (max(self.side, round(length * scale)) for length in image.size)
        left, top = (width - self.side) // 2, (height - self.side) // 2
        scaled = image.resize((width, height), Image.Resampling.LANCZOS)
        return scaled.crop((left, top, left + self.side, top + self.side))


def to_values(pixels: np.ndarray) -> Tensor:
    """The values fp32 [C, height, width] in [-1, 1] of pixels, uint8 [height, width, C]."""
    return torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1) / 127.5 - 1


def to_image(pixels: Tensor) -> Image.Image:
    """The image of values [3, S, S] in [-1, 1]."""
    scaled = ((pixels.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(scaled.permute(1, 2, 0).numpy())


def frame_image(pixels: Tensor) -> Image.Image:
    """The image of uint8 [3, (frames,) height, width]; of a video its first frame."""
    frame = pixels[:, 0] if pixels.ndim == 4 else pixels
    return Image.fromarray(np.ascontiguousarray(frame.permute(1, 2, 0).numpy()))


def to_data_url(image: Image.Image, side: int) -> str:
    """A PNG of a picture, at most `side` pixels a side, as a data URL."""
    image = image.copy()
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
