"""Loss masks of chat templates with media: golden texts of six templates, and properties over random ones.

In golden texts what is trained on stands in [[double brackets]].
"""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.test_template import SYSTEM, assistant, bracketed, user
from tests.data.test_template_property import rendered, template_of, texts, written
from tests.properties import examples
from tutti.data.media_places import with_media
from tutti.data.rows import Conversation, conversation_of
from tutti.data.template import ChatTemplate

_QWEN = (
    "{% set seen = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set seen.value = seen.value + 1 %}{% if add_vision_id %}Picture {{ seen.value }}: {% endif %}<IMAGE>"
    "{% elif content['type'] == 'audio' or 'audio' in content %}<AUDIO>"
    "{% elif content['type'] == 'video' or 'video' in content %}<VIDEO>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "qwen2-vl": _QWEN.replace("<IMAGE>", "<|vision_start|><|image_pad|><|vision_end|>"),
    "omni": _QWEN.replace("<IMAGE>", "<|vision_bos|><|IMAGE|><|vision_eos|>"),
    "smolvlm": (
        "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
        "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
        "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
        "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
    ),
    "gemma3": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% if messages[0]['content'] is string %}"
        "{% set lead = messages[0]['content'] + '\n\n' %}{% else %}"
        "{% set lead = messages[0]['content'][0]['text'] + '\n\n' %}{% endif %}{% set rest = messages[1:] %}"
        "{% else %}{% set lead = '' %}{% set rest = messages %}{% endif %}{% for message in rest %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles') }}{% endif %}"
        "{% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
        "{% endif %}{{ '<start_of_turn>' + role + '\n' + (lead if loop.first else '') }}"
        "{% if message['content'] is string %}{{ message['content'] | trim }}"
        "{% elif message['content'] is iterable %}{% for item in message['content'] %}"
        "{% if item['type'] == 'image' %}{{ '<start_of_image>' }}{% elif item['type'] == 'text' %}"
        "{{ item['text'] | trim }}{% endif %}{% endfor %}{% else %}{{ raise_exception('type') }}{% endif %}"
        "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "llava": (
        "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}"
        "{% endif %}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
        "{{ '<image>\n' }}{% endfor %}{% if message['role'] != 'assistant' %}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}"
        "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
        "{% generation %}{{ content['text'] + ' ' }}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    ),
    "internvl": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for content in message['content'] %}{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
        "{% elif content['type'] == 'video' %}{{ '<video>\n' }}{% elif content['type'] == 'text' %}"
        "{{ content['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}
"""The templates of the model cards, without parts that do not affect masks."""

CHAT = [SYSTEM, user("<image>One<image><image>"), assistant("A cat. "), user("And <image>?"), assistant("A dog.")]
GOLDEN = {
    "qwen2-vl": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<i>One<i><i><|im_end|>\n"
    "<|im_start|>assistant\n[[A cat. <|im_end|>]]\n<|im_start|>user\nAnd <i>?<|im_end|>\n"
    "<|im_start|>assistant\n[[A dog.<|im_end|>]]\n",
    "smolvlm": "<|im_start|>System: Be brief.<end_of_utterance>\nUser:<i>One<i><i><end_of_utterance>\n"
    "Assistant:[[ A cat. <end_of_utterance>]]\nUser: And <i>?<end_of_utterance>\n"
    "Assistant:[[ A dog.<end_of_utterance>]]\n",
    "gemma3": "<s><start_of_turn>user\nBe brief.\n\n<i>One<i><i><end_of_turn>\n<start_of_turn>model\n"
    "[[A cat.<end_of_turn>]]\n<start_of_turn>user\nAnd<i>?<end_of_turn>\n<start_of_turn>model\n"
    "[[A dog.<end_of_turn>]]\n",
    "llava": "Be brief. USER: <i>\n<i>\n<i>\nOne ASSISTANT: [[A cat.  ]]USER: <i>\nAnd  ? ASSISTANT: [[A dog. ]]",
    "internvl": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<i>\nOne<i>\n<i>\n<|im_end|>\n"
    "<|im_start|>assistant\n[[A cat. <|im_end|>]]\n<|im_start|>user\nAnd <i>\n?<|im_end|>\n"
    "<|im_start|>assistant\n[[A dog.<|im_end|>]]\n",
}
MARKERS = {"qwen2-vl": "<|vision_start|><|image_pad|><|vision_end|>", "omni": "<|vision_bos|><|IMAGE|><|vision_eos|>",
           "gemma3": "<start_of_image>", "internvl": "<IMG_CONTEXT>"}  # fmt: skip
GOLDEN["omni"] = GOLDEN["qwen2-vl"]
ENDS = ("<|im_end|>", "<end_of_utterance>", "<end_of_turn>")


def template_named(name: str) -> ChatTemplate:
    return ChatTemplate(TEMPLATES[name], TEMPLATES[name], {"bos_token": "<s>"}, ENDS)


def placed(messages: list[dict[str, Any]], **columns: Any) -> Conversation:
    return with_media(conversation_of({"messages": messages}, ("messages",)), columns)[0]


@pytest.mark.parametrize("name", TEMPLATES)
def test_golden(name: str) -> None:
    template, chat = template_named(name), placed(CHAT, images=["a"] * 4)
    exact = template._exact(chat)
    assert [template(chat) for _ in range(2)] == [exact] * 2
    assert bracketed(*exact).replace(MARKERS.get(name, "<image>"), "<i>") == GOLDEN[name]


@pytest.mark.parametrize("name", TEMPLATES)
def test_rows_of_known_shapes_are_not_rendered(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The treatment of texts is proved for all six, because rendering each row would be slow."""
    template = template_named(name)
    rows = [[user("<image>" + question), assistant(answer)] for question, answer in (("Who?", "A cat."), ("x", "y"))]
    first, second = (placed(row, image="a") for row in rows)
    template(first)
    exact = template._exact(second)
    monkeypatch.delattr(ChatTemplate, "_render")
    assert template(second) == exact


PIECES = ["a", " ", "\n", "<", "<image>", "text", "type", "image", "</think>", "assistant", "\ue0000\ue001", "é", ""]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_quick_way_is_exact(name: str) -> None:
    """For any texts, the text is what the template renders, and the spans are those found by rendering."""
    random.seed(3)
    template, quick = template_named(name), 0
    for _ in range(40):
        chat: list[dict[str, Any]] = [SYSTEM] if random.random() < 0.3 else []
        for _ in range(random.randint(1, 2)):
            question = [random.choice([{"type": "image", "path": "a"}, None]) for _ in range(random.randint(1, 4))]
            parts = [part or {"type": "text", "text": some_text()} for part in question]
            chat += [user(parts), assistant(some_text())]  # type: ignore[arg-type]
        conversation = placed(chat)
        shape = template._shape(conversation)
        exact = written(template_named(name), Conversation(conversation.messages, conversation.trained, plain=False))
        assert written(template, conversation) == exact
        quick += shape is not None and not isinstance(exact, str)
    assert quick > 20


def some_text() -> str:
    text = "".join(random.choices(PIECES, k=random.randint(1, 3)))
    return f"x{text}y" if random.random() < 0.6 else text


CONTENTS = [
    "{% if c is string %}{{ c }}{% else %}{% for p in c %}PART{% endfor %}{% endif %}",
    "{% if c is not string %}{% for p in c %}PART{% endfor %}{% else %}{{ c }}{% endif %}",
    "{% if c is string %}{{ c }}{% elif c is iterable %}{% for p in c %}PART{% endfor %}{% else %}?{% endif %}",
    "{% if m.content is string %}{{ c | trim }}{% else %}{{ c | length }}{{ (c | first).text }}{% endif %}",
    "{{ c if c is string else c[0].text }}",
    "{{ c if c is not string else 'text' }}",
    "{{ c[-1].text if c is not string else c }}{{ c is mapping }}",
    "{% if c is string %}{% set c = [c] %}{% for p in c %}{{ p }}{% endfor %}{% else %}{{ c[0]['text'] }}{% endif %}",
    "{% if c is string %}{{ c }}{% else %}{% set c = c[0].text %}{{ c }}{% endif %}",
    "{% for p in c if p.type == 'text' %}PART{% endfor %}{{ c if c is string else '' }}",
    "{% if c is string %}{{ c }}{% endif %}{% if c is not string %}{% for p in c[1:] %}PART{% endfor %}{% endif %}",
    "{{ c }}",
    "{{ c | length }}{{ c if c is string else c | map(attribute='text') | join }}",
    "{% if c is string %}{{ c }}{% else %}{% for p in c | selectattr('type', 'equalto', 'text') %}PART{% endfor %}"
    "{{ c | selectattr('text', 'defined') | list | length }}{% endif %}",
    "{% if c %}{% for p in ([c] if c is string else c) %}{{ p if p is string else p.text }}{% endfor %}{% endif %}",
]
PARTS = [
    "{{ p.text }}",
    "{{ p['text'] if 'text' in p else '<i>' }}",
    "{% if p.type == 'text' %}{{ p.text | trim }}{% elif p.type == 'image' %}<i>{% endif %}",
    "{{ p.get('text', '<i>') }}",
    "{{ p.text | upper if p.text else '<i>' }}",
    "{{ p.text | length }}",
    "{{ p }}",
    "{% if 'a' in p.text | default('') %}A{% endif %}{{ p.text }}",
    "{% if not loop.first %} {% endif %}{% if p.text is defined %}{{ p.text }}{% else %}<i>{% endif %}",
]


def source_of(content: str, part: str) -> str:
    return (
        "{% for m in messages %}{% set c = m.content %}{{ '<|start|>' + m.role + '\\n' }}"
        f"{content.replace('PART', part)}{{{{ '<|end|>' }}}}{{% endfor %}}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant\\n' }}{% endif %}"
    )


@st.composite
def conversations(draw: Any) -> Conversation:
    messages = []
    for role in ["user", "assistant"] * draw(st.integers(1, 2)):
        content: Any = draw(texts)
        if role == "user" or draw(st.integers(0, 4)) == 0:
            parts = st.just({"type": "image"}) | texts.map(lambda text: {"type": "text", "text": text})
            content = draw(texts | st.lists(parts, min_size=1, max_size=3))
        messages.append({"role": role, "content": content})
    return Conversation(messages, tuple(message["role"] == "assistant" for message in messages))


@examples(40)
@given(
    st.builds(source_of, st.sampled_from(CONTENTS), st.sampled_from(PARTS)),
    st.lists(conversations(), min_size=1, max_size=5),
)
def test_every_row_is_what_the_template_gives_whatever_came_before(source: str, rows: list) -> None:
    template, slow = template_of(source), template_of(source)
    for row in rows:
        result = written(template, row)
        exact = written(slow, Conversation(row.messages, row.trained, plain=False))
        assert isinstance(result, str) == isinstance(exact, str)
        if not isinstance(result, str):
            assert result == exact
            if not template._form.parts:
                assert result[0] == rendered(source, row.messages)


def test_some_of_the_random_templates_are_proved() -> None:
    """Without this, the property above would be empty."""
    chat = placed([user("<image>q"), assistant("a")], image="a")
    shapes = [template_of(source_of(content, PARTS[1]))._shape(chat) for content in CONTENTS]
    assert sum(shape is not None and shape.condition is not None for shape in shapes) >= 6
