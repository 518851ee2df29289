"""Make requests of prompts, rows and conversations, in a model's format.

A conversation is rendered with the model's chat template up to where the assistant is to speak; a text is tokenized as
it is. A row asks by its columns: `prompt` (a text, or a list of messages), a conversation in any of
the shapes that training takes, or `content_split` or `text`, which are continued. A conversation that ends with an
assistant's message is asked again: that message is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from tutti.data.rows import Conversation, RowError, conversation_of, half_surrogate
from tutti.data.template import ChatTemplate
from tutti.infer.generate import Request
from tutti.infer.stream import NO_EDGES, Edges, edges_of

_TEXTS = ("content_split", "text")


@dataclass(frozen=True)
class PromptFormat:
    """A model's way of writing prompts.

    template: renders conversations; None where none is known. is_chat: a bare prompt is a user's message, rather than a
    text to continue. context: most tokens of prompt and answer together; None: no limit known.
    """

    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate | None
    is_chat: bool
    context: int | None

    def dated(self, day: str) -> PromptFormat:
        """The format with a template that is told `day`, YYYY-MM-DD, when it asks for the date."""
        if self.template is None:
            return self
        return replace(self, template=replace(self.template, now=datetime.fromisoformat(day)))

    @cached_property
    def edges(self) -> Edges:
        """The blanks around an answer in a conversation."""
        return NO_EDGES if self.template is None else edges_of(self.template)


def prompt_request(form: PromptFormat, prompt: str, number: int, max_tokens: int) -> Request:
    """A request for the answer to a bare prompt. RowError: it can't be asked."""
    if not form.is_chat:
        return _request(form, _tokens(form, prompt, special=True), number, max_tokens)
    return chat_request(form, Conversation([{"role": "user", "content": prompt}], (False,)), number, max_tokens)


def chat_request(form: PromptFormat, conversation: Conversation, number: int, max_tokens: int) -> Request:
    """A request for the next message of a conversation. RowError: it can't be asked."""
    return _request(form, chat_tokens(form, conversation), number, max_tokens, form.edges)


def row_request(form: PromptFormat, row: dict[str, Any], number: int, max_tokens: int) -> Request:
    """A request for the answer to a row. RowError: it can't be asked."""
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        return prompt_request(form, prompt, number, max_tokens)
    if prompt is None and all(row.get(name) is None for name in ("messages", "conversations", "instruction")):
        text = next((row[name] for name in _TEXTS if isinstance(row.get(name), str)), None)
        if text is None:
            raise RowError(f"has neither prompt nor messages; its columns are {', '.join(row) or 'none'}")
        return _request(form, _tokens(form, text, special=True), number, max_tokens)
    return chat_request(form, conversation_to_answer(row), number, max_tokens)


def conversation_to_answer(row: dict[str, Any]) -> Conversation:
    """The conversation of a row, without the assistant's messages at its end. RowError: the row has none."""
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        row = {**row, "messages": [{"role": "user", "content": prompt}]}
    elif isinstance(prompt, list):
        row = {**row, "messages": prompt}
    elif prompt is not None:
        raise RowError(f"prompt must be a text or a list of messages, not {type(prompt).__name__}")
    elif "instruction" in row and row.get("output") is None:
        row = {**row, "output": ""}
    _refuse_media(row)
    conversation = conversation_of(row, ("messages",))
    while conversation.messages and conversation.messages[-1]["role"] == "assistant":
        conversation.messages.pop()
    if not conversation.messages:
        raise RowError("the conversation has no message to answer")
    return conversation


def chat_tokens(form: PromptFormat, conversation: Conversation) -> list[int]:
    """The tokens of a conversation up to where the assistant is to speak. RowError: the template can't render it."""
    if form.template is None:
        raise RowError("the model has no chat template; name one by infer.chat_template (chatml, say)")
    text = form.template.render(conversation.messages, conversation, prompt=True)
    return _tokens(form, text, special=False)


def _tokens(form: PromptFormat, text: str, *, special: bool) -> list[int]:
    if (half := half_surrogate(text)) is not None:
        raise RowError(f"the prompt has half a surrogate pair, {half!r}, which is no character")
    return form.tokenizer(text, add_special_tokens=special).input_ids


def _request(form: PromptFormat, ids: Sequence[int], number: int, max_tokens: int, edges: Edges = NO_EDGES) -> Request:
    """A request for at most `max_tokens`, or as many as the model's context has room for. RowError: it has none."""
    if not ids:
        raise RowError("the prompt is empty")
    room = max_tokens if form.context is None else form.context - len(ids)
    if room < 1:
        raise RowError(
            f"the prompt has {len(ids)} tokens, which leaves no room for an answer in the model's context of "
            f"{form.context}; shorten it"
        )
    return Request(number, ids, min(room, max_tokens), edges)


def _refuse_media(row: dict[str, Any]) -> None:
    """Raise RowError for images, audio and video, which have no way into a model yet."""
    turns = row.get("messages") or row.get("conversations")
    for number, turn in enumerate(turns if isinstance(turns, list) else ()):
        content = turn.get("content") if isinstance(turn, dict) else None
        for part in content if isinstance(content, list) else ():
            kind = part.get("type", "text") if isinstance(part, dict) else "text"
            if "text" not in str(kind):
                raise RowError(f"message {number} has a part of type {kind}; a model can be given only text so far")
