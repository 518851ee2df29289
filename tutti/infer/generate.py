"""Generation: token ids of prompts in, tokens of answers out, as they are generated.

`Generator.stream` keeps as many sequences running as its token budget allows. In each round, either waiting prompts
start or every running sequence gets one more token. Finished sequences leave at once and make room for the next, so no
work is spent on padding or finished rows.

The next logits are computed in one of three ways, behind `NextLogits`:

- `CachedLogits`: prompts run as one packed row, then one token per sequence with a key/value cache
  (`tutti.attention.kv_cache`); for models whose parameters are on one device or sharded.
- `tutti.infer.hf_generate`: transformers' own loop, for models with more than plain attention.
- `tutti.train.samples`: all tokens so far are run again, for a model that is split over ranks in any way.

With several ranks, all of them run the same sequences, and rank 0 chooses the tokens.
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
    """A prompt to continue.

    number: identifies the sequence and seeds its sampling. limit: maximum number of tokens of the answer. edges: spaces
    around the answer that are not part of it. media: of the prompt, in the order of their placeholders. drawn: the
    answer begins with an image, whose first token is the last of `ids`.
    """

    number: int
    ids: Sequence[int]
    limit: int
    edges: Edges = NO_EDGES
    media: tuple[Media, ...] = ()
    drawn: bool = False

    @property
    def size(self) -> int:
        """The number of tokens of the prompt and the longest possible answer."""
        return len(self.ids) + self.limit

    def hidden(self, hide: Callable[[Sequence[int]], list[int]], begun: int) -> Request:
        """The request with its prompt hidden, except for the `begun` tokens at its end that begin an image."""
        prompt = len(self.ids) - (begun if self.drawn else 0)
        return self._replace(ids=[*hide(self.ids[:prompt]), *self.ids[prompt:]])


class Token(NamedTuple):
    """A generated token of sequence `number`. end: `stop` (it is a stop token), `text` (the answer contains a text
    of infer.stop), `length` (the limit), or None."""

    number: int
    id: int
    end: str | None


Forward = Callable[[Mapping[str, Any], Mapping[str, Tensor]], Any]
"""Function from the inputs of a cache pass (`KVCache`), and the values of its prompts' media by name, to the model's
output."""


class NextLogits(Protocol):
    """Computes the next logits of each running sequence; sequences are in the order in which they started.

    joins: sequences may start while others are running, and together with others of different lengths. All methods are
    collective.
    """

    joins: bool

    def start(self, requests: Sequence[Request]) -> Tensor:
        """Start n sequences; returns the logits [n, V] that follow their prompts."""
        ...

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Add a token to each of the B sequences; returns the logits [B, V] that follow."""
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all sequences except those in `rows` (ascending)."""
        ...


class CachedLogits:
    """Next logits of a model whose attention is `tutti.attention.kv_cache`.

    forward: calls the model with the cache's inputs, and the values of new prompts' media (`extras`). media: makes
    these values from prompts.
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
    """A running sequence. state: which tokens of images come next. text: detects texts that end the answer. answer:
    its tokens so far. end: as in `Token`."""

    request: Request
    random: torch.Generator
    state: DrawingState
    text: TextStream | None = None
    answer: list[int] = field(default_factory=list)
    end: str | None = None

    @property
    def seen(self) -> list[int]:
        """The tokens of the prompt and of the answer so far."""
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

    stop_ids: tokens that end an answer. batch_tokens: maximum of the number of running sequences times the size of the
    largest, unless a single one exceeds it. interrupted: called once per round; true (on rank 0) ends the streams.
    drawing: for a model that draws. make_text: makes detectors of texts that end an answer, if there are such texts.
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
        """Yield the tokens of all answers as they are chosen; prompts start in the order of `requests`.

        The last token of each answer has its `end` set. Collective.
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
        """Take from `waiting` as many requests as the budget allows in addition to `rows`; at least one if there are
        none."""
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
        """Rank 0's choice of the next token for each of `rows` from logits [B, V]; None if it was interrupted."""
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
    """Yield the number and text of each answer when the last of its `tokens` has arrived."""
    edges = {request.number: request.edges for request in requests}
    made: dict[int, list[int]] = {number: [] for number in edges}
    for token in tokens:
        if token.end != "stop":
            made[token.number].append(token.id)
        if token.end:
            yield token.number, answer_text(tokenizer, made.pop(token.number), edges[token.number])
