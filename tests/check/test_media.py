"""`tutti check` of data with media: what stands in the samples, and which media take the tokens."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from tests.train.test_media_run import config_of, write_model
from tutti.check.run import check


def test_media_are_shown_in_the_place_of_their_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, size in (("a", (64, 48)), ("b", (24, 16))):
        Image.new("RGB", size, "red").save(tmp_path / f"{name}.png")
    both = {"images": ["a.png", "b.png"], "messages": [{"role": "user", "content": "<image> or <image>?"}]}
    both["messages"].append({"role": "assistant", "content": "One."})
    text = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, [both, text] * 30)))
    model = write_model(tmp_path / "model", "qwen2_5_vl")
    check(config_of(tmp_path, model, str(path), **{"data.row_template": {}, "data.media_root": None}))
    shown = " ".join(capsys.readouterr().out.split())
    # Four patches of 4 x 4 make a token.
    assert (
        "<|vision_start|>[image 1: 64x48, 48 tokens]<|vision_end|> or <|vision_start|>[image 2: 24x16, 6 tokens]"
        in shown
    )
    assert "<|image_pad|>" not in shown
    total = int(re.search(r"tokens ([\d,]+), of which", shown).group(1).replace(",", ""))  # type: ignore[union-attr]
    assert f"image {54 * 30:,} tokens ({54 * 30 / total:.0%}) in 60" in shown
    assert "largest image of 48 tokens: 64x48 a.png" in shown
