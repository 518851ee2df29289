"""Images in answers: which tokens may come next, and decoding the codes among them to images.

A model that draws starts an image with a special token. From there on it generates codes (tokens beyond the vocabulary,
or within it), as many as an image has. Tokens that the family writes around and between codes are inserted
automatically, and then text continues. An image is not started if the answer has no room for all of it.

With classifier-free guidance (arXiv 2207.12598) each sequence has a twin whose prompt is hidden, as some are in
training (train.cfg_dropout). Codes are sampled from logits that are pushed away from the twin's: u + guidance * (c -
u).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from tutti.core.pixels import to_image
from tutti.infer.flow_painter import FlowPainter
from tutti.model.drawing import picture_text
from tutti.model.omni_processor import CODE
from tutti.model.vq import PictureTokenizer

if TYPE_CHECKING:
    from tutti.infer.generate import NextLogits, Request, Token


_CODE = -1
"""Marks a code in the pattern of an image."""


@dataclass(frozen=True)
class Drawing:
    """Description of how a model draws.

    start: the token that begins an image. pattern: the tokens that follow it up to the one that ends the image, with -1
    for codes. first, number: the id of code 0, and the number of codes. decode: from codes [N, n] to images [N, 3, S,
    S]; None if the model only sees images as codes. temperature: divides the logits of codes, on top of
    infer.temperature. paint: for a model that draws with queries (`tutti.infer.flow_painter`), which are then in the
    pattern instead of codes: makes an image [3, S, S] from the answer's number and the image's index.
    """

    start: int
    pattern: tuple[int, ...]
    first: int
    number: int
    decode: Callable[[Tensor], Tensor] | None
    temperature: float = 1.0
    paint: Callable[[int, int], Tensor] | None = None

    @property
    def codes(self) -> slice:
        """The ids of codes."""
        return slice(self.first, self.first + self.number)

    @property
    def tokens(self) -> int:
        """The number of codes of an image."""
        return self.pattern.count(_CODE)

    @property
    def room(self) -> int:
        """The number of tokens of an image, including those around it."""
        return len(self.pattern) + 1

    @property
    def begins(self) -> list[int]:
        """The tokens before the first code."""
        first = 0 if self.paint is not None else self.pattern.index(_CODE)
        return [self.start, *self.pattern[:first]]

    @property
    def draws(self) -> bool:
        """True if images can be made."""
        return self.decode is not None or self.paint is not None

    def allow(self, logits: Tensor, states: Sequence[DrawingState]) -> Tensor:
        """Set the logits [B, V] of tokens that may not come next to -inf."""
        allowed = logits.clone()
        for row, state in enumerate(states):
            if state.place is None:
                allowed[row, self.codes] = -torch.inf
                if state.room < self.room or not self.draws:
                    allowed[row, self.start] = -torch.inf
            elif self.pattern[state.place] == _CODE:
                own = allowed[row, self.codes] / self.temperature
                allowed[row] = -torch.inf
                allowed[row, self.codes] = own
            else:
                allowed[row] = -torch.inf
                allowed[row, self.pattern[state.place]] = 0.0
        return allowed


@dataclass
class DrawingState:
    """The state of a sequence. room: number of tokens that its answer may still get. place: index in the pattern of
    what comes next in its image; None outside of images."""

    room: int
    place: int | None = None

    @classmethod
    def of(cls, request: Request, drawing: Drawing | None) -> DrawingState:
        """The state before the answer to a request, whose prompt may end with the beginning of an image."""
        begins = [] if drawing is None else drawing.begins
        begun = begins and list(request.ids[-len(begins) :]) == begins
        return cls(request.limit, len(begins) - 1 if begun else None)

    def add(self, token: int, drawing: Drawing) -> None:
        """Add a token."""
        self.room -= 1
        if self.place is not None:
            self.place = self.place + 1 if self.place + 1 < len(drawing.pattern) else None
        elif token == drawing.start:
            self.place = 0


@dataclass
class PictureCollector:
    """Collects the images of answers, by number. made: called with each complete image: its answer's number, its
    index in the answer, and the image."""

    drawing: Drawing | None
    made: Callable[[int, int, Image.Image], None] = lambda number, place, picture: None
    found: dict[int, list[Image.Image]] = field(default_factory=dict)

    def watch(self, tokens: Iterable[Token]) -> Iterator[Token]:
        """Pass on text tokens and the tokens that begin and end images, and turn codes into images."""
        codes: dict[int, list[int]] = {}
        states: dict[int, DrawingState] = {}
        for token in tokens:
            if (drawing := self.drawing) is None:
                yield token
                continue
            state = states.setdefault(token.number, DrawingState(0))
            is_code = 0 <= token.id - drawing.first < drawing.number
            if state.place is None and is_code:  # belongs to an image that the prompt has begun
                state.place = len(drawing.begins) - 1
            inside = state.place is not None
            state.add(token.id, drawing)
            if not inside or state.place is None:
                if inside and drawing.paint is not None:
                    self._complete(token.number, [], drawing)
                yield token
            elif is_code and drawing.paint is None:
                codes.setdefault(token.number, []).append(token.id - drawing.first)
                if len(codes[token.number]) == drawing.tokens:
                    self._complete(token.number, codes.pop(token.number), drawing)

    def _complete(self, number: int, codes: list[int], drawing: Drawing) -> None:
        pictures = self.found.setdefault(number, [])
        place = len(pictures) + 1
        if drawing.paint is not None:
            pixels = drawing.paint(number, place)
        else:
            assert drawing.decode is not None
            pixels = drawing.decode(torch.tensor([codes]))[0]
        pictures.append(to_image(pixels))
        self.made(number, place, pictures[-1])


class GuidedLogits:
    """Next logits with guidance for codes, from twins with hidden prompts. inner: computes both. hide: replaces a
    prompt's tokens."""

    joins = True

    def __init__(
        self, inner: NextLogits, drawing: Drawing, guidance: float, hide: Callable[[Sequence[int]], list[int]]
    ) -> None:
        self._inner, self._drawing, self._guidance, self._hide = inner, drawing, guidance, hide

    def start(self, requests: Sequence[Request]) -> Tensor:
        both = [one for item in requests for one in (item, item.hidden(self._hide, len(self._drawing.begins)))]
        return self._guided(self._inner.start(both))

    def step(self, tokens: Sequence[int]) -> Tensor:
        return self._guided(self._inner.step([token for token in tokens for _ in range(2)]))

    def keep(self, rows: Sequence[int]) -> None:
        self._inner.keep([twin for row in rows for twin in (2 * row, 2 * row + 1)])

    def _guided(self, logits: Tensor) -> Tensor:
        guided, free = logits[0::2].clone(), logits[1::2]
        codes = self._drawing.codes
        guided[:, codes] = free[:, codes] + self._guidance * (guided[:, codes] - free[:, codes])
        return guided


@dataclass(frozen=True)
class Hidden:
    """Hides a prompt: replaces every token by `meaningless`, except those in `kept`, the placeholders of media."""

    meaningless: int
    kept: frozenset[int]

    def __call__(self, ids: Sequence[int]) -> list[int]:
        return [token if token in self.kept else self.meaningless for token in ids]


def hiding(tokenizer: Any, model: Any) -> Hidden:
    """The `Hidden` for a model that draws: tokens become padding, or else end-of-text."""
    token = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    places = getattr(model.config, "placeholders", None) or {}
    return Hidden(token, model.code_decoder.kept.union(places.values()))


def drawing_of(
    model: Any, tokenizer: Any, device: torch.device, temperature: float = 1.0, painter: FlowPainter | None = None
) -> tuple[Drawing, PictureTokenizer | FlowPainter] | None:
    """The `Drawing` of a model, and the tokenizer that encodes images; None if it does not draw. painter: for a
    model with a diffusion decoder."""
    folder: Any = getattr(model, "drawing_folder", None)
    if folder is None and painter is None:
        return None
    codes: Any = model.code_decoder
    pictures: Any = painter or PictureTokenizer(folder, device, size=model.drawing_size)
    written = tokenizer(picture_text(tokenizer, pictures.codes), add_special_tokens=False).input_ids
    placeholder = tokenizer.convert_tokens_to_ids(CODE)
    if painter is not None:
        queries = count(codes.first)
        start, *pattern = (next(queries) if token == placeholder else token for token in written)
        return Drawing(start, tuple(pattern), codes.first, codes.number, None, paint=painter.paint), painter
    start, *pattern = (_CODE if token == placeholder else token for token in written)
    decode = pictures.decode if pictures.codes.draws else None
    return Drawing(start, tuple(pattern), codes.first, codes.number, decode, temperature), pictures
