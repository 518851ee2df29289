"""What a row may look like: documents, conversations and labelled texts, checked and brought into one form.

A conversation becomes a list of messages as chat templates take them, with a flag for each that says whether it is
trained on. Its shape is found row by row, so that a file may mix them: OpenAI messages (`role`, `content`), ShareGPT
(`from`, `value`), Alpaca (`instruction`, `input`, `output`). Whatever is wrong is a `RowError` that says exactly what.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")
_ALIASES = {
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
} | {role: role for role in ROLES}
CONVERSATIONS = ("messages", "conversations")
_TAKEN = {"role", "content", "from", "value", "loss_mask"}


class RowError(Exception):
    """A row that can't be used; the message is the reason."""


@dataclass(slots=True)
class Conversation:
    """Messages as a chat template takes them. trained: one flag a message. tools, kwargs: passed to the template.

    plain: whether every message is a role and a text and nothing else is passed, as nearly all are.
    """

    messages: list[dict[str, Any]]
    trained: tuple[bool, ...]
    plain: bool = True
    tools: list[Any] | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)


def text_of(value: dict[str, Any], columns: Sequence[str]) -> str:
    """The text of a plaintext or classification row: that of the first of `columns` it has."""
    text = _column(value, columns)
    if not isinstance(text, str):
        raise RowError(f"{_name(value, columns)} must be text, not {kind_of(text)}")
    if not text:
        raise RowError(f"{_name(value, columns)} is empty")
    return text


def class_of(value: dict[str, Any], num_labels: int | None, label_names: Sequence[str] = ()) -> int:
    """The class of a classification row: a whole number in [0, num_labels), or one of `label_names`."""
    label = value.get("label")
    if label is None:
        raise RowError(f"has no column label; its columns are {listed(value)}")
    if isinstance(label, str):
        if label in label_names:
            return label_names.index(label)
        try:
            label = int(label)
        except ValueError:
            known = f"one of {', '.join(label_names)}" if label_names else "a whole number"
            raise RowError(f"label {label!r} must be {known}") from None
    if isinstance(label, bool) or not isinstance(label, int):
        raise RowError(f"label must be a whole number, not {kind_of(label)} {label!r}")
    if label < 0 or (num_labels is not None and label >= num_labels):
        raise RowError(f"label {label} is outside 0 to {num_labels - 1 if num_labels else '...'}")
    return label


def conversation_of(value: dict[str, Any], columns: Sequence[str]) -> Conversation:
    """The conversation a row holds, whichever of the known shapes it has."""
    turns = _turns(value, columns)
    if not isinstance(turns, list):
        raise RowError(f"{_name(value, columns)} must be a list of messages, not {kind_of(turns)}")
    if not turns:
        raise RowError("the conversation is empty")
    messages, trained, plain = [], [], True
    for number, turn in enumerate(turns):
        message, train = message_of(number, turn)
        plain = plain and len(message) == 2
        messages.append(message)
        trained.append(train)
    system = value.get("system")
    if system and isinstance(system, str) and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
        trained.insert(0, False)
    conversation = Conversation(messages, tuple(trained), plain)
    if value.get("tools"):
        conversation.tools = as_json(value["tools"], list, "tools")
        conversation.plain = False
    if value.get("chat_template_kwargs"):
        kwargs = as_json(value["chat_template_kwargs"], dict, "chat_template_kwargs")
        conversation.kwargs = {name: setting for name, setting in kwargs.items() if setting is not None}
        conversation.plain = False
    return conversation


def _turns(value: dict[str, Any], columns: Sequence[str]) -> Any:
    for names in (columns, CONVERSATIONS):
        for column in names:
            turns = value.get(column)
            if turns is not None:
                return as_json(turns, list, column) if isinstance(turns, str) else turns
    if "instruction" in value:
        return _alpaca(value)
    raise RowError(
        f"has no column {' or '.join(columns)} (data.text_keys), nor conversations, nor instruction and output; "
        f"its columns are {listed(value)}"
    )


def _alpaca(value: dict[str, Any]) -> list[dict[str, Any]]:
    if value.get("output") is None:
        raise RowError(f"has an instruction but no output; its columns are {listed(value)}")
    turns = []
    for pair in value.get("history") or ():
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowError("history must be a list of [question, answer] pairs")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    question = question_of(value)
    return [*turns, {"role": "user", "content": question}, {"role": "assistant", "content": value["output"]}]


def question_of(value: dict[str, Any]) -> Any:
    """The question of a row with an `instruction` and maybe an `input` that follows it."""
    question, extra = value["instruction"], value.get("input")
    if extra and isinstance(extra, str) and isinstance(question, str):
        question = f"{question}\n{extra}" if question else extra
    return question


def message_of(number: int, turn: Any) -> tuple[dict[str, Any], bool]:
    """The `number`-th message of a conversation as chat templates take it, and whether it is trained on."""
    return _simple(turn) or _message(number, turn)


def _simple(turn: Any) -> tuple[dict[str, Any], bool] | None:
    """The common message, a known role and a text, without further looks; None for any other."""
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
    train = role == "assistant"
    if len(turn) > 2:
        mask = turn.get("loss_mask")
        if mask is not None:
            if mask not in (0, 1):
                raise RowError(f"message {number}: loss_mask must be 0 or 1, not {mask!r}")
            train = bool(mask)
        message |= {key: extra for key, extra in turn.items() if extra is not None and key not in _TAKEN}
    if not isinstance(content, str):
        if content is None and message.get("tool_calls"):
            del message["content"]
        else:
            message["content"] = _joined(number, content)
    return message, train


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
            raise RowError(f"message {number} has {what}: only text parts can be trained on so far")
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


def as_json(value: Any, kind: type, column: str) -> Any:
    """`value`, or what it says as JSON where a table could only hold it as text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise RowError(f"{column} is text that is not valid JSON: {error.msg}") from None
    if not isinstance(value, kind):
        raise RowError(f"{column} must be a {kind.__name__}, not {kind_of(value)}")
    return value


def kind_of(value: Any) -> str:
    """What a value is called in a message."""
    return "nothing" if value is None else type(value).__name__


def listed(value: dict[str, Any]) -> str:
    """The columns that a row has, for a message."""
    names = [str(key) for key, item in value.items() if item is not None]
    return ", ".join(names) if names else "none"
