"""Generation: token ids of prompts in, tokens of answers out, as they come.

`Generator.stream` keeps as many sequences going as its token budget allows. In each round either waiting prompts join
(one packed pass over all of them gives each its first token) or every sequence under way gets one more token. Sequences
that are finished leave at once and make room for the next, so that no work is done on padding or on finished rows; see
`tutti.attention.kv_cache`. Models with more than plain attention (states, dynamic rotary frequencies, penalties in
their generation config) are left to transformers' own `generate`; see `tutti.infer.hf_generate`.

With several ranks every rank holds a part of the model and runs the same sequences; rank 0 chooses the tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as torch_dist
from torch import Tensor
from transformers import PreTrainedModel

from tutti.attention.kv_cache import Cache
from tutti.core.dist import World
from tutti.infer.hf_generate import generate_equal, needs_generate
from tutti.infer.sampling import Sampler


class Request(NamedTuple):
    """A prompt to go on from. number: names the sequence and seeds its sampling. limit: most tokens of the answer."""

    number: int
    ids: Sequence[int]
    limit: int


class Token(NamedTuple):
    """One more token of sequence `number`. end: `stop` (it is a stop token), `length` (the limit), or None."""

    number: int
    id: int
    end: str | None


@dataclass
class _Row:
    """A sequence under way. last: its newest token. made: how many the answer has. end: as in `Token`."""

    request: Request
    random: torch.Generator
    last: int = -1
    made: int = 0
    end: str | None = None

    @property
    def size(self) -> int:
        """Places that the sequence takes in the cache when it is as long as it may get."""
        return len(self.request.ids) + self.request.limit

    def add(self, token: int, stop_ids: frozenset[int]) -> Token:
        self.last, self.made = token, self.made + 1
        self.end = "stop" if token in stop_ids else "length" if self.made == self.request.limit else None
        return Token(self.request.number, token, self.end)


@dataclass
class Generator:
    """Generates with `model`, which has its weights and is in evaluation mode.

    stop_ids: tokens that end an answer. batch_tokens: rows times places that are in the cache at once.
    interrupted: asked once a round; true (on rank 0) ends the streams.
    """

    model: PreTrainedModel
    sampler: Sampler
    stop_ids: frozenset[int]
    dist: World
    batch_tokens: int
    interrupted: Callable[[], bool] = field(default=lambda: False)

    @torch.no_grad()
    def stream(self, requests: Iterable[Request]) -> Iterator[Token]:
        """The tokens of all answers as they are chosen; the next prompt to start is the next of `requests`.

        Each answer ends with a token whose `end` is set. Collective.
        """
        if needs_generate(self.model):
            yield from self._stream_equal(requests)
            return
        waiting = deque(requests)
        rows: list[_Row] = []
        cache = Cache(self.dist.device)
        while waiting or rows:
            joining = self._admit(waiting, rows)
            if joining:
                inputs = cache.prefill([row.request.ids for row in joining])
            else:
                inputs = cache.decode(torch.tensor([row.last for row in rows]))
            active = joining or rows
            rows = rows + joining
            tokens = self._choose(self.model(**inputs).logits[0], active)
            if tokens is None:
                return
            for row, token in zip(active, tokens, strict=True):
                yield row.add(token, self.stop_ids)
            kept = [place for place, row in enumerate(rows) if not row.end]
            if len(kept) < len(rows):
                cache.keep(kept)
                rows = [rows[place] for place in kept]

    def _admit(self, waiting: deque[Request], rows: Sequence[_Row]) -> list[_Row]:
        """Take from `waiting` what the budget has room for beside `rows`; at least one if there are none."""
        longest = max((row.size for row in rows), default=0)
        joining: list[_Row] = []
        while waiting:
            row = _Row(waiting[0], self.sampler.generator(waiting[0].number))
            longest = max(longest, row.size)
            count = len(rows) + len(joining) + 1
            if count > 1 and count * longest > self.batch_tokens:
                break
            waiting.popleft()
            joining.append(row)
        return joining

    def _choose(self, logits: Tensor, rows: Sequence[_Row]) -> list[int] | None:
        """Rank 0's choice for each of `rows` from logits [B, V]; None if it was interrupted."""
        tokens = self.sampler.pick(logits, [row.random for row in rows])
        if self.dist.size > 1:
            shared = torch.cat([tokens, tokens.new_tensor([self.interrupted()])])
            torch_dist.broadcast(shared, src=0)
            *chosen, interrupted = shared.tolist()
            return None if interrupted else chosen
        return None if self.interrupted() else tokens.tolist()

    def _stream_equal(self, requests: Iterable[Request]) -> Iterator[Token]:
        """By transformers' generate, for prompts of one length at a time, so that nothing needs padding."""
        groups: dict[int, list[_Row]] = {}
        for request in requests:
            row = _Row(request, self.sampler.generator(request.number))
            groups.setdefault(len(request.ids), []).append(row)
        for group in groups.values():
            size = max(1, self.batch_tokens // max(row.size for row in group))
            for first in range(0, len(group), size):
                rows = group[first : first + size]
                yield from self._stream_batch(rows)
                if any(not row.end for row in rows):
                    return

    def _stream_batch(self, rows: Sequence[_Row]) -> Iterator[Token]:
        steps = generate_equal(
            self.model,
            [row.request.ids for row in rows],
            lambda logits: self._choose(logits, rows),
            limit=max(row.request.limit for row in rows),
            stop_ids=self.stop_ids,
        )
        for tokens in steps:
            for row, token in zip(rows, tokens, strict=True):
                if not row.end:
                    yield row.add(token, self.stop_ids)
