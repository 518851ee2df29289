"""Runs of placeholders are tokenized as a single placeholder, with the same result."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import AddedToken

from tests.data.processors import PROCESSORS
from tutti.config import DataConfig
from tutti.data.media_processor import MediaProcessor
from tutti.data.tokenize import BatchTokenizer

SENTENCE = "Déjà vu: 2 + 2 = 4,  isn't\n\nit? "


@pytest.mark.parametrize("family", ["qwen2_5_vl", "smolvlm", "pixtral", "qwen2_audio"])
def test_ids_and_places_are_those_of_the_whole_text(family: str) -> None:
    processor = PROCESSORS[family]()
    places = MediaProcessor(processor, DataConfig(train_path="x")).placeholders
    marks = processor.tokenizer.convert_ids_to_tokens(places)
    texts = [SENTENCE, "", *(f"{SENTENCE}{mark * 70}{SENTENCE}{mark}{mark * 3}\n{mark * 2}é" for mark in marks)]
    texts += [(marks[0] * 5 + marks[-1] * 4) * 3, f"<{marks[0] * 9}>{marks[0][1:]}{marks[0][:-1]}"]
    runs = BatchTokenizer(processor.tokenizer, special=False, places=True, repeated=places)
    assert set(runs._repeated.values()) == set(marks)
    found, whole = runs(texts), BatchTokenizer(processor.tokenizer, special=False, places=True)(texts)
    assert np.array_equal(found.ids, whole.ids) and found.ends == whole.ends and found.texts == whole.texts
    assert whole.begins is not None and np.array_equal(found.begins, whole.begins)


def test_tokens_that_can_overlap_are_left_as_they_are() -> None:
    tokenizer = PROCESSORS["llava"]().tokenizer
    tokenizer.add_tokens([AddedToken("ab"), AddedToken("abab"), AddedToken("<x"), AddedToken("x>y"), AddedToken("zz")])
    tokenizer.add_tokens([AddedToken("<q>", rstrip=True), AddedToken("<image>!")])
    names = ["<image>", "ab", "abab", "<x", "x>y", "zz", "<q>", "a", "<|endoftext|>"]
    places = tokenizer.convert_tokens_to_ids(names)
    assert list(BatchTokenizer(tokenizer, special=False, places=True, repeated=places)._repeated.values()) == [
        "<|endoftext|>"
    ]
