"""Generation: token ids of prompts in, tokens of answers out, as they come.

`Generator.stream` keeps as many sequences going as its token budget allows. In each round either waiting prompts join
or every sequence under way gets one more token. Sequences that are finished leave at once and make room for the next,
so that no work is done on padding or on finished rows.

The next logits are computed in one of three ways, behind `NextLogits`:

- `CachedLogits`: prompts run as one packed row, then one token a sequence against a cache of keys and values
  (`tutti.attention.kv_cache`), by a model whose parameters lie on one device or are sharded.
- `tutti.infer.hf_generate`: transformers' own loop, for models with more than plain attention.
- `tutti.train.samples`: all tokens so far are run anew, by a model that is split over ranks in any way.

With several ranks all of them run the same sequences; rank 0 chooses the tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tutti.attention.kv_cache import KVCache
from tutti.core.batch import Media
from tutti.core.dist import World
from tutti.infer.drawing import Drawing, DrawingState
from tutti.infer.media import MediaInputs
from tutti.infer.sampling import Sampler
from tutti.infer.stream import NO_EDGES, Edges, TextStream, answer_text


class Request(NamedTuple):
    """A prompt to continue. number: names the sequence and seeds its sampling. limit: most tokens of the answer. edges:
    the blanks around the answer that are no part of it. media: what stands in the place of some of its tokens. drawn:
    the answer begins with a picture, whose first token is the last of `ids`."""

    number: int
    ids: Sequence[int]
    limit: int
    edges: Edges = NO_EDGES
    media: tuple[Media, ...] = ()
    drawn: bool = False

    @property
    def size(self) -> int:
        """The tokens of prompt and answer when the answer is as long as it may get."""
        return len(self.ids) + self.limit

    def hidden(self, hide: Callable[[Sequence[int]], list[int]], begun: int) -> Request:
        """The request with its prompt hidden, but for the `begun` tokens at its end that begin a picture."""
        prompt = len(self.ids) - (begun if self.drawn else 0)
        return self._replace(ids=[*hide(self.ids[:prompt]), *self.ids[prompt:]])


class Token(NamedTuple):
    """One more token of sequence `number`. end: `stop` (it is a stop token), `text` (the answer's text has one of
    infer.stop), `length` (the limit), or None."""

    number: int
    id: int
    end: str | None


Forward = Callable[[Mapping[str, Any], Mapping[str, Tensor]], Any]
"""The output of a model for a pass of the cache (`KVCache`), and for the values of its prompts' media, by name."""


class NextLogits(Protocol):
    """Computes the logits that follow each of the sequences under way, which are kept in the order they started in.

    joins: sequences may start while others are under way, and together with such of other lengths. All methods are
    collective.
    """

    joins: bool

    def start(self, requests: Sequence[Request]) -> Tensor:
        """Start sequences; the logits [n, V] that follow their n prompts."""
        ...

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Add a token to each of the B sequences; the logits [B, V] that follow."""
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """Forget all sequences but those in `rows` (ascending)."""
        ...


class CachedLogits:
    """Next logits of a model whose attention is `tutti.attention.kv_cache`'s.

    forward: the model, or what calls it: given the cache's inputs, and the values of new prompts' media (`extras`).
    media: makes these of prompts.
    """

    joins = True

    def __init__(self, forward: Forward, device: torch.device, media: MediaInputs) -> None:
        self._forward, self._device, self._media = forward, device, media
        self._cache = KVCache(device)

    def start(self, requests: Sequence[Request]) -> Tensor:
        if self._media.masks and len(requests) > 1 and any(item.media for item in requests):
            return torch.cat([self.start([item]) for item in requests])
        extras, ahead = self._media.packed([(item.ids, item.media) for item in requests])
        inputs = self._cache.prefill([item.ids for item in requests], [item.size for item in requests], ahead)
        return self._forward(inputs, {name: value.to(self._device) for name, value in extras.items()}).logits[0]

    def step(self, tokens: Sequence[int]) -> Tensor:
        return self._forward(self._cache.decode(tokens), {}).logits[0]

    def keep(self, rows: Sequence[int]) -> None:
        self._cache.keep(rows)


@dataclass
class _Row:
    """A sequence under way. state: where its pictures are. text: looks for texts that end it. answer: its tokens so
    far. end: as in `Token`."""

    request: Request
    random: torch.Generator
    state: DrawingState
    text: TextStream | None = None
    answer: list[int] = field(default_factory=list)
    end: str | None = None

    @property
    def seen(self) -> list[int]:
        """The tokens of prompt and answer."""
        return [*self.request.ids, *self.answer]

    def add(self, token: int, stop_ids: frozenset[int]) -> Token:
        self.answer.append(token)
        if self.text is not None:
            self.text.add(token)
        if token in stop_ids:
            self.end = "stop"
        elif self.text is not None and self.text.is_stopped:
            self.end = "text"
        elif len(self.answer) == self.request.limit:
            self.end = "length"
        return Token(self.request.number, token, self.end)


@dataclass
class Generator:
    """Generates with the model behind `logits`.

    stop_ids: tokens that end an answer. batch_tokens: most sequences under way times the size of the largest of them,
    unless it is one alone. interrupted: asked once a round; true (on rank 0) ends the streams. drawing: of a model that
    draws. make_text: makes what looks for texts that end an answer, if there are such.
    """

    logits: NextLogits
    sampler: Sampler
    stop_ids: frozenset[int]
    world: World
    batch_tokens: int
    interrupted: Callable[[], bool] = field(default=lambda: False)
    drawing: Drawing | None = None
    make_text: Callable[[], TextStream] | None = None

    @torch.no_grad()
    def stream(self, requests: Iterable[Request]) -> Iterator[Token]:
        """The tokens of all answers as they are chosen; prompts start in the order of `requests`.

        Each answer ends with a token whose `end` is set. Collective.
        """
        waiting = deque(requests)
        rows: list[_Row] = []
        try:
            while waiting or rows:
                joining = self._admit(waiting, rows)
                if joining:
                    logits = self.logits.start([row.request for row in joining])
                else:
                    logits = self.logits.step([row.answer[-1] for row in rows])
                active = joining or rows
                rows = rows + joining
                tokens = self._choose(logits, active)
                if tokens is None:
                    return
                for row, token in zip(active, tokens, strict=True):
                    if self.drawing is not None:
                        row.state.add(token, self.drawing)
                    yield row.add(token, self.stop_ids)
                kept = [place for place, row in enumerate(rows) if not row.end]
                if len(kept) < len(rows):
                    self.logits.keep(kept)
                    rows = [rows[place] for place in kept]
        finally:
            self.logits.keep([])

    def _admit(self, waiting: deque[Request], rows: Sequence[_Row]) -> list[_Row]:
        """Take from `waiting` as many as the budget has room for beside `rows`; at least one if there are none."""
        if rows and not self.logits.joins:
            return []
        largest = max((row.request.size for row in rows), default=0)
        joining: list[_Row] = []
        passed_over: list[Request] = []
        while waiting:
            request = waiting[0]
            if joining and not self.logits.joins and len(request.ids) != len(joining[0].request.ids):
                passed_over.append(waiting.popleft())
                continue
            largest = max(largest, request.size)
            count = len(rows) + len(joining) + 1
            if count > 1 and count * largest > self.batch_tokens:
                break
            request = waiting.popleft()
            state = DrawingState.of(request, self.drawing)
            text = self.make_text and self.make_text()
            joining.append(_Row(request, self.sampler.generator(request.number), state, text))
        waiting.extendleft(reversed(passed_over))
        return joining

    def _choose(self, logits: Tensor, rows: Sequence[_Row]) -> list[int] | None:
        """Rank 0's choice for each of `rows` from logits [B, V]; None if it was interrupted."""
        if self.sampler.repetition_penalty != 1:
            logits = self.sampler.penalize(logits, [row.seen for row in rows])
        if self.drawing is not None:
            logits = self.drawing.allow(logits, [row.state for row in rows])
        tokens = self.sampler.pick(logits, [row.random for row in rows])
        if self.world.size > 1:
            shared = torch.cat([tokens, tokens.new_tensor([self.interrupted()])])
            dist.broadcast(shared, src=0)
            *chosen, interrupted = shared.tolist()
            return None if interrupted else chosen
        return None if self.interrupted() else tokens.tolist()


def whole_answers(
    tokens: Iterable[Token], requests: Iterable[Request], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[int, str]]:
    """Number and text of each answer, once the last of its `tokens` is there."""
    edges = {request.number: request.edges for request in requests}
    made: dict[int, list[int]] = {number: [] for number in edges}
    for token in tokens:
        if token.end != "stop":
            made[token.number].append(token.id)
        if token.end:
            yield token.number, answer_text(tokenizer, made.pop(token.number), edges[token.number])
