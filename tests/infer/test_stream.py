"""Streamed pieces, joined, equal the text decoded at once, and never contain half a character."""

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

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


@settings(max_examples=300, deadline=None)
@given(
    st.text("ab \n", max_size=20),
    st.text(" \n", max_size=1),
    st.text(" \n", max_size=2),
    st.lists(st.text("ab\n", min_size=1, max_size=3), max_size=2),
)
def test_pieces_add_up_to_the_text_before_the_first_stop(text, before, after, stops):
    ids, edges = TOKENIZER(text, add_special_tokens=False).input_ids, Edges(before, after, tuple(stops))
    stream = TextStream(TOKENIZER, edges)
    pieces, made = "", 0
    while made < len(ids) and not stream.is_stopped:  # as an answer is made
        pieces += stream.add(ids[made])
        made += 1
    assert stream.is_stopped == any(stop in text for stop in stops)
    text = answer_text(TOKENIZER, ids[:made])
    whole = min((text.find(stop) for stop in stops if stop in text), default=len(text))
    want = text[:whole].removeprefix(before).removesuffix(after)
    assert pieces + stream.end() == answer_text(TOKENIZER, ids[:made], edges) == want


def _pieces_words() -> PreTrainedTokenizerFast:
    """A tokenizer that decodes a token differently at the start of a text, and skips some tokens."""
    words = ["[UNK]", "[CLS]", "hel", "##lo", "wor", "##ld", ",", "don", "'", "t", "."]
    own = Tokenizer(models.WordPiece(vocab={word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    own.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=own, unk_token="[UNK]", cls_token="[CLS]")


def _llama() -> PreTrainedTokenizerFast:
    """A tokenizer that spells what it has no token for in bytes, and drops a blank where a text begins."""
    words = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "a", "▁Hello", "b", "."]
    vocabulary = {word: number for number, word in enumerate(words)}
    own = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    own.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=own, unk_token="<unk>", eos_token="</s>")


LLAMA = _llama()


def _streamed(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    stream = TextStream(tokenizer)
    return "".join(map(stream.add, ids)) + stream.end()


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([TOKENIZER, _pieces_words()]).flatmap(
    lambda tokenizer: st.tuples(st.just(tokenizer), st.lists(st.integers(0, len(tokenizer) - 1), max_size=12))
))  # fmt: skip
def test_any_tokens_add_up(case):
    tokenizer, ids = case
    assert _streamed(tokenizer, ids) == answer_text(tokenizer, ids)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["é", "🎵", "▁", "▁a", "a", "▁Hello", ".", "</s>"]), max_size=8))
def test_characters_in_bytes_add_up(words):
    spelled = [[f"<0x{byte:02X}>" for byte in word.encode()] if word in "é🎵" else [word] for word in words]
    ids = LLAMA.convert_tokens_to_ids([token for tokens in spelled for token in tokens])
    assert _streamed(LLAMA, ids) == answer_text(LLAMA, ids)


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
    assert found == {"plain": Edges(" ", ""), "chatml": Edges("", ""), "llama2": Edges(" ", " ")}


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
