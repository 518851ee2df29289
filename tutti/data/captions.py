"""Rows of captioned images or videos, for training diffusion models.

A row has a caption in the first of data.text_keys that it contains (from a list of captions, one is chosen each time
the row is trained on), and an image in `image`, `image_path`, `image_bytes` or `target_image`, or a `video`. Or it is a
conversation, with the user's text and the assistant's image.

A sample's tokens represent what the model processes, and batches are planned with them: the bytes of its captions, each
followed by a 0, and then LATENT for each latent token. The image is resized, keeping its aspect ratio, to the pixels
that data.image_min_pixels and data.image_max_pixels allow, and center-cropped to whole latent tokens; a micro batch
contains samples of one size.

Pickled latents and embeddings of other programs are refused: unpickling runs code.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tutti.config import DataConfig
from tutti.core.batch import IGNORE, Frames, Grid, Media, Sample
from tutti.data.media import MediaFolder, MediaSummary, described, load_image, measure_image, reference, resized
from tutti.data.media_places import with_media
from tutti.data.rows import (
    CONVERSATIONS,
    BrokenMediaError,
    RowError,
    conversation_of,
    encode_each,
    half_surrogate,
    kind_of,
    listed,
)
from tutti.data.source import BadRow, Row
from tutti.data.video import FRAMES_FPS, load_video, measure_video, video_source

LATENT = 256
"""The token for a latent token; no byte has this number."""

VOCABULARY = 257
PIXELS = "pixels"
"""The name of decoded images among a batch's extras."""

_IMAGES = ("image", "image_path", "image_bytes", "target_image")
_VIDEOS = ("video", "video_path", "video_bytes")
_PICKLE = b"\x80"
_FRAMES = 49
"""Number of frames of a video if data.video_max_frames is not set."""


class Extent(NamedTuple):
    """The size of a sample's pixels."""

    width: int
    height: int
    frames: int = 1


@dataclass
class CaptionEncoder:
    """Turns rows into samples, and samples into pixels.

    columns: possible caption columns. limits: the data's limits for pixels and frames. ranks: the number of ranks that
    share the latent tokens of a sample. decodes: batches get pixels; False if all latents are cached. notes: as in
    other encoders.
    """

    columns: tuple[str, ...]
    grid: Grid
    limits: DataConfig
    ranks: int = 1
    decodes: bool = True
    notes: Counter[str] = field(default_factory=Counter)

    def __call__(self, rows: Sequence[Row | BadRow], source: int = 0) -> list[list[Sample] | BadRow]:
        """Per row its sample, or why there is none. `source`: its index."""
        return encode_each(rows, partial(self._sample, source=source))

    def _sample(self, row: Row, source: int) -> Sample:
        _refuse_pickles(row.value)
        captions, kind, entry = self._read(row.value)
        medium = self._measure(kind, entry, MediaFolder(os.path.dirname(row.file), self.limits.media_root))
        extent = self.extent(medium)
        if (number := self._num_latents(extent)) % self.ranks:
            raise RowError(
                f"{described(medium)} makes {number} latent tokens, which train.ulysses_parallel_size "
                f"{self.ranks} does not divide"
            )
        tokens = np.frombuffer(b"".join(caption.encode() + b"\0" for caption in captions), np.uint8).astype(np.int32)
        ids = np.append(tokens, np.full(self._num_latents(extent), LATENT, np.int32))
        labels = np.full(len(ids), IGNORE, np.int32)
        labels[-1] = 0
        bucket = (extent.frames << 40) | (extent.width << 20) | extent.height
        return Sample(ids, labels, source, media=(medium,), bucket=bucket)

    def _read(self, value: Mapping[str, Any]) -> tuple[list[str], str, Any]:
        """A row's captions, and its image or video: the kind and the row's entry."""
        kinds = (("video", _VIDEOS),) if self.grid.frames else ()
        for kind, names in (*kinds, ("image", _IMAGES)):
            name = next((name for name in names if value.get(name) is not None), None)
            if name is not None and not any(value.get(key) is not None for key in CONVERSATIONS):
                return self._captions(value), kind, value[name]
        if not any(value.get(key) is not None for key in CONVERSATIONS):
            wanted = " or ".join((*_IMAGES, *(_VIDEOS if self.grid.frames else ())))
            raise RowError(f"has no picture ({wanted}); its columns are {listed(dict(value))}")
        column = next(key for key in CONVERSATIONS if value.get(key) is not None)
        conversation, entries = with_media(conversation_of(dict(value), (column,)), value)
        if len(entries) != 1:
            raise RowError(f"has {len(entries)} pictures in its messages, and one is drawn at a time")
        said = [text for message in conversation.messages if message["role"] == "user" for text in _texts(message)]
        caption = "".join(said).strip()
        if not caption:
            raise RowError("has no text of the user to draw a picture of")
        return [_checked(caption)], *entries[0]

    def _captions(self, value: Mapping[str, Any]) -> list[str]:
        name = next((column for column in self.columns if value.get(column) is not None), None)
        if name is None:
            wanted = " or ".join(self.columns)
            raise RowError(f"has no caption under {wanted} (data.text_keys); its columns are {listed(dict(value))}")
        found = value[name] if isinstance(value[name], list) else [value[name]]
        if not found or not all(isinstance(text, str) for text in found):
            raise RowError(f"{name} must be a text or a list of texts, not {kind_of(value[name])}")
        return [_checked(text) for text in found]

    def _measure(self, kind: str, entry: Any, folder: MediaFolder) -> Media:
        if kind == "image":
            source = reference(entry, folder)
            return Media("image", source, measure_image(source))
        given, fps = video_source(entry, folder)
        header = measure_video(given)
        rate = fps or header.fps or FRAMES_FPS
        most = min(self.limits.video_max_frames or _FRAMES, header.total)
        step = max(1.0, rate / self.limits.video_fps) if self.limits.video_fps else header.total / most
        count = min(most, max(1, int(header.total / step)))
        count = (count - 1) // self.grid.frames * self.grid.frames + 1
        indices = tuple(min(header.total - 1, int(number * step)) for number in range(count))
        return Media("video", given, header.size, Frames(indices, header.total, rate))

    def extent(self, medium: Media) -> Extent:
        """The size at which an image or video is trained on. RowError: it is too small for a single latent token."""
        width, height, *_ = medium.size
        limits, step = self.limits, self.grid.step
        if medium.frames is not None:
            width, height = resized((width, height), limits.video_min_pixels, limits.video_max_pixels)
        else:
            width, height = resized((width, height), limits.image_min_pixels, limits.image_max_pixels)
        width, height = (size // step * step for size in (width, height))
        if not width or not height:
            kind = "image" if medium.frames is None else "video"
            raise RowError(
                f"{described(medium)} is smaller than {step} pixels a side, which make one latent token: raise "
                f"data.{kind}_min_pixels or data.{kind}_max_pixels"
            )
        return Extent(width, height, len(medium.frames.indices) if medium.frames is not None else 1)

    def _num_latents(self, extent: Extent) -> int:
        frames = 1 + (extent.frames - 1) // max(1, self.grid.frames)
        return frames * (extent.width // self.grid.step) * (extent.height // self.grid.step)

    def extras(self, samples: Sequence[Sample], length: int) -> dict[str, Tensor]:
        """The pixels of a micro batch, uint8 [B, 3, (frames,) height, width]; black for a sample without a medium,
        whose own was broken. BrokenMediaError: one cannot be decoded."""
        if not self.decodes:
            return {}
        found: list[Tensor | None] = []
        for number, sample in enumerate(samples):
            try:
                found.append(self.pixels(sample.media[0]) if sample.media else None)
            except RowError as error:
                raise BrokenMediaError(str(error), number) from None
        like = next(pixels for pixels in found if pixels is not None)
        return {PIXELS: torch.stack([torch.zeros_like(like) if pixels is None else pixels for pixels in found])}

    def pixels(self, medium: Media) -> Tensor:
        """The pixels of an image, uint8 [3, height, width], or for video models [3, frames, height, width].
        RowError: it cannot be decoded."""
        extent = self.extent(medium)
        inner = _covering(medium.size, extent)
        if medium.frames is not None:
            frames = load_video(medium, inner).transpose(1, 0, 2, 3)
        else:
            image = load_image(medium)
            image = image if image.size == inner else image.resize(inner, Image.Resampling.BICUBIC)
            frames = np.asarray(image).transpose(2, 0, 1)
        left, top = (inner[0] - extent.width) // 2, (inner[1] - extent.height) // 2
        cut = frames[..., top : top + extent.height, left : left + extent.width]
        pixels = torch.from_numpy(np.ascontiguousarray(cut))
        return pixels.unsqueeze(1) if self.grid.frames and pixels.ndim == 3 else pixels

    def summarize_media(self, samples: Sequence[Sample]) -> MediaSummary:
        """Statistics of the samples' images."""
        summary = MediaSummary()
        for sample in samples:
            for medium in sample.media:
                summary.add(medium, int((sample.input_ids == LATENT).sum()))
        return summary.shortened()


def captions_of(ids: np.ndarray) -> list[str]:
    """The captions in a sample's tokens."""
    text = ids[ids != LATENT].astype(np.uint8).tobytes()
    return [caption.decode() for caption in text.split(b"\0")[:-1]]


def _covering(size: tuple[int, ...], extent: Extent) -> tuple[int, int]:
    """The smallest size of the same aspect that `extent` fits into."""
    scale = max(extent.width / size[0], extent.height / size[1])
    return max(extent.width, round(size[0] * scale)), max(extent.height, round(size[1] * scale))


def _texts(message: Mapping[str, Any]) -> list[str]:
    content = message.get("content")
    if isinstance(content, list):
        return [part["text"] for part in content if part.get("type") == "text"]
    return [content] if isinstance(content, str) else []


def _checked(caption: str) -> str:
    if "\0" in caption or half_surrogate(caption) is not None:
        raise RowError("its caption has characters that are none (U+0000, or half a surrogate pair)")
    return caption


def _refuse_pickles(value: Mapping[str, Any]) -> None:
    """Raise RowError if a column contains a pickle, as VeOmni's offline_embedding writes them."""
    names = [name for name, item in value.items() if isinstance(item, bytes | bytearray) and bytes(item[:1]) == _PICKLE]
    if names:
        raise RowError(
            f"holds pickles ({', '.join(names)}), which are programs and are not run: give the pictures and captions "
            "themselves; train.cache_latents encodes them once"
        )
