"""The example rows in docs/multimodal.md are read as documented."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from tests.data.recordings import sound, video
from tests.data.test_odd_media import encoder_of
from tutti.data.formats import Row

PAGE = Path(__file__).parents[2] / "docs" / "multimodal.md"
ROWS = re.findall(r"^\{.*\}$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("number", range(len(ROWS)))
def test_a_row_of_the_page_is_read(tmp_path: Path, number: int) -> None:
    Image.new("RGB", (40, 40), (200, 3, 9)).save(tmp_path / "a.png")
    for name in ("1.png", "2.png"):
        Image.new("RGB", (40, 40)).save(tmp_path / name)
    (tmp_path / "a.mp4").write_bytes(video(4))
    (tmp_path / "a.wav").write_bytes(sound())
    text = ROWS[number].replace("UklGR...", base64.b64encode(sound()).decode())
    kind = next(kind for kind in ("image", "video", "audio") if kind in text)
    (found,) = encoder_of(kind)([Row(json.loads(text), str(tmp_path / "rows.jsonl"), 1)])
    assert isinstance(found, list), found.reason
    assert [medium.kind for medium in found[0].media] == [kind]
    assert encoder_of(kind).extras(found, len(found[0]))


def test_the_page_has_rows_of_every_kind() -> None:
    text = "\n".join(ROWS)
    assert len(ROWS) >= 12 and all(part in text for part in ("image_url", "video_url", "input_audio", "frames"))
