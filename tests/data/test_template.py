"""Loss masks of chat templates: golden texts of real formats, and properties that hold for any conversation.

In golden texts what is trained on stands in [[double brackets]].
"""

from __future__ import annotations

import pickle
import random
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from tutti.data.rows import RowError, conversation_of
from tutti.data.template import ChatTemplate, is_dated, read_template
from tutti.model.tokenizer import TEMPLATES, set_chat_template

QUICKSTART = Path(__file__).parents[2] / "data" / "quickstart" / "tokenizer.json"
FOLDER = Path(__file__).parent / "templates"
MARKERS = {
    "llama2": ["<s>", "</s>"],
    "llama3": ["<s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "gemma": ["<s>", "<start_of_turn>", "<end_of_turn>"],
    "mistral": ["<s>", "[INST]", "[/INST]", "</s>"],
    "deepseek": ["<s>", "<|User|>", "<|Assistant|>", "<|end_of_sentence|>"],
    "phi3": ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
    "harmony": ["<|start|>", "<|channel|>", "<|message|>", "<|return|>", "<|end|>"],
    "tagged": ["<|end|>"],
}
NAMES = [*TEMPLATES, *sorted(path.stem for path in FOLDER.glob("*.jinja"))]

SYSTEM = {"role": "system", "content": "Be brief."}


def user(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def assistant(content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


CHAT = [SYSTEM, user("Hi!"), assistant("Hello."), user("2+2? "), assistant(" It is 4.")]


def tokenizer_for(name: str) -> PreTrainedTokenizerFast:
    eos = "</s>" if name in ("llama2", "mistral") else "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(QUICKSTART), bos_token="<s>", eos_token=eos)
    tokenizer.add_special_tokens({"additional_special_tokens": MARKERS.get(name, [])})
    return tokenizer


def template_for(name: str) -> ChatTemplate:
    path = FOLDER / f"{name}.jinja"
    tokenizer = tokenizer_for(name)
    set_chat_template(tokenizer, "default" if name == "plain" else name if name in TEMPLATES else str(path))
    return read_template(tokenizer)


def bracketed(text: str, spans: list[tuple[int, int]]) -> str:
    for begin, end in reversed(spans):
        text = f"{text[:begin]}[[{text[begin:end]}]]{text[end:]}"
    return text


def golden(name: str, messages: list[dict[str, Any]], **row: Any) -> str:
    """The bracketed text, found by the fast method and by the exact method, which must agree."""
    template = template_for(name)
    conversation = conversation_of({"messages": messages, **row}, ("messages",))
    exact = template._exact(conversation)
    for _ in range(6):
        assert template(conversation) == exact
    return bracketed(*exact)


GOLDEN = {
    "plain": "System: Be brief.<|endoftext|>\nUser: Hi!<|endoftext|>\nAssistant:[[ Hello.<|endoftext|>]]\n"
    "User: 2+2? <|endoftext|>\nAssistant:[[  It is 4.<|endoftext|>]]\n",
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi!<|im_end|>\n"
    "<|im_start|>assistant\n[[Hello.<|im_end|>]]\n<|im_start|>user\n2+2? <|im_end|>\n"
    "<|im_start|>assistant\n[[ It is 4.<|im_end|>]]\n",
    "llama2": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi! [/INST][[ Hello. </s>]]"
    "<s>[INST] 2+2? [/INST][[ It is 4. </s>]]",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi!<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n[[Hello.<|eot_id|>]]"
    "<|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n[[It is 4.<|eot_id|>]]",
    "qwen2": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi!<|im_end|>\n"
    "<|im_start|>assistant\n[[Hello.<|im_end|>]]\n<|im_start|>user\n2+2? <|im_end|>\n"
    "<|im_start|>assistant\n[[ It is 4.<|im_end|>]]\n",
    "qwen3": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi!<|im_end|>\n"
    "<|im_start|>assistant\n[[Hello.<|im_end|>]]\n<|im_start|>user\n2+2? <|im_end|>\n"
    "<|im_start|>assistant\n[[<think>\n\n</think>\n\n It is 4.<|im_end|>]]\n",
    "gemma": "<s><start_of_turn>user\nBe brief.\n\nHi!<end_of_turn>\n<start_of_turn>model\n[[Hello.<end_of_turn>]]\n"
    "<start_of_turn>user\n2+2?<end_of_turn>\n<start_of_turn>model\n[[It is 4.<end_of_turn>]]\n",
    "mistral": "<s>[INST] Hi![/INST][[ Hello.</s>]][INST] 2+2? [/INST][[ It is 4.</s>]]",
    "deepseek": "<s>Be brief.<|User|>Hi!<|Assistant|>[[Hello.<|end_of_sentence|>]]"
    "<|User|>2+2? <|Assistant|>[[ It is 4.<|end_of_sentence|>]]",
    "phi3": "<|system|>\nBe brief.<|end|>\n<|user|>\nHi!<|end|>\n<|assistant|>\n[[Hello.<|end|>]]\n"
    "<|user|>\n2+2? <|end|>\n<|assistant|>\n[[ It is 4.<|end|>]]\n<|endoftext|>",
    "harmony": "<|start|>system<|message|>Be brief.<|end|><|start|>user<|message|>Hi!<|end|>"
    "<|start|>assistant[[<|channel|>final<|message|>Hello.<|end|>]]<|start|>user<|message|>2+2? <|end|>"
    "<|start|>assistant[[<|channel|>final<|message|> It is 4.<|return|>]]",
    "tagged": "Q: Be brief.\nQ: Hi!\nA: [[Hello.<|end|>]]\nQ: 2+2? \nA: [[ It is 4.<|end|>]]\n",
}


@pytest.mark.parametrize("name", NAMES)
def test_golden(name: str) -> None:
    assert golden(name, CHAT) == GOLDEN[name]


def test_thoughts_that_a_template_drops_from_earlier_turns() -> None:
    chat = [user("q"), assistant("<think>\nhm\n</think>\n\nyes"), user("w"), assistant("<think>\nmm\n</think>\n\nno")]
    expected = (
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n[[yes<|im_end|>]]\n"
        "<|im_start|>user\nw<|im_end|>\n<|im_start|>assistant\n[[<think>\nmm\n</think>\n\nno<|im_end|>]]\n"
    )
    assert golden("qwen3", chat) == expected
    apart = [user("q"), assistant("yes", reasoning_content="hm"), user("w"), assistant("no", reasoning_content="mm")]
    assert golden("qwen3", apart) == expected
    assert golden("deepseek", chat) == (
        "<s><|User|>q<|Assistant|>[[\n\nyes<|end_of_sentence|>]]<|User|>w<|Assistant|>[[\n\nno<|end_of_sentence|>]]"
    )


def test_tools_and_settings_reach_the_template() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    chat = [user("2+2?"), assistant(None, tool_calls=[call]), {"role": "tool", "content": "4"}, assistant("Four.")]
    assert golden("qwen3", chat, tools=[{"name": "add"}]) == (
        '<|im_start|>system\n# Tools\n\n<tools>\n{"name": "add"}\n</tools><|im_end|>\n'
        "<|im_start|>user\n2+2?<|im_end|>\n"
        '<|im_start|>assistant\n[[<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>]]\n'
        "<|im_start|>user\n<tool_response>\n4\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n[[<think>\n\n</think>\n\nFour.<|im_end|>]]\n"
    )
    off = golden("qwen3", [user("q"), assistant("a")], chat_template_kwargs={"enable_thinking": False})
    assert off == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n[[a<|im_end|>]]\n"


def test_loss_mask_of_a_message_overrides_its_role() -> None:
    chat = [user("a", loss_mask=1), assistant("b", loss_mask=0), user("c"), assistant("d", loss_mask=True)]
    assert golden("chatml", chat) == (
        "<|im_start|>user\n[[a<|im_end|>]]\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n[[d<|im_end|>]]\n"
    )
    chat = [user("a"), assistant("b", loss_mask=0), user("c"), assistant("d")]
    assert golden("tagged", chat) == "Q: a\nA: b<|end|>\nQ: c\nA: [[d<|end|>]]\n"
    assert golden("llama2", chat) == "<s>[INST] a [/INST] b </s><s>[INST] c [/INST][[ d </s>]]"


def test_a_default_system_message_and_a_first_turn_of_the_assistant() -> None:
    opening = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    chat = [assistant("Hi."), user("q"), assistant("a")]
    rest = "[[Hi.<|im_end|>]]\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n[[a<|im_end|>]]\n"
    assert golden("qwen2", chat) == f"{opening}<|im_start|>assistant\n{rest}"
    assert golden("phi3", chat[:1]) == "<|assistant|>\n[[Hi.<|end|>]]\n<|endoftext|>"


@pytest.mark.parametrize(
    ("name", "messages", "reason"),
    [
        ("gemma", [assistant("a")], "can't render it: Conversation roles must alternate"),
        ("mistral", [{**SYSTEM, "loss_mask": 1}, user("b"), assistant("c")], "writes message 0 0 times"),
        ("tagged", [user("b", loss_mask=1), assistant("c")], "loss_mask differs from what the chat template tags"),
        ("mistral", [assistant("a")], "starts with an assistant message, whose header is not known"),
    ],
)
def test_no_guessing(name: str, messages: list, reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        template_for(name)(conversation_of({"messages": messages}, ("messages",)))


def test_a_template_without_a_generation_prompt() -> None:
    source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>\n{% endfor %}"
    spans = template_of(source)(conversation(user("q"), assistant("a")))
    assert bracketed(*spans) == "<user>q<end>\n<assistant>[[a<end>]]\n"


def test_a_template_whose_prompt_is_not_its_header() -> None:
    source = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[A]{% endif %}"
    )
    template = ChatTemplate(source, source, {}, ())
    with pytest.raises(RowError, match=r"generation prompt '\\n\[A\]' is not how it writes '\\n<assistant>'"):
        template(conversation_of({"messages": [user("q"), assistant("a")]}, ("messages",)))


PIECES = [
    "a",
    "B c",
    " ",
    "\n",
    "\n\n",
    "",
    "é",
    "🙂",
    "<",
    "|>",
    "</think>",
    "<think>",
    "<tool_response>",
    "</tool_response>",
]
PIECES += [
    "<|im_end|>",
    "<|im_start|>",
    "[INST]",
    "system",
    "user",
    "assistant",
    "{{ x }}",
    '"',
    "\\n",
    "<|end|>",
    "\ue000",
]


@pytest.mark.parametrize("name", NAMES)
def test_text_is_upstreams_and_the_quick_way_is_exact(name: str) -> None:
    """Random contents made of what templates look for: same text as apply_chat_template, same spans both ways."""
    random.seed(7)
    tokenizer, template = tokenizer_for(name), template_for(name)
    quick = 0
    for _ in range(150):
        pairs = random.randint(1, 3)
        messages = [SYSTEM] if random.random() < 0.5 else []
        for _ in range(pairs):
            few = random.choice(([1], [2, 3], [4]))
            contents = ["".join(random.choices(PIECES, k=random.choice(few))) for _ in range(2)]
            if random.random() < 0.5:
                contents = ["x" + content + "y" for content in contents]
            messages += [user(contents[0]), assistant(contents[1])]
        conversation = conversation_of({"messages": messages}, ("messages",))
        upstream = tokenizer.apply_chat_template(messages, chat_template=template.source, tokenize=False)
        text, spans = template._exact(conversation)
        assert text == upstream
        assert template(conversation) == (text, spans)
        assert len(spans) == pairs
        shape = template._shape(conversation)
        quick += shape is not None and shape.write([message["content"] for message in messages])[0] == text
    assert quick > 5, "the quick way was never taken"
    assert None not in template._shapes.values()


@pytest.mark.parametrize("name", ["plain", "chatml", "llama2", "llama3", "qwen2", "gemma", "phi3", "harmony"])
def test_what_precedes_a_trained_span_is_the_prompt_at_inference(name: str) -> None:
    tokenizer, template = tokenizer_for(name), template_for(name)
    text, spans = template(conversation_of({"messages": CHAT}, ("messages",)))
    for number, (begin, _) in zip((2, 4), spans, strict=True):
        prompt = tokenizer.apply_chat_template(
            CHAT[:number], chat_template=template.source, tokenize=False, add_generation_prompt=True
        )
        assert text[:begin] == prompt


def test_a_template_with_whims_is_followed_row_by_row() -> None:
    """A rule that depends on length, which trials with other texts would not find."""
    source = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content if m.content | length < 9 else 'long' }}<e>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    template = ChatTemplate(source, source, {}, ("<e>",))
    for content in ["short"] * 9 + ["much longer than that", "short"]:
        conversation = conversation_of({"messages": [user(content), assistant("b")]}, ("messages",))
        written = content if len(content) < 9 else "long"
        assert bracketed(*template(conversation)) == f"<user>{written}<e><assistant>[[b<e>]]"


def test_pickled_templates_work() -> None:
    template = pickle.loads(pickle.dumps(template_for("qwen3")))
    assert bracketed(*template(conversation_of({"messages": CHAT}, ("messages",)))) == GOLDEN["qwen3"]


ADD = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
PARTS_ONLY = (
    "{% for m in messages %}<{{ m.role }}>{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}"
    "{% endif %}{% endfor %}<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def template_of(source: str) -> ChatTemplate:
    return ChatTemplate(source, source, {}, ("<end>",))


def conversation(*messages: dict[str, Any], **row: Any) -> Any:
    return conversation_of({"messages": list(messages), **row}, ("messages",))


def test_a_template_that_writes_a_piece_of_a_text_is_given_texts() -> None:
    """From a list of content parts it would write a whole part, because it never extracts a text."""
    source = "{% for m in messages %}[{{ m.role }}]{{ (m.content | first) | tojson }}{% endfor %}"
    chat = [user("hello"), assistant("yes")]
    assert template_of(source).render(chat, conversation(*chat)) == '[user]"h"[assistant]"y"'


def test_a_template_that_refuses_some_contents_says_that_spans_are_not_exact() -> None:
    """It renders these texts, but not the markers that are used to find turns."""
    source = "{% for m in messages %}[{{ m.role }}]{{ m.content if 'a' in m.content else m.content | length | first }}"
    chat = template_of(f"{source}{{% endfor %}}")
    with pytest.raises(RowError, match=r"the chat template can't render it: .*can't be exact"):
        chat(conversation(user("a"), assistant("a")))


def test_a_template_that_takes_parts_only_is_given_parts() -> None:
    text, spans = template_of(PARTS_ONLY)(conversation(user("q"), assistant("a")))
    assert bracketed(text, spans) == "<user>q<end><assistant>[[a<end>]]"
    text_too = "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    both = PARTS_ONLY.replace("{% for part in m.content %}", text_too)
    both = both.replace("{% endfor %}<end>", "{% endfor %}{% endif %}<end>")
    chat = [user("q"), assistant("a")]
    assert template_of(both).render(chat, conversation(*chat)) == text


EACH = "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
WRITES_CALLS = {
    "by text": (
        "{% for m in messages %}<{{ m.role }}>{% for call in m.tool_calls or [] %}"
        "{{ m.content + '[' + call.function.name + ' ' + call.function.arguments + ']' }}{% else %}{{ m.content }}"
        "{% endfor %}<end>{% endfor %}"
    ),
    "by name": (
        EACH + "{% for call in m.tool_calls or [] %}[{{ call.function.name }} "
        "{{ call.function.arguments | tojson }}]{% endfor %}<end>{% endfor %}"
    ),
    "by items": (
        EACH + "{% for call in m.tool_calls or [] %}[{{ call.function.name }}"
        "{% for k, v in call.function.arguments | items %} {{ k }}={{ v }}{% endfor %}]{% endfor %}<end>{% endfor %}"
    ),
    "known tools only": (
        EACH + "{% for call in m.tool_calls or [] %}"
        "{% if call.function.name != 'add' %}{{ raise_exception('unknown tool') }}{% endif %}+{% endfor %}<end>"
        "{% endfor %}"
    ),
}
DROPS_CALLS = {
    "all": EACH + "<end>{% endfor %}",
    "beside content": (
        "{% for m in messages %}<{{ m.role }}>{{ m.content or m.tool_calls[0].function.name }}<end>{% endfor %}"
    ),
    "all but the first": (
        EACH + "{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}{% endif %}<end>{% endfor %}"
    ),
    "their names": (EACH + "{% if m.tool_calls %}[calls]{% endif %}<end>{% endfor %}"),
}


@pytest.mark.parametrize("name", WRITES_CALLS)
def test_templates_that_write_tool_calls(name: str) -> None:
    call = {"by items": "[add a=2]", "known tools only": "+"}.get(name, '[add {"a": 2}]')
    for content in ("", None):
        text, spans = template_of(WRITES_CALLS[name])(conversation(user("2?"), assistant(content, tool_calls=[ADD])))
        assert bracketed(text, spans) == f"<user>2?<end><assistant>[[{call}<end>]]"


@pytest.mark.parametrize("name", DROPS_CALLS)
def test_templates_that_do_not_write_tool_calls(name: str) -> None:
    other = {"type": "function", "function": {"name": "other", "arguments": {}}}
    chat = conversation(user("2?"), assistant("x", tool_calls=[ADD, other]), assistant("four"))
    with pytest.raises(RowError, match="message 1 calls tools, and the chat template does not write tool calls"):
        template_of(DROPS_CALLS[name])(chat)


def test_what_a_template_leaves_out_is_counted() -> None:
    template = template_for("chatml")
    for _ in range(3):
        template(conversation(user("q"), assistant("a", reasoning_content="hm", mood="good", name="Bo")))
    template(conversation(user("q"), assistant("a"), tools=[{"name": "add"}]))
    template(conversation(user("q", weight=1), assistant("a", train=True)))
    assert template.notes == {
        "the chat template does not write the assistant's reasoning": 3,
        "messages have a key 'mood' that means nothing here, nor to the chat template": 3,
        "the chat template does not write which tools there are": 1,
    }
    template = template_for("deepseek")
    template(conversation(user("q"), {"role": "tool", "content": "4"}, assistant("a")))
    template(conversation(user("q"), {"role": "tool", "content": "4", "name": "add"}, assistant("a")))
    assert template.notes == {"the chat template leaves out messages of role tool": 2}
    template = template_for("qwen3")
    chat = [user("q"), assistant("a", reasoning_content="hm"), user("q"), assistant("a", reasoning_content="hm")]
    template(conversation(*chat, tools=[ADD]))
    assert not template.notes


def test_the_date_is_the_one_it_is_given() -> None:
    source = (
        "{{ strftime_now('%d %b %Y %H:%M') }}|{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    )
    tokenizer = tokenizer_for("plain")
    tokenizer.chat_template = source
    assert is_dated(tokenizer) and not is_dated(tokenizer_for("plain"))
    first, second = read_template(tokenizer, "2026-01-31"), read_template(tokenizer, "2026-02-01")
    chat = conversation(user("q"), assistant("a"))
    for template, day in ((first, "31 Jan"), (second, "01 Feb"), (first, "31 Jan")):
        assert template(chat)[0].startswith(f"{day} 2026 00:00|<user>q")
    assert pickle.loads(pickle.dumps(first))(chat) == first(chat)
    assert read_template(tokenizer)(chat)[0].startswith(datetime.now().strftime("%d %b %Y"))
