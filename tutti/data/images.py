"""Rows with one image each, for models of pixels: measured when rows are read, decoded when they are trained on.

A sample counts as one token that is trained on; its id and label have no meaning, only its medium does. Images are
scaled so that their shorter side fits the model's size, and center-cropped.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from tutti.config import Config
from tutti.core.batch import IGNORE, Media, Sample
from tutti.core.pixels import Square, to_values
from tutti.data.media import MediaFolder, MediaSummary, identity, load_image, measure_image, reference
from tutti.data.media_cache import MediaCache
from tutti.data.rows import BrokenMediaError, RowError, encode_each
from tutti.data.source import BadRow, Row, text_columns

PIXELS = "pixel_values"
"""The name of images among a batch's extras: fp32 [N, 3, S, S] in [-1, 1], one per target."""


@dataclass
class ImageEncoder:
    """Turns rows into samples of one image; picklable.

    columns: possible image columns, in order of preference. cache: of decoded images. notes: counts of rows with other,
    unused columns, by name.
    """

    columns: tuple[str, ...]
    size: Square
    media_root: str | None = None
    cache: MediaCache | None = None
    notes: Counter[str] = field(default_factory=Counter)

    def __call__(self, rows: Sequence[Row | BadRow], source: int = 0) -> list[list[Sample] | BadRow]:
        """Per row its sample, or why there is none. `source`: its index."""
        return encode_each(rows, partial(self._sample, source=source))

    def _sample(self, row: Row, source: int) -> Sample:
        column = next((name for name in self.columns if row.value.get(name) is not None), None)
        if column is None:
            raise RowError(f"has no image: no column {' or '.join(self.columns)} (data.text_keys)")
        if others := sorted(name for name, value in row.value.items() if name != column and value is not None):
            self.notes[f"an image alone is read; left aside were {', '.join(others)}"] += 1
        found = reference(row.value[column], MediaFolder(os.path.dirname(row.file), self.media_root))
        one = np.zeros(1, np.int32)
        return Sample(one, one.copy(), source, media=(Media("image", found, measure_image(found)),))

    def extras(self, samples: Sequence[Sample], length: int) -> dict[str, Tensor]:
        """The images of samples under the name `PIXELS`. BrokenMediaError: one of them cannot be decoded."""
        values = []
        for number, sample in enumerate(samples):
            if sample.labels[0] == IGNORE:
                continue
            try:
                values.append(to_values(self._pixels(sample.media[0])))
            except RowError as error:
                raise BrokenMediaError(str(error), number) from None
        return {PIXELS: torch.stack(values)} if values else {}

    def _pixels(self, medium: Media) -> np.ndarray:
        """The center of an image, uint8 [S, S, 3]."""
        name = b"%s\0%d" % (identity(medium), self.size.side)
        if self.cache is not None and (found := self.cache.get(name)) is not None:
            return found
        pixels = np.asarray(self.size.cut(load_image(medium)))
        if self.cache is not None:
            self.cache.put(name, pixels)
        return pixels

    def summarize_media(self, samples: Sequence[Sample]) -> MediaSummary:
        """Statistics of the samples' images."""
        summary = MediaSummary()
        for medium in (medium for sample in samples for medium in sample.media):
            summary.add(medium, 1)
        return summary.shortened()


def make_image_encoder(config: Config, size: Square) -> ImageEncoder:
    """The encoder of rows with images, for squares of `size`."""
    megabytes = config.data.media_cache_mb
    cache = MediaCache(megabytes * 2**20) if megabytes else None
    return ImageEncoder(text_columns(config), size, config.data.media_root, cache)
