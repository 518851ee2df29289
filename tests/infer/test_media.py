"""Prompts with media: greedy answers equal those of transformers' generate, in a batch of prompts of all kinds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForMultimodalLM

from tests.data.processors import PROCESSORS
from tests.infer.models import ONE, infer_config, open_model
from tests.model.test_media import CONFIGS, build
from tests.train.runs import QUICKSTART
from tutti.attention.kv_cache import CACHED
from tutti.infer.generate import CachedLogits, Generator, Request
from tutti.infer.prompts import row_request
from tutti.infer.sampling import Sampler

NEW = 20
PICTURES = [json.loads(line)["image"] for line in (QUICKSTART / "images.jsonl").read_text().splitlines()[:9]]


def write_model(folder: Path, family: str) -> str:
    """A random model of `family` with its processor; its path."""
    processor = PROCESSORS[family]()
    model = build(family, processor)[0]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(2)
    model.save_pretrained(folder)
    processor.chat_template = processor.tokenizer.chat_template
    processor.save_pretrained(folder)
    return str(folder)


def make_pictures(folder: Path) -> list[dict[str, Any]]:
    """Rows about no, one, two and three images of several sizes, in files in `folder`."""
    sizes = [(40, 28), (64, 20), (24, 24), (30, 50), (48, 36), (28, 28)]
    for number, (size, name) in enumerate(zip(sizes, PICTURES, strict=False)):
        Image.open(QUICKSTART / name).convert("RGB").resize(size).save(folder / f"{number}.png")
    rows, used = [], 0
    for number, count in enumerate((1, 0, 2, 3)):
        text = "<image>" * count + "What do you see?" + " And where?" * number
        names = [f"{place}.png" for place in range(used, used + count)]
        used += count
        rows.append({"messages": [{"role": "user", "content": text}]} | ({"images": names} if names else {}))
    return rows


def requests_of(loaded: Any, rows: list[dict[str, Any]], folder: Path, limit: int = NEW) -> list[Request]:
    form = replace(loaded.form, context=None)
    return [row_request(form, row, number, limit, str(folder)) for number, row in enumerate(rows)]


def answers(loaded: Any, config: Any, requests: list[Request], *, batch_tokens: int = 10_000) -> list[list[int]]:
    generator = Generator(loaded.logits, Sampler.of(config.infer), frozenset(), ONE, batch_tokens)
    made: list[list[int]] = [[] for _ in requests]
    for token in generator.stream(requests):
        made[token.number].append(token.id)
    return made


def by_transformers(
    path: str, family: str, rows: list[dict[str, Any]], folder: Path
) -> tuple[list[torch.Tensor], list[list[int]]]:
    """The logits after each prompt and the answers of the untouched class, to each row alone as its own processor makes
    inputs of it."""
    processor = PROCESSORS[family]()
    model: Any = AutoModelForMultimodalLM.from_pretrained(path, attn_implementation="eager").eval()
    first, made = [], []
    for row in rows:
        names = row.get("images", [])
        text = row["messages"][0]["content"].replace("<image>", "")
        parts = [{"type": "image"}] * len(names) + [{"type": "text", "text": text}]
        chat = [{"role": "user", "content": parts}]
        prompt = processor.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        images = [Image.open(folder / name).convert("RGB") for name in names]
        inputs = processor(text=[prompt], images=images or None, return_tensors="pt", add_special_tokens=False)
        out = model.generate(
            **inputs, do_sample=False, max_new_tokens=NEW, eos_token_id=None, pad_token_id=0, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        first.append(out.logits[0][0])
        made.append(out.sequences[0, inputs["input_ids"].shape[1] :].tolist())
    return first, made


@pytest.mark.parametrize("family", CONFIGS)
def test_greedy_equals_generate(tmp_path: Path, family: str) -> None:
    path, rows = write_model(tmp_path, family), make_pictures(tmp_path)
    config, loaded = open_model(path, do_sample=False)
    assert isinstance(loaded.logits, CachedLogits)
    assert loaded.model.config.get_text_config()._attn_implementation == CACHED
    requests = requests_of(loaded, rows, tmp_path)
    first, made = by_transformers(path, family, rows, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded.logits.start(requests), torch.stack(first), rtol=1e-4, atol=1e-4)
    loaded.logits.keep([])
    together = answers(loaded, config, requests)
    assert together == made
    assert len({tuple(answer) for answer in together}) >= 3, "the answers are to differ, or this shows little"
    # One by one, and joining those under way.
    assert answers(loaded, config, requests, batch_tokens=1) == together
    assert answers(loaded, config, requests, batch_tokens=300) == together
