"""The processor of a composed model: the tower's own image processor beside the foundation's tokenizer.

It has what `tutti.data.processor` asks of a Hugging Face processor: called with texts and images it gives ids, values,
and what it has put in place of each placeholder, which is as many placeholders as the tower makes features. Of a tower
that takes images of one size that number is found by running it once without storage; a tower that takes patches says
it by its grid.

The placeholder is a token that the tokenizer has for images, or a new one. Chat templates of language models know no
images: `write_markers` puts a few lines before such a template, by which parts of a message become text.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor, PreTrainedTokenizerBase, Qwen2VLImageProcessor, SiglipImageProcessor

from tutti.config import ModelConfig
from tutti.model.omni import features, takes_grid, tower_class
from tutti.model.omni_config import SETTINGS, encoder_specs, tower_config
from tutti.model.tokenizer import first_line

log = logging.getLogger(__name__)

_TRIPLES = (
    ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>"),
    ("<start_of_image>", "<image_soft_token>", "<end_of_image>"),
    ("<|image_start|>", "<|image|>", "<|image_end|>"),
)
"""What tokenizers call the tokens before, for and after an image."""

_NEW = "<|image|>"

_FLATTENED = (
    "{%- set flat = namespace(messages=[]) -%}{%- for message in messages -%}"
    "{%- if message['content'] is defined and message['content'] is not string and message['content'] is iterable -%}"
    "{%- set text = namespace(value='') -%}{%- for part in message['content'] -%}"
    "{%- set text.value = text.value + (MARKER if part['type'] == 'image' else part['text'] | default('')) -%}"
    "{%- endfor -%}{%- set flat.messages = flat.messages + [dict(message, content=text.value)] -%}"
    "{%- else -%}{%- set flat.messages = flat.messages + [message] -%}{%- endif -%}"
    "{%- endfor -%}{%- set messages = flat.messages -%}"
)
"""Jinja that makes each message's parts one text; MARKER: what stands for an image."""


def placeholder(tokenizer: PreTrainedTokenizerBase) -> str:
    """The token that stands for a feature of an image."""
    known = tokenizer.get_vocab()
    return next((token for _, token, _ in _TRIPLES if token in known), _NEW)


def placeholder_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of the placeholder; None: the tokenizer lacks it."""
    return tokenizer.get_vocab().get(placeholder(tokenizer))


def add_placeholder(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the tokenizer a token for images, if it has none. Logs a line where it does."""
    if placeholder_id(tokenizer) is None:
        tokenizer.add_tokens([_NEW], special_tokens=True)
        log.info("model.encoders: %s is new in the tokenizer, as id %s", _NEW, placeholder_id(tokenizer))


def write_markers(tokenizer: PreTrainedTokenizerBase) -> None:
    """Have the chat template write the placeholder for an image among a message's parts, if it does not."""
    token, source = placeholder(tokenizer), tokenizer.chat_template
    if not isinstance(source, str):
        return
    chat: Any = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "x"}]}]
    try:
        text = str(tokenizer.apply_chat_template(chat, tokenize=False))
    except Exception:  # a template may fail in any way on messages it was not made for
        text = ""
    if text.count(token) != 1:
        known = tokenizer.get_vocab()
        around = next((triple for triple in _TRIPLES if triple[1] == token and set(triple) <= set(known)), (token,))
        tokenizer.chat_template = _FLATTENED.replace("MARKER", repr("".join(around))) + source


@dataclass
class OmniProcessor:
    """The processor of a composed model. counts: by height and width of its pixels, how many tokens an image takes;
    merge: of a tower that takes patches, how many by how many of them make a token."""

    tokenizer: PreTrainedTokenizerBase
    image_processor: Any
    counts: dict[tuple[int, int], int]
    merge: int

    def __post_init__(self) -> None:
        self.image_token = placeholder(self.tokenizer)
        self.image_token_ids = [placeholder_id(self.tokenizer)]

    @property
    def chat_template(self) -> Any:
        return self.tokenizer.chat_template

    def __call__(self, text: Sequence[str], images: Sequence[Image.Image] | None = None, **kwargs: Any) -> Any:
        """Ids and values of one text with its images, as tensors, and `text_replacement_offsets`."""
        (source,) = text
        values: dict[str, torch.Tensor] = {}
        numbers: list[int] = []
        if images:
            found = self.image_processor(images=list(images), return_tensors="pt")
            values = {name: found[name] for name in ("pixel_values", "image_grid_thw") if name in found}
            numbers = self._numbers(values)
        pieces = source.split(self.image_token)
        if len(pieces) != len(numbers) + 1:
            raise ValueError(f"{len(pieces) - 1} placeholders for {len(numbers)} images")
        written, offsets = pieces[0], []
        for number, piece in zip(numbers, pieces[1:], strict=True):
            replacement = self.image_token * number
            offsets.append({"type": "image", "text": self.image_token, "replacement": replacement})
            written += replacement + piece
        ids = self.tokenizer([written], return_tensors="pt", add_special_tokens=False)
        return {**ids, **values, "text_replacement_offsets": [offsets]}

    def _numbers(self, values: dict[str, torch.Tensor]) -> list[int]:
        if self.merge:
            return [int(count) // self.merge**2 for count in values["image_grid_thw"].prod(-1)]
        pixels = values["pixel_values"]
        size = (pixels.shape[-2], pixels.shape[-1])
        if size not in self.counts:
            (known,) = self.counts
            raise ValueError(f"the image processor makes images of {size} pixels and of {known}; give it one size")
        return [self.counts[size]] * len(pixels)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tokenizer to `folder`, and the image processor to its encoder's."""
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(Path(folder) / "encoders" / "image")


def compose_processor(model: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> OmniProcessor:
    """The processor of the composed model that `model` describes. ValueError: the image processor cannot be used, or
    does not make what the tower takes."""
    spec = encoder_specs(model)["image"]
    config: Any = tower_config("image", spec)
    with torch.device("meta"):
        tower = tower_class(config)(copy.deepcopy(config))
    patches = takes_grid(tower)
    processor = _image_processor(spec, config, patches)
    if patches:
        return OmniProcessor(tokenizer, processor, {}, config.spatial_merge_size)
    try:
        made = processor(images=[Image.new("RGB", (64, 48))], return_tensors="pt")["pixel_values"]
        settings = {name: spec.get(name, default) for name, default in SETTINGS.items()}
        found = features(tower, made.to("meta"), None, settings["layer"], settings["pool"])
    except Exception as error:  # towers and processors fail in many ways when they do not fit each other
        raise ValueError(
            f"model.encoders.image.processor_path: {type(processor).__name__} makes no images that "
            f"{type(config).__name__} takes: {first_line(error)}"
        ) from error
    return OmniProcessor(tokenizer, processor, {(made.shape[-2], made.shape[-1]): found.shape[1]}, 0)


def _image_processor(spec: dict[str, Any], config: Any, patches: bool) -> Any:
    """The image processor in the tower's folder, or one for the size that its config names, which is logged."""
    for key in ("processor_path", "model_path", "config_path"):
        folder = Path(spec[key]).expanduser() if spec.get(key) else None
        if folder is None or not any(folder.glob("*processor_config.json")):
            continue
        try:
            return AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # processors fail in many ways, such as for a package that is missing
            raise ValueError(
                f"model.encoders.image.{key}: no image processor in {folder}: {first_line(error)}"
            ) from error
    if patches:
        made = Qwen2VLImageProcessor(
            patch_size=config.patch_size,
            merge_size=config.spatial_merge_size,
            temporal_patch_size=config.temporal_patch_size,
        )
        log.info("model.encoders.image: no image processor in its folder: images of any size become patches")
        return made
    side = getattr(config, "image_size", None) or 224
    height, width = (side, side) if isinstance(side, int) else side
    log.info("model.encoders.image: no image processor in its folder: images are resized to %d x %d", width, height)
    return SiglipImageProcessor(size={"height": height, "width": width})
