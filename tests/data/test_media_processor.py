"""The images of a micro batch are processed in one call if that gives the same values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.data.processors import PROCESSORS
from tutti.config.load import from_dict
from tutti.core.batch import Media, Sample
from tutti.data import media_processor as module
from tutti.data.media_processor import MediaProcessor
from tutti.data.rows import BrokenMediaError, RowError

TOGETHER = {
    "qwen2_vl": 1, "qwen2_5_vl": 1, "qwen3_vl": 1, "qwen2_5_omni": 1, "qwen3_omni": 1, "llava": 1, "internvl": 1,
    "gemma3": 1, "janus": 1, "llava_next": 1, "llava_onevision": 1, "pixtral": 1, "idefics3": 4, "smolvlm": 4,
    "aya_vision": 1, "cohere2_vision": 1, "ovis2": 1, "video_llama_3": 1,
}  # fmt: skip
"""The calls of each family's processor for four samples with images: once, or for each of them."""

SIZES = [((64, 48),), (), ((40, 56), (64, 48)), ((24, 24),), ((96, 40),)]
"""Grouped by sample."""


def make(family: str, monkeypatch: pytest.MonkeyPatch) -> tuple[MediaProcessor, list[Sample]]:
    """The processor of a family and samples with noise for images, whose sources are their seeds."""
    held = MediaProcessor(PROCESSORS[family](), from_dict({}).data)

    def noise(medium: Media) -> Image.Image:
        if medium.source == b"broken":
            raise RowError("is broken")
        draws, (width, height) = np.random.default_rng(medium.source[0]), medium.size
        return Image.fromarray(draws.integers(0, 256, (height, width, 3), np.uint8))

    monkeypatch.setattr(module, "load_image", noise)
    samples = []
    for number, sizes in enumerate(SIZES):
        media = tuple(Media("image", bytes([number, place]), size) for place, size in enumerate(sizes))
        text = "".join(["A ", *held._replaced(media), "?"])
        ids = np.array(held.processor.tokenizer(text)["input_ids"], np.int32)
        samples.append(Sample(ids, ids, media=media))
    return held, samples


@pytest.mark.parametrize("family", TOGETHER)
def test_one_call_gives_the_values_of_many(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    held, samples = make(family, monkeypatch)
    length = sum(map(len, samples)) + 3
    held._takes_images_together()
    calls, process = [], type(held.processor).__call__
    monkeypatch.setattr(type(held.processor), "__call__", lambda own, *a, **k: calls.append(1) or process(own, *a, **k))
    got = held.values(samples, length)
    assert len(calls) == TOGETHER[family]
    held._images_together = False
    want = held.values(samples, length)
    assert got.keys() == want.keys() and all(got[name].equal(want[name]) for name in want)


@pytest.mark.parametrize("family", ["aya_vision", "ovis2"])
def test_the_tokens_of_an_image_are_found_where_its_placeholder_is_none_of_them(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, samples = make(family, monkeypatch)
    for sample in samples:
        written = [held.processor.tokenizer.decode(sample.input_ids[begin:end]) for begin, end in held.spans(sample)]
        assert written == held._replaced(sample.media)
        assert bool(held.count(sample.input_ids, sample.media)) == bool(sample.media)
    with_one, without = samples[:2]
    assert held.count(with_one.input_ids[2:-1], with_one.media) > held.count(with_one.input_ids[9:], with_one.media)
    assert held.count(without.input_ids, with_one.media) == 0


def test_the_sample_with_a_broken_image_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    held, samples = make("qwen2_5_vl", monkeypatch)
    media = (samples[2].media[0], samples[2].media[1]._replace(source=b"broken"))
    samples[2] = Sample(samples[2].input_ids, samples[2].labels, media=media)
    with pytest.raises(BrokenMediaError, match="is broken") as caught:
        held.values(samples, 1000)
    assert caught.value.number == 2


def test_an_image_of_another_size_than_its_tokens_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    held, samples = make("qwen2_5_vl", monkeypatch)
    monkeypatch.setattr(MediaProcessor, "_load", lambda *_: Image.new("RGB", (16, 16)))
    with pytest.raises(BrokenMediaError, match="another number of tokens") as caught:
        held.values(samples, 1000)
    assert caught.value.number == 0


def test_a_processor_that_fails_on_many_is_given_each(monkeypatch: pytest.MonkeyPatch) -> None:
    held, samples = make("qwen2_5_vl", monkeypatch)
    want: Any = held.values(samples, 1000)
    monkeypatch.setattr(MediaProcessor, "_process_images", lambda *_: 1 / 0)
    got = held.values(samples, 1000)
    assert all(got[name].equal(want[name]) for name in want)
