"""A Hugging Face processor as the encoder and the loader see it.

Nothing here knows a family. A processor replaces each placeholder in a text by as many tokens as the medium takes, and
makes values (pixels) of the media; how many tokens depends on the media's sizes alone. So when rows are encoded the
processor is asked with blank media of the same sizes, once for each tuple of sizes, and its answers are remembered; the
placeholders of a rendered chat are then replaced as the processor would (`expand`), and the trained spans shifted.

When a micro batch is loaded, each sample's media are decoded and processed together, as they would be alone, and the
samples' values are joined (`values`). Along which dimension a value grows with the media is found out once, by
processing one, two and differently sized blanks; its other dimensions are padded with zeros to the largest.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tutti.core.batch import Media, Sample
from tutti.data.media import load_image, resized
from tutti.data.rows import KINDS, RowError

_OF_TEXT = ("input_ids", "attention_mask", "text_replacement_offsets", "labels")

Span = tuple[int, int]


@dataclass
class MediaProcessor:
    """The processor of a model that takes media; picklable. min_pixels, max_pixels: bounds of an image
    (data.image_min_pixels, data.image_max_pixels), which is resized to meet them."""

    processor: Any
    min_pixels: int | None = None
    max_pixels: int | None = None
    _replacements: dict[Any, list[str]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.markers = {
            kind: token for kind in KINDS if isinstance(token := getattr(self.processor, f"{kind}_token", None), str)
        }
        self._marker = re.compile("|".join(f"(?P<{kind}>{re.escape(token)})" for kind, token in self.markers.items()))
        ids = [token for kind in KINDS for token in getattr(self.processor, f"{kind}_token_ids", None) or ()]
        self._placeholders = [token for token in ids if token is not None]

    def expand(self, text: str, media: Sequence[Media]) -> tuple[str, list[tuple[int, int, int]]]:
        """The text with its placeholders replaced as the media need, and for each of them (begin and end in `text`, end
        in the new text). RowError: there are other placeholders than media."""
        found = list(self._marker.finditer(text)) if self.markers else []
        kinds = [match.lastgroup for match in found]
        if kinds != [medium.kind for medium in media]:
            raise RowError(_mismatch(kinds, media))
        parts: list[str] = []
        places, last, length = [], 0, 0
        for match, replacement in zip(found, self._replaced(media), strict=True):
            parts += (text[last : match.start()], replacement)
            length += match.start() - last + len(replacement)
            last = match.end()
            places.append((match.start(), last, length))
        parts.append(text[last:])
        return "".join(parts), places

    def _replaced(self, media: Sequence[Media]) -> list[str]:
        """The text that takes the place of each medium's placeholder."""
        if not media:
            return []
        sizes = tuple((medium.kind, *self._size(medium)) for medium in media)
        if sizes not in self._replacements:
            blanks = [Image.new("RGB", size) for _, *size in sizes]
            self._replacements[sizes] = [
                item["replacement"] for item in self._process(blanks)["text_replacement_offsets"]
            ]
        return self._replacements[sizes]

    def _size(self, medium: Media) -> tuple[int, int]:
        width, height = medium.size
        return resized((width, height), self.min_pixels, self.max_pixels)

    def _process(self, images: Sequence[Image.Image]) -> dict[str, Any]:
        """Run the processor on one sample's images: values as tensors, and how it replaced the placeholders."""
        text = self.markers["image"] * len(images)
        name = type(self.processor).__name__
        try:
            found = self.processor(
                text=[text],
                images=list(images),
                return_text_replacement_offsets=True,
                return_mm_token_type_ids=True,
                return_tensors="pt",
            )
        except Exception as error:  # a processor may fail in any way on an image it was not made for
            raise RowError(f"{name} cannot take its images: {(str(error) or repr(error)).splitlines()[0]}") from None
        offsets = found["text_replacement_offsets"][0]
        if len(offsets) != len(images):
            raise RowError(f"{name} replaces {len(offsets)} of {len(images)} placeholders: it cannot be trained with")
        return {**found, "text_replacement_offsets": offsets}

    @cached_property
    def _layout(self) -> tuple[dict[str, int], dict[str, dict[int, int]]]:
        """For each value that the processor makes, the dimension along which samples are joined; and for those that
        lie along tokens, the value that stands for a token's id."""
        one, two = (self._process([Image.new("RGB", (64, 48))] * count) for count in (1, 2))
        length = one["input_ids"].shape[-1]
        dims: dict[str, int] = {}
        along: dict[str, dict[int, int]] = {}
        for name, value in one.items():
            if name in _OF_TEXT or not isinstance(value, Tensor):
                continue
            if value.shape == one["input_ids"].shape and two[name].shape[-1] != length:
                pairs = zip(two["input_ids"].flatten().tolist(), two[name].flatten().tolist(), strict=True)
                along[name] = {token: kind for token, kind in pairs if kind}
                continue
            grown = [dim for dim in range(value.ndim) if two[name].shape[dim] != value.shape[dim]]
            dims[name] = grown[0] if grown else 0
        return dims, along

    def count(self, ids: np.ndarray) -> int:
        """The number of `ids` that are placeholders of media."""
        return int(np.isin(ids, self._placeholders).sum())

    def values(self, samples: Sequence[Sample], length: int) -> dict[str, Tensor]:
        """The inputs that the model takes beside the tokens of samples packed into `length` places: values by name, and
        what lies along the tokens [1, length]. Nothing where no sample has media. RowError: a medium cannot be
        decoded."""
        if not any(sample.media for sample in samples):
            return {}
        dims, along = self._layout
        made = [self._load(sample.media) for sample in samples if sample.media]
        extras = {name: _join([one[name] for one in made], dim) for name, dim in dims.items()}
        ids = np.full(length, -1)
        packed = np.concatenate([sample.input_ids for sample in samples])
        ids[: len(packed)] = packed
        for name, kinds in along.items():
            lie = np.zeros(len(ids), np.int64)
            for token, kind in kinds.items():
                lie[ids == token] = kind
            extras[name] = torch.from_numpy(lie)[None]
        return extras

    def _load(self, media: Sequence[Media]) -> Mapping[str, Any]:
        images = []
        for medium in media:
            image, size = load_image(medium), self._size(medium)
            images.append(image if image.size == size else image.resize(size, Image.Resampling.BICUBIC))
        made = self._process(images)
        if [item["replacement"] for item in made["text_replacement_offsets"]] != self._replaced(media):
            raise RowError("an image takes another number of tokens than its size said: it has changed during the run")
        return made


def shift(spans: Sequence[Span], places: Sequence[tuple[int, int, int]]) -> list[Span]:
    """Spans of a text as spans of the text with replacements at `places` (from `MediaProcessor.expand`).

    RowError: a span has a replacement within it, which cannot be trained on.
    """
    moved = []
    for begin, end in spans:
        if any(start < end and begin < stop for start, stop, _ in places):
            raise RowError("an assistant message has media, which only models with a decoder for them are trained on")
        moved.append(tuple(_moved(place, places) for place in (begin, end)))
    return moved  # type: ignore[return-value]


def _moved(at: int, places: Sequence[tuple[int, int, int]]) -> int:
    """A place in a text as a place in the one with replacements."""
    before = [(stop, end) for _, stop, end in places if stop <= at]
    return at + before[-1][1] - before[-1][0] if before else at


def _join(values: Sequence[Tensor], dim: int) -> Tensor:
    """Values of several samples, one after the other along `dim`; other dimensions padded with zeros at their ends."""
    shape = [max(value.shape[d] for value in values) for d in range(values[0].ndim)]
    padded = []
    for value in values:
        pads = [[0, shape[d] - value.shape[d] if d != dim else 0] for d in range(value.ndim)]
        flat = [amount for pair in reversed(pads) for amount in pair]
        padded.append(torch.nn.functional.pad(value, flat) if any(flat) else value)
    return torch.cat(padded, dim)


def _mismatch(kinds: Sequence[str | None], media: Sequence[Media]) -> str:
    said = {kind: kinds.count(kind) for kind in KINDS}
    given = {kind: sum(medium.kind == kind for medium in media) for kind in KINDS}
    for kind in KINDS:
        if said[kind] != given[kind]:
            return f"the text has {said[kind]} places for {kind}s, and the row has {given[kind]}"
    return "images, videos and sounds come in another order in the text than in the row"
