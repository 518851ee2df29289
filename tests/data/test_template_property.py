"""Properties of chat templates over random templates and random conversations.

Templates are put together from filters, slices, conditions and loops, messages from what templates look for. Whatever
they do: the text is that of `apply_chat_template`, for every row and whatever rows came before it, and the trained
spans are what the model writes after the prompt.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.test_template import PIECES, tokenizer_for
from tests.properties import examples
from tutti.data.rows import Conversation, RowError
from tutti.data.template import ChatTemplate, read_template

TOKENIZER = tokenizer_for("harmony")
END = "<|end|>"

FILTERS = [
    "",
    "",
    " | trim",
    " | lower",
    " | upper",
    " | capitalize",
    " | title",
    " | tojson",
    " | e",
    " | reverse",
    " | replace('a', 'bb')",
    " | replace('\\n', ' ')",
    " | truncate(4, true, '')",
    " | length",
    " | wordcount",
    " | first",
    " | default('none', true)",
    " | indent(2)",
    "[:3]",
    "[1:]",
    "[::-1]",
    ".strip()",
    ".split('</think>')[-1]",
    ".lstrip('\\n')",
]
CONDITIONS = [
    "true",
    "c | length < 4",
    "'a' in c",
    "c.startswith('<')",
    "c",
    "c == 'a'",
    "loop.last",
    "loop.first",
    "loop.index0 % 2 == 0",
    "m.role == 'assistant'",
    "messages[0].content | length > 2",
    "messages[-1].content == c",
]
LOOPS = ["messages", "messages[::-1]", "messages[1:]", "messages | sort(attribute='content')", "messages[:2]"]

expressions = st.tuples(st.sampled_from(FILTERS), st.sampled_from(FILTERS)).map(lambda two: f"((c{two[0]}){two[1]})")


@st.composite
def templates(draw: Any) -> str:
    """A template of one loop; half of them are of the plain kind that all but a few are."""
    plain = draw(st.booleans())
    loop = "messages" if plain else draw(st.sampled_from(LOOPS))
    written = "c" if plain else draw(expressions)
    if draw(st.booleans()):
        other, when = draw(expressions), draw(st.sampled_from(CONDITIONS))
        written = f"({written}) if {when} else ({other})"
    lead, tail = draw(st.sampled_from(["", " ", "\n"])), draw(st.sampled_from(["", " ", "x"]))
    end = draw(st.sampled_from([END, END, "\n", "<|return|>' if loop.last else '<|end|>"]))
    prompt = draw(st.sampled_from(["<|start|>assistant\n", "<|start|>assistant", ""]))
    begin = draw(st.sampled_from(["", "{{ 'S' }}", "{{ messages | length }}", "{{ messages[0].content }}"]))
    return (
        f"{begin}{{% for m in {loop} %}}{{% set c = m.content %}}{{{{ '<|start|>' + m.role }}}}{{{{ '\\n' }}}}"
        f"{{{{ '{lead}' }}}}{{{{ {written} }}}}{{{{ '{tail}' + '{end}' }}}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {prompt!r} }}}}{{% endif %}}"
    )


texts = st.lists(st.sampled_from([*PIECES, "hello", "a", "ab"]), max_size=3).map("".join)


@st.composite
def conversations(draw: Any) -> Conversation:
    roles = draw(st.sampled_from([[], ["system"]])) + ["user", "assistant"] * draw(st.integers(1, 2))
    flags = tuple(role == "assistant" and draw(st.integers(0, 9)) > 0 for role in roles)
    return Conversation([{"role": role, "content": draw(texts)} for role in roles], flags)


def rendered(source: str, messages: list[dict[str, Any]], *, prompt: bool = False) -> str | None:
    try:
        return TOKENIZER.apply_chat_template(
            messages, chat_template=source, tokenize=False, add_generation_prompt=prompt
        )
    except Exception:
        return None


def written(template: ChatTemplate, conversation: Conversation) -> Any:
    """The text and the spans, or the reason why there are none."""
    try:
        return template(conversation)
    except RowError as error:
        return str(error)


def template_of(source: str) -> ChatTemplate:
    TOKENIZER.chat_template = source
    return read_template(TOKENIZER)


@examples(150)
@given(templates(), st.lists(conversations(), min_size=1, max_size=8))
def test_every_row_is_what_apply_chat_template_gives_whatever_came_before(source: str, rows: list) -> None:
    template, backwards = template_of(source), template_of(source)
    results = [written(template, row) for row in rows]
    assert results == [written(backwards, row) for row in reversed(rows)][::-1]
    for row, result in zip(rows, results, strict=True):
        expected = rendered(source, row.messages)
        if isinstance(result, str):
            assert expected is None or "can't be exact" in result, result
            continue
        text, spans = result
        assert text == expected
        assert len(spans) == sum(row.trained)
        assert all(0 <= begin <= end <= len(text) for begin, end in spans)


@examples(150)
@given(templates(), conversations())
def test_spans_begin_where_the_prompt_ends(source: str, row: Conversation) -> None:
    result = written(template_of(source), row)
    if isinstance(result, str):
        return
    text, spans = result
    for number, (begin, _) in zip([n for n, flag in enumerate(row.trained) if flag], spans, strict=True):
        prompt = rendered(source, row.messages[:number], prompt=True)
        bare = rendered(source, row.messages[:number])
        if prompt and bare and prompt != bare and text.startswith(prompt):
            assert begin == len(prompt)


@pytest.mark.parametrize("lead", ["", " ", "\n"])
@examples(40)
@given(conversations())
def test_spans_are_the_answers_where_contents_are_written_as_they_are(lead: str, row: Conversation) -> None:
    source = (
        "{% for m in messages %}{{ '<|start|>' + m.role + '\\n' }}{{ LEAD }}{{ m.content + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant\\n' }}{% endif %}"
    ).replace("LEAD", repr(lead))
    text, spans = template_of(source)(row)
    answers = [f"{lead}{m['content']}{END}" for m, flag in zip(row.messages, row.trained, strict=True) if flag]
    assert [text[slice(*span)] for span in spans] == answers
