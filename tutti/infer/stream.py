"""Tokens of an answer as text, all at once or piece by piece as they come."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from tutti.data.rows import Conversation, RowError
from tutti.data.template import ChatTemplate


class Edges(NamedTuple):
    """The blanks that a chat template writes before and after the content of an answer.

    A model that was trained with the template generates them too, and the template writes them again around an answer
    that is fed back, so they are no part of its text.
    """

    before: str = ""
    after: str = ""

    def strip(self, text: str) -> str:
        return text.removeprefix(self.before).removesuffix(self.after)


NO_EDGES = Edges()


def edges_of(template: ChatTemplate) -> Edges:
    """The blanks around an answer by `template`; none where its trained spans are not known."""
    turn = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]
    try:
        text, spans = template(Conversation(turn, (False, True)))
    except RowError:
        return NO_EDGES
    found = re.match(r"(\s*)x(\s*)", text[slice(*spans[-1])]) if spans else None
    return Edges(*found.groups()) if found else NO_EDGES


class TextStream:
    """Turns the tokens of one answer into pieces of text that can be shown at once.

    A token may hold part of a character only, and some tokenizers write a token differently after another, so that
    tokens can't be decoded one by one. The last few tokens are decoded with each new one and without it, and the piece
    is the difference; it is held back while it ends in an incomplete character, or may be the blanks at an edge.
    (tokenizers' own DecodeStream stops with an error at bytes that are no character, and tokenizers that are written in
    Python lack it.)
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, edges: Edges = NO_EDGES) -> None:
        self._tokenizer = tokenizer
        self._edges = edges
        self._ids: list[int] = []
        self._start = 0
        self._shown = 0
        self._begun = False
        self._held = ""

    def add(self, token: int) -> str:
        """One more token; the text that is now complete."""
        self._ids.append(token)
        text = self._decoded(self._start, len(self._ids))
        if text.endswith("\ufffd"):
            return ""
        return self._within_edges(self._advance(text))

    def end(self) -> str:
        """The text that is left when no token follows."""
        rest = self._held + self._advance(self._decoded(self._start, len(self._ids)))
        if not self._begun:
            rest = rest.removeprefix(self._edges.before)
        return rest.removesuffix(self._edges.after)

    def _within_edges(self, piece: str) -> str:
        """The part of the held back text and `piece` that is certain to belong to the answer."""
        text, (before, after) = self._held + piece, self._edges
        if not self._begun:
            if len(text) < len(before) and before.startswith(text):
                self._held = text
                return ""
            text, self._begun = text.removeprefix(before), bool(text)
        keep = next(size for size in range(min(len(after), len(text)), -1, -1) if text.endswith(after[:size]))
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _advance(self, text: str) -> str:
        before = self._decoded(self._start, self._shown)
        piece = text[len(before) :]
        if piece:  # else the next token would be decoded as the first of a text
            self._start = self._shown
        self._shown = len(self._ids)
        return piece

    def _decoded(self, start: int, stop: int) -> str:
        return answer_text(self._tokenizer, self._ids[start:stop])


def answer_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], edges: Edges = NO_EDGES) -> str:
    """The text of an answer, without special tokens and the blanks at its edges."""
    return edges.strip(str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)))
