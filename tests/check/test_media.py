"""`tutti check` on data with media: the contents of samples, and the tokens of each kind of media."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.train.test_media_run import config_of, write_model
from tutti.check.dry_run import predict
from tutti.check.run import check
from tutti.model.structure import towers


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
    # Four patches of 4 x 4 pixels are one token.
    assert (
        "<|vision_start|>[image 1: 64x48, 48 tokens]<|vision_end|> or <|vision_start|>[image 2: 24x16, 6 tokens]"
        in shown
    )
    assert "<|image_pad|>" not in shown
    total = int(re.search(r"tokens ([\d,]+), of which", shown).group(1).replace(",", ""))  # type: ignore[union-attr]
    assert f"image {54 * 30:,} tokens ({54 * 30 / total:.0%}) in 60" in shown
    assert "largest image of 48 tokens: 64x48 a.png" in shown


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava", "gemma3", "pixtral", "internvl", "qwen2_5_omni"])
def test_the_images_of_the_largest_micro_batch_are_foreseen(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (64, 48), "red").save(tmp_path / "a.png")
    lines = []
    for count in (1,) * 13 + (3,) + (0,) * 6:
        chat = [{"role": "user", "content": "<image>" * count + "What?"}, {"role": "assistant", "content": "Red."}]
        lines.append(json.dumps({"messages": chat, "images": ["a.png"] * count}))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    told: list[tuple[Any, ...]] = []

    def noted(*given: Any, on_cpu: bool = False) -> Any:
        told.extend([] if on_cpu else [given])
        return predict(*given, on_cpu=on_cpu)

    monkeypatch.setattr("tutti.check.run.predict", noted)
    options = {
        "data.row_template": {}, "data.media_root": None, "train.dyn_bsz": False, "data.max_seq_len": 512,
        "train.global_batch_size": 4, "train.max_steps": None,
    }  # fmt: skip
    check(config_of(tmp_path, write_model(tmp_path / "model", family), str(tmp_path / "rows.jsonl"), **options), 2)
    shown = capsys.readouterr().out
    assert "Sent per rank and step" in shown and "not counted" not in shown
    ((config, model, world, full),) = told
    assert full.num_tokens == 2 * 512 and len(full.lengths()) >= 3
    with_images, without = predict(*told[0]), predict(config, model, world, replace(full, extras={}))
    tower = full.num_values() * 4 + sum(p.numel() for part in towers(model) for p in part.parameters())
    assert with_images.activations - without.activations > tower / 4 and with_images.parameters == without.parameters
