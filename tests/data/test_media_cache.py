"""Decoded media are cached in bounded memory that workers share, so that later epochs decode nothing."""

from __future__ import annotations

import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoProcessor

from tests.train.test_media_run import ALONE, QUICKSTART, config_of, write_model
from tutti.data import media_processor as module
from tutti.data.loader import build_data
from tutti.data.media_cache import MediaCache


def test_what_comes_first_is_kept_in_so_much_memory() -> None:
    cache = MediaCache(10_000)
    arrays = {
        b"a": np.arange(48, dtype=np.uint8).reshape(4, 4, 3),
        b"b": np.linspace(0, 1, 77, dtype=np.float32),
        b"c": np.arange(2 * 3 * 4 * 5, dtype=np.uint8).reshape(2, 3, 4, 5).transpose(0, 3, 1, 2),
    }
    for name, value in arrays.items():
        assert cache.get(name) is None
        cache.put(name, value)
        cache.put(name, np.zeros_like(value))
    cache.put(b"large", np.ones(9_800, np.uint8))
    cache.put(b"small", np.ones(9, np.uint8))
    for name, value in arrays.items():
        found = cache.get(name)
        assert found is not None and found.dtype == value.dtype and np.array_equal(found, value)
    assert cache.get(b"large") is None and cache.get(b"small") is not None
    for number in range(5_000):
        cache.put(b"more %d" % number, np.full(9, number % 251, np.uint8))
        if (found := cache.get(b"more %d" % number)) is not None:
            assert (found == number % 251).all()
    assert pickle.loads(pickle.dumps(cache)).get(b"a") is None


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("vlm"), "qwen2_5_vl")


@pytest.mark.parametrize(("num_workers", "megabytes", "decodes"), [(2, 256, 1), (0, 256, 1), (0, 0, 2)])
def test_the_second_epoch_decodes_nothing(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch, num_workers: int, megabytes: int, decodes: int
) -> None:
    count, decode = multiprocessing.get_context("fork").Value("i", 0), module.load_image

    def counted(medium: Any) -> Any:
        with count.get_lock():
            count.value += 1
        return decode(medium)

    monkeypatch.setattr(module, "load_image", counted)
    rows = str(QUICKSTART / "images.jsonl")
    options = {
        "data.media_cache_mb": megabytes, "data.num_workers": num_workers, "data.shuffle": False,
        "train.num_train_epochs": 2, "train.max_steps": None, "data.drop_last": False,
    }  # fmt: skip
    config = config_of(tmp_path, model, rows, **options)
    processor = AutoProcessor.from_pretrained(model)
    data = build_data(config, processor.tokenizer, world=ALONE, dp_rank=0, dp_size=1, vocab_size=4096,
                      processor=processor)  # fmt: skip
    seen: list[dict[tuple[int, ...], Any]] = [{}, {}]
    for step in data.train():
        for names, micro in zip(step.names, step.micro_batches, strict=True):
            seen[step.epoch] |= {tuple(names): micro.extras["pixel_values"]}
    assert count.value == decodes * 180  # of so many images
    assert sum(len(names) for epoch in seen for names in epoch) == 2 * 180
    same = seen[0].keys() & seen[1].keys()
    assert same and all(seen[0][names].equal(seen[1][names]) for names in same)
