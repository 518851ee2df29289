"""Image autoencoders: diffusers' VQModel and AutoencoderKL, wrapped so that a run can train them like any model.

An autoencoder encodes an image to a small map and decodes the map to an image. In a VQModel (arXiv 1711.00937) a cell
of the map is a vector of a codebook, represented by its index, the *code*: a language model can predict codes. In an
AutoencoderKL (arXiv 1312.6114, 2112.10752) a cell consists of a few real numbers, *latents*, on which diffusion models
work.

The class named in a config.json (`_class_name`) is built as diffusers does, and called through its own parts: encoder,
quant_conv, codebook, post_quant_conv, decoder. Pixels are in [-1, 1].

Shapes: N images, S their side in pixels, h x w the map, D the width of its cells, K codes.
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig, PreTrainedModel

from tutti.config import Config
from tutti.model.tokenizer import local_path

_PLACES = {
    "VQModel": "diffusers.models.autoencoders.vq_model",
    "AutoencoderKL": "diffusers.models.autoencoders.autoencoder_kl",
}
"""The module of each class, since importing only that takes half of the time of importing everything."""


class AutoencoderConfig(PreTrainedConfig):
    """The config of an autoencoder. net: the content of its config.json, with `_class_name`."""

    model_type = "tutti_autoencoder"

    def __init__(self, net: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.net = net or {}

    @property
    def side(self) -> int:
        """The side of the images in pixels."""
        return int(self.net.get("sample_size", 32))

    @property
    def num_codes(self) -> int:
        """The number of vectors in the codebook; 0 if there is none."""
        return int(self.net.get("num_vq_embeddings", 256)) if self.net["_class_name"] == "VQModel" else 0


def read_autoencoder_config(path: Path, argument: str) -> AutoencoderConfig:
    """The config of the autoencoder in a folder or a config.json, of diffusers or of a checkpoint.

    ValueError, naming `argument`: there is none, or it is of another class.
    """
    file = path if path.is_file() else path / "config.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{argument}: no config.json can be read from {path}: {error}") from None
    net = content.get("net", content) if isinstance(content, dict) else {}
    if net.get("_class_name") not in _PLACES:
        known = " or ".join(_PLACES)
        raise ValueError(
            f"{argument}: {file} is of {net.get('_class_name') or 'no diffusers class'}; data.data_type image trains "
            f"{known}, which `_class_name` says"
        )
    return AutoencoderConfig(net={name: value for name, value in net.items() if name != "_name_or_path"})


def load_autoencoder_config(config: Config) -> AutoencoderConfig:
    """The config of the trained autoencoder, from model.config_path (by default model.model_path)."""
    name = config.model.config_path or config.model.model_path
    if name is None:
        raise ValueError("model.model_path: required, or model.config_path to start from random weights")
    argument = "model.model_path" if name == config.model.model_path else "model.config_path"
    return read_autoencoder_config(local_path(name, argument), argument)


def make_net(net: dict[str, Any]) -> Any:
    """A module of the diffusers class named in a config. ValueError: diffusers is not installed, or rejects the
    config."""
    name = net["_class_name"]
    try:
        factory = getattr(import_module(_PLACES[name]), name)
    except ImportError as error:
        raise ValueError(f"a {name} needs diffusers ({error}): pip install tutti-train[diffusion]") from None
    try:
        return factory.from_config({key: value for key, value in net.items() if not key.startswith("_")})
    except (ValueError, TypeError, AssertionError, ZeroDivisionError) as error:
        raise ValueError(f"{name} cannot be made of its config.json: {error}") from None


class Reconstruction(NamedTuple):
    """The result of an autoencoder.

    pixels: [N, 3, S, S], reconstructed. terms: the losses of each image [N] by kind. codes: int64 [N, h w]. encoded:
    [N, h w, D], the encoder's output, which codes approximate. Both are None without a codebook.
    """

    pixels: Tensor
    terms: dict[str, Tensor]
    codes: Tensor | None = None
    encoded: Tensor | None = None


class Autoencoder(PreTrainedModel):
    """An autoencoder, `net`, as a model that a run can train.

    usage: int64 [K], how often each code was used since unused ones were last replaced. seen: statistics of a step's
    micro batches, for training.
    """

    config_class = AutoencoderConfig
    base_model_prefix = "net"
    net: Any
    usage: Tensor

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__(config)
        self.net = make_net(config.net)
        if config.num_codes:
            self.register_buffer("usage", torch.zeros(config.num_codes, dtype=torch.int64))
        self.seen: list[Any] = []
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            module.weight.uniform_(-1 / module.num_embeddings, 1 / module.num_embeddings)
        elif hasattr(module, "reset_parameters"):
            module.reset_parameters()  # type: ignore[operator]
        elif module is self and self.config.num_codes:
            self.usage.zero_()

    def forward(self, pixels: Tensor, noise: Tensor | None = None) -> Reconstruction:
        """Encode and decode images [N, 3, S, S]. noise: [N, D, h, w], for sampling latents from the encoder's
        distribution; without it their means are used."""
        pixels = pixels.to(next(self.net.parameters()).dtype)
        return self._with_codes(pixels) if self.config.num_codes else self._with_latents(pixels, noise)

    def _with_codes(self, pixels: Tensor) -> Reconstruction:
        net = self.net
        encoded = net.quant_conv(net.encoder(pixels))
        codes, found = nearest(encoded, net.quantize.embedding.weight)
        apart, drawn = ((found - encoded.detach()) ** 2, (encoded - found.detach()) ** 2)
        terms = {"commitment": (apart + net.quantize.beta * drawn).float().flatten(1).mean(1)}
        # Straight-through gradients: the choice of a code is skipped.
        straight = encoded + (found - encoded).detach()
        made = decode_map(net, straight, found)
        return Reconstruction(made, _distances(made, pixels) | terms, codes, encoded.flatten(2).transpose(1, 2))

    def _with_latents(self, pixels: Tensor, noise: Tensor | None) -> Reconstruction:
        net = self.net
        moments = net.encoder(pixels)
        moments = net.quant_conv(moments) if net.quant_conv is not None else moments
        mean, log_variance = moments.float().chunk(2, dim=1)
        log_variance = log_variance.clamp(-30, 20)
        latents = mean if noise is None else mean + (log_variance / 2).exp() * noise
        divergence = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).flatten(1).sum(1)
        latents = latents.to(pixels.dtype)
        made = net.decoder(net.post_quant_conv(latents) if net.post_quant_conv is not None else latents)
        # Per image value, like the other terms.
        return Reconstruction(made, _distances(made, pixels) | {"kl": divergence / pixels[0].numel()})

    def map_shape(self) -> tuple[int, int, int]:
        """The shape (D, h, w) of the map of an image of the config's size."""
        width, halvings = self.config.net.get("latent_channels", 4), len(self.net.config.block_out_channels) - 1
        side = self.config.side // 2**halvings
        return int(width), side, side


def nearest(encoded: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """The codes int64 [N, h w] nearest to a map [N, D, h, w], and the map of their vectors in `codebook` [K, D]."""
    cells = encoded.flatten(2).transpose(1, 2)
    codes = torch.cdist(cells.float(), codebook.float()[None]).argmin(-1)
    return codes, nn.functional.embedding(codes, codebook).transpose(1, 2).reshape(encoded.shape)


def decode_map(net: Any, straight: Tensor, found: Tensor) -> Tensor:
    """Decode maps of codebook vectors [N, D, h, w] to images [N, 3, S, S] with a VQModel. straight: `found`, with
    straight-through gradients."""
    return net.decoder(net.post_quant_conv(straight), found if net.config.norm_type == "spatial" else None)


def _distances(made: Tensor, pixels: Tensor) -> dict[str, Tensor]:
    apart = (made.float() - pixels.float()).flatten(1)
    return {"l1": apart.abs().mean(1), "mse": apart.square().mean(1)}


def build_autoencoder(config: Config) -> Autoencoder:
    """The autoencoder that `config` describes, on the meta device, in training mode, with parameters in fp32 or
    (without train.enable_mixed_precision) in bf16."""
    model_config = load_autoencoder_config(config)
    dtype = torch.float32 if config.train.enable_mixed_precision else torch.bfloat16
    with torch.device("meta"):
        model: Autoencoder = Autoencoder._from_config(model_config, dtype=dtype)
    found = model.map_shape()[1:]
    with torch.no_grad(), torch.device("meta"):
        size = model_config.side
        shape = tuple(model.net.encoder(torch.zeros(1, 3, size, size, dtype=dtype)).shape[-2:])
    if found != shape or shape[0] * 2 ** (len(model.net.config.block_out_channels) - 1) != size:
        raise ValueError(f"model.config_path: a sample_size of {size} is not divisible by what the encoder halves")
    return model.train()


def flops_per_value(model: Autoencoder) -> float:
    """The operations of a training step per image value: three times those of the forward pass."""
    side = model.config.side
    parameter = next(model.parameters())
    twin: Autoencoder = model
    if not parameter.is_meta:
        with torch.device("meta"):
            twin = Autoencoder._from_config(model.config)
    pixels = torch.zeros(1, 3, side, side, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        twin(pixels)
    return 3.0 * counter.get_total_flops() / pixels.numel()
