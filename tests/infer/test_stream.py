"""Streamed pieces put together are the text decoded at once, and never half a character."""

from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tests.train.runs import QUICKSTART
from tutti.infer.stream import TextStream, answer_text

TOKENIZER = AutoTokenizer.from_pretrained(QUICKSTART)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40))
def test_pieces_add_up(text):
    ids = TOKENIZER(text, add_special_tokens=False).input_ids
    stream = TextStream(TOKENIZER)
    pieces = [stream.add(token) for token in ids]
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text
    assert "".join(pieces) + stream.end() == answer_text(TOKENIZER, ids)


def test_what_is_held_back_is_given_at_the_end():
    ids = TOKENIZER("a🎵", add_special_tokens=False).input_ids[:-1]
    stream = TextStream(TOKENIZER)
    shown = "".join(map(stream.add, ids))
    assert shown == "a" and stream.end().startswith("\ufffd")
