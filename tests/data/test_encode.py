"""Rows become samples: all row formats, labels, truncation, bad rows, and tokens at the boundaries of spans."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tutti.config import Config, DataConfig
from tutti.core.batch import IGNORE, Sample
from tutti.data.encode import Encoder, describe, make_encoder
from tutti.data.rows import class_of
from tutti.data.source import BadRow, Row
from tutti.model.tokenizer import TEMPLATES

QUICKSTART = Path(__file__).parents[2] / "data" / "quickstart"
CHAT = [{"role": "user", "content": "Hi there!"}, {"role": "assistant", "content": "Hello, how are you?"}]
TRAINED = "Hello, how are you?<|im_end|>"


def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_file=str(QUICKSTART / "tokenizer.json"),
        eos_token="<|endoftext|>",
        chat_template=TEMPLATES["chatml"],
    )


def encoder(data_type: str = "conversation", num_labels: int | None = None, **data: Any) -> Encoder:
    settings: dict[str, Any] = {"data_type": data_type, **data}
    return make_encoder(Config(data=DataConfig(**settings)), tokenizer(), vocab_size=2048, num_labels=num_labels)


def encode(encoder: Encoder, *values: dict[str, Any]) -> list[Any]:
    return encoder([Row(value, "f.jsonl", line) for line, value in enumerate(values, 1)], source=3)


def trained_text(sample: Sample) -> str:
    return "".join(text for text, trained in describe(sample, tokenizer()) if trained)


def check_shifted(sample: Sample) -> None:
    assert sample.input_ids.dtype == sample.labels.dtype == np.int32
    assert len(sample.labels) == len(sample)
    assert sample.labels[-1] == IGNORE
    kept = sample.labels[:-1] != IGNORE
    np.testing.assert_array_equal(sample.labels[:-1][kept], sample.input_ids[1:][kept])


SHAPES = {
    "messages": {"messages": CHAT},
    "messages as JSON text": {"messages": json.dumps(CHAT)},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "Hi there!"}, {"from": "gpt", "value": CHAT[1]["content"]}]
    },
    "alpaca": {"instruction": "Hi there!", "input": "", "output": CHAT[1]["content"]},
    "parts": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Hi "}, {"type": "text", "text": "there!"}]},
            {"role": "assistant", "content": [{"type": "text", "text": CHAT[1]["content"]}]},
        ]
    },
    "absent columns as null": {
        "messages": [{**message, "name": None, "loss_mask": None} for message in CHAT],
        "tools": None,
        "instruction": None,
    },
}


@pytest.mark.parametrize("shape", SHAPES)
def test_conversation_shapes_give_the_same_sample(shape: str) -> None:
    ((sample,),) = encode(encoder(), SHAPES[shape])
    check_shifted(sample)
    assert sample.source == 3
    assert describe(sample, tokenizer()) == [
        ("<|im_start|>user\nHi there!<|im_end|>\n<|im_start|>assistant\n", False),
        (TRAINED, True),
        ("\n", False),
    ]


ASKED = {"role": "user", "content": "2 + 3?"}
RESULT = {"role": "tool", "content": "5"}
ANSWERED = {"role": "assistant", "content": "It is five."}
ARGUMENTS = {"a": 2, "b": 3}
ADD = {"name": "add", "arguments": ARGUMENTS}


def called(**message: Any) -> dict[str, Any]:
    return {"messages": [ASKED, {"role": "assistant", **message}, RESULT, ANSWERED]}


def as_text(call: dict[str, Any]) -> dict[str, Any]:
    return {**call, "arguments": json.dumps(call["arguments"])}


def spoken(role: str, value: str) -> dict[str, Any]:
    turns = [("human", "2 + 3?"), (role, value), ("observation", "5"), ("gpt", "It is five.")]
    return {"conversations": [{"from": who, "value": what} for who, what in turns]}


CALLS = {
    "an object": called(content=None, tool_calls=[{"type": "function", "function": ADD}]),
    "text": called(content="", tool_calls=[{"id": "c1", "type": "function", "function": as_text(ADD)}]),
    "all calls as text": called(tool_calls=json.dumps([{"type": "function", "function": as_text(ADD)}])),
    "each call as text": called(tool_calls=[json.dumps({"type": "function", "function": ADD})]),
    "the older form": called(content=None, function_call=as_text(ADD)),
    "a role": spoken("function_call", json.dumps(ADD)),
    "a role, arguments as text": spoken("tool_call", json.dumps(as_text(ADD))),
    "a role, a list": spoken("function_call", json.dumps([ADD])),
    "a role in messages": {"messages": [ASKED, {"role": "tool_call", "content": ADD}, RESULT, ANSWERED]},
    "another role for the result": {
        "messages": [ASKED, {"role": "assistant", "function_call": ADD}, {**RESULT, "role": "tool_response"}, ANSWERED]
    },
}


@pytest.mark.parametrize("shape", CALLS)
def test_tool_calls_in_every_spelling_give_the_same_sample(shape: str) -> None:
    """A tool call is trained on as an object; its result is not."""
    tok = tokenizer()
    tok.chat_template = (Path(__file__).parent / "templates" / "qwen3.jinja").read_text()
    made = make_encoder(Config(), tok, vocab_size=2048)
    before = json.dumps(CALLS[shape])
    ((sample,),) = encode(made, CALLS[shape])
    assert json.dumps(CALLS[shape]) == before, "rows are left as they are"
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call><|im_end|>'
    assert trained_text(sample) == f"{call}<think>\n\n</think>\n\nIt is five.<|im_end|>"
    assert not made.notes


WEIGHTS = {
    "weight": ({"weight": 0}, {"weight": 1}),
    "train": ({"train": False}, {"train": True}),
    "loss": ({"loss": False}, {}),
    "loss_mask": ({"loss_mask": 0}, {"loss_mask": 1}),
    "several": ({"loss_mask": 0, "weight": 0.0, "train": None}, {"loss_mask": 1, "weight": 1}),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_messages_that_are_not_to_be_trained_on(kind: str) -> None:
    wrong, right = WEIGHTS[kind]
    weight = {"weight": 1} if kind == "weight" else {}
    chat = [
        {"role": "user", "content": "2 + 2?", **weight},
        {"role": "assistant", "content": "Five.", **wrong},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Four, sorry.", **right},
    ]
    made = encoder()
    ((sample,),) = encode(made, {"messages": chat})
    assert trained_text(sample) == "Four, sorry.<|im_end|>" and not made.notes


def test_tokens_do_not_depend_on_the_rows_before() -> None:
    """Templates that change some texts, which the first rows may not contain: several ranks agree with one."""
    tok = tokenizer()
    tok.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'tool' %}{{ m.content | tojson }}{% else %}"
        "{{ m.content | e if loop.last else m.content[:9] | lower }}{% endif %}<|im_end|>\n{% endfor %}"
    )
    said = ["plain", "It's <b>", 'a "quote"', "é", "Upper", "longer than nine characters"]
    rows = [
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "tool", "content": said[number // 2 % 6 if number > 12 else 0]},
                {"role": "assistant", "content": said[number % 5 if number > 20 else 0]},
            ]
        }
        for number in range(128)
    ]
    whole = encode(make_encoder(Config(), tok, vocab_size=2048), *rows)
    for ranks in (2, 3):
        for rank in range(ranks):
            part = encode(make_encoder(Config(), tok, vocab_size=2048), *rows[rank::ranks])
            for (one,), (other,) in zip(part, whole[rank::ranks], strict=True):
                assert one.input_ids.tolist() == other.input_ids.tolist()
                assert one.labels.tolist() == other.labels.tolist()


def test_alpaca_with_everything() -> None:
    row = {"system": "S", "history": [["a", "b"]], "instruction": "c", "input": "d", "output": "e"}
    ((sample,),) = encode(encoder(), row)
    text = "".join(text for text, _ in describe(sample, tokenizer()))
    turns = [("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c\nd"), ("assistant", "e")]
    assert text == "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    assert trained_text(sample) == "b<|im_end|>e<|im_end|>"


def test_ids_are_those_of_the_whole_text() -> None:
    tok = tokenizer()
    tok.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    rows = [json.loads(line) for line in (QUICKSTART / "chat.jsonl").read_text().splitlines()]
    encoded = encode(make_encoder(Config(), tok, vocab_size=2048), *rows)
    for row, (sample,) in zip(rows, encoded, strict=True):
        expected = tok.apply_chat_template(row["messages"], tokenize=True, return_dict=False)
        assert sample.input_ids.tolist() == expected
        check_shifted(sample)


def test_a_token_across_the_border_of_a_header_is_not_trained() -> None:
    tok = tokenizer()
    tok.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    ((sample,),) = encode(make_encoder(Config(), tok, vocab_size=2048), {"messages": CHAT})
    assert [tok.decode([i]) for i in sample.input_ids[-9:-5]] == [" H", "ell", "o", ","]
    assert trained_text(sample) == "ello, how are you?<|endoftext|>"


@pytest.mark.parametrize("trim", [True, False])
def test_offsets_trimmed_by_the_tokenizer_hide_no_border(trim: bool) -> None:
    """A post-processor that trims blanks off offsets (as Llama 3's does) must not make " H" look like "H"."""
    backend = tokenizer().backend_tokenizer
    backend.post_processor = processors.ByteLevel(trim_offsets=trim)
    tok = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    tok.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    ((sample,),) = encode(make_encoder(Config(), tok, vocab_size=2048), {"messages": CHAT})
    assert trained_text(sample) == "ello, how are you?<|endoftext|>"


def test_no_second_first_token() -> None:
    words = {"<s>": 0, "</s>": 1, "a": 2, "b": 3}
    backend = Tokenizer(models.WordLevel(words, unk_token="b"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tok = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tok.chat_template = "{{ bos_token }}{% for m in messages %} {{ m.content }} {{ eos_token }}{% endfor %}"
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    ((sample,),) = encode(make_encoder(Config(), tok, vocab_size=4), row)
    assert sample.input_ids.tolist() == [0, 2, 1, 3, 1]
    assert sample.labels.tolist() == [IGNORE, IGNORE, 3, 1, IGNORE]
    config = Config(data=DataConfig(data_type="classification"))
    ((sample,),) = encode(make_encoder(config, tok, vocab_size=4), {"text": "a b", "label": 1})
    assert sample.input_ids.tolist() == [0, 2, 3], "a text to classify is what the tokenizer makes of it by itself"


@pytest.mark.parametrize("limit", [2, 3, 7, 8, 100])
def test_plaintext_is_cut_into_pieces_and_nothing_lost(limit: int) -> None:
    text = "It is a truth universally acknowledged, 🙂 that"
    tok = tokenizer()
    ids = [*tok.encode(text), tok.eos_token_id]
    (samples,) = encode(encoder("plaintext", max_seq_len=limit), {"content_split": text})
    assert (
        np.concatenate([sample.input_ids for sample in samples]).tolist()
        == ids[: len(ids) - (limit == 2 and len(ids) % 2)]
    )
    for sample in samples:
        check_shifted(sample)
        assert 2 <= len(sample) <= limit
        assert (sample.labels[:-1] != IGNORE).all()


def test_no_piece_is_a_single_token() -> None:
    tok = tokenizer()
    count = len(tok.encode("one two three four five")) + 1
    (samples,) = encode(encoder("plaintext", max_seq_len=count - 1), {"content_split": "one two three four five"})
    assert [len(sample) for sample in samples] == [count - 2, 2]


def test_a_long_conversation_keeps_its_last_tokens() -> None:
    ((whole,),) = encode(encoder(), {"messages": CHAT})
    limit = len(whole) - 5
    ((cut,),) = encode(encoder(max_seq_len=limit), {"messages": CHAT})
    assert cut.input_ids.tolist() == whole.input_ids[-limit:].tolist()
    ((cut,),) = encode(encoder(max_seq_len=4), {"messages": CHAT})
    assert trained_text(cut) == "?<|im_end|>", "the first token kept is never a target"
    long_question = [*CHAT, {"role": "user", "content": "why " * 30}]
    (bad,) = encode(encoder(max_seq_len=16), {"messages": long_question})
    assert str(bad).startswith("f.jsonl:1: no trained token among the last 16 (data.max_seq_len) of ")


def test_classification_trains_on_the_class_at_the_last_token() -> None:
    whole, (cut,) = (
        encode(encoder("classification", 4, max_seq_len=n), {"text": "so good", "label": 3})[0] for n in (99, 2)
    )
    assert whole[0].input_ids.tolist() == tokenizer().encode("so good")
    assert whole[0].labels.tolist() == [IGNORE] * (len(whole[0]) - 1) + [3]
    assert cut.input_ids.tolist() == whole[0].input_ids[:2].tolist() and cut.labels.tolist() == [IGNORE, 3]
    made = make_encoder(
        Config(data=DataConfig(data_type="classification")),
        tokenizer(),
        vocab_size=2048,
        num_labels=2,
        label_names=["no", "yes"],
    )
    labels = [
        sample.labels[-1] for (sample,) in encode(made, {"text": "a", "label": "yes"}, {"text": "a", "label": "0"})
    ]
    assert labels == [1, 0]


def test_labels_as_tables_write_them() -> None:
    for label, number in ((3, 3), (1.0, 1), ("2", 2), ("2.0", 2), (True, 1), (False, 0), ("True", 1), ("false", 0)):
        assert class_of({"label": label}, 4) == number, label
    for label, number in (("true", 0), (True, 0), ("False", 1), ("1", 1)):
        assert class_of({"label": label}, 2, ("True", "False")) == number, label


def chat(*messages: Any, **row: Any) -> dict[str, Any]:
    return {"messages": list(messages), **row}


ANSWER = {"role": "assistant", "content": "a"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
NOT_TRAINED = "no trained token: no assistant message, or none that is to be trained on"
ID2LABEL = "; classes are named by id2label in the model's config.json"
BAD = [
    (
        "conversation",
        {"dialog": [], "id": 1},
        "has no column messages (data.text_keys), nor conversations, nor instruction and output, nor prompt and "
        "completion; its columns are dialog, id (data.row_template makes messages of them)",
    ),
    ("conversation", chat(), "the conversation is empty"),
    (
        "conversation",
        chat({"role": "user", "content": [{"type": "image", "path": "a.png"}]}, ANSWER),
        "has image, and this model takes none, or its folder has no processor that can be used",
    ),
    ("conversation", {"messages": 5}, "messages must be a list of messages, not int"),
    ("conversation", {"messages": "Hi"}, "messages is text that is not valid JSON: Expecting value"),
    ("conversation", chat("Hi"), "message 0 must be an object with role and content, not str"),
    (
        "conversation",
        chat(ANSWER, {"role": "narrator", "content": "x"}),
        "message 1 has unknown role 'narrator'; known are system, developer, user, assistant, tool",
    ),
    ("conversation", chat({"content": "x"}), "message 0 has no role; its keys are content"),
    ("conversation", chat({"role": "user"}), "message 0 has no content"),
    (
        "conversation",
        chat({"role": "user", "content": 7}),
        "message 0: content must be text or a list of parts, not int",
    ),
    (
        "conversation",
        chat({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}),
        "a part of type image_url without url, path or data",
    ),
    ("conversation", chat({**ANSWER, "loss_mask": 2}), "message 0: loss_mask must be 0 or 1, not 2"),
    ("conversation", chat({"role": "user", "content": "x"}), NOT_TRAINED),
    ("conversation", chat({**ANSWER, "loss_mask": 0}), NOT_TRAINED),
    ("conversation", chat(ANSWER, tools=5), "tools must be a list, not int"),
    (
        "conversation",
        {"instruction": "x", "outputs": "y"},
        "has an instruction but no output; its columns are instruction, outputs",
    ),
    ("plaintext", {"text": "x"}, "has no column content_split (data.text_keys); its columns are text"),
    ("plaintext", {"content_split": ["x"]}, "content_split must be text, not list"),
    ("plaintext", {"content_split": ""}, "content_split is empty"),
    ("classification", {"text": "x"}, "has no column label; its columns are text"),
    ("classification", {"text": "x", "label": 4}, "label 4 is outside 0 to 3"),
    ("classification", {"text": "x", "label": -1}, "label -1 is outside 0 to 3"),
    ("classification", {"text": "x", "label": 1.5}, "label must be a whole number, not float 1.5"),
    ("classification", {"text": "x", "label": "good"}, f"label must be a whole number, not str 'good'{ID2LABEL}"),
    ("classification", {"text": "x", "label": [1]}, "label must be a whole number, not list [1]"),
    ("classification", {"text": "x", "label": "nan"}, f"label must be a whole number, not str 'nan'{ID2LABEL}"),
    ("conversation", chat({**ANSWER, "weight": 0.5}), "message 0: weight must be 0 or 1, not 0.5"),
    ("conversation", chat({**ANSWER, "train": True, "loss": 0}), "message 0: train and loss contradict each other"),
    ("conversation", chat({"role": "function_call", "content": "add 2 3"}), "message 0: function_call is text that "
     "is not valid JSON: Expecting value"),
    ("conversation", chat({"from": "function_call", "value": "[]"}), "message 0 calls no tool"),
    ("conversation", chat({**ANSWER, "tool_calls": 5}), "message 0: tool_calls must be a list, not int"),
    ("conversation", chat({**ANSWER, "tool_calls": [5]}), "message 0: tool_calls must be a dict, not int"),
    ("conversation", chat({**ANSWER, "tool_calls": [{"id": "c"}]}), "message 0: tool_calls must have a name, and the "
     "arguments it is called with"),
    ("conversation", chat({**ANSWER, "tool_calls": [{"name": "add", "arguments": "2, 3"}]}), "message 0: tool_calls: "
     "arguments of add is text that is not valid JSON: Extra data"),
    ("conversation", chat({**ANSWER, "tool_calls": [{"name": "add", "arguments": "[2]"}]}), "message 0: tool_calls: "
     "arguments of add must be a dict, not list"),
    ("conversation", chat(ANSWER, tools=["x"]), "tools[0] is text that is not valid JSON: Expecting value"),
    ("conversation", chat(ANSWER, system=["x"]), "system must be text, not list"),
    ("conversation", chat({"role": "system", "content": "a"}, ANSWER, system="b"), "the column system says another "
     "thing than the conversation's first message, of that role"),
    ("conversation", {"instruction": "x", "input": {"a": 1}, "output": "y"}, "input must be text, not dict"),
    ("conversation", chat({**ANSWER, "tool_calls": [CALL]}), "message 0 calls tools, and the chat template does not "
     "write tool calls: name one that does (data.chat_template)"),
]  # fmt: skip


@pytest.mark.parametrize(("data_type", "value", "reason"), BAD)
def test_bad_rows_say_exactly_what_is_wrong(data_type: str, value: dict[str, Any], reason: str) -> None:
    good = {"messages": CHAT, "content_split": "good text", "text": "good", "label": 1}
    first, bad, last = encode(encoder(data_type, 4), good, value, good)
    assert bad == BadRow("f.jsonl", 2, reason)
    assert first[0].input_ids.tolist() == last[0].input_ids.tolist()


def test_bad_rows_pass_through() -> None:
    bad = BadRow("x", 1, "not valid JSON")
    assert encoder()([bad]) == [bad]
    assert encoder()([]) == []


def test_of_a_prompt_and_its_completion_the_completion_is_trained_on() -> None:
    """TRL's format: texts or messages, without an answer inside the prompt."""
    before = [{"role": "system", "content": "Be kind."}, *CHAT, {"role": "user", "content": "Fine."}]
    answer = [{"role": "assistant", "content": "Good."}]
    rows = [
        {"prompt": "Hi there!", "completion": CHAT[1]["content"]},
        {"prompt": before, "completion": answer},
        {"prompt": json.dumps(before), "completion": json.dumps(answer)},
        {"prompt": "Hi", "completion": 3},
    ]
    (plain,), (chat,), (packed,), bad = encode(encoder(), *rows)
    assert trained_text(plain) == TRAINED
    assert trained_text(chat) == "Good.<|im_end|>"
    np.testing.assert_array_equal(chat.labels, packed.labels)
    assert bad.reason == "completion must be text or a list of messages, not int"


def test_a_column_that_rows_lack_is_told() -> None:
    """Conversations in another column than the configured one are not used silently."""
    made = encoder(text_keys="dialog")
    encode(made, {"messages": CHAT}, {"dialog": CHAT})
    assert dict(made.notes) == {"rows lack the column of data.text_keys (dialog); their conversation is in another": 1}
    made = encoder()
    encode(made, SHAPES["sharegpt"])
    assert not made.notes


def test_text_keys() -> None:
    made = encoder("plaintext", text_keys="body, title")
    rows = [{"title": "some title"}, {"title": "t", "body": "some body"}, {"text": "x"}]
    title, body, bad = encode(made, *rows)
    assert [tokenizer().decode(samples[0].input_ids) for samples in (title, body)] == [
        "some title<|endoftext|>",
        "some body<|endoftext|>",
    ]
    assert bad.reason == "has no column body or title (data.text_keys); its columns are text"


def test_what_can_not_fit_is_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"the tokenizer has 2048 tokens but the model embeds only 2000: .*tokenizer_path"
    ):
        make_encoder(Config(), tokenizer(), vocab_size=2000)
    made = encoder()
    made.vocab_size = 100
    with pytest.raises(ValueError, match=r"gives token id \d+ but the model embeds only 100"):
        encode(made, {"messages": CHAT})
    bare = PreTrainedTokenizerFast(tokenizer_file=str(QUICKSTART / "tokenizer.json"))
    with pytest.raises(ValueError, match="the tokenizer has no eos_token"):
        make_encoder(Config(data=DataConfig(data_type="plaintext")), bare, vocab_size=2048)
    with pytest.raises(ValueError, match=r"data.max_seq_len 1 leaves nothing to predict"):
        encoder(max_seq_len=1)


TRICKY = ["é", "e\u0301", "🙂🙂", "\u212b", "日本語", "a\nb", "  ", "x" * 50, "\u0958", "<|im_end|>", "\x00", "\r\n\t"]


@pytest.mark.parametrize("normalizer", [None, normalizers.NFC(), normalizers.NFD()])
def test_places_by_bytes_are_those_by_offsets(normalizer: Any) -> None:
    """Trained tokens are the same if their positions come from byte lengths or from the library's offsets."""
    tok = tokenizer()
    tok.backend_tokenizer.normalizer = normalizer
    by_bytes = make_encoder(Config(data=DataConfig(chat_template="chatml")), tok, vocab_size=2048)
    by_offsets = pickle.loads(pickle.dumps(by_bytes))
    assert (by_bytes.tokenize._byte_lengths is None) == isinstance(normalizer, normalizers.NFD)
    by_offsets.tokenize._byte_lengths = None
    texts = [*TRICKY, *(first + second for first in TRICKY for second in TRICKY), ""]
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1] + "."}]}
        for text in texts
    ]
    for size in (1, len(rows)):
        for start in range(0, len(rows), size):
            pairs = zip(*(encode(made, *rows[start : start + size]) for made in (by_bytes, by_offsets)), strict=True)
            for (one,), (other,) in pairs:
                assert one.input_ids.tolist() == other.input_ids.tolist()
                assert one.labels.tolist() == other.labels.tolist()


def test_a_tokenizer_without_offsets() -> None:
    from transformers import ByT5Tokenizer

    tok = ByT5Tokenizer()
    tok.chat_template = "{% for m in messages %}{{ m.role }}:{{ m.content }}</s>{% endfor %}"
    ((sample,),) = encode(make_encoder(Config(), tok, vocab_size=len(tok)), {"messages": CHAT})
    assert [text for text, trained in describe(sample, tok) if trained] == ["Hello, how are you?</s>"]


def test_pickled_encoders_work() -> None:
    made = pickle.loads(pickle.dumps(encoder()))
    assert trained_text(encode(made, {"messages": CHAT})[0][0]) == TRAINED
