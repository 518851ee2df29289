"""Media of prompts: the model's inputs in addition to tokens, computed when a prompt is first run.

The values (pixels, and what goes with them) are those that training makes of the same row
(`tutti.data.media_processor`), and so are the positions of models with several rotary axes (`tutti.model.multimodal`).
A prompt is run once; from then on its images are keys and values in the cache like any other token.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tutti.core.batch import ALONG_TOKENS, IGNORE, Batch, Media, Sample, pack
from tutti.core.compat import tree_leaves
from tutti.core.structure import ModelStructure
from tutti.data.media_processor import MediaProcessor
from tutti.data.rows import KINDS, RowError
from tutti.model.multimodal import make_media_positions

_KEPT = 8
"""Number of encoder calls that are remembered."""

Prompt = tuple[Sequence[int], tuple[Media, ...]]
"""The tokens of a prompt, and its media."""


@dataclass(frozen=True)
class MediaInputs:
    """Makes the inputs in addition to tokens.

    processor: None if the model takes no media. place: adds the positions of its media to a batch
    (`tutti.model.multimodal.make_media_positions`). masks: prompts with media need a full [T, T] attention mask, so
    that they are better run one by one.
    """

    processor: MediaProcessor | None = None
    place: Callable[[Batch], Batch] = lambda batch: batch
    masks: bool = False

    def packed(self, prompts: Sequence[Prompt]) -> tuple[dict[str, Tensor], list[int]]:
        """The values for prompts laid end to end, and for each prompt the difference between the position that
        follows it and its length. ValueError: a medium cannot be decoded."""
        if not any(media for _, media in prompts):
            return {}, [0] * len(prompts)
        samples = [as_sample(*prompt) for prompt in prompts]
        batch = self.place(self.with_values(samples, pack(samples)))
        rows, lengths = batch.extras.get("position_ids"), [len(ids) for ids, _ in prompts]
        if rows is None:
            return dict(batch.extras), [0] * len(prompts)
        ends = [int(part.max()) + 1 for part in rows[1:].split(lengths, dim=-1)]
        return dict(batch.extras), [end - length for end, length in zip(ends, lengths, strict=True)]

    def stacked(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """The values for prompts of equal length that are rows of a matrix. ValueError: a medium cannot be decoded."""
        samples = [as_sample(*prompt) for prompt in prompts]
        values = self.with_values(samples, pack(samples)).extras
        return {name: value.view(len(prompts), -1) if name in ALONG_TOKENS else value for name, value in values.items()}

    def with_values(self, samples: Sequence[Sample], batch: Batch) -> Batch:
        """The packed batch of samples with the values of their media added. ValueError: one cannot be decoded."""
        if self.processor is None:
            return batch
        try:
            return replace(batch, extras=self.processor.values(samples, len(batch.input_ids)))
        except RowError as error:
            raise ValueError(str(error)) from None


def media_inputs(structure: ModelStructure, processor: MediaProcessor | None) -> MediaInputs:
    """The `MediaInputs` for the model of `structure`."""
    masks = "token_type_ids" in inspect.signature(structure.decoder.forward).parameters
    return MediaInputs(processor, make_media_positions(structure), masks)


@contextmanager
def encoded_once(decoder: Any) -> Iterator[None]:
    """Within this context, an outer decoder encodes media once for equal values, although rows are run again for
    each token."""
    kept: list[tuple[Any, Any]] = []

    def remembering(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def run(*args: Any, **kwargs: Any) -> Any:
            given = (method, *tree_leaves((args, kwargs)))
            for before, features in kept:
                if _same(before, given):
                    return features
            kept.append((given, method(*args, **kwargs)))
            del kept[:-_KEPT]
            return kept[-1][1]

        return run

    names = [name for kind in KINDS if hasattr(decoder, name := f"get_{kind}_features")]
    for name in names:
        decoder.__dict__[name] = remembering(getattr(decoder, name))
    try:
        yield
    finally:
        for name in names:
            del decoder.__dict__[name]


def _same(one: Sequence[Any], other: Sequence[Any]) -> bool:
    def alike(mine: Any, theirs: Any) -> bool:
        both = isinstance(mine, Tensor) and isinstance(theirs, Tensor)
        return torch.equal(mine, theirs) if both else type(mine) is type(theirs) and bool(mine == theirs)

    return len(one) == len(other) and all(alike(mine, theirs) for mine, theirs in zip(one, other, strict=True))


def as_sample(ids: Sequence[int], media: tuple[Media, ...]) -> Sample:
    """A prompt as a sample that is not trained on."""
    return Sample(np.asarray(ids, np.int32), np.full(len(ids), IGNORE, np.int32), media=media)
