"""Finished samples from a user's dataset, which bypass the encoder after a check."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from tutti.core.batch import IGNORE, Sample
from tutti.data.media import MediaSummary
from tutti.data.source import BadRow


@dataclass
class PreEncoded:
    """An encoder for rows some of which are samples already; `encoder` handles the others. pairs: samples are pairs."""

    encoder: Any
    max_seq_len: int
    vocab_size: int
    pairs: bool = False

    @property
    def notes(self) -> Counter[str]:
        """As `encoder` has them."""
        return self.encoder.notes

    def __call__(self, rows: Sequence[Any], source: int = 0) -> list[list[Sample] | BadRow]:
        """As the encoder: for each row its samples, or what is wrong with it."""
        results: list[Any] = [None] * len(rows)
        raw = []
        for number, row in enumerate(rows):
            if isinstance(row, BadRow) or isinstance(row.value, dict):
                raw.append(number)
            elif wrong := self._wrong(row.value):
                results[number] = BadRow(row.file, row.line, wrong)
            else:
                results[number] = [replace(row.value, source=source)]
        for number, result in zip(raw, self.encoder([rows[number] for number in raw], source), strict=True):
            results[number] = result
        return results

    def extras(self, samples: Sequence[Sample], length: int) -> dict[str, Tensor]:
        """The inputs in addition to tokens, from the encoder."""
        return self.encoder.extras(samples, length)

    def summarize_media(self, samples: Sequence[Sample]) -> MediaSummary:
        """Statistics of the samples' media, from the encoder."""
        found: MediaSummary = self.encoder.summarize_media(samples)
        return found

    def _wrong(self, sample: Any) -> str | None:
        """The reason why a sample cannot be trained on."""
        if not isinstance(sample, Sample):
            return f"a row must be a dict of columns or a tutti.core.batch.Sample, not {type(sample).__name__}"
        if sample.input_ids.shape != sample.labels.shape or sample.input_ids.ndim != 1 or not len(sample):
            return "input_ids and labels of a Sample must be one-dimensional, equally long and not empty"
        if not (0 < sample.split < len(sample) if self.pairs else sample.split == 0):
            return "split of a Sample must lie within it with data.data_type dpo, else be 0"
        if len(sample) > self.max_seq_len:
            return f"a Sample of {len(sample)} tokens is longer than data.max_seq_len {self.max_seq_len}"
        if not 0 <= sample.input_ids.min() <= sample.input_ids.max() < self.vocab_size:
            return f"a Sample has token ids outside the model's vocabulary of {self.vocab_size}"
        if any((part == IGNORE).all() for part in np.split(sample.labels, [sample.split] if self.pairs else [])):
            return "no trained token: every label of the Sample is ignored"
        return None
