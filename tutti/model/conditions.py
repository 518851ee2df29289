"""Conditions and targets of a diffusion model: caption embeddings, and latents of images.

Captions are encoded one at a time, so that the result does not depend on other captions: with the family's diffusers
pipeline if the folder contains the family's own text encoders; else with a language model, whose last hidden states are
the embeddings, and their mean the pooled text. Families without a text mask need captions of one length; those of a
language model are padded with zeros to data.max_seq_len.

Images go through the autoencoder deterministically, and are shifted and scaled as its config says. In a folder without
an autoencoder the model works on pixels: the latents are colors from -1 to 1.

None of this is trained, and none of it is needed after all captions and images are cached.
"""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import torch
import transformers
from torch import Tensor, nn

from tutti.core.batch import Grid
from tutti.core.tensors import seed_of
from tutti.model.diffusion import EncodedText, class_named_in, latent_channels, latent_patch, require_diffusers
from tutti.model.pipeline_folder import PipelineFolder


def read_grid(folder: PipelineFolder, config: Any) -> Grid:
    """The grid of latents for a transformer with this config, determined with an autoencoder on the meta device.
    ValueError: they have another number of channels than the transformer's input."""
    video, patch = folder.family.video, latent_patch(folder.family, config)
    if "vae" not in folder.parts:
        _check_channels(folder, config, 3, "the pixels (it has no vae) have")
        return Grid(1, int(video), patch)
    with torch.device("meta"), torch.no_grad():
        vae = _autoencoder(folder.parts["vae"], folder.argument)
        side, frames = 256, 17
        blank = torch.zeros(1, 3, side, side)
        if _has_frames(vae):
            blank = blank.unsqueeze(2).expand(-1, -1, frames, -1, -1)
        out = _encoded(vae, blank)
    _check_channels(folder, config, out.shape[1], f"the latents of {folder.parts['vae']} have")
    per_latent = (frames - 1) // max(1, out.shape[2] - 1) if video else 0
    return Grid(side // out.shape[-1], per_latent, patch)


def _check_channels(folder: PipelineFolder, config: Any, found: int, what: str) -> None:
    """Raise ValueError if the transformer's latents have another number of channels than `found`, that of `what`."""
    wanted = latent_channels(folder.family, config)
    if found != wanted:
        raise ValueError(
            f"{folder.argument}: {what} {found} channels, and {folder.class_name} takes {wanted}: give one "
            "of that number, or another autoencoder"
        )


class Conditions:
    """The autoencoder, text encoders and tokenizers of a folder, frozen, on `device` in `dtype`.

    max_length: tokens of a caption encoded by a language model. seed: for parts without weights.
    """

    def __init__(
        self, folder: PipelineFolder, device: torch.device, dtype: torch.dtype, *, max_length: int, seed: int
    ) -> None:
        self._folder, self._device, self._dtype = folder, device, dtype
        self._max_length, self._seed = max_length, seed

    @cached_property
    def vae(self) -> Any:
        """The autoencoder; None in a folder without one."""
        path = self._folder.parts.get("vae")
        return None if path is None else self._frozen(_load_autoencoder(path, self._folder.argument, self._seed))

    @cached_property
    def _text(self) -> _PipelineText | _LanguageModelText:
        parts: dict[str, Any] = {}
        for name, path in self._folder.text_parts():
            if name.startswith("text_encoder"):
                parts[name] = self._frozen(_load_text_encoder(path, f"{self._folder.argument}: {name}", self._seed))
            else:
                parts[name] = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
        if "tokenizer" not in parts:
            path = self._folder.parts["text_encoder"]
            parts["tokenizer"] = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
        if _is_of_family(self._folder, parts["text_encoder"]):
            return _PipelineText(self._folder, parts, self._device)
        return _LanguageModelText(self._folder, parts, self._device, self._max_length)

    def _frozen(self, module: nn.Module) -> nn.Module:
        return module.to(self._device, self._dtype).eval().requires_grad_(False)

    @torch.no_grad()
    def encode_text(self, caption: str) -> EncodedText:
        """The embedding of a caption, on the host, without a batch dimension."""
        found = self._text(caption)
        mask = None if found.mask is None else found.mask.bool()
        return EncodedText(found.embeds, mask, found.pooled).map(lambda part: part[0].cpu())

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """The latents fp32 [C, (F,) H, W], on the host, of an image or video, uint8 [3, (frames,) height, width]."""
        values = pixels.to(self._device, self._dtype) / 127.5 - 1
        if self.vae is None:
            return values.float().cpu()
        if _has_frames(self.vae) and values.ndim == 3:
            values = values.unsqueeze(1)
        raw = _encoded(self.vae, values.unsqueeze(0)).float()
        shift, scale = _latent_statistics(self.vae, raw)
        found = ((raw - shift) * scale)[0].cpu()
        return found if self._folder.family.video or found.ndim == 3 else found.squeeze(1)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """The image or video, uint8 [3, (frames,) height, width] on the host, decoded from latents [C, (F,) H, W]."""
        values = latents.to(self._device).float().unsqueeze(0)
        if self.vae is not None:
            frames = _has_frames(self.vae)
            values = values.unsqueeze(2) if frames and values.ndim == 4 else values
            shift, scale = _latent_statistics(self.vae, values)
            values = (values / scale + shift).to(self._dtype)
            timed = {"temb": values.new_zeros(1)} if getattr(self.vae.config, "timestep_conditioning", False) else {}
            values = self.vae.decode(values, **timed, return_dict=False)[0]
            values = values if self._folder.family.video or not frames else values.squeeze(2)
        return ((values[0].float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()


def write_part(folder: PipelineFolder, name: str, place: Path, seed: int) -> None:
    """Write a frozen part to `place`: a copy of its folder, or, without weights, the part as initialized from
    `seed`."""
    path = folder.parts[name]
    if name.startswith("tokenizer"):
        transformers.AutoTokenizer.from_pretrained(path, local_files_only=True).save_pretrained(place)
        return
    shutil.copytree(path, place, ignore=shutil.ignore_patterns(".*"))
    if name.startswith(("vae", "text_encoder")) and not _has_weights(path):
        load: Any = _load_autoencoder if name == "vae" else _load_text_encoder
        load(path, folder.argument, seed).save_pretrained(place)


def _has_weights(path: Path) -> bool:
    return any(file.suffix in (".safetensors", ".bin") for file in path.iterdir())


def _has_frames(vae: Any) -> bool:
    return any(isinstance(module, nn.Conv3d) for module in vae.modules())


def _encoded(vae: Any, values: Tensor) -> Tensor:
    found = vae.encode(values)
    return found.latent_dist.mode() if hasattr(found, "latent_dist") else found.latent


def _latent_statistics(vae: Any, latents: Tensor) -> tuple[Any, Any]:
    """The shift and the scale of an autoencoder's raw latents: (raw - shift) * scale."""
    config = vae.config
    held = dict(vae.named_buffers())
    mean, std = (held.get(name, config.get(name)) for name in ("latents_mean", "latents_std"))
    if mean is None or std is None:
        return config.get("shift_factor") or 0.0, config.get("scaling_factor") or 1.0
    per_channel = (1, -1, *[1] * (latents.ndim - 2))
    mean, std = (torch.as_tensor(value).to(latents).view(per_channel) for value in (mean, std))
    return mean, (config.get("scaling_factor") or 1.0) / std


def _autoencoder(path: Path, argument: str) -> Any:
    kind = getattr(require_diffusers(), class_named_in(path, argument), None)
    if kind is None or not hasattr(kind, "encode"):
        raise ValueError(f"{argument}: {path} is not the folder of an autoencoder of diffusers")
    return kind.from_config(kind.load_config(path))


def _load_autoencoder(path: Path, argument: str, seed: int) -> Any:
    kind = getattr(require_diffusers(), class_named_in(path, argument))
    if _has_weights(path):
        return kind.from_pretrained(path, local_files_only=True)
    with _drawn(seed, "vae"):
        return _autoencoder(path, argument)


def _load_text_encoder(path: Path, argument: str, seed: int) -> nn.Module:
    """The text encoder in a folder: the class named in its config; of a causal language model only the decoder."""
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{argument}: {path} is no text encoder that transformers knows: {error}") from None
    named = (config.architectures or [""])[0]
    kind = getattr(transformers, named, transformers.AutoModel)
    generates = named.endswith(("ForCausalLM", "LMHeadModel"))
    if _has_weights(path):
        found = (transformers.AutoModel if generates else kind).from_pretrained(path, local_files_only=True)
    else:
        with _drawn(seed, path.name):
            found = transformers.AutoModel.from_config(config) if generates or not named else kind(config)
    return found


@contextmanager
def _drawn(seed: int, part: str) -> Iterator[None]:
    """Seed torch's random numbers with `seed` and the part within this context, and restore its generator
    afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(f"{seed} {part}"))
        yield


def _is_of_family(folder: PipelineFolder, encoder: nn.Module) -> bool:
    """True if the family's pipeline supports this kind of text encoder."""
    pipeline = getattr(require_diffusers(), folder.family.pipeline)
    hint: Any = inspect.signature(pipeline.__init__, eval_str=True).parameters["text_encoder"].annotation
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return any(isinstance(kind, type) and isinstance(encoder, kind) for kind in kinds)


class _PipelineText:
    """Encodes captions as the family's pipeline does when it is called with a prompt: truncated to the same length,
    and with the same words around it (Sana's instruction, which is not used for the empty caption, as for negative
    prompts)."""

    def __init__(self, folder: PipelineFolder, parts: dict[str, Any], device: torch.device) -> None:
        self._family, self._device = folder.family, device
        kind = getattr(require_diffusers(), self._family.pipeline)
        expected = inspect.signature(kind.__init__).parameters
        lacking = {name: None for name in expected if name not in ("self", *parts)}
        defaults = {name for name in lacking if expected[name].default is not inspect.Parameter.empty}
        model = _config_alone(folder)
        given = {**{name: None for name in lacking if name not in defaults}, **parts, "transformer": model}
        self._pipeline = kind(**given)

    def __call__(self, caption: str) -> EncodedText:
        takes = inspect.signature(self._pipeline.encode_prompt).parameters
        called = inspect.signature(self._pipeline.__call__).parameters
        asked: dict[str, Any] = {"prompt": caption, "device": self._device}
        asked |= {name: None for name in ("prompt_2", "prompt_3") if name in takes}
        asked |= {name: called[name].default for name in _OF_CALLS if name in called and name in takes}
        if not caption:
            asked.pop("complex_human_instruction", None)
        if "do_classifier_free_guidance" in takes:
            asked["do_classifier_free_guidance"] = False
        found = self._pipeline.encode_prompt(**asked)
        found = found if isinstance(found, tuple) else (found,)
        return EncodedText(**{name: value for name, value in zip(self._family.encoded, found, strict=False) if name})


_OF_CALLS = ("max_sequence_length", "clean_caption", "complex_human_instruction")
"""Caption settings whose defaults differ between a pipeline's `__call__` and its `encode_prompt`."""


def _config_alone(folder: PipelineFolder) -> Any:
    """A transformer on the meta device, since pipelines read its config."""
    kind = getattr(require_diffusers(), folder.class_name)
    with torch.device("meta"):
        return kind.from_config(kind.load_config(folder.transformer))


class _LanguageModelText:
    """Encodes captions by the last hidden states of a language model."""

    def __init__(self, folder: PipelineFolder, parts: dict[str, Any], device: torch.device, max_length: int) -> None:
        self._family, self._device, self._max_length = folder.family, device, max_length
        self._tokenizer, self._model = parts["tokenizer"], parts["text_encoder"]
        wanted = text_width(json.loads((folder.transformer / "config.json").read_text()))
        width = self._model.config.get_text_config().hidden_size
        if wanted is not None and wanted != width:
            raise ValueError(
                f"{folder.argument}: the text_encoder gives embeddings of {width}, and {folder.class_name} takes "
                f"{wanted}: give a transformer config of that width"
            )

    def __call__(self, caption: str) -> EncodedText:
        ids = self._tokenizer(caption, add_special_tokens=True)["input_ids"][: self._max_length]
        ids = ids or [self._tokenizer.eos_token_id or 0]
        hidden = self._model(torch.tensor([ids], device=self._device)).last_hidden_state
        pooled = hidden.mean(1) if self._family.pooled else None
        if self._family.mask is not None:
            return EncodedText(hidden, torch.ones(1, len(ids), dtype=torch.bool), pooled)
        padded = hidden.new_zeros(1, self._max_length, hidden.shape[-1])
        padded[:, : len(ids)] = hidden
        return EncodedText(padded, None, pooled)


def text_width(config: dict[str, Any]) -> int | None:
    """The width of text embeddings in a transformer's config, if it is given."""
    for name in ("joint_attention_dim", "text_dim", "caption_channels"):
        if config.get(name) is not None:
            return int(config[name])
    return None
