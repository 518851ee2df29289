"""The configuration of a composed model: a language model (the *foundation*) and the towers that `model.encoders` adds.

    model:
      model_path: Qwen3-0.6B
      encoders: {image: {model_path: siglip-base, pool: 2}}

Each encoder is a Hugging Face tower, given by its own folder or by that of a model that has it as `vision_config`, and
a projector to the foundation's width. Every key of its description that is not in `_KEYS` is a field of the tower's
config. An export of a composed model (`omni.yaml` next to the foundation's files) includes its encoders;
`model.encoders` replaces or changes them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import yaml
from transformers import AutoConfig, PreTrainedConfig

from tutti.config import ModelConfig
from tutti.config.coerce import nearest
from tutti.model.pipeline_folder import is_pipeline
from tutti.model.tokenizer import first_line, local_path

OMNI = "omni.yaml"
"""The file in an export's folder that lists the other parts."""

_DECODER = "model.decoders.image"

DECODER = "decoders/image"
"""The folder within an export for the parts that it draws with."""

IMAGE_SIZE = "image_size"
"""The key of model.decoders.image for the size of images, for a tokenizer of any size."""

KINDS = ("image", "audio")
"""The kinds of encoders."""

PLACES = {"image": ("image", "video"), "audio": ("audio",)}
"""By kind of encoder, the media that it encodes: videos frame by frame."""

_KEYS: dict[str, type] = {
    "config_path": str,
    "model_path": str,
    "processor_path": str,
    "add_projector": bool,
    "pool": int,
    "layer": int,
}
"""The keys of an encoder's description that are not fields of its config, and their types."""

SETTINGS = {"add_projector": True, "pool": 1, "layer": -1}
"""The ones that the model is built with, and their defaults: a two-layer projector, or none; how many features in a
row, and in a column, become one token; the layer whose hidden states are the features."""

_ELSEWHERE = {
    "qwen2_vl_vision_model": "a Qwen2-VL or Qwen2.5-VL folder of Hugging Face (its visual part is taken)",
    "janus_siglip": "a siglip_vision_model folder",
}
"""model_type that VeOmni has for itself -> what to give instead."""


class OmniConfig(PreTrainedConfig):
    """The config of a composed model: of its parts, and how they are connected.

    encoders: by kind, the settings in `SETTINGS` and `width`, that of the tower's features. placeholders: by kind of
    media, the id of the token that features replace; it may be beyond the embedding, since it is never looked up.
    num_codes: number of image codes, or queries; 0 if the model draws with neither. first_code: the token id of code 0,
    beyond all of the tokenizer's. denoiser: the config of the diffusion transformer, if it draws with one
    (`tutti.model.flow_decoder`). regresses: it learns to predict image features.
    """

    model_type = "tutti_omni"
    sub_configs: ClassVar[dict[str, Any]] = dict.fromkeys(("text_config", "vision_config", "audio_config"), AutoConfig)

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    audio_config: dict | PreTrainedConfig | None = None
    encoders: dict | None = None
    placeholders: dict | None = None
    num_codes: int = 0
    first_code: int = 0
    denoiser: dict | None = None
    regresses: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        for name in self.sub_configs:
            part = getattr(self, name)
            if isinstance(part, dict):
                setattr(self, name, AutoConfig.for_model(**part))
        super().__post_init__(**kwargs)

    @property
    def draws(self) -> bool:
        """True if it is trained on images of the assistant."""
        return bool(self.num_codes) or self.regresses


def part_config(config: OmniConfig, kind: str) -> Any:
    """The config of the tower for a kind of media."""
    return config.vision_config if kind == "image" else config.audio_config


def regresses(model: ModelConfig) -> bool:
    """True if images of the assistant are features that `model` learns to predict (model.output_encoder)."""
    if model.output_encoder == "encoder" or model.decoders:
        return model.output_encoder == "encoder"
    return _exported(model).get("output_encoder") == "encoder"


def answers_with_pictures(model: ModelConfig) -> bool:
    """True if `model` is trained on images of the assistant."""
    return decoder_folder(model) is not None or regresses(model)


def is_composed(model: ModelConfig) -> bool:
    """True if `model` describes a language model with additional encoders, or a decoder."""
    return bool(encoder_specs(model)) or decoder_folder(model) is not None


def _exported(model: ModelConfig) -> dict[str, Any]:
    """The content of omni.yaml in the export at model.model_path; empty if there is none."""
    file = Path(model.model_path or "") / OMNI
    if model.model_path is None or not file.is_file():
        return {}
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def decoder_folder(model: ModelConfig) -> Path | None:
    """The folder of the image decoder of `model`: that of model.decoders.image, or of the export at
    model.model_path; None if it does not draw. ValueError: an invalid description."""
    for kind, spec in model.decoders.items():
        if kind != "image":
            raise ValueError(f"model.decoders.{kind}: not available yet; there are decoders for image")
        if not isinstance(spec, Mapping) or not isinstance(spec.get("model_path"), str):
            described = spec.get("config_path") if isinstance(spec, Mapping) else None
            if isinstance(described, str) and is_pipeline(found := local_path(described, f"{_DECODER}.config_path")):
                _check_flow(spec)
                return found
            raise ValueError(
                f"{_DECODER}: needs model_path, the folder of a VQModel or of a diffusion model; codes of a VQModel "
                "that is not trained say nothing, so config_path alone is not enough"
            )
        found = local_path(spec["model_path"], f"{_DECODER}.model_path")
        if is_pipeline(found):
            _check_flow(spec)
        elif others := sorted(set(spec) - {"model_path", IMAGE_SIZE}):
            raise ValueError(f"{_DECODER}.{others[0]}: a decoder is used as it is; give model_path alone")
        return found
    return Path(model.model_path or "") / DECODER if _exported(model).get("decoders") else None


def decoder_settings(model: ModelConfig) -> dict[str, Any]:
    """The description of the image decoder: from model.decoders.image, or from the export at model.model_path."""
    return dict(model.decoders.get("image") or (_exported(model).get("decoders") or {}).get("image") or {})


def decoder_size(model: ModelConfig) -> int | None:
    """The side in pixels of drawn images, if the decoder does not fix it."""
    size = decoder_settings(model).get(IMAGE_SIZE)
    if size is not None and (not isinstance(size, int) or size < 1):
        raise ValueError(f"model.decoders.image.{IMAGE_SIZE}: needs a number of pixels, not {size!r}")
    return size


def _check_flow(spec: Mapping[str, Any]) -> None:
    """Raise ValueError if a diffusion decoder cannot be described like this."""
    known: dict[str, type] = {"model_path": str, "config_path": str, "tokens": int, IMAGE_SIZE: int}
    for key, value in spec.items():
        if key not in known:
            raise ValueError(f"{_DECODER}.{key}: a diffusion decoder has no such key; it has {', '.join(known)}")
        if not isinstance(value, known[key]) or isinstance(value, bool) or (isinstance(value, int) and value < 1):
            what = "a number above 0" if known[key] is int else "the path of a folder"
            raise ValueError(f"{_DECODER}.{key}: must be {what}, got {value!r}")


def encoder_specs(model: ModelConfig) -> dict[str, dict[str, Any]]:
    """The description of each encoder by kind: from the export at model.model_path, as changed by model.encoders.
    ValueError: an invalid one."""
    folder, known = Path(model.model_path or ""), _exported(model).get("encoders", {})
    specs: dict[str, dict[str, Any]] = {
        kind: {"model_path": str(folder / "encoders" / kind), **known[kind]} for kind in known
    }
    for kind, spec in model.encoders.items():
        if kind not in KINDS:
            raise ValueError(f"model.encoders.{kind}: not available yet; there are encoders for {', '.join(KINDS)}")
        if not isinstance(spec, Mapping):
            raise ValueError(f"model.encoders.{kind}: needs a mapping with config_path or model_path, not {spec!r}")
        moved = "model_path" in spec or "config_path" in spec
        specs[kind] = dict(spec) if moved or kind not in specs else {**specs[kind], **spec}
    for kind, spec in specs.items():
        _check_spec(kind, spec)
    return specs


def _check_spec(kind: str, spec: Mapping[str, Any]) -> None:
    if not (spec.get("config_path") or spec.get("model_path")):
        raise ValueError(f"model.encoders.{kind}: needs model_path, or config_path to start from random weights")
    for key, expected in _KEYS.items():
        value = spec.get(key)
        unset = value is None and (key not in spec or expected is str)
        if not unset and (not isinstance(value, expected) or (expected is int and isinstance(value, bool))):
            raise ValueError(f"model.encoders.{kind}.{key}: must be of type {expected.__name__}, got {value!r}")
    if spec.get("pool", 1) < 1:
        raise ValueError(f"model.encoders.{kind}.pool: must be at least 1, got {spec['pool']}")


def tower_config(kind: str, spec: Mapping[str, Any]) -> PreTrainedConfig:
    """The config of an encoder's tower, with the fields set in its description. ValueError: there is no config, or
    it has no such field."""
    key = "config_path" if spec.get("config_path") else "model_path"
    argument = f"model.encoders.{kind}.{key}"
    path = local_path(spec[key], argument)
    file = path if path.is_file() else path / "config.json"
    if not file.is_file():
        raise ValueError(f"{argument}: there is no config.json in {path}")
    try:
        found: Any = AutoConfig.from_pretrained(file, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        named = json.loads(file.read_text(encoding="utf-8")).get("model_type") if file.is_file() else None
        instead = f"; give {_ELSEWHERE[named]}" if named in _ELSEWHERE else ""
        raise ValueError(
            f"{argument}: {file} is not a configuration that transformers knows: {first_line(error)}{instead}"
        ) from error
    found = getattr(found, "vision_config" if kind == "image" else "audio_config", None) or found
    fields = found.to_dict()
    changes = {name: value for name, value in spec.items() if name not in _KEYS}
    for name in changes:
        if name not in fields:
            near = nearest(name, [*_KEYS, *fields])
            hint = f"; did you mean {near}?" if near else ""
            raise ValueError(f"model.encoders.{kind}.{name}: {type(found).__name__} has no such field{hint}")
    return type(found).from_dict({**fields, **changes}) if changes else found
