"""Chat templates: the text of a conversation, and exactly which of its characters are trained on.

A chat template is a Jinja program that knows nothing about training. The text must be what `apply_chat_template`
returns, and the trained span of an assistant turn is what the model would write at inference: it starts where the
generation prompt ends and includes the marker that ends the turn. If a template defines it (`{% generation %}`), that
is used. For other templates the borders are found by rendering *marks*, characters that no template contains, instead
of content:

1. Render the conversation with every message's content replaced by its mark. The text between the marks is what the
   template writes around the contents.
2. The *header* of turn i is what the generation prompt adds after the previous mark: render messages [0, i) with
   `add_generation_prompt=True` and take what follows the last mark. The full rendering must have the same text there.
   For a template without a generation prompt it is all visible text up to the content.
3. The *close* of turn i is what follows its mark when it is the last message, up to and including the first of the
   tokenizer's added tokens (`<|im_end|>`), or all of it if there is none; again the full rendering must agree. Some
   templates end the last turn with another token than the earlier ones; the full rendering's token is used.
4. Render the conversation as it is, and once more with only message i replaced by a mark. What follows the mark must be
   what the real text ends with, so the content ends there, whatever the template did to it (stripping, dropping earlier
   thoughts). Header and close, which must be found at these positions, give the span. (If a mark instead of the message
   before i changes more than that, the prompt of the real messages [0, i) is also accepted, if the text begins with
   it.)

Any disagreement is an error for that row; nothing is guessed.

This takes several renderings per row. But nearly all templates put the contents of nearly all rows between strings that
depend only on the roles. For each *shape* (the sequence of roles and flags, and of parts if a content is a list of
texts and media) these strings, and the positions of the spans, are cached from a rendering of marks. If a row's text is
exactly its contents between the strings of its shape, its spans are known; otherwise it is processed as above. The text
need not be rendered if the template's syntax tree proves it (`tutti.data.content_flow`). Nothing cached depends on
another row's contents, so the result for a row depends on that row alone.

A template may silently drop a part of a conversation that it was not written for. If it drops tool calls, the row is
bad, since the model would be trained on an empty answer. Anything else that it drops is counted (`ChatTemplate.notes`),
for a single warning.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import count, pairwise
from typing import Any, cast

from jinja2 import nodes

from tutti.core.compat import compile_jinja_template, render_jinja_template
from tutti.data.content_flow import Condition, Kind, condition_of
from tutti.data.rows import Conversation, RowError

Span = tuple[int, int]

_MARK = re.compile("\ue000([0-9]+)\ue001")
_OF_MARKS = set("\ue000\ue0010123456789")
_PROBE = "\ue002"
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_INEXACT = "so that its loss mask can't be exact"
_REASONING = ("reasoning_content", "thinking", "reasoning")
_KNOWN = {"role", "content", "name", "tool_calls", "tool_call_id", *_REASONING}


@dataclass(frozen=True, slots=True)
class _Form:
    """The form in which a template takes messages. parts: text as a list of parts. text_arguments: a tool call's
    arguments as JSON text. empty_content: messages that call tools have an empty content, rather than none."""

    parts: bool = False
    text_arguments: bool = False
    empty_content: bool = False

    def of(self, message: dict[str, Any]) -> dict[str, Any]:
        """The message in this form."""
        if self.empty_content and "content" not in message:
            message = {**message, "content": ""}
        if self.parts and isinstance(message.get("content"), str):
            message = {**message, "content": [{"type": "text", "text": message["content"]}]}
        if self.text_arguments and "tool_calls" in message:
            message = {**message, "tool_calls": [_with_text_arguments(call) for call in message["tool_calls"]]}
        return message


_AS_IT_IS = _Form()


@dataclass(frozen=True, slots=True)
class _Turn:
    """A message's trained span: from `header` characters after the content of message `before` (None: after the
    start of the text) to `close` characters after its own content."""

    before: int | None
    header: str
    close: str


@dataclass(frozen=True, slots=True)
class _Shape:
    """The text of a shape: its texts (`_texts`) in `order` between `literals`, of which there is one more.

    spans: (index in `order`, or -1 for the start of the text, and an offset) of begin and of end. left_out: roles of
    messages that are not written. condition: on the texts, under which this is proved; None if it is not.
    """

    literals: list[str]
    order: list[int]
    spans: list[tuple[int, int, int, int]]
    left_out: list[str]
    condition: Condition | None

    def write(self, contents: Sequence[str]) -> tuple[str, list[Span]]:
        parts: list[str] = []
        ends = []
        at = 0
        for literal, number in zip(self.literals, self.order, strict=False):
            content = contents[number]
            at += len(literal) + len(content)
            ends.append(at)
            parts += (literal, content)
        parts.append(self.literals[-1])
        ends.append(0)
        return "".join(parts), [(ends[i] + a, ends[j] + b) for i, a, j, b in self.spans]


@dataclass
class ChatTemplate:
    """A chat template with a tokenizer's special tokens. Call it with a conversation; picklable.

    source: the Jinja text. tool_source: for conversations with tools, if the tokenizer has a separate one. variables:
    the special tokens by name. ends: texts of the tokenizer's added tokens, any of which may end a turn. now: the time
    for templates that ask for today's date. notes: counts of conversations of which the template left something out, by
    what that was.
    """

    source: str
    tool_source: str
    variables: dict[str, str]
    ends: tuple[str, ...]
    now: datetime = field(default_factory=datetime.now)
    notes: Counter[str] = field(default_factory=Counter)
    _shapes: dict[Any, _Shape | None] = field(default_factory=dict, repr=False)
    _turns: dict[Any, _Turn] = field(default_factory=dict, repr=False)
    _conditions: dict[tuple[frozenset[str], Kind], Condition | None] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._end = re.compile("|".join(re.escape(end) for end in sorted(self.ends, key=len, reverse=True)) or "(?!)")
        self._tagged = bool(_GENERATION.search(self.source))
        self._names = _names(self.source) | _names(self.tool_source)
        self._form = _Form()
        self._form = self._find_form()

    def __call__(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """The text and its trained spans, ascending. RowError: the template refuses the conversation, or spans
        cannot be exact."""
        shape = self._shape(conversation) if conversation.plain else None
        if shape is None:
            text, tagged = self._render(conversation.messages, conversation, False)
            self._look_for_omissions(conversation, text)
            return text, self._spans(conversation, text, tagged)
        if shape.left_out:
            self.notes[f"the chat template leaves out messages of role {', '.join(shape.left_out)}"] += 1
        contents = _texts(conversation.messages)
        written, spans = shape.write(contents)
        if shape.condition is not None and shape.condition.holds(contents):
            return written, spans
        text, tagged = self._render(conversation.messages, conversation, False)
        if text == written and not self._tagged:
            return text, spans
        return text, self._spans(conversation, text, tagged)

    def render(self, messages: list[dict[str, Any]], conversation: Conversation, *, prompt: bool = False) -> str:
        """The text that `apply_chat_template` returns for `messages`, with the conversation's tools and settings."""
        return self._render(messages, conversation, prompt)[0]

    def _render(
        self, messages: list[dict[str, Any]], conversation: Conversation, prompt: bool
    ) -> tuple[str, list[Span]]:
        source = self.tool_source if conversation.tools else self.source
        if self._form != _AS_IT_IS:
            messages = [self._form.of(message) for message in messages]
        compile_jinja_template(source).globals["strftime_now"] = self.now.strftime
        try:
            texts, spans = cast(
                tuple[list[str], list[list[Span]]],
                render_jinja_template(
                    conversations=[messages],
                    tools=conversation.tools,
                    chat_template=source,
                    add_generation_prompt=prompt,
                    return_assistant_tokens_mask=self._tagged,
                    **{**self.variables, **conversation.kwargs},
                ),
            )
        except Exception as error:  # a template may fail in any way on unexpected messages
            calls = any("tool_calls" in message for message in messages)
            hint = "; a message calls tools, and the template may not write such" if calls else ""
            raise RowError(f"the chat template can't render it: {error}{hint}") from None
        return texts[0], spans[0] if self._tagged else []

    def _find_form(self) -> _Form:
        """The form in which the template takes messages, found with marks as contents and as a tool's name."""
        chat = [_marked(number, {"role": role}) for number, role in enumerate(("user", "assistant"))]
        # A template that ignores texts in parts may write a part as it is, where it would write only a piece of a
        # text.
        takes_parts = "text" in self._names
        parts = takes_parts and not self._writes(chat, _AS_IT_IS) and self._writes(chat, _Form(parts=True))
        call = {"id": "call00000", "type": "function", "function": {"name": _mark(1), "arguments": {"x": "y"}}}
        chat[1] = {"role": "assistant", "tool_calls": [call]}
        forms = [_Form(parts, *flags) for flags in ((False, False), (True, False), (False, True), (True, True))]
        return next((form for form in forms if self._writes(chat, form)), forms[0])

    def _writes(self, chat: list[dict[str, Any]], form: _Form) -> bool:
        """True if the marks 0 and 1 appear in the text of messages in this form."""
        try:
            return {0, 1} <= set(_split(self.render([form.of(message) for message in chat], _BARE))[1])
        except RowError:
            return False

    def _look_for_omissions(self, conversation: Conversation, text: str) -> None:
        """Record what the template leaves out of a conversation with this text. RowError: it is tool calls."""
        messages = conversation.messages
        if any("tool_calls" in message for message in messages):
            self._require_calls(conversation, text)
        found = {key for message in messages for key in message}
        if found & set(_REASONING) and not self._names & set(_REASONING):
            self.notes["the chat template does not write the assistant's reasoning"] += 1
        for key in sorted(found - _KNOWN - self._names):
            self.notes[f"messages have a key {key!r} that means nothing here, nor to the chat template"] += 1
        if conversation.tools and "tools" not in self._names:
            self.notes["the chat template does not write which tools there are"] += 1
        marked = [{**m, "content": _mark(n)} if m.get("content") else m for n, m in enumerate(messages)]
        with contextlib.suppress(RowError):
            written = _split(self.render(marked, conversation))[1]
            roles = sorted({m["role"] for n, m in enumerate(messages) if m.get("content") and n not in written})
            if roles:
                self.notes[f"the chat template leaves out messages of role {', '.join(roles)}"] += 1

    def _require_calls(self, conversation: Conversation, text: str) -> None:
        """Raise RowError unless the name of every tool call is written, tested with a mark in its place."""
        messages: list[dict[str, Any]] = []
        callers: list[int] = []
        for number, message in enumerate(conversation.messages):
            calls = []
            for call in message.get("tool_calls", ()):
                inner = {**call.get("function", call), "name": _mark(len(callers))}
                calls.append({**call, "function": inner} if "function" in call else inner)
                callers.append(number)
            messages.append({**message, "tool_calls": calls} if calls else message)
        try:
            written = set(_split(self.render(messages, conversation))[1])
            silent = [number for call, number in enumerate(callers) if call not in written]
        except RowError:  # some templates handle certain tools by name
            silent = [number for number in callers if not self._shows_calls(conversation, number, text)]
        if silent:
            raise RowError(
                f"message {silent[0]} calls tools, and the chat template does not write tool calls: name one that does "
                "(data.chat_template)"
            )

    def _shows_calls(self, conversation: Conversation, number: int, text: str) -> bool:
        """True if the text would differ without the tool calls of message `number`."""
        messages = list(conversation.messages)
        messages[number] = {key: value for key, value in messages[number].items() if key != "tool_calls"}
        try:
            return self.render(messages, conversation) != text
        except RowError:
            return True

    def _exact(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """Find text and spans by rendering, for any conversation."""
        text, tagged = self._render(conversation.messages, conversation, False)
        return text, self._spans(conversation, text, tagged)

    def _spans(self, conversation: Conversation, text: str, tagged: list[Span]) -> list[Span]:
        """The trained spans of a conversation's text (of which the template may have tagged some), by rendering it."""
        try:
            return self._find_spans(conversation, text, tagged)
        except RowError as error:
            if _INEXACT in str(error):
                raise
            # The template has rendered these contents, but refuses a part of them, or marks instead.
            raise RowError(f"{error}; {_INEXACT}") from None

    def _find_spans(self, conversation: Conversation, text: str, tagged: list[Span]) -> list[Span]:
        if self._tagged:
            return self._tagged_spans(conversation, tagged)
        ends: dict[int, int] = {}
        spans = []
        for number in [number for number, train in enumerate(conversation.trained) if train]:
            turn = self._turn(conversation, number)
            begin = self._begin(conversation, number, turn, text, ends)
            end = self._content_end(conversation, number, text, ends)
            if not text.startswith(turn.close, end):
                raise RowError(f"the chat template rewrites what follows message {number}, {_INEXACT}")
            spans.append((begin, end + len(turn.close)))
        if any(begin > end for begin, end in spans) or any(a[1] > b[0] for a, b in pairwise(spans)):
            raise RowError(f"the chat template changes the order of messages, {_INEXACT}")
        return spans

    def _begin(self, conversation: Conversation, number: int, turn: _Turn, text: str, ends: dict[int, int]) -> int:
        """The beginning of a message's span: after its header, or after the whole prompt, if `text` contains that."""
        try:
            begin = 0 if turn.before is None else self._content_end(conversation, turn.before, text, ends)
            if text.startswith(turn.header, begin):
                return begin + len(turn.header)
            raise RowError(f"the chat template rewrites what precedes message {number}, {_INEXACT}")
        except RowError:
            if conversation.messages[number]["role"] == "assistant":
                prompt = self.render(conversation.messages[:number], conversation, prompt=True)
                if text.startswith(prompt) and prompt.endswith(turn.header):
                    return len(prompt)
            raise

    def _tagged_spans(self, conversation: Conversation, tagged: list[Span]) -> list[Span]:
        """The spans that the template itself tags, except those of assistant's messages that are not trained on."""
        assistants = [n for n, message in enumerate(conversation.messages) if message["role"] == "assistant"]
        trained = [number for number, train in enumerate(conversation.trained) if train]
        if trained == assistants:
            return tagged
        if len(tagged) != len(assistants) or not set(trained) <= set(assistants):
            raise RowError(
                "loss_mask differs from what the chat template tags with {% generation %}, which is not one span for "
                f"each assistant message, {_INEXACT}"
            )
        return [span for number, span in zip(assistants, tagged, strict=True) if conversation.trained[number]]

    def _content_end(self, conversation: Conversation, number: int, text: str, ends: dict[int, int]) -> int:
        """The end of a message's content in `text`: before what follows when only this message is a mark. Cached in
        `ends`."""
        if number in ends:
            return ends[number]
        messages = list(conversation.messages)
        messages[number] = {**_marked(number, messages[number]), "content": _PROBE}
        _, *after = self.render(messages, conversation).split(_PROBE)
        if len(after) != 1 or not text.endswith(after[0]):
            raise RowError(f"the chat template writes other things after message {number} for this content, {_INEXACT}")
        ends[number] = len(text) - len(after[0])
        return ends[number]

    def _turn(self, conversation: Conversation, number: int) -> _Turn:
        messages = [_marked(n, message) for n, message in enumerate(conversation.messages)]
        simple = not conversation.tools and not conversation.kwargs and all(len(message) == 2 for message in messages)
        key = (*[message["role"] for message in messages], number) if simple else None
        turn = self._turns.get(key) if simple else None
        if turn is None:
            turn = self._find_turn(messages, conversation, number)
            if simple:
                self._turns[key] = turn
        return turn

    def _find_turn(self, messages: list[dict[str, Any]], conversation: Conversation, number: int) -> _Turn:
        """Find header and close of a message's turn from renderings of marks."""
        literals, order = _split(self.render(messages, conversation))
        if order.count(number) != 1:
            raise RowError(f"the chat template writes message {number} {order.count(number)} times, {_INEXACT}")
        place = order.index(number)
        before = order[place - 1] if place else None
        if before is not None and order.count(before) != 1:
            raise RowError(f"the chat template writes message {before} {order.count(before)} times, {_INEXACT}")
        between, after = literals[place], literals[place + 1]
        header = between
        if messages[number]["role"] == "assistant":
            header = self._header(messages[:number], conversation, before, between)
        closing = after
        if place + 1 < len(order):
            alone, marks = _split(self.render(messages[: number + 1], conversation))
            if not marks or marks[-1] != number:
                raise RowError(f"the chat template writes nothing after message {number}, {_INEXACT}")
            closing = alone[-1]
        return _Turn(before, header, self._close(closing, after, number))

    def _header(
        self, messages: list[dict[str, Any]], conversation: Conversation, before: int | None, between: str
    ) -> str:
        """The part of `between` (the text from one content to an assistant's) that is given at inference."""
        if before is None:
            return self._first_header(conversation, between)
        literals, order = _split(self.render(messages, conversation, prompt=True))
        if not order or order[-1] != before:
            raise RowError(f"the chat template moves message {before} behind others, {_INEXACT}")
        prompt = literals[-1]
        if between.startswith(prompt):
            unprompted = _split(self.render(messages, conversation))[0][-1] == prompt
            return between if unprompted and between[len(prompt) :].strip() else prompt
        if prompt.startswith(between):
            return between
        raise RowError(f"the chat template's generation prompt {prompt!r} is not how it writes {between!r}, {_INEXACT}")

    def _first_header(self, conversation: Conversation, between: str) -> str:
        """The header of an assistant's message without predecessor, from the generation prompt of another chat."""
        user = [_marked(0, {"role": "user"})]
        without, full = self.render(user, conversation), self.render(user, conversation, prompt=True)
        prompt = full[len(without) :] if full.startswith(without) else between
        found = between.rfind(prompt) if prompt and full.endswith(prompt) else -1
        if found < 0:
            raise RowError(f"the conversation starts with an assistant message, whose header is not known, {_INEXACT}")
        return between[: found + len(prompt)]

    def _close(self, closing: str, after: str, number: int) -> str:
        """The part of `after` (the text after a content) that ends its turn. closing: the text after the last turn."""
        end = self._end.search(closing)
        if end is None:
            if after.startswith(closing):
                return closing
        else:
            here = self._end.match(after, end.start())
            if here is not None and after.startswith(closing[: end.start()]):
                return after[: here.end()]
        raise RowError(f"the chat template ends message {number} in another way when others follow, {_INEXACT}")

    def _shape(self, conversation: Conversation) -> _Shape | None:
        """The shape of conversations with the roles, parts and flags of this one; None if the template cannot tell."""
        key = (*[_kinds(message) for message in conversation.messages], *conversation.trained)
        if key not in self._shapes:
            try:
                self._shapes[key] = self._read_shape(conversation)
            except RowError:
                self._shapes[key] = None
        return self._shapes[key]

    def _read_shape(self, conversation: Conversation) -> _Shape:
        marks = map(_mark, count())
        messages = [_with_texts(message, marks) for message in conversation.messages]
        text, spans = self._exact(Conversation(messages, conversation.trained))
        literals, order = _split(text)
        ends = [mark.end() for mark in _MARK.finditer(text)]

        def place(at: int) -> tuple[int, int]:
            mark = max((number for number, end in enumerate(ends) if end <= at), default=-1)
            return mark, at - (ends[mark] if mark >= 0 else 0)

        roles = [message["role"] for message in messages for _ in _texts([message])]
        left_out = sorted({role for number, role in enumerate(roles) if number not in order})
        places = [(*place(begin), *place(end)) for begin, end in spans]
        return _Shape(literals, order, places, left_out, self._condition(messages))

    def _condition(self, messages: list[dict[str, Any]]) -> Condition | None:
        """The condition under which texts of messages with the same roles are written like marks."""
        lists = any(isinstance(message["content"], list) for message in messages)
        content = Kind.PARTS if self._form.parts else Kind.EITHER if lists else Kind.CONTENT
        key = frozenset(message["role"] for message in messages), content
        if key not in self._conditions:
            found = condition_of(_tree(self.source), *key)
            # A text that may occur within a mark would distinguish marks from other contents.
            clear = found is not None and not any(set(text) <= _OF_MARKS for text in found.markers)
            self._conditions[key] = found if clear else None
        return self._conditions[key]


_BARE = Conversation([], ())


def read_template(tokenizer: Any, date: str | None = None) -> ChatTemplate:
    """The chat template of `tokenizer`, which must have one.

    date: the date for templates that ask for today's, YYYY-MM-DD; by default the present time.
    """
    added = {token.content for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
    return ChatTemplate(
        source=tokenizer.get_chat_template(),
        tool_source=tokenizer.get_chat_template(tools=[]),
        variables=dict(tokenizer.special_tokens_map),
        ends=tuple(sorted(token for token in added if token.strip())),
        now=datetime.fromisoformat(date) if date else datetime.now(),
    )


def is_dated(tokenizer: Any) -> bool:
    """True if texts of the chat template of `tokenizer` depend on the date."""
    return "strftime_now" in str(getattr(tokenizer, "chat_template", None))


def _mark(number: int) -> str:
    return f"\ue000{number}\ue001"


def _marked(number: int, message: dict[str, Any]) -> dict[str, Any]:
    """The message with a mark instead of its content; role, name and call id stay."""
    kept: dict[str, Any] = {key: message[key] for key in ("role", "name", "tool_call_id") if key in message}
    return {**kept, "content": _mark(number)}


def _kinds(message: dict[str, Any]) -> Any:
    """The role of a message, and the types of its parts if its content is a list: equal in all rows of a shape."""
    content = message["content"]
    return message["role"] if isinstance(content, str) else (message["role"], *[part["type"] for part in content])


def _texts(messages: Sequence[dict[str, Any]]) -> list[str]:
    """The contents of messages; for lists, those of each part with text."""
    texts: list[str] = []
    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            texts.append(content)
        else:
            texts += [part["text"] for part in content if "text" in part]
    return texts


def _with_texts(message: dict[str, Any], texts: Iterator[str]) -> dict[str, Any]:
    """The message with each of its texts replaced by the next of `texts`."""
    content = message["content"]
    if isinstance(content, str):
        return {"role": message["role"], "content": next(texts)}
    parts = [{**part, "text": next(texts)} if "text" in part else part for part in content]
    return {"role": message["role"], "content": parts}


def _with_text_arguments(call: dict[str, Any]) -> dict[str, Any]:
    if "function" in call:
        return {**call, "function": _with_text_arguments(call["function"])}
    return {**call, "arguments": json.dumps(call["arguments"], ensure_ascii=False)}


def _split(text: str) -> tuple[list[str], list[int]]:
    """The strings around the marks in `text`, and the marks' numbers."""
    pieces = _MARK.split(text)
    return pieces[0::2], [int(number) for number in pieces[1::2]]


def _tree(source: str) -> nodes.Template:
    """The syntax tree of a template."""
    return compile_jinja_template(source).environment.parse(source)


def _names(source: str) -> set[str]:
    """The names of variables, attributes and keys that a template may read, from its syntax tree."""
    tree = _tree(source)
    names = {node.name for node in tree.find_all(nodes.Name)}
    names |= {node.attr for node in tree.find_all(nodes.Getattr)}
    return names | {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
