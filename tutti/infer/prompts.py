"""Rows and messages as token ids to go on from.

A conversation is rendered with the model's chat template up to where the assistant is to speak; a text is tokenized as
it is. What a row asks for is found by its columns: `prompt` (a text, or a list of messages), a conversation in any of
the shapes that training takes, or `content_split` or `text`, which are gone on with. A conversation that ends with an
assistant's message is asked again: that message is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tutti.data.rows import Conversation, RowError, conversation_of
from tutti.infer.generate import Request
from tutti.infer.load import Speaker

_TEXTS = ("content_split", "text")


def request(speaker: Speaker, ids: Sequence[int], number: int, max_tokens: int) -> Request:
    """The request to go on from `ids` for at most `max_tokens`, or as far as the model's context reaches.

    RowError: it leaves no room for an answer.
    """
    if not ids:
        raise RowError("the prompt is empty")
    room = max_tokens if speaker.context is None else speaker.context - len(ids)
    if room < 1:
        raise RowError(
            f"the prompt has {len(ids)} tokens, which leaves no room for an answer in the model's context of "
            f"{speaker.context}; shorten it"
        )
    return Request(number, ids, min(room, max_tokens))


def row_ids(speaker: Speaker, row: dict[str, Any]) -> list[int]:
    """The token ids that the row's answer follows. RowError: what is wrong with it."""
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        return prompt_ids(speaker, prompt)
    if isinstance(prompt, list):
        row = {**row, "messages": prompt}
    elif prompt is not None:
        raise RowError(f"prompt must be a text or a list of messages, not {type(prompt).__name__}")
    elif not any(row.get(name) for name in ("messages", "conversations", "instruction")):
        text = next((row[name] for name in _TEXTS if isinstance(row.get(name), str)), None)
        if text is None:
            raise RowError(f"has neither prompt nor messages; its columns are {', '.join(row) or 'none'}")
        return speaker.tokenizer(text).input_ids
    _refuse_media(row)
    conversation = conversation_of(row, ("messages",))
    while conversation.messages and conversation.messages[-1]["role"] == "assistant":
        conversation.messages.pop()
    if not conversation.messages:
        raise RowError("the conversation has no message to answer")
    return conversation_ids(speaker, conversation)


def _refuse_media(row: dict[str, Any]) -> None:
    """Images, audio and video have no way into a model yet: RowError."""
    turns = row.get("messages") or row.get("conversations")
    for number, turn in enumerate(turns if isinstance(turns, list) else ()):
        content = turn.get("content") if isinstance(turn, dict) else None
        for part in content if isinstance(content, list) else ():
            kind = part.get("type", "text") if isinstance(part, dict) else "text"
            if "text" not in str(kind):
                raise RowError(f"message {number} has a part of type {kind}; a model can be given only text so far")


def prompt_ids(speaker: Speaker, prompt: str) -> list[int]:
    """A bare prompt: a user's message, or for a model without a chat template a text to go on with."""
    if not speaker.is_chat:
        return speaker.tokenizer(prompt).input_ids
    return conversation_ids(speaker, Conversation([{"role": "user", "content": prompt}], (False,)))


def conversation_ids(speaker: Speaker, conversation: Conversation) -> list[int]:
    """The conversation as the model is to answer it. RowError: the template can't render it."""
    if speaker.template is None:
        raise RowError("the model has no chat template; name one by infer.chat_template (chatml, say)")
    text = speaker.template.render(conversation.messages, conversation, prompt=True)
    return speaker.tokenizer(text, add_special_tokens=False).input_ids
