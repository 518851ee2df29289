"""Tokenizers of pictures in frozen use: pixels to codes and back.

A language model that draws predicts the codes of a picture one after the other, row by row. What makes codes of pixels,
and pixels of codes, is trained by itself before (data.data_type image) and stays as it is: it is no part of the model
that is trained, and every rank holds all of it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tutti.core.pixels import Square
from tutti.model.autoencoder import decode_map, make_net, nearest, read_autoencoder_config

WEIGHTS = "diffusion_pytorch_model.safetensors"

_OTHERS = {
    "janus_vqgan": "JanusVQVAE",
    "emu3_vqgan": "Emu3VQVAE",
    "glm_image_vqmodel": "GlmImageVQVAE",
    "chameleon_vqgan": "ChameleonVQVAE",
}
"""model_type of transformers' tokenizers of pictures, and their classes."""


@dataclass(frozen=True)
class PictureCodes:
    """The codes of a picture: `tokens` of them, of `number` different ones, for a square of pixels of `size`."""

    number: int
    tokens: int
    size: Square


def read_codes(folder: Path, argument: str) -> PictureCodes:
    """The codes of the VQModel in a folder, from its config. ValueError, in the name of `argument`: it is another."""
    content: Any = {}
    for name in ("config.json", "model_index.json"):
        if (folder / name).is_file():
            content = json.loads((folder / name).read_text(encoding="utf-8"))
            break
    kind = content.get("_class_name") or _OTHERS.get(content.get("model_type", ""))
    if kind != "VQModel":
        raise ValueError(
            f"{argument}: {folder} is of {kind or content.get('model_type') or 'no known model'}, by which models do "
            "not draw yet; give the folder of a diffusers VQModel, such as data.data_type image trains"
        )
    config = read_autoencoder_config(folder, argument)
    halvings = len(config.net.get("block_out_channels", [64])) - 1
    return PictureCodes(config.num_codes, (config.side // 2**halvings) ** 2, Square(config.side))


class PictureTokenizer:
    """A VQModel whose weights stay as they are, on one device, in fp32."""

    def __init__(self, folder: Path, device: torch.device, argument: str = "model.decoders.image.model_path") -> None:
        """ValueError, in the name of `argument`: the folder has no weights that fit its config."""
        self.codes = read_codes(folder, argument)
        self._device = device
        self._net = make_net(read_autoencoder_config(folder, argument).net)
        try:
            self._net.load_state_dict(load_file(folder / WEIGHTS))
        except (OSError, SafetensorError, RuntimeError) as error:
            line = str(error).splitlines()[0]
            raise ValueError(f"{argument}: the weights in {folder} cannot be used: {line}") from None
        self._net.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """The codes int64 [N, n], on the host, of pictures [N, 3, S, S] in [-1, 1].

        Each is encoded by itself: products of larger matrices round otherwise, and a picture has the same codes in any
        batch.
        """
        made = []
        for one in pixels.to(self._device, torch.float32).split(1):
            encoded = self._net.quant_conv(self._net.encoder(one))
            made.append(nearest(encoded, self._net.quantize.embedding.weight)[0].cpu())
        return torch.cat(made)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """The pictures [N, 3, S, S] that codes [N, n] stand for."""
        side = int(codes.shape[1] ** 0.5)
        found = self._net.quantize.embedding(codes.to(self._device)).transpose(1, 2)
        cells = found.unflatten(2, (side, side))
        return decode_map(self._net, cells, cells)
