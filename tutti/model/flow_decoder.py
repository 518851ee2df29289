"""Diffusion decoder: a language model conditions a diffusion transformer of diffusers with its hidden states.

In a row, an image is represented by *queries*: learned embeddings, as tokens beyond the vocabulary, that attend to all
text before them. Their last hidden states, projected, take the place of caption embeddings in plain diffusion training
(`tutti.model.diffusion`, whose table says how each class is called). The transformer learns to denoise an image's
latents, and generates by removing noise step by step.

model.decoders.image is a folder with the layout of a diffusers pipeline, without text encoders: `transformer/`, `vae/`
(without one, pixels are the latents) and `scheduler/`. The transformer is trained, unless train.freeze names it; the
autoencoder is frozen and not part of the model.

Shapes: P images, Q queries, H the language model's hidden size, D width of the transformer's text input.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tutti.config import ModelConfig
from tutti.core.batch import Grid
from tutti.core.pixels import Square
from tutti.model.conditions import read_grid, text_width
from tutti.model.denoiser import make_net, net_blocks, parameters_on_meta, read_net
from tutti.model.diffusion import EncodedText, Family, default_side, family_of, latent_shape
from tutti.model.extra_tokens import ExtraTokens
from tutti.model.omni_config import IMAGE_SIZE, decoder_folder, decoder_settings, decoder_size
from tutti.model.pipeline_folder import WEIGHTS_OF, PipelineFolder, is_pipeline, read_folder
from tutti.model.vq import PictureCodes

ARGUMENT = "model.decoders.image"


class KeepingSize(nn.Linear):
    """A linear layer initialized so that its outputs are about as large as its inputs: with the much smaller outputs
    of a language model's usual initialization, a transformer hardly learns to use its condition."""

    def reset_parameters(self) -> None:
        """Initialize the weights with standard deviation 1 / sqrt(inputs), and the bias with zero."""
        nn.init.normal_(self.weight, std=self.in_features**-0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class FlowDecoder(ExtraTokens):
    """The modules of a model with a diffusion decoder.

    embed: the queries; the first one is the token `first`. project, pool: project their hidden states to the
    transformer's text, and their mean to its pooled text. net: the transformer.
    """

    def __init__(self, config: dict[str, Any], first: int, number: int, hidden_size: int) -> None:
        super().__init__(first, number, hidden_size)
        self.family = family_of(config["_class_name"], ARGUMENT)
        width = text_width(config)
        assert width is not None, "no text"
        self.project = nn.Sequential(KeepingSize(hidden_size, hidden_size), nn.GELU(), KeepingSize(hidden_size, width))
        self.pool = KeepingSize(width, config["pooled_projection_dim"]) if self.family.pooled else None
        with torch.device("cpu"), parameters_on_meta():  # buffers, which the classes compute, exist at once
            self.net = make_net(config)

    def blocks(self) -> list[nn.Module]:
        """The transformer's repeated layers."""
        return [block for _, block in net_blocks(self.net)]

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits [..., Q] of the queries as tokens; not learned, since the next query is always known."""
        return hidden.new_zeros(*hidden.shape[:-1], self.number)

    def text(self, states: Tensor) -> EncodedText:
        """The transformer's text input, from the hidden states [P, Q, H] of each image's queries."""
        embeds = self.project(states.to(self.project[0].weight.dtype))  # type: ignore[arg-type]
        return EncodedText(embeds, None, None if self.pool is None else self.pool(embeds.mean(1)))


class FlowSpec(NamedTuple):
    """The configuration of a diffusion decoder. folder: its parts. weights: the folder of the transformer's weights,
    None for random ones. tokens: queries per image. grid: from pixels to latents. side: of images in pixels."""

    folder: PipelineFolder
    weights: Path | None
    net: dict[str, Any]
    tokens: int
    grid: Grid
    side: int

    @property
    def family(self) -> Family:
        return self.folder.family

    @property
    def codes(self) -> PictureCodes:
        """The queries, in the form of image codes."""
        return PictureCodes(self.tokens, self.tokens, Square(self.side))

    @property
    def latents(self) -> tuple[int, ...]:
        """The shape of an image's latents [C, H, W]."""
        return latent_shape(self.family, SimpleNamespace(**self.net), self.grid, (self.side, self.side, 1))


def read_flow(model: ModelConfig) -> FlowSpec | None:
    """The diffusion decoder of `model`; None if it draws in another way, or not at all. ValueError: it cannot be
    used."""
    root, settings = decoder_folder(model), decoder_settings(model)
    if root is None or not is_pipeline(root):
        return None
    is_random = "config_path" in settings and "model_path" not in settings
    argument = f"{ARGUMENT}.{'config_path' if is_random else 'model_path'}"
    folder = read_folder(root, argument)
    weights = None if is_random else folder.weights
    if weights is not None and "config_path" in settings:
        described = read_folder(Path(settings["config_path"]).expanduser(), f"{ARGUMENT}.config_path")
        folder = replace(folder, parts={**folder.parts, **described.parts, WEIGHTS_OF: weights})
    family = folder.family
    net = read_net(folder.transformer)
    if family.video:
        raise ValueError(f"{argument}: {folder.class_name} draws videos, and a language model draws pictures")
    if text_width(net) is None:
        raise ValueError(f"{argument}: the config of {folder.class_name} names no width of the text that it takes")
    if "vae" in folder.parts and not any(folder.parts["vae"].glob("*.safetensors")):
        raise ValueError(f"{argument}: the autoencoder in {folder.parts['vae']} has no weights; it is used as it is")
    config: Any = SimpleNamespace(**net)
    grid = read_grid(folder, config)
    side = decoder_size(model) or default_side(config, grid)
    if side % grid.step:
        raise ValueError(
            f"{ARGUMENT}.{IMAGE_SIZE}: {side} must be a multiple of {grid.step}, the pixels of a token's side"
        )
    return FlowSpec(folder, weights, net, settings.get("tokens") or 64, grid, side)
