"""Drawing by diffusion: a language model leads a diffusion transformer of diffusers by its hidden states.

The place of a picture in a row is a number of *queries*: learned embeddings, as tokens beyond the vocabulary, that look
at all text before them. Their last hidden states, projected, are for the transformer what a caption's embeddings are
for one that is trained on captions alone (`tutti.model.diffusion`, whose table of classes says how each is called). It
learns to tell noise from a picture's latents, and draws by taking noise away step by step.

model.decoders.image is a folder laid out as diffusers' pipelines are, without text encoders: `transformer/`, `vae/`
(without one, pixels are the latents) and `scheduler/`. The transformer is trained, or frozen by train.freeze; the
autoencoder stays as it is and is no part of the model.

Shapes: P pictures, Q queries, H the language model's hidden size, D width of text that the transformer takes.
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
    """A linear layer that begins with outputs about as large as its inputs: from the far smaller ones of a language
    model's own layers a transformer hardly learns to be led."""

    def reset_parameters(self) -> None:
        """Draw the weights with deviation 1 / sqrt(inputs); the bias is zero."""
        nn.init.normal_(self.weight, std=self.in_features**-0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class FlowDecoder(ExtraTokens):
    """The part of a model that draws by diffusion.

    embed: the queries, of which number 0 is the token `first`. project, pool: from their hidden states to a
    transformer's text, and of all together to its pooled text. net: the transformer.
    """

    def __init__(self, config: dict[str, Any], first: int, number: int, hidden_size: int) -> None:
        super().__init__(first, number, hidden_size)
        self.family = family_of(config["_class_name"], ARGUMENT)
        width = text_width(config)
        assert width is not None, "no text"
        self.project = nn.Sequential(KeepingSize(hidden_size, hidden_size), nn.GELU(), KeepingSize(hidden_size, width))
        self.pool = KeepingSize(width, config["pooled_projection_dim"]) if self.family.pooled else None
        with torch.device("cpu"), parameters_on_meta():  # buffers, which the classes compute, are there at once
            self.net = make_net(config)

    def blocks(self) -> list[nn.Module]:
        """The transformer's repeated units."""
        return [block for _, block in net_blocks(self.net)]

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits [..., Q] of the queries as tokens: none is learned, since which one follows is known."""
        return hidden.new_zeros(*hidden.shape[:-1], self.number)

    def text(self, states: Tensor) -> EncodedText:
        """The text that leads the transformer, from the hidden states [P, Q, H] of each picture's queries."""
        embeds = self.project(states.to(self.project[0].weight.dtype))  # type: ignore[arg-type]
        return EncodedText(embeds, None, None if self.pool is None else self.pool(embeds.mean(1)))


class FlowSpec(NamedTuple):
    """A diffusion decoder as it is configured. folder: its parts. weights: the folder of the transformer's weights,
    None if they are drawn. tokens: queries of a picture. grid: how pixels become latents. side: pixels of a picture."""

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
        """The queries, as codes of a picture."""
        return PictureCodes(self.tokens, self.tokens, Square(self.side))

    @property
    def latents(self) -> tuple[int, ...]:
        """The shape of a picture's latents [C, H, W]."""
        return latent_shape(self.family, SimpleNamespace(**self.net), self.grid, (self.side, self.side, 1))


def read_flow(model: ModelConfig) -> FlowSpec | None:
    """The diffusion decoder that `model` draws by; None if it draws by another one, or nothing. ValueError: it cannot
    be used."""
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
