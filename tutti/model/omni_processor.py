"""The processor of a composed model: the towers' own image processor and feature extractor, with the foundation's
tokenizer.

It has the interface that `tutti.data.media_processor` expects of a Hugging Face processor: called with a text and
media, it returns token ids, values, and the text that replaced each placeholder, which is one placeholder per feature
of the tower. The number of features is found by running the tower once on the meta device (fixed image size), from the
grid (patches), or from the part of the tower's window that a sound fills.

Placeholders are existing tokens of the tokenizer for a kind of media, or new ones. Chat templates of language models
have no media: `write_markers` adds a few lines before such a template that turn the parts of a message into text.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    PreTrainedTokenizerBase,
    Qwen2VLImageProcessor,
    SiglipImageProcessor,
    WhisperFeatureExtractor,
)

from tutti.config import ModelConfig
from tutti.core.batch import DRAWN_PIXELS
from tutti.core.pixels import to_values
from tutti.model.flow_decoder import read_flow
from tutti.model.omni import features, mel_stride, takes_grid, tower_class, try_features
from tutti.model.omni_config import (
    PLACES,
    SETTINGS,
    OmniConfig,
    answers_with_pictures,
    decoder_folder,
    decoder_size,
    encoder_specs,
    regresses,
    tower_config,
)
from tutti.model.tokenizer import first_line
from tutti.model.vq import DECODER, PictureCodes, read_codes

log = logging.getLogger(__name__)

_TRIPLES = {
    "image": (
        ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>"),
        ("<start_of_image>", "<image_soft_token>", "<end_of_image>"),
        ("<|image_start|>", "<|image|>", "<|image_end|>"),
    ),
    "video": (
        ("<|vision_start|>", "<|video_pad|>", "<|vision_end|>"),
        ("<|video_start|>", "<|video|>", "<|video_end|>"),
    ),
    "audio": (
        ("<|audio_start|>", "<|audio_pad|>", "<|audio_end|>"),
        ("<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>"),
        ("<|audio_start|>", "<|audio|>", "<|audio_end|>"),
    ),
}
"""Common names of the tokens before, for and after a medium; the last name is used for a new token."""

_FLATTENED = (
    "{%- set marks = MARKS -%}{%- set flat = namespace(messages=[]) -%}{%- for message in messages -%}"
    "{%- if message['content'] is defined and message['content'] is not string and message['content'] is iterable -%}"
    "{%- set text = namespace(value='') -%}{%- for part in message['content'] -%}"
    "{%- set text.value = text.value + (marks[part['type']] | default(part['text'] | default(''))) -%}"
    "{%- endfor -%}{%- set flat.messages = flat.messages + [dict(message, content=text.value)] -%}"
    "{%- else -%}{%- set flat.messages = flat.messages + [message] -%}{%- endif -%}"
    "{%- endfor -%}{%- set messages = flat.messages -%}"
)
"""Jinja that joins each message's parts into one text. MARKS: the placeholder of each kind of media."""


AS_DRAWN = {"pixel_values": "drawn_values", "image_grid_thw": "drawn_grid_thw"}
"""Names of image values -> their names for pictures that are drawn."""

DRAWN, CODE = "drawn", "<|image_code|>"
"""The kind of media that a model draws, whose placeholder token stands for a code not yet known."""


class Marks(NamedTuple):
    """The ids of the tokens before and after a drawn picture."""

    start: int
    end: int


def drawing_marks(tokenizer: PreTrainedTokenizerBase) -> Marks:
    """The tokens that begin and end a picture, added to the tokenizer if missing."""
    known = tokenizer.get_vocab()
    named = [getattr(tokenizer, name, None) for name in ("boi_token", "eoi_token")]
    if all(token in known for token in named):
        return Marks(*(known[token] for token in named))  # type: ignore[index]
    start, _, end = next((one for one in _TRIPLES["image"] if {one[0], one[2]} <= known.keys()), _TRIPLES["image"][-1])
    if start not in known or end not in known:
        tokenizer.add_tokens([start, end], special_tokens=True)
        known = tokenizer.get_vocab()
        log.info("%s and %s are new in the tokenizer, as ids %d and %d", start, end, known[start], known[end])
    return Marks(known[start], known[end])


def make_room(tokenizer: PreTrainedTokenizerBase, text: Any, *, is_new: bool) -> None:
    """Grow the embedding of a language model with config `text` to include the tokens that begin and end a picture.
    is_new: it starts from random weights. ValueError: it does not, and lacks rows."""
    needed = max(drawing_marks(tokenizer)) + 1
    if needed <= text.vocab_size:
        return
    if not is_new:
        raise ValueError(
            f"model.decoders.image: the tokenizer has no tokens that begin and end an image, and the model's "
            f"{text.vocab_size} embeddings have no room for new ones; resize them to {needed} (transformers' "
            "resize_token_embeddings) and add the tokens, or choose a model that has them"
        )
    log.info("the embedding has %d rows, for the tokens that begin and end a picture", needed)
    text.vocab_size = needed


def placeholder(tokenizer: PreTrainedTokenizerBase, kind: str) -> str:
    """The placeholder token of this kind of media."""
    if kind == DRAWN:
        return CODE
    known, triples = tokenizer.get_vocab(), _TRIPLES[kind]
    return next((token for _, token, _ in triples if token in known), triples[-1][1])


def placeholders(tokenizer: PreTrainedTokenizerBase, config: OmniConfig) -> dict[str, int]:
    """The ids of the placeholders of a model's media, by kind, without those that the tokenizer lacks."""
    known = tokenizer.get_vocab()
    kinds = [kind for encoder in config.encoders or () for kind in PLACES[encoder]] + [DRAWN] * config.draws
    return {kind: known[token] for kind in kinds if (token := placeholder(tokenizer, kind)) in known}


def add_placeholders(tokenizer: PreTrainedTokenizerBase, model: ModelConfig) -> None:
    """Add a token to the tokenizer for each kind of media that `model` takes or draws, if missing. Logs what it
    added."""
    kinds = _kinds(model)
    if DRAWN in kinds:
        drawing_marks(tokenizer)  # first, because these have embeddings, and placeholders don't
    for kind in kinds:
        token = placeholder(tokenizer, kind)
        if token not in tokenizer.get_vocab():
            tokenizer.add_tokens([token], special_tokens=True)
            log.info("%s is new in the tokenizer, as id %d", token, tokenizer.get_vocab()[token])


def _kinds(model: ModelConfig) -> list[str]:
    """The kinds of media that a composed model takes or draws."""
    taken = [kind for encoder in encoder_specs(model) for kind in PLACES[encoder]]
    return [*taken, DRAWN] if answers_with_pictures(model) else taken


def write_markers(tokenizer: PreTrainedTokenizerBase, model: ModelConfig) -> None:
    """Make the chat template write the placeholders of media in a message's parts, if it does not."""
    source, known = tokenizer.chat_template, tokenizer.get_vocab()
    if not isinstance(source, str):
        return
    marks: dict[str, str] = {}
    for kind in _kinds(model):
        token = placeholder(tokenizer, kind)
        if kind == DRAWN:
            start, end = drawing_marks(tokenizer)
            marks[kind] = "".join(tokenizer.convert_ids_to_tokens([start, known[token], end]))
            continue
        around = next(
            (triple for triple in _TRIPLES[kind] if triple[1] == token and set(triple) <= set(known)), (token,)
        )
        marks[kind] = "".join(around)
    if any(not _writes(tokenizer, kind, placeholder(tokenizer, kind)) for kind in marks):
        tokenizer.chat_template = _FLATTENED.replace("MARKS", repr(marks)) + source


def _writes(tokenizer: PreTrainedTokenizerBase, kind: str, token: str) -> bool:
    """True if the chat template writes `token` exactly once for a part of this kind."""
    chat: Any = [{"role": "user", "content": [{"type": kind}, {"type": "text", "text": "x"}]}]
    try:
        text = str(tokenizer.apply_chat_template(chat, tokenize=False))
    except Exception:  # a template may fail in any way on unexpected messages
        return False
    return text.count(token) == 1


@dataclass
class OmniProcessor:
    """The processor of a composed model.

    - Images: image_processor, with counts: tokens per image by (height, width) in pixels; or with merge, for a tower
      that takes patches: merge x merge patches make a token.
    - Sounds: feature_extractor; frames: mel frames per token; window: the maximum number of tokens of one sound.
    - Drawing: drawn, the codes of pictures that the model draws; draws_all: it also sees pictures as codes; regresses:
      pictures that it draws also go to the image tower.
    """

    tokenizer: PreTrainedTokenizerBase
    image_processor: Any = None
    counts: dict[tuple[int, int], int] = field(default_factory=dict)
    merge: int = 0
    feature_extractor: Any = None
    frames: int = 0
    window: int = 0
    drawn: PictureCodes | None = None
    draws_all: bool = False
    regresses: bool = False

    def __post_init__(self) -> None:
        kinds = [] if self.image_processor is None else ["image"] if self.merge else ["image", "video"]
        kinds += [] if self.feature_extractor is None else ["audio"]
        kinds += [DRAWN] if self.drawn is not None or self.regresses else []
        self._tokens = {kind: placeholder(self.tokenizer, kind) for kind in kinds}
        for kind, token in self._tokens.items():
            setattr(self, f"{kind}_token", token)
            setattr(self, f"{kind}_token_ids", [self.tokenizer.get_vocab()[token]])

    def advice(self, kind: str) -> str:
        """Advice, for the end of an error, on how to make the model take media of a kind that it does not take."""
        encoder = "audio" if kind == "audio" else "image"
        drawn = "; it draws images whose place is in the assistant's message" if self.drawn and kind == "image" else ""
        return f": a composed model takes it by model.encoders.{encoder}{drawn}"

    @property
    def chat_template(self) -> Any:
        return self.tokenizer.chat_template

    def __call__(
        self,
        text: Sequence[str],
        images: Any = None,
        videos: Any = None,
        audio: Any = None,
        drawn: Sequence[Image.Image] = (),
        **kwargs: Any,
    ) -> Any:
        """Ids and values of one text with its media, as tensors, and `text_replacement_offsets`. ValueError: media that
        the towers do not take.

        images: those of the text, or a list of that; videos: the same, of frames [F, 3, height, width]; audio: waves;
        drawn: pictures that become codes.
        """
        (source,) = text
        values: dict[str, torch.Tensor] = {}
        numbers: dict[str, list[int]] = {}
        if images:
            values |= self._pixels(_flat(images))
            numbers["image"] = self._numbers(values)
        if videos:
            frames = [[Image.fromarray(np.moveaxis(frame, 0, -1)) for frame in video] for video in _flat(videos)]
            made = self._pixels([frame for video in frames for frame in video])
            each = iter(self._numbers(made))
            values["pixel_values_videos"] = made["pixel_values"]
            numbers["video"] = [sum(next(each) for _ in video) for video in frames]
        if audio:
            values |= self._mel(audio)
            numbers["audio"] = values["audio_tokens"].tolist()
        if drawn and self.drawn is not None:
            pixels = [to_values(np.asarray(self.drawn.size.cut(picture))) for picture in drawn]
            values[DRAWN_PIXELS] = torch.stack(pixels)
            numbers[DRAWN] = [self.drawn.tokens] * len(drawn)
        if drawn and self.regresses:
            made = self._pixels(drawn)
            values |= {AS_DRAWN[name]: value for name, value in made.items()}
            numbers[DRAWN] = self._numbers(made)
        written, offsets = self._replace(source, numbers)
        ids = self.tokenizer([written], return_tensors="pt", add_special_tokens=False)
        return {**ids, **values, "text_replacement_offsets": [offsets]}

    def _replace(self, source: str, numbers: dict[str, list[int]]) -> tuple[str, list[dict[str, str]]]:
        """The text with each placeholder repeated for its medium's tokens, and the replacement of each."""
        left = {kind: list(found) for kind, found in numbers.items()}
        offsets: list[dict[str, str]] = []

        def expand(match: re.Match[str]) -> str:
            kind = next(kind for kind, token in self._tokens.items() if token == match.group())
            if not left.get(kind):
                raise ValueError(f"more placeholders of {kind}s than there are")
            replacement = match.group() * left[kind].pop(0)
            offsets.append({"type": kind, "text": match.group(), "replacement": replacement})
            return replacement

        written = re.sub("|".join(map(re.escape, self._tokens.values())), expand, source)
        if any(left.values()):
            raise ValueError("more media than placeholders")
        return written, offsets

    def _pixels(self, images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
        found = self.image_processor(images=list(images), return_tensors="pt")
        return {name: found[name] for name in ("pixel_values", "image_grid_thw") if name in found}

    def _numbers(self, values: dict[str, torch.Tensor]) -> list[int]:
        """The number of tokens of each image."""
        if self.merge:
            return [int(count) // self.merge**2 for count in values["image_grid_thw"].prod(-1)]
        pixels = values["pixel_values"]
        size = (pixels.shape[-2], pixels.shape[-1])
        if size not in self.counts:
            (known,) = self.counts
            raise ValueError(f"the image processor makes images of {size} pixels and of {known}; give it one size")
        return [self.counts[size]] * len(pixels)

    def _mel(self, waves: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
        extractor = self.feature_extractor
        for wave in waves:
            if len(wave) > extractor.n_samples:
                seconds, most = (number / extractor.sampling_rate for number in (len(wave), extractor.n_samples))
                raise ValueError(
                    f"a sound of {seconds:.1f} s, and the tower hears {most:.1f} s: data.audio_max_seconds cuts it"
                )
        found = extractor(
            list(waves), sampling_rate=extractor.sampling_rate, return_attention_mask=True, return_tensors="pt"
        )
        count = (found["attention_mask"].sum(-1) + self.frames - 1) // self.frames
        return {"input_features": found["input_features"], "audio_tokens": count.clamp(1, self.window).long()}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tokenizer to `folder`, and the other two to their encoders' folders."""
        self.tokenizer.save_pretrained(folder)
        for kind, part in (("image", self.image_processor), ("audio", self.feature_extractor)):
            if part is not None:
                part.save_pretrained(Path(folder) / "encoders" / kind)


def _flat(media: Any) -> list[Any]:
    """The media of the one text, which may be a list of lists."""
    return [item for part in media for item in (part if isinstance(part, (list, tuple)) else [part])]


def compose_processor(model: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> OmniProcessor:
    """The processor of the composed model `model`. ValueError: a tower's processor cannot be used, or does not make
    the tower's inputs."""
    made: dict[str, Any] = {}
    for kind, spec in encoder_specs(model).items():
        config: Any = tower_config(kind, spec)
        settings = {name: spec.get(name, default) for name, default in SETTINGS.items()}
        with torch.device("meta"):
            tower = tower_class(config)(copy.deepcopy(config))
        try:
            made |= (_for_images if kind == "image" else _for_sounds)(spec, tower, settings)
        except Exception as error:  # towers and processors that do not match fail in many ways
            raise ValueError(
                f"model.encoders.{kind}.processor_path: makes nothing that {type(config).__name__} takes: "
                f"{first_line(error)}"
            ) from error
    if (folder := decoder_folder(model)) is not None:
        flow = read_flow(model)
        made["drawn"] = flow.codes if flow else read_codes(folder, DECODER, decoder_size(model))
        made["draws_all"] = model.input_encoder == "decoder"
    made["regresses"] = regresses(model)
    return OmniProcessor(tokenizer, **made)


def _for_images(spec: dict[str, Any], tower: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """The fields of an `OmniProcessor` for images."""
    config, patches = tower.config, takes_grid(tower)
    processor = _own_processor(spec, AutoImageProcessor)
    if processor is None and patches:
        processor = Qwen2VLImageProcessor(
            patch_size=config.patch_size,
            merge_size=config.spatial_merge_size,
            temporal_patch_size=config.temporal_patch_size,
        )
        log.info("model.encoders.image: no image processor in its folder: images of any size become patches")
    elif processor is None:
        side = getattr(config, "image_size", None) or 224
        height, width = (side, side) if isinstance(side, int) else side
        log.info("model.encoders.image: no image processor in its folder: images are resized to %d x %d", width, height)
        processor = SiglipImageProcessor(size={"height": height, "width": width})
    if patches:
        return {"image_processor": processor, "merge": config.spatial_merge_size}
    pixels = processor(images=[Image.new("RGB", (64, 48))], return_tensors="pt")["pixel_values"]
    found = features(tower, pixels.to("meta"), None, settings["layer"], settings["pool"])
    return {"image_processor": processor, "counts": {(pixels.shape[-2], pixels.shape[-1]): found.shape[1]}}


def _for_sounds(spec: dict[str, Any], tower: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """The fields of an `OmniProcessor` for sounds."""
    config, extractor = tower.config, _own_processor(spec, AutoFeatureExtractor)
    length = config.max_source_positions * mel_stride(tower)
    if extractor is None:
        seconds = length // 100  # an extractor makes a hundred frames per second
        log.info("model.encoders.audio: no feature extractor in its folder: sounds of up to %d s are heard", seconds)
        extractor = WhisperFeatureExtractor(feature_size=config.num_mel_bins, chunk_length=seconds)
    mel = extractor([np.zeros(400, np.float32)], sampling_rate=extractor.sampling_rate, return_tensors="pt")
    if (shape := mel["input_features"].shape[1:]) != (config.num_mel_bins, length):
        raise ValueError(f"windows of {tuple(shape)} bins and frames, not {(config.num_mel_bins, length)}")
    window = try_features(tower, settings["layer"], settings["pool"]).shape[1]
    return {"feature_extractor": extractor, "frames": mel_stride(tower) * settings["pool"], "window": window}


def _own_processor(spec: dict[str, Any], factory: Any) -> Any:
    """The processor in an encoder's folder; None if there is none."""
    for key in ("processor_path", "model_path", "config_path"):
        folder = Path(spec[key]).expanduser() if spec.get(key) else None
        if folder is not None and any(folder.glob("*processor_config.json")):
            return factory.from_pretrained(folder, local_files_only=True)
    return None
