"""Drawing in an answer: which tokens may come next, and pictures made of the codes among them.

A model that draws says so by the token that begins a picture. From there on it gives codes, which are tokens beyond the
vocabulary, as many as a picture has; the token that ends a picture follows by itself, and text goes on. A picture is
not begun where the answer has no room for all of it.

With guidance (classifier-free, arXiv 2207.12598) each sequence has a twin whose prompt is hidden, as some are in
training (train.cfg_dropout). Codes are drawn from logits that are pushed away from the twin's: u + guidance * (c - u).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from tutti.core.pixels import to_image
from tutti.model.omni_processor import drawing_marks
from tutti.model.vq import PictureTokenizer

if TYPE_CHECKING:
    from tutti.infer.generate import NextLogits, Request, Token


@dataclass(frozen=True)
class Drawing:
    """How a model draws. start, end: the tokens around a picture. first: the id of code 0. tokens: codes of a picture.
    temperature: divides their logits, beside infer.temperature. decode: from codes [N, n] to pictures [N, 3, S, S]."""

    start: int
    end: int
    first: int
    tokens: int
    decode: Callable[[Tensor], Tensor]
    temperature: float = 1.0

    @property
    def room(self) -> int:
        """The tokens that a picture takes, with those around it."""
        return self.tokens + 2

    def allow(self, logits: Tensor, states: Sequence[DrawingState]) -> Tensor:
        """Logits [B, V] with those of tokens that may not come next at -inf."""
        allowed = logits.clone()
        for row, state in enumerate(states):
            if state.ends:
                allowed[row] = -torch.inf
                allowed[row, self.end] = 0.0
            elif state.left:
                allowed[row, : self.first] = -torch.inf
                allowed[row, self.first :] /= self.temperature
            else:
                allowed[row, self.first :] = -torch.inf
                if state.room < self.room:
                    allowed[row, self.start] = -torch.inf
        return allowed


@dataclass
class DrawingState:
    """Where a sequence is. room: tokens that its answer may still get. left: codes that its picture lacks. ends: the
    picture is complete, and its end comes next."""

    room: int
    left: int = 0
    ends: bool = False

    @classmethod
    def of(cls, request: Request, drawing: Drawing | None) -> DrawingState:
        """The state before the answer to a request, whose prompt may end with the beginning of a picture."""
        begun = drawing is not None and request.ids[-1] == drawing.start
        return cls(request.limit, drawing.tokens if begun and drawing else 0)

    def add(self, token: int, drawing: Drawing) -> None:
        """Go on by a token."""
        self.room -= 1
        self.ends = self.left == 1
        self.left = drawing.tokens if token == drawing.start else max(0, self.left - 1)


@dataclass
class Pictures:
    """Collects the pictures of answers, by number. made: what is done with each as it is complete: its answer's number,
    its place among the answer's pictures, and itself."""

    drawing: Drawing | None
    made: Callable[[int, int, Image.Image], None] = lambda number, place, picture: None
    found: dict[int, list[Image.Image]] = field(default_factory=dict)

    def watch(self, tokens: Iterable[Token]) -> Iterator[Token]:
        """The tokens of texts; codes are left out and become pictures."""
        codes: dict[int, list[int]] = {}
        for token in tokens:
            drawing = self.drawing
            if drawing is None or token.id < drawing.first:
                yield token
                continue
            own = codes.setdefault(token.number, [])
            own.append(token.id - drawing.first)
            if len(own) == drawing.tokens:
                picture = to_image(drawing.decode(torch.tensor([codes.pop(token.number)]))[0])
                pictures = self.found.setdefault(token.number, [])
                pictures.append(picture)
                self.made(token.number, len(pictures), picture)


class GuidedLogits:
    """Next logits whose codes are pushed away from those of twins with hidden prompts. inner: computes both. hide: a
    prompt's tokens as they are hidden."""

    joins = True

    def __init__(
        self, inner: NextLogits, first: int, guidance: float, hide: Callable[[Sequence[int]], list[int]]
    ) -> None:
        self._inner, self._first, self._guidance, self._hide = inner, first, guidance, hide

    def start(self, requests: Sequence[Request]) -> Tensor:
        both = [one for item in requests for one in (item, item._replace(ids=self._hidden(item)))]
        return self._guided(self._inner.start(both))

    def step(self, tokens: Sequence[int]) -> Tensor:
        return self._guided(self._inner.step([token for token in tokens for _ in range(2)]))

    def keep(self, rows: Sequence[int]) -> None:
        self._inner.keep([twin for row in rows for twin in (2 * row, 2 * row + 1)])

    def _hidden(self, request: Request) -> list[int]:
        begun = request.ids[-1:] if request.drawn else []
        return [*self._hide(request.ids[: len(request.ids) - len(begun)]), *begun]

    def _guided(self, logits: Tensor) -> Tensor:
        guided, free = logits[0::2].clone(), logits[1::2]
        codes = slice(self._first, None)
        guided[:, codes] = free[:, codes] + self._guidance * (guided[:, codes] - free[:, codes])
        return guided


@dataclass(frozen=True)
class Hidden:
    """Hides a prompt: every token becomes `meaningless`, but for those in `kept`, the places of media."""

    meaningless: int
    kept: frozenset[int]

    def __call__(self, ids: Sequence[int]) -> list[int]:
        return [token if token in self.kept else self.meaningless for token in ids]


def hiding(tokenizer: Any, model: Any) -> Hidden:
    """How prompts are hidden from a model that draws: their tokens become padding, or else the end of a text."""
    token = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    places = getattr(model.config, "placeholders", None) or {}
    return Hidden(token, model.code_decoder.kept.union(places.values()))


def drawing_of(
    model: Any, tokenizer: Any, device: torch.device, temperature: float = 1.0
) -> tuple[Drawing, Any] | None:
    """How a model draws, and its tokenizer of pictures; None if it does not."""
    folder = getattr(model, "drawing_folder", None)
    if folder is None:
        return None
    pictures, marks = PictureTokenizer(folder, device, size=model.drawing_size), drawing_marks(tokenizer)
    first, tokens = model.code_decoder.first, pictures.codes.tokens
    return Drawing(marks.start, marks.end, first, tokens, pictures.decode, temperature), pictures
