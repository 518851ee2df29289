"""Tokenizing a batch of texts, and finding the token at a character.

The fast path calls the `tokenizers` library below a Hugging Face tokenizer once per batch: it uses all cores and
releases the interpreter lock. A text is always tokenized as a whole, never in segments, so that the ids are those the
model sees at inference.

For byte-level tokenizers (as in GPT-2 and most models) the position of a token follows from the ids alone: a token
stands for a fixed number of bytes, so its position is the sum over the tokens before it. This is checked for each text,
which must have its full length, and saves the library the bookkeeping, a fifth of its time. Otherwise the library's
character offsets are used. A few tokenizers are written in Python and have none; for them a character's token is found
by tokenizing the text up to it.

A run of one added token, such as the hundreds that represent an image, is tokenized as a single one, whose id is then
repeated.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from unicodedata import is_normalized

import numpy as np


@dataclass
class Tokens:
    """The concatenated tokens of a batch of n texts.

    ids: int32. ends: where each text's tokens end, [n + 1] from 0. begins: the byte at which each token begins and the
    last one ends, int64 [tokens + 1], if it follows from the ids; else offsets: per text, each token's first character;
    else neither.
    """

    tokenizer: Any
    texts: Sequence[str]
    ids: np.ndarray
    ends: list[int]
    begins: np.ndarray | None = None
    offsets: list[list[int]] | None = None

    def first_from(self, places: Sequence[int], chars: Sequence[int]) -> list[int]:
        """For each text index and character, the text's first token that begins there or later (or the number of its
        tokens).

        -1 if a tokenizer without offsets merges text across that character.
        """
        if self.begins is None:
            return [self._first_from(place, char) for place, char in zip(places, chars, strict=True)]
        starts = self.begins[self.ends][list(places)]
        within = [
            char if self.texts[place].isascii() else len(self.texts[place][:char].encode())
            for place, char in zip(places, chars, strict=True)
        ]
        found = np.searchsorted(self.begins, starts + np.array(within, np.int64)).tolist()
        return [token - self.ends[place] for place, token in zip(places, found, strict=True)]

    def _first_from(self, place: int, char: int) -> int:
        if self.offsets is not None:
            begins = self.offsets[place]
            return next((token for token, begin in enumerate(begins) if begin >= char), len(begins))
        ids = self.ids[self.ends[place] : self.ends[place + 1]]
        if char >= len(self.texts[place]):
            return len(ids)
        prefix = self.tokenizer.encode(self.texts[place][:char], add_special_tokens=False)
        return len(prefix) if prefix == ids[: len(prefix)].tolist() else -1


class BatchTokenizer:
    """Tokenizes texts in batches; picklable. special: with the tokens that the tokenizer adds by itself."""

    def __init__(self, tokenizer: Any, *, special: bool, places: bool, repeated: Sequence[int] = ()) -> None:
        """places: `Tokens.first_from` will be called. repeated: ids of tokens that texts contain in long runs."""
        self.tokenizer, self.special, self.places = tokenizer, special, places
        self.fast = bool(getattr(tokenizer, "is_fast", False))
        self._byte_lengths = _byte_lengths(tokenizer) if self.fast and places and not special else None
        self._repeated = _alone(tokenizer, repeated) if self._byte_lengths is not None else {}
        self._runs = _runs_of(self._repeated.values())

    def __call__(self, texts: Sequence[str]) -> Tokens:
        if not self.fast:
            return self._tokens(texts, [self.tokenizer.encode(text, add_special_tokens=self.special) for text in texts])
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        if self._byte_lengths is None and self.places:
            return self._with_offsets(backend, texts)
        tokens = self._without_runs(backend, texts) if self._repeated else None
        if tokens is None:
            encodings = backend.encode_batch_fast(texts, add_special_tokens=self.special)
            tokens = self._tokens(texts, [encoding.ids for encoding in encodings])
        if self._byte_lengths is not None:
            tokens.begins = self._begins(tokens, self._byte_lengths)
            if tokens.begins is None:
                return self._with_offsets(backend, texts)
        return tokens

    def _tokens(self, texts: Sequence[str], lists: Sequence[list[int]]) -> Tokens:
        flat: list[int] = []
        ends = [0]
        for ids in lists:
            flat += ids
            ends.append(len(flat))
        return Tokens(self.tokenizer, texts, np.array(flat, np.int32), ends)

    def _without_runs(self, backend: Any, texts: Sequence[str]) -> Tokens | None:
        """The tokens of texts, tokenizing each run of an added token as a single one; None if a single one and its
        text do not correspond everywhere."""
        lengths: list[int] = []
        of_text = {text: len(text) for text in self._repeated.values()}

        def one(run: re.Match[str]) -> str:
            text = next(text for text in of_text if run.group().startswith(text))
            lengths.append(len(run.group()) // of_text[text])
            return text

        shorter = [self._runs.sub(one, text) for text in texts]
        tokens = self._tokens(texts, [one.ids for one in backend.encode_batch_fast(shorter, add_special_tokens=False)])
        places = np.flatnonzero(np.isin(tokens.ids, list(self._repeated)))
        if len(places) != len(lengths):
            return None
        repeats = np.ones(len(tokens.ids), np.int64)
        repeats[places] = lengths
        ends = np.concatenate([[0], np.cumsum(repeats)])[tokens.ends]
        return Tokens(self.tokenizer, texts, np.repeat(tokens.ids, repeats), ends.tolist())

    def _begins(self, tokens: Tokens, byte_lengths: np.ndarray) -> np.ndarray | None:
        """The byte at which each token begins; None if some text was not tokenized byte for byte."""
        if len(tokens.ids) and int(tokens.ids.max()) >= len(byte_lengths):
            return None
        ends = np.concatenate([[0], np.cumsum(byte_lengths[tokens.ids])])
        lengths = np.diff(ends[tokens.ends]).tolist()
        for text, length in zip(tokens.texts, lengths, strict=True):
            if text.isascii():
                if length != len(text):
                    return None
            elif length != len(text.encode()) or not is_normalized("NFC", text):
                return None
        return ends

    def _with_offsets(self, backend: Any, texts: Sequence[str]) -> Tokens:
        # A post-processor only adds special tokens, which are not wanted here, and may remove spaces from the
        # offsets, which would hide that a token straddles a border.
        processor = backend.post_processor
        if not self.special:
            backend.post_processor = None
        try:
            encodings = backend.encode_batch(texts, add_special_tokens=self.special)
        finally:
            backend.post_processor = processor
        tokens = self._tokens(texts, [encoding.ids for encoding in encodings])
        tokens.offsets = [[begin for begin, _ in encoding.offsets] for encoding in encodings]
        return tokens


def _byte_lengths(tokenizer: Any) -> np.ndarray | None:
    """The number of bytes that each id stands for, int64 [vocabulary]; None if this tokenizer has no fixed numbers."""
    backend = tokenizer.backend_tokenizer
    if _state(backend.normalizer).get("type", "NFC") != "NFC" or "ByteLevel" not in str(_state(backend.pre_tokenizer)):
        return None
    # In a byte-level vocabulary each character of a token stands for one byte; added tokens are plain text.
    lengths = np.zeros(max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1, np.int64)
    for token, number in backend.get_vocab(with_added_tokens=False).items():
        lengths[number] = len(token)
    for number, added in backend.get_added_tokens_decoder().items():
        lengths[number] = len(added.content.encode())
    return lengths


def _alone(tokenizer: Any, ids: Sequence[int]) -> dict[int, str]:
    """The texts of those of `ids` that are added tokens which are recognized wherever they occur in a text: no added
    token can overlap them."""
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    found = {}
    for number in {number for number in ids if number in added}:
        token, text = added[number], added[number].content
        free = not (token.lstrip or token.rstrip or token.single_word)
        if free and not any(_overlap(text, other.content, same=place == number) for place, other in added.items()):
            found[number] = text
    return found


def _runs_of(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern for runs of one of `texts`; starting with the text itself makes it much faster."""
    return re.compile("|".join("{0}(?:{0})*".format(re.escape(text)) for text in texts) or "(?!)")


def _overlap(one: str, other: str, *, same: bool) -> bool:
    """True if the texts can overlap in a longer one. same: they are one token, which may overlap itself as a whole."""
    if not same and (one in other or other in one):
        return True
    sizes = range(1, min(len(one), len(other)))
    return any(one[-size:] == other[:size] or other[-size:] == one[:size] for size in sizes)


def _state(part: Any) -> dict[str, Any]:
    """The settings of a part of a tokenizer, which may be missing."""
    return json.loads(part.__getstate__()) if part else {}
