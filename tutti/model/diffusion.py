"""Diffusion transformers of diffusers: the differences between their classes, the training loss, and a sampler.

A sample's latents x0 are mixed with noise e at a time s between 0 (no noise) and 1: x_s = (1 - s) x0 + s e. A *flow
matching* model predicts the velocity e - x0 (Lipman et al., arXiv 2210.02747; Esser et al., arXiv 2403.03206). An *eps*
model predicts e from sqrt(a) x0 + sqrt(1 - a) e, with a from the scheduler's table (Ho et al., arXiv 2006.11239).
Latents are [B, C, H, W] everywhere here, or [B, C, F, H, W] for videos. `FAMILIES` defines how each class uses them,
and is the only code per family. It is verified against the family's own pipeline in diffusers, which `sample` must
equal.

Sampling follows the scheduler's own times, with one scheduler step each, and classifier-free guidance (Ho and Salimans,
arXiv 2207.12598): the prediction is pushed away from that for an empty prompt.

Shapes: B samples, C channels, F frames, H and W of latents, L text tokens, D width of text, P width of pooled text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tutti.core.batch import Grid

_JOINED = 2**14
"""Number of latent values up to which predictions for the prompt and for the empty one are computed in one batch:
for small images the overhead of calls dominates, for large ones memory."""
TIMES = 1000
"""Number of times of a schedule, as all these models count them."""


class EncodedText(NamedTuple):
    """Encoded prompts: embeds [B, L, D], mask bool [B, L] (None: all tokens count), pooled [B, P]."""

    embeds: Tensor
    mask: Tensor | None = None
    pooled: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> EncodedText:
        return EncodedText(*(None if part is None else change(part) for part in self))  # type: ignore[arg-type]


Extra = Callable[[Tensor, EncodedText, Any], dict[str, Any]]
"""Additional arguments of a class, computed from latents, text and the model's config."""


@dataclass(frozen=True)
class Family:
    """The inputs and outputs of one class.

    pipeline: its pipeline in diffusers. patch: number of latents per token along a side (0: the input is latents, not
    tokens). video: latents have frames. time_scale: factor for times in 0 to 1. pooled: it takes pooled text. mask: the
    argument for the text mask. prediction: what it predicts. encoded: the return values of the pipeline's
    encode_prompt. by_sigmas: its schedule is defined by evenly spaced sigmas. rescales: guidance preserves the
    prediction's norm (Qwen-Image).
    """

    pipeline: str
    patch: int = 0
    video: bool = False
    time_scale: float = TIMES
    pooled: bool = False
    mask: str | None = None
    prediction: Literal["velocity", "eps"] = "velocity"
    encoded: tuple[str, ...] = ("embeds", "mask")
    by_sigmas: bool = False
    rescales: bool = False
    extra: Extra = lambda latents, text, config: {}


def _flux_places(latents: Tensor, text: EncodedText, config: Any) -> dict[str, Any]:
    height, width = (size // 2 for size in latents.shape[-2:])
    places = latents.new_zeros(height, width, 3)
    places[..., 1] += torch.arange(height, device=latents.device)[:, None]
    places[..., 2] += torch.arange(width, device=latents.device)[None, :]
    return {"img_ids": places.view(-1, 3), "txt_ids": latents.new_zeros(text.embeds.shape[1], 3)}


def _qwen_shapes(latents: Tensor, text: EncodedText, config: Any) -> dict[str, Any]:
    height, width = (size // 2 for size in latents.shape[-2:])
    return {"img_shapes": [[(1, height, width)]] * len(latents)}


def _ltx_sizes(latents: Tensor, text: EncodedText, config: Any) -> dict[str, Any]:
    frames, height, width = latents.shape[2:]
    # LTX's autoencoder: 8 frames and 32 pixels to a latent; its pipeline takes videos for 25 frames a second.
    return {"num_frames": frames, "height": height, "width": width, "rope_interpolation_scale": (8 / 25, 32, 32)}


def _pixart_conditions(latents: Tensor, text: EncodedText, config: Any) -> dict[str, Any]:
    return {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}


FAMILIES: dict[str, Family] = {
    "FluxTransformer2DModel": Family(
        "FluxPipeline",
        patch=2,
        time_scale=1,
        pooled=True,
        encoded=("embeds", "pooled"),
        by_sigmas=True,
        extra=_flux_places,
    ),
    "SD3Transformer2DModel": Family(
        "StableDiffusion3Pipeline", pooled=True, encoded=("embeds", "", "pooled"), by_sigmas=False
    ),
    "QwenImageTransformer2DModel": Family(
        "QwenImagePipeline",
        patch=2,
        time_scale=1,
        mask="encoder_hidden_states_mask",
        by_sigmas=True,
        rescales=True,
        extra=_qwen_shapes,
    ),
    "WanTransformer3DModel": Family("WanPipeline", video=True, encoded=("embeds",)),
    "LTXVideoTransformer3DModel": Family(
        "LTXPipeline", patch=1, video=True, mask="encoder_attention_mask", by_sigmas=True, extra=_ltx_sizes
    ),
    "SanaTransformer2DModel": Family("SanaPipeline", mask="encoder_attention_mask"),
    "PixArtTransformer2DModel": Family(
        "PixArtSigmaPipeline", mask="encoder_attention_mask", prediction="eps", extra=_pixart_conditions
    ),
}
"""By the name of the transformer class."""


def require_diffusers() -> Any:
    """The module diffusers. ValueError: it is not installed."""
    try:
        import diffusers
    except ImportError:
        raise ValueError("this needs diffusers: pip install tutti-train[diffusion]") from None
    diffusers.utils.logging.set_verbosity_error()
    return diffusers


def class_named_in(folder: Path, argument: str) -> str:
    """The class named in the config.json in `folder`. ValueError: there is none."""
    try:
        return str(json.loads((folder / "config.json").read_text(encoding="utf-8"))["_class_name"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{argument}: there is no config.json of a diffusers model in {folder}") from None


def family_of(name: str, argument: str = "model.config_path") -> Family:
    """The family of a transformer class. ValueError: it is not supported."""
    if name not in FAMILIES:
        raise ValueError(f"{argument}: {name} cannot be trained by data.data_type diffusion; {', '.join(FAMILIES)} can")
    return FAMILIES[name]


def latent_patch(family: Family, config: Any) -> int:
    """The number of latents per token along a side: an image's sides must be multiples of it."""
    if family.patch:
        return family.patch
    size = config.patch_size
    return int(size if isinstance(size, int) else size[-1])


def latent_channels(family: Family, config: Any) -> int:
    """The number of channels of a model's latents."""
    return int(config.in_channels) // (4 if family.patch == 2 else 1)


def default_side(config: Any, grid: Grid) -> int:
    """The side in pixels of an image if nothing else determines it, from the transformer's config."""
    return (getattr(config, "sample_size", None) or 32) * grid.pixels


def latent_shape(family: Family, config: Any, grid: Grid, extent: tuple[int, int, int]) -> tuple[int, ...]:
    """The shape of the latents of an image or video of this size (width, height) in pixels and number of frames."""
    width, height, frames = extent
    sides = (height // grid.pixels, width // grid.pixels)
    times = (1 + (frames - 1) // grid.frames,) if family.video else ()
    return (latent_channels(family, config), *times, *sides)


def predict(
    family: Family, model: nn.Module, latents: Tensor, times: Tensor, text: EncodedText, guidance: float = 1.0
) -> Tensor:
    """The model's prediction for noisy latents, of the same shape: velocities, or noise for an eps model.

    times: [B], from 0 (no noise) to TIMES. guidance: for models that take it as an input.
    """
    config: Any = model.config
    arguments: dict[str, Any] = {
        "hidden_states": to_tokens(latents, family),
        "timestep": times / TIMES * family.time_scale * (getattr(config, "timestep_scale", None) or 1.0),
        "encoder_hidden_states": text.embeds,
        "return_dict": False,
        **family.extra(latents, text, config),
    }
    if family.prediction == "eps":
        arguments["timestep"] = times.round().long()
    if family.pooled:
        arguments["pooled_projections"] = text.pooled
    if family.mask is not None:
        arguments[family.mask] = _mask(family, text)
    if takes_guidance(config):
        arguments["guidance"] = torch.full_like(times, guidance)
    out = model(**arguments)[0]
    if family.patch == 0 and out.shape[1] == 2 * latents.shape[1]:  # and variances
        out = out.chunk(2, dim=1)[0]
    return from_tokens(out, latents, family)


def takes_guidance(config: Any) -> bool:
    """True for a distilled model that takes the guidance scale as an input."""
    return bool(getattr(config, "guidance_embeds", False))


def _mask(family: Family, text: EncodedText) -> Tensor | None:
    if text.mask is not None or family.rescales:
        return text.mask
    return torch.ones(text.embeds.shape[:2], dtype=torch.bool, device=text.embeds.device)


def to_tokens(latents: Tensor, family: Family) -> Tensor:
    """Latents as tokens [B, T, C p p], if the family's model takes tokens."""
    if not family.patch:
        return latents
    if family.video:
        return latents.flatten(2).transpose(1, 2)
    batch, channels, height, width = latents.shape
    cut = latents.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return cut.reshape(batch, height * width // 4, channels * 4)


def from_tokens(tokens: Tensor, latents: Tensor, family: Family) -> Tensor:
    """Convert the tokens of `to_tokens` back to latents of the shape of `latents`."""
    if not family.patch:
        return tokens
    if family.video:
        return tokens.transpose(1, 2).reshape(latents.shape)
    batch, channels, height, width = latents.shape
    cut = tokens.view(batch, height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return cut.reshape(batch, channels, height, width)


class Noised(NamedTuple):
    """Noisy latents as model inputs, their times from 0 to TIMES [B], and the target of the prediction."""

    latents: Tensor
    times: Tensor
    target: Tensor


def add_noise(family: Family, scheduler: Any, latents: Tensor, noise: Tensor, times: Tensor) -> Noised:
    """Mix latents with noise. times: [B], from 0 to 1; for an eps model they are rounded to its scheduler's table."""
    if family.prediction == "velocity":
        s = times.view(-1, *[1] * (latents.ndim - 1))
        return Noised((1 - s) * latents + s * noise, times * TIMES, noise - latents)
    steps = (times * TIMES).long().clamp(max=TIMES - 1)
    kept = scheduler.alphas_cumprod.to(latents)[steps].view(-1, *[1] * (latents.ndim - 1))
    return Noised(kept.sqrt() * latents + (1 - kept).sqrt() * noise, steps.to(times), noise)


def flow_time(uniform: float, mean: float, std: float, shift: float) -> float:
    """Convert a uniform random number to a time in (0, 1): logit-normal with `mean` and `std`, then shifted towards
    noise."""
    normal = math.sqrt(2) * float(torch.erfinv(torch.tensor(2 * uniform - 1, dtype=torch.float64)))
    time = 1 / (1 + math.exp(-(mean + std * normal)))
    return shift * time / (1 + (shift - 1) * time)


def squared_errors(prediction: Tensor, target: Tensor) -> Tensor:
    """The mean squared error of each sample, fp32 [B]."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


class Guided(NamedTuple):
    """Sampling settings: number of scheduler steps, and guidance scale (1: none)."""

    steps: int
    guidance: float


@torch.no_grad()
def sample(
    family: Family,
    model: nn.Module,
    scheduler: Any,
    text: EncodedText,
    empty: EncodedText | None,
    noise: Tensor,
    settings: Guided,
) -> Tensor:
    """Sample latents from `noise`, of the same shape, for encoded prompts. empty: encoded empty prompts, for
    guidance; unused if that is 1, or an input of the model."""
    scheduler = type(scheduler).from_config(scheduler.config)
    _set_times(family, scheduler, noise, model.config, settings.steps)
    if settings.guidance == 1 or takes_guidance(model.config):
        empty = None
    both = None if empty is None or noise.numel() > _JOINED else _joined(text, empty)
    latents = noise
    away: Tensor | None
    for time in scheduler.timesteps:
        times = time.expand(len(latents)).to(latents)
        given = scheduler.scale_model_input(latents, time) if hasattr(scheduler, "scale_model_input") else latents
        given = given.to(text.embeds.dtype)
        if both is not None:
            out, away = predict(family, model, given.repeat(2, *[1] * (given.ndim - 1)), times.repeat(2), both).chunk(2)
        else:
            out = predict(family, model, given, times, text, settings.guidance)
            away = None if empty is None else predict(family, model, given, times, empty)
        out = out.float()
        if away is not None:
            led = away.float() + settings.guidance * (out - away.float())
            out = _with_norm_of(led, out, family) if family.rescales else led
        latents = scheduler.step(out, time, latents, return_dict=False)[0]
    return latents


def _joined(one: EncodedText, other: EncodedText) -> EncodedText | None:
    """Two encoded prompts as one batch; None if their lengths differ."""
    pairs = list(zip(one, other, strict=True))
    if any((a is None) != (b is None) or (a is not None and b is not None and a.shape != b.shape) for a, b in pairs):
        return None
    return EncodedText(*(None if a is None or b is None else torch.cat([a, b]) for a, b in pairs))  # type: ignore[arg-type]


def _set_times(family: Family, scheduler: Any, latents: Tensor, config: Any, steps: int) -> None:
    options: dict[str, Any] = {}
    settings: Mapping[str, Any] = scheduler.config
    if settings.get("use_dynamic_shifting"):
        tokens = latents[0, 0].numel() // latent_patch(family, config) ** 2
        low, high = settings.get("base_image_seq_len", 256), settings.get("max_image_seq_len", 4096)
        least, most = settings.get("base_shift", 0.5), settings.get("max_shift", 1.15)
        options["mu"] = least + (most - least) * (tokens - low) / (high - low)
    if family.by_sigmas and not settings.get("use_flow_sigmas"):
        options["sigmas"] = np.linspace(1.0, 1 / steps, steps)
    else:
        options["num_inference_steps"] = steps
    scheduler.set_timesteps(device=latents.device, **options)


def _with_norm_of(led: Tensor, plain: Tensor, family: Family) -> Tensor:
    """The guided prediction, rescaled to each token's norm without guidance."""
    tokens, before = to_tokens(led, family), to_tokens(plain, family)
    return from_tokens(tokens * (before.norm(dim=-1, keepdim=True) / tokens.norm(dim=-1, keepdim=True)), led, family)


def join_texts(texts: Sequence[EncodedText], multiple: int = 1) -> dict[str, Tensor]:
    """Encoded captions as one batch, shorter ones padded with zeros that the mask excludes; no mask if nothing is
    padded. multiple: pad to a multiple of this length."""
    longest = -(-max(len(text.embeds) for text in texts) // multiple) * multiple
    masks = [
        torch.ones(len(text.embeds), dtype=torch.bool) if text.mask is None else text.mask.bool() for text in texts
    ]
    found = {
        "embeds": torch.stack([_filled(text.embeds, longest) for text in texts]),
        "mask": torch.stack([_filled(mask, longest) for mask in masks]),
    }
    if found["mask"].all():
        del found["mask"]
    if texts[0].pooled is not None:
        found["pooled"] = torch.stack([text.pooled for text in texts])  # type: ignore[misc]
    return found


def _filled(values: Tensor, length: int) -> Tensor:
    return torch.cat([values, values.new_zeros(length - len(values), *values.shape[1:])])
