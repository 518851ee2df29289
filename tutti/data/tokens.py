"""Tokenising a batch of texts, and finding the token at a character.

The fast path calls the `tokenizers` library beneath a Hugging Face tokenizer once per batch: it runs on all cores and
releases the interpreter's lock. A text is always tokenised whole, never in segments, so that the ids are those the
model sees at inference. Without that library (a few tokenizers are written in Python) texts are tokenised one by one,
and a character's token is found by tokenising the text up to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tutti.data.rows import RowError


@dataclass
class Tokens:
    """The tokens of a batch of n texts. ids: int32, all texts' end to end; ends: where each text's end, int [n + 1]."""

    ids: np.ndarray
    ends: list[int]
    texts: Sequence[str]
    encodings: Sequence[Any] | None
    tokenizer: Any

    def of(self, place: int) -> np.ndarray:
        """The ids of text number `place`, int32; a view."""
        return self.ids[self.ends[place] : self.ends[place + 1]]

    def first_from(self, place: int, char: int) -> int:
        """The first token of text `place` that begins at `char` or later; their number if none does."""
        if self.encodings is None:
            return self._first_by_prefix(place, char)
        encoding = self.encodings[place]
        token = encoding.char_to_token(char)
        if token is None:
            begins = [begin for begin, _ in encoding.offsets]
            return next((number for number, begin in enumerate(begins) if begin >= char), len(begins))
        while token < len(encoding) and encoding.token_to_chars(token)[0] < char:
            token += 1
        return token

    def _first_by_prefix(self, place: int, char: int) -> int:
        if char >= len(self.texts[place]):
            return len(self.of(place))
        prefix = self.tokenizer.encode(self.texts[place][:char], add_special_tokens=False)
        if prefix != self.of(place)[: len(prefix)].tolist():
            raise RowError(
                f"{type(self.tokenizer).__name__} gives no character offsets and joins text across the border of a "
                "trained span, so that the loss mask can't be exact; use the fast version of the tokenizer"
            )
        return len(prefix)


def tokenize(tokenizer: Any, texts: Sequence[str], *, special: bool) -> Tokens:
    """The tokens of `texts`; with `special` those the tokenizer adds by itself (such as a first token) are added."""
    encodings = None
    if getattr(tokenizer, "is_fast", False):
        encodings = _encode(tokenizer.backend_tokenizer, texts, special)
        lists = [encoding.ids for encoding in encodings]
    else:
        lists = [tokenizer.encode(text, add_special_tokens=special) for text in texts]
    flat: list[int] = []
    ends = [0]
    for ids in lists:
        flat += ids
        ends.append(len(flat))
    return Tokens(np.array(flat, np.int32), ends, texts, encodings, tokenizer)


def _encode(backend: Any, texts: Sequence[str], special: bool) -> Sequence[Any]:
    backend.no_truncation()
    backend.no_padding()
    if special:
        return backend.encode_batch(texts)
    # A post-processor adds special tokens, which is not wanted here, and may trim spaces off the offsets, which would
    # hide that a token straddles a border.
    processor = backend.post_processor
    backend.post_processor = None
    try:
        return backend.encode_batch(texts, add_special_tokens=False)
    finally:
        backend.post_processor = processor
