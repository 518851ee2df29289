"""Preference pairs: from a row with a chosen and a rejected answer to a sample of two sequences.

A row contains both answers, and usually the prompt, in one of many formats, which is detected row by row:

1. Each side becomes a whole conversation: it is one already (`chosen: [messages]`), or the prompt is put before it. The
   prompt is text or messages, an answer is text, a message or messages.
2. The common beginning of both conversations is the prompt, and is not trained on. After it, both must continue with an
   assistant's message.
3. Both go through the encoder of conversations, which knows the chat template and finds the trained tokens.
4. They are joined to one sample, chosen first, split where the rejected one begins. A pair counts as one sample
   everywhere: it is in one micro batch, and data.max_seq_len limits its length. If it is too long, both sides lose the
   same number of tokens at the beginning of the prompt; if the answers alone are too long, the row is bad. Media are in
   the prompt, and each side has all of them.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import numpy as np
from torch import Tensor

from tutti.config import Config
from tutti.core.batch import IGNORE, Sample
from tutti.data.encode import Encoder, make_encoder
from tutti.data.media import MediaSummary
from tutti.data.media_places import media_columns
from tutti.data.rows import CONVERSATIONS, RowError, as_json, kind_of, listed, message_of, question_of
from tutti.data.source import BadRow, Row, text_columns

SIDES = ("chosen", "rejected")

_SPEAKER = re.compile(r"\n\n(Human|Assistant):")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_SHARED = ("system", "tools", "chat_template_kwargs")

Turn = tuple[dict[str, Any], bool]
"""A message in the format of chat templates, and whether it is trained on."""


@dataclass
class PairEncoder:
    """Turns rows into pairs; picklable. chats: the encoder of their conversations, which does not cut them. last:
    answers are scored at their last token, which is then the only target (labeled 0)."""

    chats: Encoder
    columns: tuple[str, ...]
    max_seq_len: int
    last: bool = False

    @property
    def notes(self) -> Counter[str]:
        """The notes of the encoder of conversations."""
        return self.chats.notes

    def __call__(self, rows: Sequence[Row | BadRow], source: int = 0) -> list[list[Sample] | BadRow]:
        """Encode rows: returns for each row its pair, or why there is none. source: the source's index."""
        results: list[Any] = list(rows)
        numbers, sides = [], []
        for number, row in enumerate(rows):
            if isinstance(row, BadRow):
                continue
            try:
                both = conversations_of(row.value, self.columns)
            except RowError as error:
                results[number] = BadRow(row.file, row.line, str(error))
                continue
            numbers.append(number)
            sides += [Row(side, row.file, row.line) for side in both]
        encoded = self.chats(sides, source)
        for number, *answers in zip(numbers, encoded[::2], encoded[1::2], strict=True):
            try:
                results[number] = [self._joined(answers)]
            except RowError as error:
                results[number] = BadRow(rows[number].file, rows[number].line, str(error))
        return results

    def extras(self, samples: Sequence[Sample], length: int) -> dict[str, Tensor]:
        """The inputs in addition to tokens, from the encoder of conversations."""
        return self.chats.extras(samples, length)

    def summarize_media(self, samples: Sequence[Sample]) -> MediaSummary:
        """Statistics of the pairs' media, counting both answers."""
        return self.chats.summarize_media(samples)

    def _joined(self, answers: Sequence[Any]) -> Sample:
        """Join the encoded chosen and rejected conversations to a pair."""
        samples: list[Sample] = []
        for name, side in zip(SIDES, answers, strict=True):
            if isinstance(side, BadRow):
                raise RowError(f"{name}: {side.reason}")
            samples += side
        chosen, rejected = samples
        if np.array_equal(chosen.input_ids, rejected.input_ids):
            raise RowError("chosen and rejected are the same once they are tokenised")
        total = len(chosen) + len(rejected)
        cut = max(0, -(-(total - self.max_seq_len) // 2))
        if cut > min(int(np.argmax(side.labels != IGNORE)) for side in samples):
            raise RowError(
                f"a pair of {total} tokens is longer than data.max_seq_len {self.max_seq_len}, and the answers leave "
                "no room for any of the prompt"
            )
        for side in samples:
            self.chats.require_media(side.media, side.input_ids, side.input_ids[cut:], self.max_seq_len)
        labels = [side.labels[cut:] for side in samples]
        if self.last:
            labels = [np.append(np.full(len(side) - 1, IGNORE, np.int32), np.int32(0)) for side in labels]
        return Sample(
            np.concatenate([side.input_ids[cut:] for side in samples]),
            np.concatenate(labels),
            chosen.source,
            split=len(chosen) - cut,
            media=chosen.media + rejected.media,
            num_values=chosen.num_values + rejected.num_values,
        )


def make_pair_encoder(config: Config, tokenizer: Any, *, vocab_size: int, processor: Any = None) -> PairEncoder:
    """The encoder for tasks whose rows are pairs; arguments and errors as for `make_encoder`."""
    chats = replace(config, data=replace(config.data, data_type="conversation", text_keys="messages"))
    encoder = replace(
        make_encoder(chats, tokenizer, vocab_size=vocab_size, processor=processor), max_seq_len=sys.maxsize
    )
    return PairEncoder(encoder, text_columns(config), config.data.max_seq_len, last=config.data.task.head == "scalar")


def conversations_of(value: dict[str, Any], columns: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The chosen and the rejected conversation of a row, as rows of conversations in which the answers are trained on.

    columns: possible prompt columns, in order of preference.
    """
    for name in SIDES:
        if value.get(name) is None:
            raise RowError(f"has no column {name}; its columns are {listed(value)}")
    prompt = _prompt(value, columns)
    chosen, rejected = (_turns(name, _unpacked(value[name]), prompt) for name in SIDES)
    if chosen == rejected:
        raise RowError("chosen and rejected are the same")
    shared = len(list(takewhile(lambda pair: pair[0][0] == pair[1][0], zip(chosen, rejected, strict=False))))
    if not shared:
        raise RowError("chosen and rejected do not begin with the same prompt")
    for name, turns in zip(SIDES, (chosen, rejected), strict=True):
        if len(turns) == shared:
            raise RowError(f"no trained token: {name} has no answer after what both begin with")
        if (role := turns[shared][0]["role"]) != "assistant":
            raise RowError(
                f"chosen and rejected part at message {shared}, which in {name} is not an assistant's but of role "
                f"{role}: the prompt must be the same in both"
            )
    beside = {key: value[key] for key in (*_SHARED, *media_columns(value)) if value.get(key) is not None}
    both = ([_masked(turn, number >= shared) for number, turn in enumerate(turns)] for turns in (chosen, rejected))
    return tuple({**beside, "messages": messages} for messages in both)  # type: ignore[return-value]


def _masked(turn: Turn, answer: bool) -> dict[str, Any]:
    """The message, with a loss_mask unless its role alone already decides whether it is trained on."""
    message, trained = turn
    trained = trained and answer
    return message if trained == (message["role"] == "assistant") else {**message, "loss_mask": int(trained)}


def _prompt(value: dict[str, Any], columns: Sequence[str]) -> Any:
    """The prompt of a row, before the answers: text, messages, or None."""
    for column in (*columns, *CONVERSATIONS):
        prompt = value.get(column)
        if prompt is not None:
            return as_json(prompt, list, column) if column in CONVERSATIONS else _unpacked(prompt)
    return question_of(value) if value.get("instruction") is not None else None


def _unpacked(side: Any) -> Any:
    """Decode messages that a table stored as JSON text; anything else is unchanged."""
    if isinstance(side, str) and side.lstrip().startswith("[{"):
        try:
            turns = json.loads(side)
        except json.JSONDecodeError:
            return side
        if all(isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in turns):
            return turns
    return side


def _turns(name: str, side: Any, prompt: Any) -> list[Turn]:
    """The conversation in `side`, with the prompt in front if it is only an answer."""
    if isinstance(side, str):
        begun = prompt if isinstance(prompt, str) else ""
        if prompt is None or _SPEAKER.match(begun):
            return _dialogue(name, begun + side)
        side = {"role": "assistant", "content": side}
    if isinstance(side, dict):
        side = [side]
    if not isinstance(side, list):
        raise RowError(f"{name} must be text or messages, not {kind_of(side)}")
    turns = _normal(name, side)
    if not turns:
        raise RowError(f"{name} is an empty conversation")
    if prompt is None:
        return turns
    if isinstance(prompt, str):
        before: list[Turn] = [({"role": "user", "content": prompt}, False)]
        whole = any(message["role"] == "user" and message.get("content") == prompt for message, _ in turns)
    elif isinstance(prompt, list):
        before = _normal("the prompt", prompt)
        whole = [message for message, _ in turns[: len(before)]] == [message for message, _ in before]
    else:
        raise RowError(f"the prompt must be text or messages, not {kind_of(prompt)}")
    if whole:
        return turns
    if turns[0][0]["role"] != "assistant":
        raise RowError(f"{name} is a conversation that does not hold the prompt of its row")
    return before + turns


def _normal(name: str, turns: list[Any]) -> list[Turn]:
    try:
        return [message_of(number, turn) for number, turn in enumerate(turns)]
    except RowError as error:
        raise RowError(f"{name}: {error}") from None


def _dialogue(name: str, text: str) -> list[Turn]:
    """The turns of a conversation in one text: `\\n\\nHuman: ...\\n\\nAssistant: ...`."""
    first, *parts = _SPEAKER.split(text)
    if first.strip() or not parts:
        raise RowError(
            f"{name} is text, and the row has no prompt (data.text_keys), nor does {name} hold a conversation itself"
        )
    roles = [_SPEAKERS[speaker] for speaker in parts[::2]]
    contents = [content.strip() for content in parts[1::2]]
    return [
        ({"role": role, "content": content}, role == "assistant") for role, content in zip(roles, contents, strict=True)
    ]
