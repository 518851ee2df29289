"""Composed models: any Hugging Face causal language model combined with Hugging Face towers, as one model.

A ready-made multimodal model is an outer decoder around a language model and towers (`tutti.model.multimodal`). A
composed model has the same form, made of parts that are independent of each other:

- `foundation`: the complete causal language model including its head, so that it loads and is exported as itself.
- `encoders`: for images and for sounds, a tower whose features are pooled and projected to the foundation's width.
  Videos are encoded frame by frame with the image encoder.
- `outer`: the outer decoder over the same modules. It is a view without parameters: state dicts, parameter names and
  checkpoints only know the two above.

Features replace placeholder tokens, which are never looked up in the embedding and never predicted. So a placeholder
that was added to the tokenizer needs no row there.

The features are determined by inspecting the tower: patches without the preceding class tokens, or the cells of a
feature map, or (for towers with `grid_thw`) the output of its own patch merger; for sounds the hidden states of the
part of the window that the sound fills.

Shapes: N images, n features of one, D their width, H the foundation's hidden size.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tutti.config import ModelConfig
from tutti.core.compat import model_mapping
from tutti.model.extra_tokens import ExtraTokens
from tutti.model.feature_head import FeatureHead, normalised
from tutti.model.flow_decoder import FlowDecoder, FlowSpec, KeepingSize, read_flow
from tutti.model.omni_config import (
    SETTINGS,
    OmniConfig,
    decoder_folder,
    decoder_size,
    encoder_specs,
    part_config,
    regresses,
    tower_config,
)
from tutti.model.vq import DECODER, read_codes

log = logging.getLogger(__name__)


def tower_class(config: PreTrainedConfig) -> type[Any]:
    """The class of the tower that a config describes; of an encoder-decoder, the encoder's. ValueError: transformers
    has none for it."""
    known = model_mapping(AutoModel)
    if type(config) in known and not config.is_encoder_decoder:
        found: type[Any] = known[type(config)]
        return found
    module = import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
    fitting = [
        item
        for item in vars(module).values()
        if isinstance(item, type) and issubclass(item, PreTrainedModel) and item.config_class is type(config)
    ]
    if config.is_encoder_decoder:
        fitting = [item for item in fitting if item.__name__.endswith("Encoder")]
    if not fitting:
        raise ValueError(f"transformers has no model for {type(config).__name__}")
    return fitting[0]


class ProjectedTower(nn.Module):
    """A tower with pooling and projection to the width of a language model. settings: those in
    `omni_config.SETTINGS`, and `width`, the width of the features."""

    def __init__(self, config: PreTrainedConfig, settings: dict[str, Any], hidden_size: int) -> None:
        super().__init__()
        self.tower = tower_class(config)(config)
        self.pool, self.layer = settings["pool"], settings["layer"]
        width = settings["width"] * num_pooled(self.tower, self.pool)
        self.projector = nn.Sequential()
        if settings["add_projector"]:
            layers = nn.Linear(width, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size)
            self.projector = nn.Sequential(*layers)

    def forward(self, values: Tensor, sizes: Tensor | None = None) -> Tensor:
        """Projected features: [N, n, H] of images; or the rows [R, H] of all images as patches, with `sizes` [N, 3],
        or of sounds, with `sizes` [N], their numbers of features."""
        if hears(self.tower):
            states = sounds(self.tower, values, self.layer, self.pool)
            held = torch.arange(states.shape[1], device=states.device) < sizes[:, None]  # type: ignore[index]
            return self.projector(states[held])
        return self.projector(self.features(values, sizes))

    def features(self, values: Tensor, sizes: Tensor | None = None) -> Tensor:
        """The features before the projection."""
        return features(self.tower, values, sizes, self.layer, self.pool)


def hears(tower: nn.Module) -> bool:
    """True if the tower takes sounds."""
    return "input_features" in inspect.signature(tower.forward).parameters


def num_pooled(tower: nn.Module, pool: int) -> int:
    """The number of features that are pooled to one: in a row of sound, or in a square of an image."""
    return pool if hears(tower) else pool**2


def sounds(tower: nn.Module, mel: Tensor, layer: int, pool: int) -> Tensor:
    """The features [N, n, D] of a window of mel frames [N, bins, frames]; `pool` successive ones become one of width
    pool D."""
    mel = mel.to(next(tower.parameters()).dtype)
    if layer == -1:
        states = tower(input_features=mel).last_hidden_state
    else:
        states = tower(input_features=mel, output_hidden_states=True).hidden_states[layer]
    return states[:, : states.shape[1] // pool * pool].unflatten(1, (-1, pool)).flatten(2)


def takes_grid(tower: nn.Module) -> bool:
    """True if the tower takes images as patches [P, values] together with their numbers of patches in time, height
    and width."""
    return "grid_thw" in inspect.signature(tower.forward).parameters


def features(tower: nn.Module, pixel_values: Tensor, grid: Tensor | None, layer: int, pool: int) -> Tensor:
    """The features [N, n, D] of images [N, C, height, width], or [R, D] of patches; `pool` x `pool` neighbors become
    one of width pool^2 D. layer: the layer whose hidden states are used, -1 for the tower's output."""
    pixel_values = pixel_values.to(next(tower.parameters()).dtype)
    if grid is not None:
        return tower(pixel_values, grid_thw=grid).pooler_output
    if layer == -1:
        states = tower(pixel_values=pixel_values).last_hidden_state
    else:
        states = tower(pixel_values=pixel_values, output_hidden_states=True).hidden_states[layer]
    if states.ndim == 4:
        cells = states.movedim(1, -1)
    else:
        size: Any = tower.config.patch_size  # type: ignore[union-attr]
        patch = (size, size) if isinstance(size, int) else tuple(size)
        rows, columns = (side // one for side, one in zip(pixel_values.shape[-2:], patch, strict=True))
        # Tokens before the patches are class tokens or registers.
        cells = states[:, states.shape[1] - rows * columns :].unflatten(1, (rows, columns))
    if pool > 1:
        height, width = (side // pool * pool for side in cells.shape[1:3])
        cells = cells[:, :height, :width].unflatten(2, (-1, pool)).unflatten(1, (-1, pool))
        cells = cells.transpose(2, 3).flatten(3)
    return cells.flatten(1, 2)


class CodeDecoder(ExtraTokens):
    """The embeddings and the head for image codes, in a model that draws.

    Code c is the token `first` + c, beyond the vocabulary; the hidden state before it predicts it.
    """

    def __init__(self, first: int, number: int, hidden_size: int) -> None:
        super().__init__(first, number, hidden_size)
        self.middle = nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.GELU())
        self.head = nn.Linear(hidden_size, number)

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits of the codes [..., K]."""
        return self.head(self.middle(hidden))


class OuterDecoder(nn.Module):
    """The decoder around a composed model's language model, from tokens and images to `last_hidden_state`."""

    def __init__(
        self,
        config: OmniConfig,
        language_model: PreTrainedModel,
        encoders: nn.ModuleDict,
        codes: ExtraTokens | None = None,
        feature_head: FeatureHead | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.language_model = language_model
        for kind, encoder in encoders.items():
            self.add_module(kind, encoder)
        self.codes = codes
        self.feature_head = feature_head

    def get_image_features(self, pixel_values: Tensor, image_grid_thw: Tensor | None = None, **kwargs: Any) -> Any:
        """Image features as `pooler_output`, [N, n, H], or [R, H] for images as patches."""
        encoder: Any = self.image
        return BaseModelOutputWithPooling(pooler_output=encoder(pixel_values, image_grid_thw))

    def get_video_features(self, pixel_values_videos: Tensor, **kwargs: Any) -> Any:
        """The features of the frames of all videos, in the form of images'."""
        return self.get_image_features(pixel_values_videos)

    def get_audio_features(self, input_features: Tensor, audio_tokens: Tensor, **kwargs: Any) -> Any:
        """The features [R, H] of all sounds, audio_tokens [N] of each."""
        encoder: Any = self.audio
        return BaseModelOutputWithPooling(pooler_output=encoder(input_features, audio_tokens))

    def get_drawn_features(self, drawn_values: Tensor, drawn_grid_thw: Tensor | None = None, **kwargs: Any) -> Any:
        """The normalized features, before projection, of images that the model learns to generate, [N, n, D] or [R,
        D]."""
        encoder: Any = self.image
        return BaseModelOutputWithPooling(pooler_output=normalised(encoder.features(drawn_values, drawn_grid_thw)))

    def encode(self, values: Mapping[str, Tensor]) -> dict[str, Any]:
        """The features of media by kind, from their values by the names in `_MEDIA`."""
        made = {}
        for kind, (name, *sizes) in _MEDIA.items():
            if name in values:
                inputs = {key: values[key] for key in (name, *sizes) if key in values}
                made[kind] = getattr(self, f"get_{kind}_features")(**inputs)
        return made

    def embed(self, input_ids: Tensor, made: Mapping[str, Any]) -> Tensor:
        """The embeddings [B, T, H] of tokens, with the placeholders of media replaced by features (`made`, by kind).
        ValueError: the numbers of features and placeholders differ."""
        places = {kind: input_ids.eq(token) for kind, token in (self.config.placeholders or {}).items()}
        table: Any = self.language_model.get_input_embeddings()
        ids = input_ids
        for where in places.values():
            # The looked-up value of a placeholder is overwritten, and its id may be beyond the table.
            ids = ids.masked_fill(where, 0)
        if self.codes is None:
            embedded = table(ids)
        else:
            embedded = self.codes.put(ids, table(ids.masked_fill(ids >= self.codes.first, 0)))
        for kind, found in made.items():
            rows = found.pooler_output
            if kind == "drawn":
                encoder: Any = self.image
                rows = encoder.projector(rows)
            rows = rows.reshape(-1, embedded.shape[-1]).to(embedded.dtype)
            if (count := int(places[kind].sum())) != len(rows):
                raise ValueError(f"{count} placeholders of {kind}s in the tokens, and {len(rows)} features")
            embedded = embedded.masked_scatter(places[kind][..., None], rows)
        return embedded

    def forward(
        self,
        input_ids: Tensor,
        mm_encoder_outputs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The language model's output; its attribute `drawn_features` [R, D] has the features of images that the model
        learns to generate.

        mm_encoder_outputs: features by kind, computed before. kwargs: media's values, and arguments of the language
        model.
        """
        made = {**(mm_encoder_outputs or {}), **self.encode(_values_in(kwargs))}
        found = self.language_model(inputs_embeds=self.embed(input_ids, made), **kwargs)
        if "drawn" in made:
            found.drawn_features = made["drawn"].pooler_output.flatten(0, -2).detach()
        return found


_MEDIA = {
    "image": ("pixel_values", "image_grid_thw"),
    "video": ("pixel_values_videos",),
    "audio": ("input_features", "audio_tokens"),
    "drawn": ("drawn_values", "drawn_grid_thw"),
}
"""By kind of media, the names of its values and of their sizes."""


def _values_in(kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """Remove the values of media from a forward's arguments, and return them."""
    values = {name: kwargs.pop(name, None) for names in _MEDIA.values() for name in names}
    return {name: value for name, value in values.items() if value is not None}


class Part(NamedTuple):
    """A part of a composed model with files of its own. name: of its module within the model. folder: its place in
    an export, relative to the root."""

    name: str
    module: Any
    folder: str


class OmniModel(PreTrainedModel, GenerationMixin):
    """A causal language model that takes media through additional encoders, or draws.

    weights: by kind of encoder, the folder of its weights, None for random ones. drawing_folder: the folder of the
    image tokenizer with which it draws, None if it has none. drawing_size: the side of drawn images, if the tokenizer
    does not fix it. flow: the diffusion decoder with which it draws, if any.
    """

    config_class = OmniConfig
    base_model_prefix = "outer"
    supports_gradient_checkpointing = True
    _supports_attention_backend = True
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: OmniConfig) -> None:
        super().__init__(config)
        text: Any = config.text_config
        self.foundation = model_mapping(AutoModelForCausalLM)[type(text)](text)
        made = {}
        for kind, settings in (config.encoders or {}).items():
            made[kind] = ProjectedTower(part_config(config, kind), settings, text.hidden_size)
        self.encoders = nn.ModuleDict(made)
        self.weights: dict[str, Path | None] = dict.fromkeys(made)
        self.decoders = nn.ModuleDict()
        self.drawing_folder: Path | None = None
        self.drawing_size: int | None = None
        self.flow: FlowSpec | None = None
        if config.denoiser:
            self.decoders["image"] = FlowDecoder(config.denoiser, config.first_code, config.num_codes, text.hidden_size)
        elif config.num_codes:
            self.decoders["image"] = CodeDecoder(config.first_code, config.num_codes, text.hidden_size)
        if config.regresses:
            encoder: Any = self.encoders["image"]
            width = config.encoders["image"]["width"] * num_pooled(encoder.tower, encoder.pool)  # type: ignore[index]
            self.decoders["features"] = FeatureHead(config.first_code, text.hidden_size, width)
        # Not registered as a module: its modules are the ones above, under other names.
        language = self.foundation.get_decoder()
        outer = OuterDecoder(config, language, self.encoders, self.code_decoder, self.feature_head)
        self.__dict__["outer"] = outer
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, KeepingSize):
            module.reset_parameters()
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=getattr(self.config.text_config, "initializer_range", 0.02))
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=getattr(self.config.text_config, "initializer_range", 0.02))

    @property
    def code_decoder(self) -> Any:
        """The module for image codes, or for queries; None if the model does not draw."""
        return getattr(self.decoders, "image", None)

    @property
    def flow_decoder(self) -> Any:
        """The diffusion decoder; None if there is none."""
        return self.code_decoder if self.config.denoiser else None

    @property
    def feature_head(self) -> Any:
        """The head that predicts image features; None if there is none."""
        return getattr(self.decoders, "features", None)

    def get_input_embeddings(self) -> nn.Module:
        return self.foundation.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.foundation.get_output_embeddings()

    def parts(self) -> list[Part]:
        """The parts that are Hugging Face models themselves, the foundation first."""
        towers = [Part(f"encoders.{kind}.tower", one.tower, f"encoders/{kind}") for kind, one in self.encoders.items()]
        return [Part("foundation", self.foundation, ""), *towers]

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """The foundation's output with logits; in a model that draws, the logits of codes follow those of the
        vocabulary. kwargs: media's values, and other arguments of the foundation."""
        given = _values_in(kwargs)
        codes = self.code_decoder
        if (given or codes is not None) and input_ids is not None:
            outer: Any = self.outer
            inputs_embeds, input_ids = outer.embed(input_ids, outer.encode(given)), None
        kwargs |= {"position_ids": position_ids, "logits_to_keep": logits_to_keep}
        run = partial(self.foundation, input_ids=input_ids, inputs_embeds=inputs_embeds, **kwargs)
        return run() if codes is None else with_code_logits(run, self.foundation.get_output_embeddings(), codes)


def with_code_logits(run: Callable[[], Any], head: nn.Module, codes: ExtraTokens) -> Any:
    """The output of `run`, a forward pass of a model with output embedding `head`, with the logits of codes after
    those of the vocabulary, at the positions of their ids."""
    hidden: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda module, args: hidden.append(args[0]))
    try:
        found = run()
    finally:
        handle.remove()
    text = nn.functional.pad(found.logits, (0, codes.first - found.logits.shape[-1]), value=-torch.inf)
    found.logits = torch.cat([text, codes(hidden[0]).to(text.dtype)], dim=-1)
    return found


def compose(model: ModelConfig, text: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the foundation `text` combined with the encoders that `model` describes; `text` itself if there are
    none.

    ValueError: a part cannot be used, or the parts do not fit together.
    """
    specs, folder, features = encoder_specs(model), decoder_folder(model), regresses(model)
    if features and "image" not in specs:
        raise ValueError(
            "model.output_encoder: encoder takes pictures of the assistant's as features of model.encoders.image, and "
            "there is none; set that, or set decoder"
        )
    if not specs and folder is None:
        return text
    if text.get_text_config() is not text:
        raise ValueError(
            f"model.encoders: {text.model_type} takes images by towers of its own; give a language model of text "
            "alone, or leave model.encoders out"
        )
    if type(text) not in model_mapping(AutoModelForCausalLM):
        raise ValueError(f"model.encoders: transformers has no causal language model for model_type {text.model_type}")
    flow = read_flow(model)
    towers = {kind: tower_config(kind, spec) for kind, spec in specs.items()}
    settings = {kind: _settings(kind, spec, towers[kind], text) for kind, spec in specs.items()}
    drawn = flow.codes if flow else None if folder is None else read_codes(folder, DECODER, decoder_size(model))
    if drawn is not None and not drawn.draws:
        raise ValueError(f"{DECODER}: {folder} is of ChameleonVQVAE, which makes no pictures of codes")
    return OmniConfig(
        text_config=text,
        vision_config=towers.get("image"),
        audio_config=towers.get("audio"),
        encoders=settings,
        num_codes=0 if drawn is None else drawn.number,
        denoiser=flow.net if flow else None,
        regresses=features,
        dtype=text.dtype,
    )


def _settings(kind: str, spec: dict[str, Any], config: Any, text: PreTrainedConfig) -> dict[str, Any]:
    """The settings of an encoder, from its entry in model.encoders."""
    settings: dict[str, Any] = {name: spec.get(name, default) for name, default in SETTINGS.items()}
    argument = f"model.encoders.{kind}"
    try:
        with torch.device("meta"):
            tower = tower_class(config)(copy.deepcopy(config))
        if hears(tower) != (kind == "audio"):
            raise ValueError("it takes no mel frames of sounds" if kind == "audio" else "it takes sounds")
        if takes_grid(tower):
            settings["width"] = getattr(config, "out_hidden_size", None) or config.hidden_size
        else:
            settings["width"] = try_features(tower, settings["layer"], 1).shape[-1]
    except Exception as error:  # towers fail in many ways on unsuitable media
        raise ValueError(f"{argument}: {type(config).__name__} cannot be used for {kind}: {error}") from error
    if takes_grid(tower) and (settings["pool"], settings["layer"]) != (1, -1):
        raise ValueError(f"{argument}: {type(tower).__name__} has a merger of its own; leave pool and layer out")
    width = settings["width"] * num_pooled(tower, settings["pool"])
    if not settings["add_projector"] and width != text.hidden_size:
        raise ValueError(
            f"{argument}.add_projector: false needs features of the language model's width "
            f"{text.hidden_size}, and these have {width}; set true"
        )
    return settings


def try_features(tower: nn.Module, layer: int, pool: int, size: tuple[int, int] | None = None) -> Tensor:
    """The features, on the meta device, of one image of `size` (by default the size in the tower's config), or of
    one window of sound."""
    config: Any = tower.config
    if hears(tower):
        frames = config.max_source_positions * mel_stride(tower)
        mel = torch.zeros(1, config.num_mel_bins, frames, device="meta")
        return sounds(tower, mel, layer, pool)
    side = getattr(config, "image_size", None) or 224
    height, width = size or ((side, side) if isinstance(side, int) else side)
    pixels = torch.zeros(1, getattr(config, "num_channels", 3), height, width, device="meta")
    return features(tower, pixels, None, layer, pool)


def mel_stride(tower: nn.Module) -> int:
    """The number of mel frames per position of an audio tower."""
    stride = 1
    for module in tower.modules():
        if isinstance(module, nn.Conv1d):
            stride *= module.stride[0]
    return stride


def name_sources(model: OmniModel, settings: ModelConfig) -> None:
    """Record in `model` where its encoders' weights are, and freeze parameters that do not affect the features (a
    pooling head, a mask token): they would get no gradient, and weight decay would shrink them."""
    model.flow = read_flow(settings)
    model.drawing_folder = None if model.flow else decoder_folder(settings)
    model.drawing_size = None if model.flow else decoder_size(settings)
    for kind, spec in encoder_specs(settings).items():
        found = spec.get("model_path")
        model.weights[kind] = None if found is None else Path(found).expanduser()
        encoder: Any = model.encoders[kind]
        if takes_grid(encoder.tower):
            continue
        named = {name: item for name, item in encoder.tower.named_parameters() if item.requires_grad}
        with torch.enable_grad():
            total = try_features(encoder.tower, encoder.layer, encoder.pool).sum()
        grads = torch.autograd.grad(total, list(named.values()), allow_unused=True)
        unused = [name for (name, item), grad in zip(named.items(), grads, strict=True) if grad is None]
        for name in unused:
            named[name].requires_grad_(False)
        if unused:
            shown = ", ".join(unused[:3]) + (f" and {len(unused) - 3} more" if len(unused) > 3 else "")
            log.info("model.encoders.%s: %s: stays as it is, since features do not depend on it", kind, shown)
