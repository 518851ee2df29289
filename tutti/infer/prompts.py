"""Turn prompts, rows and conversations into requests, in a model's format.

A conversation is rendered with the model's chat template up to where the assistant has to speak; a text is tokenized as
it is. A row contains a `prompt` (a text, or a list of messages), a conversation in any format of training data, or
`content_split` or `text`, which are continued. If a conversation ends with an assistant's message, that message is
dropped and generated again. Media in a conversation are found, measured and put in place of the template's placeholders
as in training (`tutti.data.media_processor`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tutti.core.batch import Media
from tutti.data.media import MediaFolder
from tutti.data.media_places import Entry, media_columns, not_taken, with_media
from tutti.data.media_processor import MediaProcessor
from tutti.data.rows import Conversation, RowError, conversation_of, fill, half_surrogate
from tutti.data.template import ChatTemplate
from tutti.infer.drawing import Drawing
from tutti.infer.generate import Request
from tutti.infer.media import as_sample
from tutti.infer.stream import NO_EDGES, Edges, edges_of

_TEXTS = ("content_split", "text")


@dataclass(frozen=True)
class PromptFormat:
    """A model's prompt format.

    template: renders conversations; None if unknown. is_chat: a bare prompt is a user's message, rather than a text to
    continue. context: maximum number of tokens of prompt and answer together; None if unlimited. media: the processor
    of a multimodal model. media_root: an additional folder for media files, besides that of the rows (data.media_root).
    row_template: messages, by role, for rows without any (data.row_template). drawing: for a model that draws. encode:
    encodes images to codes [N, n], for a model that sees images as codes. stops: infer.stop.
    """

    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate | None
    is_chat: bool
    context: int | None
    media: MediaProcessor | None = None
    media_root: str | None = None
    row_template: Mapping[str, str] = field(default_factory=dict)
    drawing: Drawing | None = None
    encode: Callable[[Any], Any] | None = None
    stops: tuple[str, ...] = ()

    def dated(self, day: str) -> PromptFormat:
        """A copy whose template gets the date `day`, YYYY-MM-DD."""
        if self.template is None:
            return self
        return replace(self, template=replace(self.template, now=datetime.fromisoformat(day)))

    @cached_property
    def edges(self) -> Edges:
        """The whitespace around an answer in a conversation."""
        return NO_EDGES if self.template is None else edges_of(self.template)


def prompt_request(
    form: PromptFormat, prompt: str, number: int, max_tokens: int, media: Sequence[Entry] = ()
) -> Request:
    """A request for the answer to a bare prompt, with media before it. RowError: it cannot be answered."""
    if not form.is_chat and not media:
        return _request(form, _tokens(form, prompt, special=True), number, max_tokens)
    content: Any = [*(as_part(*entry) for entry in media), {"type": "text", "text": prompt}] if media else prompt
    return chat_request(form, Conversation([{"role": "user", "content": content}], (False,)), number, max_tokens)


def as_part(kind: str, path: str) -> dict[str, str]:
    """A message part for a user's media file, at any path."""
    return {"type": kind, kind: Path(path).expanduser().absolute().as_uri()}


def chat_request(
    form: PromptFormat,
    conversation: Conversation,
    number: int,
    max_tokens: int,
    *,
    columns: Mapping[str, Any] | None = None,
    folder: str = "/",
) -> Request:
    """A request for the next message of a conversation. RowError: it cannot be answered.

    columns: of the conversation's row, some of which may contain its media. folder: where media files may be.
    """
    ids, media = chat_tokens(form, conversation, columns=columns, folder=folder)
    return _request(form, ids, number, max_tokens, form.edges)._replace(media=media)


def row_request(form: PromptFormat, row: dict[str, Any], number: int, max_tokens: int, folder: str) -> Request:
    """A request for the answer to a row of a file in `folder`. RowError: it cannot be answered."""
    row = filled(form, row)
    prompt = row.get("prompt")
    if isinstance(prompt, str) and not media_columns(row):
        return prompt_request(form, prompt, number, max_tokens)
    if prompt is None and all(row.get(name) is None for name in ("messages", "conversations", "instruction")):
        text = next((row[name] for name in _TEXTS if isinstance(row.get(name), str)), None)
        if text is None:
            raise RowError(f"has neither prompt nor messages; its columns are {', '.join(row) or 'none'}")
        return _request(form, _tokens(form, text, special=True), number, max_tokens)
    return chat_request(form, conversation_to_answer(row), number, max_tokens, columns=row, folder=folder)


def filled(form: PromptFormat, row: dict[str, Any]) -> dict[str, Any]:
    """The row with the messages of data.row_template up to the answer, unless the row has a prompt of its own."""
    asked = {role: text for role, text in form.row_template.items() if role != "assistant"}
    if not asked or row.get("prompt") is not None:
        return row
    if is_target(form.row_template):
        row = {name: value for name, value in row.items() if name not in ("image", "images")}
    return fill(asked, row)


def is_target(row_template: Mapping[str, str]) -> bool:
    """True if the assistant's answer to a row is its image."""
    others = "".join(text for role, text in row_template.items() if role != "assistant")
    return "<image>" in row_template.get("assistant", "") and "<image>" not in others


def to_draw(form: PromptFormat, request: Request) -> Request:
    """The request, changed so that the answer begins with an image. RowError: the model does not draw, or has no
    room for it."""
    drawing = form.drawing
    if drawing is None:
        raise RowError("this model draws no pictures (model.decoders)")
    if not drawing.draws:
        raise RowError("this model makes codes of pictures, and no pictures of codes; it does not draw")
    room = form.context - len(request.ids) if form.context else drawing.room
    if room < drawing.room:
        raise RowError(f"the prompt leaves no room for the {drawing.room} tokens of a picture; shorten it")
    ids = [*request.ids, *drawing.begins]
    return request._replace(ids=ids, limit=max(request.limit, drawing.room), drawn=True)


def conversation_to_answer(row: dict[str, Any]) -> Conversation:
    """The conversation of a row, without the assistant's last messages. RowError: the row has none."""
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        row = {**row, "messages": [{"role": "user", "content": prompt}]}
    elif isinstance(prompt, list):
        row = {**row, "messages": prompt}
    elif prompt is not None:
        raise RowError(f"prompt must be a text or a list of messages, not {type(prompt).__name__}")
    elif "instruction" in row and row.get("output") is None:
        row = {**row, "output": ""}
    conversation = conversation_of(row, ("messages",))
    while conversation.messages and conversation.messages[-1]["role"] == "assistant":
        conversation.messages.pop()
    if not conversation.messages:
        raise RowError("the conversation has no message to answer")
    return conversation


def chat_tokens(
    form: PromptFormat, conversation: Conversation, *, columns: Mapping[str, Any] | None = None, folder: str = "/"
) -> tuple[list[int], tuple[Media, ...]]:
    """The tokens of a conversation up to where the assistant has to speak, and its media. RowError: it cannot be
    answered.

    columns, folder: as for `chat_request`.
    """
    if form.template is None:
        raise RowError("the model has no chat template; name one by infer.chat_template (chatml, say)")
    conversation, entries = with_media(conversation, columns or {})
    if entries and form.media is None:
        raise not_taken(entries)
    if form.media is not None:
        conversation, entries = form.media.place(conversation, entries)
    text = form.template.render(conversation.messages, conversation, prompt=True)
    if form.media is None:
        return _tokens(form, text, special=False), ()
    places = MediaFolder(folder, form.media_root)
    media = tuple(form.media.measure(kind, entry, places) for kind, entry in entries)
    ids = _tokens(form, form.media.expand(text, media)[0], special=False)
    return _with_codes(form, ids, media) if any(medium.kind == "drawn" for medium in media) else (ids, media)


def _with_codes(form: PromptFormat, ids: list[int], media: tuple[Media, ...]) -> tuple[list[int], tuple[Media, ...]]:
    """The tokens with the codes of images that the model sees as codes inserted, and the other media."""
    assert form.media is not None and form.drawing is not None and form.encode is not None
    pixels = form.media.values([as_sample(ids, media)], len(ids))["drawn_pixels"]
    codes = iter((form.encode(pixels).flatten() + form.drawing.first).tolist())
    (placeholder,) = form.media.processor.drawn_token_ids
    filled = [next(codes) if token == placeholder else token for token in ids]
    return filled, tuple(medium for medium in media if medium.kind != "drawn")


def _tokens(form: PromptFormat, text: str, *, special: bool) -> list[int]:
    if (half := half_surrogate(text)) is not None:
        raise RowError(f"the prompt has half a surrogate pair, {half!r}, which is no character")
    # Not verbose: we report ourselves if the prompt is too long.
    return form.tokenizer(text, add_special_tokens=special, verbose=False).input_ids


def _request(form: PromptFormat, ids: Sequence[int], number: int, max_tokens: int, edges: Edges = NO_EDGES) -> Request:
    """A request for at most `max_tokens`, limited by the model's context. RowError: it leaves no room."""
    if not ids:
        raise RowError("the prompt is empty")
    room = max_tokens if form.context is None else form.context - len(ids)
    if room < 1:
        raise RowError(
            f"the prompt has {len(ids)} tokens, which leaves no room for an answer in the model's context of "
            f"{form.context}; shorten it"
        )
    return Request(number, ids, min(room, max_tokens), edges._replace(stops=form.stops))
