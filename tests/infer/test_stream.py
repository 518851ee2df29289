"""Streamed pieces put together are the text decoded at once, and never half a character."""

from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tests.train.runs import QUICKSTART
from tutti.data.rows import Conversation
from tutti.data.template import ChatTemplate, read_template
from tutti.infer.stream import Edges, TextStream, answer_text, edges_of
from tutti.model.tokenizer import TEMPLATES, set_chat_template

TOKENIZER = AutoTokenizer.from_pretrained(QUICKSTART)
BLANKS = st.text(" \n", max_size=2)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40), BLANKS, BLANKS, BLANKS, BLANKS)
def test_pieces_add_up(text, first, last, before, after):
    ids, edges = TOKENIZER(first + text + last, add_special_tokens=False).input_ids, Edges(before, after)
    stream = TextStream(TOKENIZER, edges)
    pieces = [stream.add(token) for token in ids]
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text
    assert "".join(pieces) + stream.end() == answer_text(TOKENIZER, ids, edges)
    assert answer_text(TOKENIZER, ids) == first + text + last


def test_what_is_held_back_is_given_at_the_end():
    ids = TOKENIZER("a🎵", add_special_tokens=False).input_ids[:-1]
    stream = TextStream(TOKENIZER)
    shown = "".join(map(stream.add, ids))
    assert shown == "a" and stream.end().startswith("\ufffd")


def template_named(name) -> ChatTemplate:
    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART)
    set_chat_template(tokenizer, name)
    return read_template(tokenizer)


NAMED = {name: template_named(name) for name in (*TEMPLATES, "default")}


def test_blanks_of_templates():
    found = {name: edges_of(NAMED[name]) for name in TEMPLATES}
    assert found == {"plain": (" ", ""), "chatml": ("", ""), "llama2": (" ", " ")}


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(list(NAMED)), st.text(min_size=1, max_size=20))
def test_what_is_trained_is_what_is_generated_and_fed_back(name, answer):
    template = NAMED[name]
    turn = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": answer}]
    text, spans = template(Conversation(turn, (False, True)))
    made = TOKENIZER(text[slice(*spans[-1])], add_special_tokens=False).input_ids
    response = answer_text(TOKENIZER, made[:-1], edges_of(template))
    assert response == (answer.strip() if name == "llama2" else answer)
    fed_back = [turn[0], {"role": "assistant", "content": response}]
    assert template.render(fed_back, Conversation(fed_back, (False, True))) == text
