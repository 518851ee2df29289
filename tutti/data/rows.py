"""Row formats: documents, conversations and labeled texts, validated and normalized.

A conversation becomes a list of messages as chat templates take them, with a flag for each that says whether it is
trained on. Its format is detected row by row, so a file may mix them: OpenAI messages (`role`, `content`), ShareGPT
(`from`, `value`), Alpaca (`instruction`, `input`, `output`). Tool calls have many formats too; templates get all of
them in one (`_calls`), with arguments as an object. Every error is a `RowError` that says exactly what is wrong.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tutti.core.batch import Sample
from tutti.data.formats import BadRow, Row

ROLES = ("system", "developer", "user", "assistant", "tool")
_ALIASES = {
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "ipython": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
} | {role: role for role in ROLES}
_CALLERS = ("function_call", "tool_call")
"""Role names of an assistant's message that only calls tools."""

CONVERSATIONS = ("messages", "conversations")
_FLAGS = ("loss_mask", "weight", "train", "loss")
"""Keys of a message that say whether it is trained on: 1 or 0, true or false."""

_TAKEN = {"role", "content", "from", "value", "function_call", "tool_calls", *_FLAGS}


_COLUMN = re.compile(r"\{(\w+)\}")

KINDS = ("image", "video", "audio")
"""The kinds of media."""

MEDIA_PARTS = {
    "image": "image",
    "input_image": "image",
    "image_url": "image",
    "video": "video",
    "video_url": "video",
    "audio": "audio",
    "input_audio": "audio",
    "audio_url": "audio",
}
"""The kind of medium by type of a part."""


_FILE_NAMES = ("{}_file_name", "{}s_file_names", "file_name", "file_names")
"""Columns with media paths in the metadata.csv or metadata.jsonl of a folder for Hugging Face's datasets."""


class RowError(Exception):
    """A row that cannot be used; the message is the reason."""


class BrokenMediaError(RowError):
    """A sample whose media cannot be decoded. number: its index in a batch."""

    def __init__(self, reason: str, number: int) -> None:
        super().__init__(reason)
        self.number = number


def encode_each(rows: Sequence[Row | BadRow], encode: Callable[[Row], Sample]) -> list[list[Sample] | BadRow]:
    """For each row the sample that `encode` makes of it, or why there is none: `encode` raises RowError."""
    results: list[list[Sample] | BadRow] = []
    for row in rows:
        try:
            results.append(row if isinstance(row, BadRow) else [encode(row)])
        except RowError as error:
            results.append(BadRow(row.file, row.line, str(error)))
    return results


@dataclass(slots=True)
class Conversation:
    """Messages as a chat template takes them. trained: one flag per message. tools, kwargs: passed to the template.

    plain: True if every message consists of a role and a content and nothing else is passed, as in nearly all rows.
    """

    messages: list[dict[str, Any]]
    trained: tuple[bool, ...]
    plain: bool = True
    tools: list[Any] | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)


def text_of(value: dict[str, Any], columns: Sequence[str]) -> str:
    """The text of a plaintext or classification row: the first of `columns` that it has."""
    text = _column(value, columns)
    if not isinstance(text, str):
        raise RowError(f"{_name(value, columns)} must be text, not {kind_of(text)}")
    if not text:
        raise RowError(f"{_name(value, columns)} is empty")
    return text


def half_surrogate(text: str) -> str | None:
    """The first unpaired surrogate in `text`, if any.

    JSON can contain one (`"\\ud83d"`), but it is not a character: UTF-8 cannot encode it, and no tokenizer accepts it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return text[error.start]
    return None


def class_of(value: dict[str, Any], num_labels: int | None, label_names: Sequence[str] = ()) -> int:
    """The class of a classification row: an integer in [0, num_labels), or one of `label_names`.

    A number may be written as a float or as text, and false and true are 0 and 1, as in tables.
    """
    label = value.get("label")
    if label is None:
        raise RowError(f"has no column label; its columns are {listed(value)}")
    names = list(label_names)
    if str(label).lower() in ("true", "false") and label not in names:
        names, label = [name.lower() for name in names], str(label).lower()
    number = names.index(label) if label in names else _whole(label)
    if number is None:
        known = f"one of {', '.join(label_names)}" if label_names else "a whole number"
        named = isinstance(label, str) and not label_names
        hint = "; classes are named by id2label in the model's config.json" if named else ""
        raise RowError(f"label must be {known}, not {kind_of(label)} {label!r}{hint}")
    if number < 0 or (num_labels is not None and number >= num_labels):
        raise RowError(f"label {number} is outside 0 to {num_labels - 1 if num_labels else '...'}")
    return number


def _whole(value: Any) -> int | None:
    """The integer that `value` is or spells; None if it is none."""
    if isinstance(value, str):
        text = value.strip().lower()
        value = {"false": 0, "true": 1}.get(text, text)
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return int(number) if number.is_integer() else None


def has_media(content: Any) -> bool:
    """True for a list of parts that contains a medium."""
    return isinstance(content, list) and any(
        isinstance(part, dict) and part.get("type") in MEDIA_PARTS for part in content
    )


def conversation_of(value: dict[str, Any], columns: Sequence[str]) -> Conversation:
    """The conversation in a row, in any of the known formats."""
    turns = _turns(value, columns)
    if not isinstance(turns, list):
        raise RowError(f"{_name(value, columns)} must be a list of messages, not {kind_of(turns)}")
    if not turns:
        raise RowError("the conversation is empty")
    messages, trained, plain = [], [], True
    for number, turn in enumerate(turns):
        message, train = message_of(number, turn)
        plain = plain and len(message) == 2 and "content" in message
        messages.append(message)
        trained.append(train)
    if system := _system(value):
        if messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system})
            trained.insert(0, False)
        elif messages[0]["content"] != system:
            raise RowError("the column system says another thing than the conversation's first message, of that role")
    conversation = Conversation(messages, tuple(trained), plain)
    if value.get("tools"):
        tools = as_json(value["tools"], list, "tools")
        conversation.tools = [as_json(tool, dict, f"tools[{number}]") for number, tool in enumerate(tools)]
        conversation.plain = False
    if value.get("chat_template_kwargs"):
        kwargs = as_json(value["chat_template_kwargs"], dict, "chat_template_kwargs")
        conversation.kwargs = {name: setting for name, setting in kwargs.items() if setting is not None}
        conversation.plain = False
    return conversation


def fill(template: Mapping[str, str], value: dict[str, Any]) -> dict[str, Any]:
    """The row with messages made from `template` (data.row_template), a text per role with columns filled in; a row
    that already has messages is unchanged. RowError: it lacks a column, or a medium that a text has a place for."""
    if any(value.get(column) is not None for column in CONVERSATIONS):
        return value
    texts = "".join(template.values())
    for kind in (kind for kind in KINDS if f"<{kind}>" in texts):
        names = (kind, f"{kind}s", *(name.format(kind) for name in _FILE_NAMES))
        found = next((name for name in names if value.get(name)), None)
        if found is None:
            raise RowError(
                f"has nothing in a column {kind}, {kind}s or file_name for the <{kind}> of data.row_template; its "
                f"columns are {listed(value)}"
            )
        if found not in names[:2]:
            value = {**value, f"{kind}s": value[found]}

    def column(found: re.Match[str]) -> str:
        entry = value.get(found.group(1))
        if entry is None:
            raise RowError(f"has no column {found.group(1)} (data.row_template); its columns are {listed(value)}")
        return str(entry)

    messages = [{"role": role, "content": _COLUMN.sub(column, text)} for role, text in template.items()]
    return {**value, "messages": messages}


def _turns(value: dict[str, Any], columns: Sequence[str]) -> Any:
    for names in (columns, CONVERSATIONS):
        for column in names:
            turns = value.get(column)
            if turns is not None:
                return as_json(turns, list, column) if isinstance(turns, str) else turns
    if "instruction" in value:
        return _alpaca(value)
    if value.get("prompt") is not None and value.get("completion") is not None:
        return _completed(value)
    raise RowError(
        f"has no column {' or '.join(columns)} (data.text_keys), nor conversations, nor instruction and output, nor "
        f"prompt and completion; its columns are {listed(value)} (data.row_template makes messages of them)"
    )


def _completed(value: dict[str, Any]) -> list[Any]:
    """The messages of a row with a `prompt` and its `completion`, texts or messages; only the latter is trained on."""
    turns: list[Any] = []
    for column, role in (("prompt", "user"), ("completion", "assistant")):
        side = value[column]
        if isinstance(side, str) and side.lstrip().startswith("[{"):
            side = as_json(side, list, column)
        if not isinstance(side, str | list):
            raise RowError(f"{column} must be text or a list of messages, not {kind_of(side)}")
        said = [{"role": role, "content": side}] if isinstance(side, str) else side
        if column == "prompt":
            said = [{"loss_mask": 0, **turn} if isinstance(turn, dict) else turn for turn in said]
        turns += said
    return turns


def _system(value: dict[str, Any]) -> str:
    """The row's separate system message; "" if there is none."""
    system = value.get("system")
    if system is not None and not isinstance(system, str):
        raise RowError(f"system must be text, not {kind_of(system)}")
    return system or ""


def _alpaca(value: dict[str, Any]) -> list[dict[str, Any]]:
    if value.get("output") is None:
        raise RowError(f"has an instruction but no output; its columns are {listed(value)}")
    turns = []
    for pair in as_json(value.get("history") or [], list, "history"):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowError("history must be a list of [question, answer] pairs")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    question = question_of(value)
    return [*turns, {"role": "user", "content": question}, {"role": "assistant", "content": value["output"]}]


def question_of(value: dict[str, Any]) -> Any:
    """The question in a row with an `instruction` and maybe an `input` that follows it."""
    question, extra = value["instruction"], value.get("input")
    if extra is not None and not isinstance(extra, str):
        raise RowError(f"input must be text, not {kind_of(extra)}")
    if extra and isinstance(question, str):
        question = f"{question}\n{extra}" if question else extra
    return question


def message_of(number: int, turn: Any) -> tuple[dict[str, Any], bool]:
    """The `number`-th message of a conversation as chat templates take it, and whether it is trained on."""
    return _simple(turn) or _message(number, turn)


def _simple(turn: Any) -> tuple[dict[str, Any], bool] | None:
    """A simple message (a known role and a text) without further checks; None for any other."""
    try:
        role = turn["role"]
        if len(turn) == 2 and role in ROLES and type(turn["content"]) is str:
            return turn, role == "assistant"
    except (TypeError, KeyError):
        pass
    return None


def _message(number: int, turn: Any) -> tuple[dict[str, Any], bool]:
    """A message with a known role and textual content, and whether it is trained on."""
    if not isinstance(turn, dict):
        raise RowError(f"message {number} must be an object with role and content, not {kind_of(turn)}")
    name = turn.get("role")
    if name is None:
        name = turn.get("from")
    role = _ALIASES.get(name) if isinstance(name, str) else None
    if role is None:
        if name is None:
            raise RowError(f"message {number} has no role; its keys are {listed(turn)}")
        raise RowError(f"message {number} has unknown role {name!r}; known are {', '.join(ROLES)}")
    content = turn.get("content")
    if content is None:
        content = turn.get("value")
    message: dict[str, Any] = {"role": role, "content": content}
    calls = _calls(number, turn, content if name in _CALLERS else None)
    if calls:
        message["tool_calls"] = calls
    if len(turn) > 2:
        message |= {key: extra for key, extra in turn.items() if extra is not None and key not in _TAKEN}
    if calls and (content is None or name in _CALLERS):
        del message["content"]
    elif not isinstance(content, str) and not has_media(content):
        message["content"] = _joined(number, content)
    return message, _is_trained(number, turn, role)


def _is_trained(number: int, turn: dict[str, Any], role: str) -> bool:
    """True if a message is trained on: according to its flag, else if it is the assistant's.

    A weight differs from the other flags: it can exclude assistant's messages, but not include others.
    """
    flags = {key: turn[key] for key in _FLAGS if turn.get(key) is not None}
    for key, flag in flags.items():
        if flag not in (0, 1):
            raise RowError(f"message {number}: {key} must be 0 or 1, not {flag!r}")
    if len(set(map(bool, flags.values()))) > 1:
        raise RowError(f"message {number}: {' and '.join(flags)} contradict each other")
    if flags.keys() == {"weight"}:
        return role == "assistant" and bool(flags["weight"])
    return all(flags.values()) if flags else role == "assistant"


def _calls(number: int, turn: dict[str, Any], said: Any) -> list[dict[str, Any]]:
    """The tool calls of a message in the format of templates, `{"type": "function", "function": {"name",
    "arguments"}}`, or `{"name", "arguments"}` if the row has them so, with arguments as an object.

    They are in `tool_calls`, in OpenAI's older `function_call`, or in the assistant's text `said`; each may be JSON
    text.
    """
    where = f"message {number}: tool_calls"
    calls = turn.get("tool_calls")
    wrapped = calls is None
    if calls is None:
        where = f"message {number}: function_call"
        calls = said if turn.get("function_call") is None else turn["function_call"]
    if isinstance(calls, str):
        calls = as_json(calls, (list, dict), where)
    calls = [calls] if isinstance(calls, dict) else calls
    if not calls:
        if said is not None:
            raise RowError(f"message {number} calls no tool")
        return []
    if not isinstance(calls, list):
        raise RowError(f"{where} must be a list, not {kind_of(calls)}")
    return [_call(as_json(call, dict, where), where, wrapped) for call in calls]


def _call(call: dict[str, Any], where: str, wrapped: bool) -> dict[str, Any]:
    """A tool call with its arguments as an object. wrapped: in the format with a type."""
    function = as_json(call.get("function") or call, dict, where)
    if not isinstance(function.get("name"), str):
        raise RowError(f"{where} must have a name, and the arguments it is called with")
    arguments = function.get("arguments")
    if arguments is None or arguments == "":
        arguments = {}
    function = {**function, "arguments": as_json(arguments, dict, f"{where}: arguments of {function['name']}")}
    if call.get("function"):
        return {**call, "function": function}
    return {"type": "function", "function": function} if wrapped else function


def _joined(number: int, content: Any) -> str:
    """The text of content given as parts."""
    if content is None:
        raise RowError(f"message {number} has no content")
    if not isinstance(content, list):
        raise RowError(f"message {number}: content must be text or a list of parts, not {kind_of(content)}")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "input_text", "output_text") and not (isinstance(part, dict) and kind is None):
            what = f"a part of type {kind}" if kind else f"a part that is {kind_of(part)}"
            raise RowError(f"message {number} has {what}: only text can be trained on here")
        if not isinstance(part.get("text"), str):
            raise RowError(f"message {number} has a text part without text")
        texts.append(part["text"])
    return "".join(texts)


def _column(value: dict[str, Any], columns: Sequence[str]) -> Any:
    for column in columns:
        if value.get(column) is not None:
            return value[column]
    raise RowError(f"has no column {' or '.join(columns)} (data.text_keys); its columns are {listed(value)}")


def _name(value: dict[str, Any], columns: Sequence[str]) -> str:
    return next((column for column in columns if value.get(column) is not None), columns[0])


def as_json(value: Any, kind: type | tuple[type, ...], column: str) -> Any:
    """`value`, decoded if it is JSON text (for tables that can only hold it as text)."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (json.JSONDecodeError, RecursionError) as error:
            reason = getattr(error, "msg", "too deeply nested")
            raise RowError(f"{column} is text that is not valid JSON: {reason}") from None
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds):
        wanted = " or ".join(f"a {each.__name__}" for each in kinds)
        raise RowError(f"{column} must be {wanted}, not {kind_of(value)}")
    return value


def kind_of(value: Any) -> str:
    """The name of a value's type in a message."""
    return "nothing" if value is None else type(value).__name__


def listed(value: dict[str, Any]) -> str:
    """The columns of a row, for a message."""
    names = [str(key) for key, item in value.items() if item is not None]
    return ", ".join(names) if names else "none"
