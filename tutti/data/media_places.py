"""Media in the messages of a row: the many ways in which rows say where an image, a video or a sound belongs.

- Parts: content is a list of `{"type": "text" | "image" | "video" | "audio", ...}` (Hugging Face), or OpenAI's
  `image_url`, `video_url` and `input_audio`. A part names its medium, or takes the next entry of the row's column.
- Placeholders: `<image>`, `<video>` and `<audio>` in texts, for the entries of the row's columns `images` or `image`
  (LLaVA, ShareGPT4V, ms-swift, LLaMA-Factory, VeOmni). The rest of a text is unchanged.
- A column for whose entries no text has a place: they come before the first message of the user.
- A video may be a list of frames: an entry of `videos` that is a list, or all of `video`, unless it has as many entries
  as there are places for videos.

Chat templates get parts without their media, `{"type": "image"}`, and write the model's placeholders. When these are
replaced by a medium's tokens, `shift` converts the trained spans.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tutti.core.batch import Media
from tutti.data.media import plural
from tutti.data.rows import KINDS, MEDIA_PARTS, Conversation, RowError, kind_of

_TEXT = ("text", "input_text", "output_text", None)
_PLACEHOLDER = re.compile("<(image|video|audio)>")
_NAMES = ("url", "path", "base64", "data", "bytes")

Entry = tuple[str, Any]
"""A medium's kind, and its entry in the row."""

Span = tuple[int, int]


def with_media(conversation: Conversation, row: Mapping[str, Any]) -> tuple[Conversation, list[Entry]]:
    """The conversation of a row with a part for each medium, and the media's entries; see `place_media`."""
    messages, entries = place_media(conversation.messages, row)
    if not entries:
        return conversation, []
    return replace(conversation, messages=messages), entries


def place_media(messages: list[dict[str, Any]], row: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[Entry]]:
    """The messages with each reference to a medium replaced by a part, and the media's entries in order.

    Messages without media are unchanged. RowError: media without a place, or places without a medium.
    """
    columns = {kind: _column(row, kind) for kind in KINDS}
    if isinstance(row.get("video"), list | tuple) and len(columns["video"]) != max(1, _places(messages, "video")):
        columns["video"] = [row["video"]]
    said = any(isinstance(message.get("content"), list) for message in messages)
    if not said and not any(columns.values()):
        return messages, []
    left = {kind: list(entries) for kind, entries in columns.items()}
    homeless = [kind for kind, entries in columns.items() if entries and not _places(messages, kind)]
    entries: list[Entry] = []
    placed = []
    for number, message in enumerate(messages):
        content = message.get("content")
        parts = _parts(content, columns) if isinstance(content, str) else _typed(number, content)
        if message["role"] == "user" and homeless:
            kinds = [kind for kind in homeless for _ in columns[kind]]
            parts, homeless = [*((kind, None) for kind in kinds), *parts], []
        if all(kind == "text" for kind, _ in parts):
            text = "".join(value for _, value in parts)
            placed.append({**message, "content": text} if "content" in message else message)
            continue
        for place, (kind, entry) in enumerate(parts):
            if kind == "text":
                continue
            if entry is None:
                if not left[kind]:
                    raise RowError(f"has more places for {kind}s than the {len(columns[kind])} in its column {kind}s")
                entry = left[kind].pop(0)
            entries.append((kind, entry))
            parts[place] = (kind, None)
        shown = [{"type": "text", "text": value} if kind == "text" else {"type": kind} for kind, value in parts]
        placed.append({**message, "content": shown})
    for kind, rest in left.items():
        if rest:
            used = len(columns[kind]) - len(rest)
            raise RowError(f"has {len(columns[kind])} {kind}s, and places for {used} of them")
    return placed, entries


def as_drawn(conversation: Conversation, entries: list[Entry], *, everyone: bool) -> tuple[Conversation, list[Entry]]:
    """The conversation with its images marked as images to draw (kind `drawn`): those of the assistant, or of
    everyone; and the entries of all media likewise."""
    kinds: list[str] = []
    messages = []
    for message in conversation.messages:
        content = message.get("content")
        if not isinstance(content, list):
            messages.append(message)
            continue
        draws = everyone or message["role"] == "assistant"
        parts = [{"type": "drawn"} if draws and part["type"] == "image" else part for part in content]
        kinds += [part["type"] for part in parts if part["type"] != "text"]
        messages.append({**message, "content": parts})
    renamed = [(kind, entry) for kind, (_, entry) in zip(kinds, entries, strict=True)]
    return replace(conversation, messages=messages), renamed


def literal_places(messages: list[dict[str, Any]]) -> set[str]:
    """The placeholders that remain in texts of messages after media were placed, since there was no medium for them."""
    found: set[str] = set()
    for content in (message.get("content") or "" for message in messages):
        texts = [content] if isinstance(content, str) else [part.get("text", "") for part in content]
        for text in texts:
            if "<" in text:  # a quick look first: nearly no text has it
                found.update(f"<{kind}>" for kind in _PLACEHOLDER.findall(text))
    return found


def not_taken(entries: list[Entry]) -> RowError:
    """The error for media if the model has no processor for them."""
    kinds = " and ".join(sorted({kind for kind, _ in entries}))
    return RowError(f"has {kinds}, and this model takes none, or its folder has no processor that can be used")


def media_columns(row: Mapping[str, Any]) -> list[str]:
    """The columns of a row that hold media."""
    return [name for kind in KINDS for name in (f"{kind}s", kind) if row.get(name) is not None]


def _column(row: Mapping[str, Any], kind: str) -> list[Any]:
    """The entries of a row's column of media."""
    for name in (f"{kind}s", kind):
        entries = row.get(name)
        if entries is not None:
            return list(entries) if isinstance(entries, list | tuple) else [entries]
    return []


def _places(messages: list[dict[str, Any]], kind: str) -> int:
    """The number of places that messages have for media of a kind."""
    count = 0
    for message in messages:
        content = message.get("content")
        if isinstance(content, str):
            count += content.count(f"<{kind}>")
        elif isinstance(content, list):
            parts = (part for part in content if isinstance(part, dict))
            count += sum(MEDIA_PARTS.get(part.get("type", "")) == kind for part in parts)
    return count


def _parts(text: str, columns: Mapping[str, list[Any]]) -> list[tuple[str, Any]]:
    """A text split at the placeholders of media that the row has; other placeholders stay text."""
    parts: list[tuple[str, Any]] = []
    last = 0
    for found in _PLACEHOLDER.finditer(text):
        kind = found.group(1)
        if not columns[kind]:
            continue
        if found.start() > last:
            parts.append(("text", text[last : found.start()]))
        parts.append((kind, None))
        last = found.end()
    if last < len(text) or not parts:
        parts.append(("text", text[last:]))
    return parts


def _typed(number: int, content: Any) -> list[tuple[str, Any]]:
    """The parts of a content list, as kinds with their text or reference to a medium (None if there is none)."""
    if content is None:
        return []
    if not isinstance(content, list):
        raise RowError(f"message {number}: content must be text or a list of parts, not {kind_of(content)}")
    parts: list[tuple[str, Any]] = []
    for part in content:
        if not isinstance(part, dict):
            raise RowError(f"message {number} has a part that is {kind_of(part)}")
        kind = part.get("type")
        if kind in _TEXT:
            if not isinstance(part.get("text"), str):
                raise RowError(f"message {number} has a text part without text")
            parts.append(("text", part["text"]))
        elif kind in MEDIA_PARTS:
            parts.append((MEDIA_PARTS[kind], _entry(part, MEDIA_PARTS[kind])))
        else:
            raise RowError(f"message {number} has a part of type {kind}; known are text, {', '.join(MEDIA_PARTS)}")
    return parts


def _entry(part: Mapping[str, Any], kind: str) -> Any:
    """The entry with the medium of a part: under its type, its kind, frames, or a name such as url or path."""
    for name in (part["type"], kind, "frames", *_NAMES):
        value = part.get(name)
        if value is None:
            continue
        if isinstance(value, dict) and value.get("bytes") is None and value.get("frames") is None:
            inner = next((value[key] for key in _NAMES if value.get(key) is not None), None)
            if inner is None:
                raise RowError(f"a part of type {part['type']} without url, path or data")
            if "data" in value and isinstance(inner, str) and not inner.startswith("data:"):
                return f"data:{kind}/{value.get('format', 'x')};base64,{inner}"
            return inner
        if name == "base64" and isinstance(value, str) and not value.startswith("data:"):
            return f"data:{kind}/x;base64,{value}"
        if kind == "video" and isinstance(value, list | tuple):
            return {"frames": value, "video_fps": part.get("video_fps")}
        return value
    return None


def shift(spans: Sequence[Span], places: Sequence[tuple[int, int, int]], media: Sequence[Media]) -> list[Span]:
    """Convert spans of a text to spans after the replacements at `places` (from `MediaProcessor.expand`) of `media`.

    RowError: a span contains a replacement that is not an image to draw, which cannot be trained on.
    """
    moved = []
    seen = [place for place, medium in zip(places, media, strict=True) if medium.kind != "drawn"]
    for begin, end in spans:
        if any(start < end and begin < stop for start, stop, _ in seen):
            raise RowError("an assistant message has media, which only models with a decoder for them are trained on")
        moved.append(tuple(_moved(place, places) for place in (begin, end)))
    return moved  # type: ignore[return-value]


def _moved(at: int, places: Sequence[tuple[int, int, int]]) -> int:
    """Convert a position in a text to one in the text with replacements."""
    before = [(stop, end) for _, stop, end in places if stop <= at]
    return at + before[-1][1] - before[-1][0] if before else at


def mismatch(kinds: Sequence[str], media: Sequence[Media]) -> str:
    """The difference between the placeholders in a text, of these kinds, and the media of its row, in words."""
    for kind in (*KINDS, "drawn"):
        said, given = kinds.count(kind), sum(medium.kind == kind for medium in media)
        if said != given:
            return f"the text has {said} places for {plural(kind)}, and the row has {given}"
    return "images, videos and sounds come in another order in the text than in the row"
