"""Bad media in streams of each format: an error that names the file, the row and the medium, or the row is skipped."""

from __future__ import annotations

import base64
import json
import logging
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.processors import PROCESSORS
from tests.data.recordings import sound, video
from tests.data.test_odd_media import ALONE, animation, cut, picture
from tests.data.test_tars import write
from tests.train.runs import tiny_config
from tutti.data import media
from tutti.data.loader import build_data

FORMATS = ("jsonl", "parquet", "tar")
WHOLE = picture("JPEG", (200, 200))
BAD: dict[str, tuple[str, bytes | str, str]] = {
    "empty": ("image.png", b"", "no bytes|0 bytes is not"),
    "a text": ("image.jpg", b"no image at all", "is not an image"),
    "a page": ("image.jpg", b"<!doctype html><html><body>404</body></html>", "is not an image"),
    "a drawing of vectors": ("image.png", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is not an image"),
    "ten bytes": ("image.jpg", WHOLE[:10], "cannot be read as an image|is not an image"),
    "a cut png": ("image.png", picture(size=(200, 200))[:9000], "truncated"),
    "a cut jpeg": ("image.jpg", cut(WHOLE), "truncated"),
    "a cut webp": ("image.webp", cut(picture("WEBP", (200, 200))), "cannot be read as an image|is not an image"),
    "a cut gif": ("image.gif", cut(picture("GIF", (200, 200))), "truncated|cannot be read as an image"),
    "1 x 20000": ("image.png", picture(size=(1, 20_000)), "absolute aspect ratio"),
    "a bomb": ("image.png", picture(size=(1200, 900)), "has 1200 x 900 pixels, too many to decode"),
    "a video as an image": ("image.jpg", video(), "is not an image"),
    "a sound as an image": ("image.jpg", sound(), "is not an image"),
    "a text as a video": ("video.mp4", b"no video at all", "cannot be read as a video"),
    "a sound as a video": ("video.mp4", sound(), "has no video"),
    "a cut webp animation": ("video.mp4", cut(animation("WEBP")), "cannot be read as a video"),
    "a cut mp4": ("video.mp4", cut(video(60)), "cannot be read as a video"),
    "a text as a sound": ("audio.wav", b"no sound at all", "cannot be read as a sound"),
    "a video as a sound": ("audio.wav", video(), "has no sound"),
    "an image as a sound": ("audio.wav", WHOLE, "cannot be read as a sound|has no sound"),
    "a header of a sound": ("audio.wav", sound()[:44], "no samples|cannot be read as a sound"),
    "missing": ("image.jpg", "none.jpg", "none.jpg is not a file below"),
    "outside": ("image.jpg", "../../outside.jpg", "is not a file below"),
    "a folder": ("image.jpg", ".", "is not a file below"),
    "http": ("image.jpg", "http://example.org/a.jpg", "would have to be downloaded"),
    "bad base64": ("image.jpg", "data:image/png;base64,@@@@", "a data URL that is not base64"),
    "a data URL of a text": ("image.jpg", "data:text/plain,hello", "a data URL that is not in base64"),
}
"""The medium's name, which begins with its kind; its bytes, or the row's value instead of them; the error."""


def chat(kind: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"<{kind}>?"}, {"role": "assistant", "content": "Yes."}]


def write_rows(folder: Path, form: str, entries: list[tuple[str, bytes | str]]) -> Path:
    """A file of rows with one medium each."""
    path, rows = folder / f"rows.{form}", []
    members: dict[str, bytes | str] = {}
    for number, (name, data) in enumerate(entries, 1):
        kind, _, extension = name.partition(".")
        row: dict[str, Any] = {"messages": chat(kind)}
        if form == "tar" and isinstance(data, bytes):
            members[f"in/{number}.{extension}"] = data
        elif form == "jsonl" and isinstance(data, bytes):
            row[f"{kind}s"] = ["data:x/y;base64," + base64.b64encode(data).decode()]
        elif form == "parquet":
            binary = isinstance(data, bytes)
            entry = {"bytes": data if binary else None, "path": f"in/{number}.{extension}" if binary else data}
            row |= {f"{other}s": [entry] if other == kind else None for other in ("image", "video", "audio")}
        else:
            row[f"{kind}s"] = [data]
        members[f"in/{number}.json"] = json.dumps(row) if form == "tar" else ""
        rows.append(row)
    if form == "tar":
        return write(path, members)
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    return path


@cache
def omni() -> Any:
    return PROCESSORS["qwen2_5_omni"]()


def trained(path: Path, silent: bool) -> tuple[Any, int]:
    """The data of a stream, read to its end, and its trained tokens."""
    processor = omni()
    config = tiny_config(path.parent, **{
        "data.train_path": str(path), "data.datasets_type": "iterable", "data.train_sample": 4, "data.shuffle": False,
        "data.max_seq_len": 2048, "data.silent_exception": silent, "data.num_workers": 0, "train.dyn_bsz": False,
        "train.global_batch_size": 1, "train.micro_batch_size": 1,
    })  # fmt: skip
    data = build_data(config, processor.tokenizer, world=ALONE, dp_rank=0, dp_size=1, vocab_size=4096,
                      processor=processor)  # fmt: skip
    return data, sum(step.trained_tokens for step in data.train())


@pytest.mark.parametrize("form", FORMATS)
def test_a_bad_medium_is_one_line_that_names_its_row(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(media, "MAX_IMAGE_PIXELS", 1_000_000)
    for number, (name, (kind, data, reason)) in enumerate(BAD.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = write_rows(folder, form, [("image.png", picture()), (kind, data)])
        with pytest.raises(ValueError, match=reason) as caught:
            trained(path, silent=False)
        line = str(caught.value)
        assert line.startswith(f"{path}, line 2: ") and "\n" not in line, (name, line)
        assert line.endswith("; data.silent_exception: true skips bad rows")
        if isinstance(data, bytes) and form != "jsonl" and "aspect" not in reason:
            assert f"in/2.{kind.partition('.')[2]} {f'({len(data):,} bytes)' if data else 'has no'}" in line


@pytest.mark.parametrize("form", FORMATS)
def test_bad_media_are_left_out_and_counted(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(media, "MAX_IMAGE_PIXELS", 1_000_000)
    good: list[tuple[str, bytes | str]] = [("image.png", picture()), ("video.mp4", video()), ("audio.wav", sound())]
    path = write_rows(tmp_path, form, [good[0], *((kind, data) for kind, data, _ in BAD.values()), *good[1:]])
    with caplog.at_level(logging.INFO, logger="tutti"):
        data, tokens = trained(path, silent=True)
    assert sum(data.report.dropped.values()) >= len(BAD) and tokens > 0
