"""Chat templates by name, and the tokens that end a text."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from tests.data.test_template import CHAT, NAMES, assistant, template_for, tokenizer_for, user
from tests.train.runs import QUICKSTART
from tutti.data.rows import conversation_of
from tutti.data.template import read_template
from tutti.model.tokenizer import TEMPLATES, end_ids, set_chat_template


def bare(**roles: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_file=str(QUICKSTART / "tokenizer.json"), **roles)


def test_choice_of_template(tmp_path: Path) -> None:
    tokenizer = tokenizer_for("plain")
    set_chat_template(tokenizer, "default")
    assert tokenizer.chat_template == TEMPLATES["plain"]
    own = "{% for message in messages %}{{ message.content }}<|endoftext|>{% endfor %}"
    tokenizer.chat_template = own
    set_chat_template(tokenizer, "default")
    assert tokenizer.chat_template == own
    for name in TEMPLATES:
        set_chat_template(tokenizer, name)
        assert tokenizer.chat_template == TEMPLATES[name]
    (tmp_path / "own.jinja").write_text(own)
    set_chat_template(tokenizer, str(tmp_path / "own.jinja"))
    assert tokenizer.chat_template == own


@pytest.mark.parametrize(
    ("name", "roles", "reason"),
    [
        (
            "nope",
            {},
            r"data.chat_template nope is neither default, plain, chatml, llama2, nor the path of a Jinja file",
        ),
        ("bad.jinja", {}, r"bad.jinja: is not a valid Jinja template: .*\(line 1\)"),
        ("binary.jinja", {}, r"binary.jinja: 'utf-8' codec can't decode"),
        ("default", {}, r"data.chat_template plain ends a turn with the tokenizer's eos_token, and it has none"),
        ("llama2", {}, r"data.chat_template llama2 ends a turn with the tokenizer's eos_token"),
    ],
)
def test_templates_that_can_not_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, roles: dict[str, str], reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.jinja").write_text("{% for %}")
    Path("binary.jinja").write_bytes(b"\xff{{ messages }}")
    with pytest.raises(ValueError, match=reason):
        set_chat_template(bare(**roles), name)


def test_of_several_templates_one_must_be_the_default() -> None:
    tokenizer: Any = bare(eos_token="<|endoftext|>")
    tokenizer.chat_template = {"one": TEMPLATES["chatml"], "two": TEMPLATES["plain"]}
    with pytest.raises(ValueError, match=r"data.chat_template default: "):
        set_chat_template(tokenizer, "default")
    tokenizer.chat_template = {"default": TEMPLATES["chatml"], "tool_use": TEMPLATES["plain"]}
    set_chat_template(tokenizer, "default")
    template = read_template(tokenizer)
    assert (template.source, template.tool_source) == (TEMPLATES["chatml"], TEMPLATES["plain"])


def test_llama2_needs_no_bos_token_where_it_is_served() -> None:
    tokenizer = bare(eos_token="<|endoftext|>")
    set_chat_template(tokenizer, "llama2")
    assert tokenizer.apply_chat_template(CHAT[1:3], tokenize=False) == "[INST] Hi! [/INST] Hello. <|endoftext|>"


def test_a_turn_that_no_token_ends_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = bare(eos_token="<|endoftext|>")
    with caplog.at_level(logging.WARNING):
        set_chat_template(tokenizer, "chatml")
        assert not caplog.records, "the tokenizer has <|im_end|>"
        tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
        set_chat_template(tokenizer, "default")
    assert "the tokenizer has no token for what ends a turn, '<end>'" in caplog.text
    assert end_ids(tokenizer) == [tokenizer.eos_token_id]


@pytest.mark.parametrize("name", NAMES)
def test_generation_ends_where_the_trained_span_does(name: str) -> None:
    tokenizer = tokenizer_for(name)
    template = template_for(name)
    tokenizer.chat_template = template.source
    text, spans = template(conversation_of({"messages": [user("x"), assistant("y")]}, ("messages",)))
    ids = tokenizer.encode(text[slice(*spans[-1])], add_special_tokens=False)
    assert ids[-1] in end_ids(tokenizer)
    assert not set(ids[:-1]) & set(end_ids(tokenizer))


def test_ends_are_those_of_the_config_of_the_text_and_of_the_turn() -> None:
    tokenizer = bare(eos_token="<|endoftext|>")
    turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end_ids(tokenizer) == [tokenizer.eos_token_id]
    set_chat_template(tokenizer, "chatml")
    assert end_ids(tokenizer) == [tokenizer.eos_token_id, turn]
    assert end_ids(tokenizer, SimpleNamespace(eos_token_id=7)) == [7, tokenizer.eos_token_id, turn]
    assert end_ids(tokenizer, SimpleNamespace(eos_token_id=[turn, 7])) == [turn, 7, tokenizer.eos_token_id]
    assert end_ids(bare(), SimpleNamespace(eos_token_id=None)) == []


def test_a_template_that_takes_parts_ends_its_turns_too() -> None:
    tokenizer = bare(eos_token="<|endoftext|>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:{% for p in m.content %}{{ p.text }}{% endfor %}<|im_end|>{% endfor %}"
    )
    assert end_ids(tokenizer)[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
