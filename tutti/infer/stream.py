"""Decoding the tokens of an answer to text, all at once or as they arrive."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from tutti.data.rows import Conversation, RowError
from tutti.data.template import ChatTemplate


class Edges(NamedTuple):
    """The whitespace that a chat template writes before and after an answer, and texts that end an answer.

    A model trained with the template generates this whitespace too, and the template writes it again around an answer
    that is sent back, so it is not part of the answer's text. Neither are `stops` (infer.stop) and what follows one.
    """

    before: str = ""
    after: str = ""
    stops: tuple[str, ...] = ()

    def strip(self, text: str) -> str:
        return text[: self.end_of(text)].removeprefix(self.before).removesuffix(self.after)

    def end_of(self, text: str) -> int:
        """The position of the first of `stops` in `text`, or its length."""
        return min((place for stop in self.stops if (place := text.find(stop)) >= 0), default=len(text))

    def uncertain(self, text: str) -> int:
        """The number of characters at the end of `text` that may not be part of the answer."""
        begun = {size for stop in self.stops for size in range(len(stop)) if text.endswith(stop[:size])} | {0}
        return max(size + self._blanks(text[: len(text) - size]) for size in begun)

    def _blanks(self, text: str) -> int:
        """The number of characters at the end of `text` that may belong to the whitespace after an answer."""
        after = self.after
        return next(size for size in range(min(len(after), len(text)), -1, -1) if text.endswith(after[:size]))


NO_EDGES = Edges()


def edges_of(template: ChatTemplate) -> Edges:
    """The whitespace around an answer by `template`; none if its trained spans are unknown."""
    turn = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]
    try:
        text, spans = template(Conversation(turn, (False, True)))
    except RowError:
        return NO_EDGES
    found = re.match(r"(\s*)x(\s*)", text[slice(*spans[-1])]) if spans else None
    return Edges(found[1], found[2]) if found else NO_EDGES


class TextStream:
    """Turns the tokens of one answer into pieces of text that can be shown at once.

    A token may be only a part of a character, and some tokenizers write a token differently depending on the one
    before, so tokens cannot be decoded one by one. The last few tokens are decoded with and without each new one, and
    the piece is the difference. It is held back while it ends in an incomplete character, or may belong to the spaces
    at an edge. (tokenizers' own DecodeStream stops with an error at invalid bytes, and tokenizers written in Python do
    not have it.)
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, edges: Edges = NO_EDGES) -> None:
        self._tokenizer = tokenizer
        self._edges = edges
        self._ids: list[int] = []
        self._start = 0
        self._shown = 0
        self._begun = False
        self._held = ""
        self.is_stopped = False
        """True after a text that ends the answer was generated."""

    def add(self, token: int) -> str:
        """Add a token; returns the text that is now complete."""
        if self.is_stopped:
            return ""
        self._ids.append(token)
        text = self._decoded(self._start, len(self._ids))
        if text.endswith("\ufffd"):
            return ""
        return self._within_edges(self._advance(text))

    def end(self) -> str:
        """The remaining text when no token follows."""
        rest = self._held
        if not self.is_stopped:
            rest += self._advance(self._decoded(self._start, len(self._ids)))
            rest = rest[: self._edges.end_of(rest)]
        if not self._begun:
            rest = rest.removeprefix(self._edges.before)
        return rest.removesuffix(self._edges.after)

    def _within_edges(self, piece: str) -> str:
        """The part of the held-back text and `piece` that certainly belongs to the answer."""
        text, before = self._held + piece, self._edges.before
        if (end := self._edges.end_of(text)) < len(text):
            self._held, self.is_stopped = text[:end], True
            return ""
        keep = self._edges.uncertain(text)
        sure = text[: len(text) - keep]
        if not self._begun:
            if len(sure) < len(before) and before.startswith(sure):
                self._held = text
                return ""
            sure, self._begun = sure.removeprefix(before), bool(sure)
        self._held = text[len(text) - keep :]
        return sure

    def _advance(self, text: str) -> str:
        before = self._decoded(self._start, self._shown)
        piece = text[len(before) :]
        if piece:  # otherwise the next token would be decoded as the first one of a text
            self._start = self._shown
        self._shown = len(self._ids)
        return piece

    def _decoded(self, start: int, stop: int) -> str:
        return answer_text(self._tokenizer, self._ids[start:stop])


def answer_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], edges: Edges = NO_EDGES) -> str:
    """The text of an answer, without special tokens and the whitespace at its edges."""
    return edges.strip(str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)))
