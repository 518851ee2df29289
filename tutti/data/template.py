"""Chat templates: the text of a conversation, and exactly which of its characters are trained on.

A chat template is a Jinja program that knows nothing of training. Its text must be what `apply_chat_template` gives,
and the trained span of an assistant turn is what the model would write at inference: it starts where the generation
prompt ends and runs through the marker that ends the turn. Templates that say so themselves (`{% generation %}`) are
taken at their word. For the others the borders are found by rendering *marks*, characters no template knows, in place
of content:

1. Render the conversation with every message's content replaced by its mark. Between the marks now lies what the
   template writes around the contents.
2. The *header* of turn i is what the generation prompt puts after the previous mark: render messages [0, i) with
   `add_generation_prompt=True` and read off what follows the last mark. The full rendering must have the same there.
   Of a template without a generation prompt it is all visible text up to the content.
3. The *close* of turn i is what follows its mark when it is the last message, up to and including the first of the
   tokenizer's added tokens (`<|im_end|>`), or all of it if there is none; the full rendering must agree again. Some
   templates end the last turn with another token than the earlier ones; the full rendering's token counts.
4. Render the conversation as it is, and once more with only message i replaced by a mark. What follows the mark must
   be what the real text ends with, so that the content ends there, whatever the template did to it (stripping, dropping
   earlier thoughts). Header and close, which must be found at these places, give the span.
   (Where a mark in place of the message before i changes more than that, the prompt of the real messages [0, i) does
   as well, if the text begins with it.)

Anything that fails to agree is an error for that row; nothing is guessed.

That is exact but takes several renderings a row. Nearly all templates put plain contents between constant strings, and
for them one rendering a *shape* (the sequence of roles and flags) is enough: the strings between the marks are kept and
contents are joined in. A content is plain if it has nothing in it that could make the template act differently: no
string constant of the template that looks like markup, nor any other constant that was seen to matter when the template
was tried with it, nor, where that was seen to matter, blanks at its edges. Rows with other contents take the exact way,
and so do the first rows of each shape, whose results must be equal.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

from tutti.data.rows import Conversation, RowError

log = logging.getLogger(__name__)

Span = tuple[int, int]

TEMPLATES = {
    "plain": (
        "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}{{ eos_token }}\n"
        "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
    ),
    "chatml": (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "llama2": (
        "{% set system = '' %}{% if messages[0]['role'] == 'system' %}"
        "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}{% set messages = messages[1:] %}"
        "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate user, assistant after an optional system message') }}{% endif %}"
        "{% if message['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + (system if loop.first else '') + message['content'].strip() + ' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}"
        "{% else %}{{ raise_exception('only system, user and assistant messages are supported') }}"
        "{% endif %}{% endfor %}"
    ),
}
"""Templates by name. `plain` is used where the tokenizer has none of its own."""

_MARK = re.compile("\ue000([0-9]+)\ue001")
_PROBE = "\ue002"
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_TRIALS = 4
_INEXACT = "so that its loss mask can't be exact"


@dataclass(frozen=True, slots=True)
class _Turn:
    """Where the trained span of a message lies: `header` characters after the content of message `before` (None: after
    the start of the text), through `close` characters after its own content."""

    before: int | None
    header: str
    close: str


@dataclass(slots=True)
class _Plan:
    """How to write down a shape: contents of messages `order` between `literals`, one more of these.

    spans: (place in `order`, or -1 for the start of the text, and an offset) of begin and of end.
    trials: how many more rows are to be compared with the exact way.
    """

    literals: list[str]
    order: list[int]
    spans: list[tuple[int, int, int, int]]
    trials: int = _TRIALS

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
    """A chat template over a tokenizer's special tokens. Call it with a conversation; picklable.

    source: the Jinja text. tool_source: the one for conversations with tools, where the tokenizer has another.
    variables: the special tokens by name. ends: texts of the tokenizer's added tokens, any of which may end a turn.
    """

    source: str
    tool_source: str
    variables: dict[str, str]
    ends: tuple[str, ...]
    _plans: dict[Any, _Plan | None] = field(default_factory=dict, repr=False)
    _turns: dict[Any, _Turn] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._end = re.compile("|".join(re.escape(end) for end in sorted(self.ends, key=len, reverse=True)) or "(?!)")
        self._tagged = bool(_GENERATION.search(self.source))
        odd, self._blanks_matter = self._learn_odd()
        self._odd = re.compile("|".join(map(re.escape, odd)))

    def __call__(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """The text and its trained spans, ascending. RowError if the template refuses or spans can't be exact."""
        if not conversation.plain:
            return self._exact(conversation)
        messages = conversation.messages
        shape = (*[message["role"] for message in messages], *conversation.trained)
        contents = [message["content"] for message in messages]
        if not self._are_plain(contents):
            return self._exact(conversation)
        if shape not in self._plans:
            self._plans[shape] = self._plan(conversation)
        plan = self._plans[shape]
        if plan is None:
            return self._exact(conversation)
        result = plan.write(contents)
        if plan.trials:
            plan.trials -= 1
            self._plans[shape] = None
            exact = self._exact(conversation)
            if exact != result:
                return exact
            self._plans[shape] = plan
        return result

    def render(self, messages: list[dict[str, Any]], conversation: Conversation, *, prompt: bool = False) -> str:
        """What `apply_chat_template` gives for `messages`, with the conversation's tools and settings."""
        return self._render(messages, conversation, prompt)[0]

    def _render(
        self, messages: list[dict[str, Any]], conversation: Conversation, prompt: bool
    ) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = cast(
                tuple[list[str], list[list[Span]]],
                render_jinja_template(
                    conversations=[messages],
                    tools=conversation.tools,
                    chat_template=self.tool_source if conversation.tools else self.source,
                    add_generation_prompt=prompt,
                    return_assistant_tokens_mask=self._tagged,
                    **{**self.variables, **conversation.kwargs},
                ),
            )
        except Exception as error:  # a template may fail in any way on messages it was not made for
            raise RowError(f"the chat template can't render it: {error}") from None
        return texts[0], spans[0] if self._tagged else []

    def _exact(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """Text and spans by rendering, for any conversation."""
        messages, trained = conversation.messages, conversation.trained
        text, tagged = self._render(messages, conversation, False)
        if self._tagged:
            return text, self._tagged_spans(conversation, tagged)
        ends: dict[int, int] = {}
        spans = []
        for number in [number for number, train in enumerate(trained) if train]:
            turn = self._turn(conversation, number)
            begin = self._begin(conversation, number, turn, text, ends)
            end = self._content_end(conversation, number, text, ends)
            if not text.startswith(turn.close, end):
                raise RowError(f"the chat template rewrites what follows message {number}, {_INEXACT}")
            spans.append((begin, end + len(turn.close)))
        if any(begin > end for begin, end in spans) or any(a[1] > b[0] for a, b in pairwise(spans)):
            raise RowError(f"the chat template changes the order of messages, {_INEXACT}")
        return text, spans

    def _begin(self, conversation: Conversation, number: int, turn: _Turn, text: str, ends: dict[int, int]) -> int:
        """Where the span of a message begins: after its header, or else after the whole prompt, if `text` has that."""
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
        """The spans the template itself tags, less those of assistant messages that are not to be trained on."""
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
        """Where a message's content ends in `text`: before what follows when it alone is a mark. Kept in `ends`."""
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
        """Header and close of a message's turn, from renderings of marks alone."""
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
        """What of `between`, the text from the previous content to an assistant's, is given to it at inference."""
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
        """The header of an assistant message that nothing comes before, by the generation prompt of another chat."""
        user = [_marked(0, {"role": "user"})]
        without, full = self.render(user, conversation), self.render(user, conversation, prompt=True)
        prompt = full[len(without) :] if full.startswith(without) else between
        found = between.rfind(prompt) if prompt and full.endswith(prompt) else -1
        if found < 0:
            raise RowError(f"the conversation starts with an assistant message, whose header is not known, {_INEXACT}")
        return between[: found + len(prompt)]

    def _close(self, closing: str, after: str, number: int) -> str:
        """What of `after`, the text after a content, ends its turn; `closing`: that text where the turn is the last."""
        end = self._end.search(closing)
        if end is None:
            if after.startswith(closing):
                return closing
        else:
            here = self._end.match(after, end.start())
            if here is not None and after.startswith(closing[: end.start()]):
                return after[: here.end()]
        raise RowError(f"the chat template ends message {number} in another way when others follow, {_INEXACT}")

    def _plan(self, conversation: Conversation) -> _Plan:
        """The shape of a conversation as strings and places."""
        marked = Conversation([_marked(n, m) for n, m in enumerate(conversation.messages)], conversation.trained)
        text, spans = self._exact(marked)
        literals, order = _split(text)
        roles = [message["role"] for message in conversation.messages]
        if missing := sorted({role for number, role in enumerate(roles) if number not in order}):
            log.warning(
                "the chat template leaves out %s from conversations of %s", ", ".join(missing), ", ".join(roles)
            )
        ends = [mark.end() for mark in _MARK.finditer(text)]
        places = []
        for begin, end in spans:
            first = max((place for place, at in enumerate(ends) if at <= begin), default=-1)
            last = max((place for place, at in enumerate(ends) if at <= end), default=-1)
            places.append(
                (first, begin - (ends[first] if first >= 0 else 0), last, end - (ends[last] if last >= 0 else 0))
            )
        return _Plan(literals, order, places)

    def _are_plain(self, contents: list[str]) -> bool:
        if self._blanks_matter and any([not text or text[0].isspace() or text[-1].isspace() for text in contents]):
            return False
        return self._odd.search("\0".join(contents)) is None

    def _learn_odd(self) -> tuple[set[str], bool]:
        """Strings that may make the template treat a content as other than text, and whether blanks at its edges do."""
        constants = _constants(self.source) | {"\n", "\n\n", "\ue000", "\ue001", _PROBE}
        odd = {
            text for text in constants if "\ue000" <= text <= _PROBE or (len(text) > 1 and set(text) & set("<>[]{}|"))
        }
        sample = self._sample()
        if sample is None:
            return {""}, True
        literals, order = _split(self.render([_marked(n, m) for n, m in enumerate(sample)], _BARE))
        plan = _Plan(literals, order, [])

        def matters(content: str) -> bool:
            contents = [content] * len(sample)
            messages = [{"role": message["role"], "content": content} for message in sample]
            try:
                return self.render(messages, _BARE) != plan.write(contents)[0]
            except RowError:
                return True

        for text in constants - odd:
            tries = [f"x{text}x"] if text.strip() != text else [f"x{text}x", f"{text}x", f"x{text}", text]
            if any(map(matters, tries)):
                odd.add(text)
        blanks = any(map(matters, ("", " x", "x ", "\nx", "x\n")))
        return odd, blanks

    def _sample(self) -> list[dict[str, Any]] | None:
        """A conversation with as many roles as the template knows, to try contents in."""
        pair = ["user", "assistant"]
        for roles in (["system", *pair, "tool", "assistant", *pair], ["system", *pair, *pair], [*pair, *pair], pair):
            messages = [_marked(number, {"role": role}) for number, role in enumerate(roles)]
            try:
                self.render(messages, _BARE)
            except RowError:
                continue
            return messages
        return None


_BARE = Conversation([], ())


def make_template(name: str, tokenizer: Any) -> ChatTemplate:
    """The template that data.chat_template names, for `tokenizer`.

    `default`: the tokenizer's own, else `plain`; a name in TEMPLATES; or the path of a Jinja file. ValueError for
    another name, a template that is not valid Jinja, or one whose end of turn the tokenizer can't write.
    """
    source = tool_source = TEMPLATES.get(name, "")
    own = tokenizer.chat_template
    if name == "default" and own:
        try:
            source, tool_source = tokenizer.get_chat_template(), tokenizer.get_chat_template(tools=[])
        except ValueError as error:
            raise ValueError(f"data.chat_template default: {error}") from None
    elif name == "default":
        source = tool_source = TEMPLATES["plain"]
    elif not source:
        if not Path(name).is_file():
            raise ValueError(
                f"data.chat_template {name} is neither default, {', '.join(TEMPLATES)}, nor the path of a Jinja file"
            )
        source = tool_source = Path(name).read_text()
    variables = {key: token for key, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    if source in (TEMPLATES["plain"], TEMPLATES["llama2"]) and "eos_token" not in variables:
        raise ValueError(f"data.chat_template {name} ends a turn with the tokenizer's eos_token, and it has none")
    if source == TEMPLATES["llama2"]:
        variables.setdefault("bos_token", "")
    added = {token.content for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
    if source == TEMPLATES["chatml"] and "<|im_end|>" not in added:
        log.warning("the tokenizer has no token <|im_end|>, so that data.chat_template chatml spells it in several")
    return ChatTemplate(source, tool_source, variables, tuple(sorted(token for token in added if token.strip())))


def end_of_turn(template: ChatTemplate, tokenizer: Any) -> int | None:
    """The token by which `template` ends an assistant's turn; None if it is not one of the tokenizer's added tokens."""
    turn = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]
    try:
        text, spans = template(Conversation(turn, (False, True)))
    except RowError:
        return None
    last = tokenizer.encode(text[slice(*spans[-1])], add_special_tokens=False)[-1:] if spans else []
    return next((token for token in last if token in tokenizer.added_tokens_decoder), None)


def _marked(number: int, message: dict[str, Any]) -> dict[str, Any]:
    """The message with a mark in place of all it says; role, name and call id stay."""
    kept: dict[str, Any] = {key: message[key] for key in ("role", "name", "tool_call_id") if key in message}
    return {**kept, "content": f"\ue000{number}\ue001"}


def _split(text: str) -> tuple[list[str], list[int]]:
    """The strings around the marks in `text`, and the marks' numbers."""
    pieces = _MARK.split(text)
    return pieces[0::2], [int(number) for number in pieces[1::2]]


def _constants(source: str) -> set[str]:
    """The strings that expressions of a template are made of; ValueError if it is not valid Jinja."""
    import jinja2
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        tree = _compile_jinja_template(source).environment.parse(source)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"data.chat_template is not a valid Jinja template: {error} (line {error.lineno})") from None
    return {node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str) and node.value}
