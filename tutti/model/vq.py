"""Frozen picture tokenizers: pixels to codes and back.

A language model that draws predicts the codes of a picture one after another, row by row. The tokenizer that turns
pixels into codes, and codes into pixels, has been trained separately (data.data_type image) and stays frozen: it is not
part of the trained model, and every rank holds all of it.

Supported are diffusers' VQModel and the tokenizers of transformers' models that draw, in a folder of their own or the
model's:

- `JanusVQVAE`: its lookup scales codes' vectors to length 1, its encoder does not; both are used as they are.
- `ChameleonVQVAE`: has no decoder, so only its own model uses it, to see pictures and to be trained on codes.
- `Emu3VQVAE`: takes pictures of any size, so the size must be given (`image_size`). A picture is a video of one frame.

Pictures are values in [-1, 1]. The tokenizer inside a model that draws was trained on values made by the model's image
processor with a mean and a standard deviation: inputs and outputs are converted as in the processor's `postprocess`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor

from tutti.core.pixels import Square
from tutti.model.autoencoder import decode_map, make_net, nearest, read_autoencoder_config
from tutti.model.tokenizer import first_line

WEIGHTS = "diffusion_pytorch_model.safetensors"

_CLASSES = {"janus_vqgan": "JanusVQVAE", "emu3_vqgan": "Emu3VQVAE"}
"""transformers' picture tokenizers: model_type -> class name."""

_REFUSED = {
    "chameleon_vqgan": "ChameleonVQVAE, which makes codes of pictures but no pictures of codes",
    "glm_image_vqmodel": "GlmImageVQVAE, which makes codes of a vision tower's features, and pictures by diffusion",
}
"""Picture tokenizers that no model draws with: model_type -> the reason."""

_ELSEWHERE = {
    "janusvq16_decoder": "or a Janus folder of Hugging Face (its vqmodel is taken)",
    "movqgan": "such as the movq of a Kandinsky 2",
}
"""model_type names of VeOmni -> the alternative, completing `a diffusers VQModel`."""

_PART = "vqmodel."
"""Patterns of a picture tokenizer's tensor names inside an entire model, after any outer prefix."""


DECODER = "model.decoders.image.model_path"
"""The argument that names an image tokenizer."""


@dataclass(frozen=True)
class PictureCodes:
    """The codes of a picture. number: of different codes. tokens: codes per picture. size: pixels. draws: the
    tokenizer has a decoder."""

    number: int
    tokens: int
    size: Square
    draws: bool = True


class _Net(Protocol):
    """A picture tokenizer. codes: describes its codes. module: has the weights."""

    codes: PictureCodes
    module: Any

    def encode(self, pixels: Tensor) -> Tensor:
        """The codes [1, n] of a picture [1, 3, S, S]."""
        ...

    def decode(self, codes: Tensor) -> Tensor:
        """The pictures [N, 3, S, S] of codes [N, n]."""
        ...


class _VQModel:
    """diffusers' VQModel."""

    def __init__(self, folder: Path, argument: str) -> None:
        config = read_autoencoder_config(folder, argument)
        halvings = len(config.net.get("block_out_channels", [64])) - 1
        self.codes = PictureCodes(config.num_codes, (config.side // 2**halvings) ** 2, Square(config.side))
        self.module: Any = make_net(config.net)

    def encode(self, pixels: Tensor) -> Tensor:
        net = self.module
        return nearest(net.quant_conv(net.encoder(pixels)), net.quantize.embedding.weight)[0]

    def decode(self, codes: Tensor) -> Tensor:
        net = self.module
        side = int(codes.shape[1] ** 0.5)
        cells = net.quantize.embedding(codes).transpose(1, 2).unflatten(2, (side, side))
        return decode_map(net, cells, cells)


class _JanusVQVAE:
    def __init__(self, config: Any) -> None:
        side = config.num_patches
        size = Square(side * 2 ** (len(config.channel_multiplier) - 1))
        self.codes = PictureCodes(config.num_embeddings, side**2, size)
        self.module: Any = transformers.JanusVQVAE(config)

    def encode(self, pixels: Tensor) -> Tensor:
        return self.module.encode(pixels).image_tokens[None]

    def decode(self, codes: Tensor) -> Tensor:
        return self.module.decode(codes)


class _ChameleonVQVAE:
    def __init__(self, config: Any) -> None:
        side = config.resolution // 2 ** (len(config.channel_multiplier) - 1)
        self.codes = PictureCodes(config.num_embeddings, side**2, Square(config.resolution), draws=False)
        self.module: Any = transformers.ChameleonVQVAE(config)

    def encode(self, pixels: Tensor) -> Tensor:
        return self.module.encode(pixels).image_tokens[None]

    def decode(self, codes: Tensor) -> Tensor:
        raise AssertionError("PictureCodes.draws says that it makes no pictures of codes")


class _Emu3VQVAE:
    def __init__(self, config: Any, size: Square) -> None:
        side = size.side // 2 ** (len(config.channel_multiplier) - 1)
        self.codes = PictureCodes(config.codebook_size, side**2, size)
        self.module: Any = transformers.Emu3VQVAE(config)

    def encode(self, pixels: Tensor) -> Tensor:
        return self.module.encode(pixels, torch.tensor([pixels.shape[-2:]])).image_tokens[0].flatten()[None]

    def decode(self, codes: Tensor) -> Tensor:
        side = self.codes.size.side // self.module.spatial_scale_factor
        return self.module.decode(codes.unflatten(1, (side, side)))


def _make(folder: Path, argument: str, size: int | None) -> _Net:
    """The picture tokenizer in a folder, from its config, on the meta device. size: the side of its pictures, if the
    config does not give it. ValueError, naming `argument`: it cannot be used."""
    content: Any = {}
    for name in ("config.json", "model_index.json"):
        if (folder / name).is_file():
            content = json.loads((folder / name).read_text(encoding="utf-8"))
            break
    kind, net = content.get("_class_name"), content.get("vq_config") or content
    if kind is None and net.get("model_type") in _CLASSES:
        kind = _CLASSES[net["model_type"]]
    if content.get("model_type") == "chameleon":
        kind = "ChameleonVQVAE"
    if size is not None and kind in ("VQModel", "JanusVQVAE"):
        raise ValueError(f"{argument}: image_size: {kind} has a size of its own; leave it out")
    with torch.device("meta"):
        if kind == "VQModel":
            return _VQModel(folder, argument)
        if kind in (*_CLASSES.values(), "ChameleonVQVAE"):
            return _of_transformers(folder, argument, size)
    named = content.get("model_type")
    found = kind or _REFUSED.get(net.get("model_type", "")) or named or "no known model"
    other = _ELSEWHERE.get(named, f"such as data.data_type image trains, or of a {' or '.join(_CLASSES.values())}")
    raise ValueError(
        f"{argument}: {folder} is of {found}, by which models do not draw; give the folder of a diffusers VQModel, "
        f"{other}"
    )


def _of_transformers(folder: Path, argument: str, size: int | None) -> _Net:
    try:
        config: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
        config = getattr(config, "vq_config", config)
        if config.model_type == "janus_vqgan":
            return _JanusVQVAE(config)
        if config.model_type == "chameleon_vqgan":
            return _ChameleonVQVAE(config)
        factor = 2 ** (len(config.channel_multiplier) - 1)
        if size is None or size % factor or size < factor:
            raise ValueError(f"takes pictures of any size: give image_size, a multiple of {factor}")
        return _Emu3VQVAE(config, Square(size))
    except (OSError, ValueError, TypeError, AssertionError) as error:
        raise ValueError(f"{argument}: the tokenizer of pictures in {folder}: {first_line(error)}") from None


def read_codes(folder: Path, argument: str, size: int | None = None) -> PictureCodes:
    """A description of the codes of the picture tokenizer in a folder, from its config. size: the side of its
    pictures, if the config does not give it. ValueError, naming `argument`: it cannot be used."""
    return _make(folder, argument, size).codes


class PixelRange(NamedTuple):
    """The pixel values that a model expects: those in [-1, 1] times `factor`, plus `shift`; each [3, 1, 1]."""

    factor: Tensor
    shift: Tensor


def read_range(folder: Path) -> PixelRange | None:
    """The pixel values that the image processor in a model's folder makes; None if there is none, or the folder has
    only a tokenizer."""
    config = folder / "config.json"
    if not config.is_file() or "vq_config" not in json.loads(config.read_text(encoding="utf-8")):
        return None
    try:
        processor: Any = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError):
        return None
    bytes_to = processor.rescale_factor if processor.do_rescale else 1.0
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else (0.0, 1.0)
    mean, std = (torch.as_tensor(value, dtype=torch.float32).expand(3).view(3, 1, 1) for value in (mean, std))
    half = 127.5 * bytes_to
    return PixelRange(half / std, (half - mean) / std)


class PictureTokenizer:
    """A frozen picture tokenizer, on one device, in fp32."""

    def __init__(self, folder: Path, device: torch.device, size: int | None = None) -> None:
        """size: as for `read_codes`. ValueError: the folder's weights do not fit its config."""
        net = _make(folder, DECODER, size)
        self.codes, self.net, self._device = net.codes, net, device
        try:
            held = net.module.to_empty(device="cpu").float()
            held.load_state_dict(_read(folder, held.state_dict()))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise ValueError(f"{DECODER}: the weights in {folder} cannot be used: {first_line(error)}") from None
        held.to(device).eval().requires_grad_(False)
        self._range = (
            read_range(folder) if net.codes.draws else None
        )  # otherwise pictures arrive as the processor made them
        if self._range is not None:
            self._range = PixelRange(*(part.to(device) for part in self._range))

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """The codes int64 [N, n], on the host, of pictures [N, 3, S, S] in [-1, 1].

        Each picture is encoded separately: batched matrix products round differently, and a picture must have the same
        codes in any batch.
        """
        values = pixels.to(self._device, torch.float32)
        values = values if self._range is None else values * self._range.factor + self._range.shift
        return torch.cat([self.net.encode(one).cpu() for one in values.split(1)])

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """The pictures [N, 3, S, S] in [-1, 1] of codes [N, n]."""
        values = self.net.decode(codes.to(self._device))
        return values if self._range is None else (values - self._range.shift) / self._range.factor


def copy_tokenizer(folder: Path, place: Path, size: int | None = None) -> None:
    """Copy the picture tokenizer in a folder, which may be its model's, to the folder `place`. size: as for
    `read_codes`."""
    if (folder / WEIGHTS).is_file():
        for name in ("config.json", WEIGHTS):
            shutil.copyfile(folder / name, place / name)
    else:
        PictureTokenizer(folder, torch.device("cpu"), size=size).net.module.save_pretrained(place)


def _read(folder: Path, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A picture tokenizer's tensors by their names in it, from the weights in its folder or its model's."""
    found: dict[str, Tensor] = {}
    for file in _files(folder):
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                name = key.rpartition(_PART)[2]
                if name in wanted and (_PART in key or key == name):
                    found[name] = opened.get_tensor(key)
    return found


def _files(folder: Path) -> Iterable[Path]:
    return [folder / WEIGHTS] if (folder / WEIGHTS).is_file() else sorted(folder.glob("*.safetensors"))
