"""Tokens of an answer as text, all at once or piece by piece as they come."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase


class TextStream:
    """Turns the tokens of one answer into pieces of text that can be shown at once.

    A token may hold part of a character only, and some tokenizers write a token differently after another, so that
    tokens can't be decoded one by one. Each piece is what the last few tokens give more than they gave before; it is
    held back while it ends in an incomplete character.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0
        self._shown = 0

    def add(self, token: int) -> str:
        """One more token; the text that is now complete."""
        self._ids.append(token)
        text = self._decoded(self._start, len(self._ids))
        if text.endswith("\ufffd"):
            return ""
        return self._advance(text)

    def end(self) -> str:
        """What is left when no token follows."""
        return self._advance(self._decoded(self._start, len(self._ids)))

    def _advance(self, text: str) -> str:
        before = self._decoded(self._start, self._shown)
        self._start, self._shown = self._shown, len(self._ids)
        return text[len(before) :]

    def _decoded(self, start: int, stop: int) -> str:
        return answer_text(self._tokenizer, self._ids[start:stop])


def answer_text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text of an answer, without special tokens."""
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
