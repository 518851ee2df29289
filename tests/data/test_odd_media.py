"""Bad and unusual media in rows: either read as intended, or a one-line error when measured or decoded."""

from __future__ import annotations

import base64
import io
import json
import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.processors import PROCESSORS
from tests.data.recordings import frames, sound, video
from tests.train.runs import tiny_config
from tutti.config.load import from_dict
from tutti.core.batch import IGNORE
from tutti.core.dist import World
from tutti.data import media
from tutti.data.encode import Encoder, make_encoder
from tutti.data.formats import BadRow, Row
from tutti.data.loader import build_data
from tutti.data.rows import RowError

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


def picture(form: str = "PNG", size: tuple[int, int] = (48, 40), mode: str = "RGB", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8))
    (image.convert(mode) if mode != "I;16" else Image.new(mode, size, 30_000)).save(buffer, form, **options)
    return buffer.getvalue()


def animation(form: str) -> bytes:
    images = [Image.fromarray(one) for one in frames(4)]
    buffer = io.BytesIO()
    images[0].save(buffer, form, save_all=True, append_images=images[1:], duration=250)
    return buffer.getvalue()


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return picture("JPEG", exif=exif)


def transparent() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGBA", (48, 40), (9, 9, 9, 0)).convert("P").save(buffer, "PNG", transparency=0)
    return buffer.getvalue()


def cut(whole: bytes) -> bytes:
    return whole[: len(whole) // 2]


def url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


READ: dict[str, tuple[str, Any]] = {
    "wrong extension": ("image", "really.png"),
    "one pixel": ("image", picture(size=(1, 1))),
    "CMYK": ("image", picture("JPEG", mode="CMYK")),
    "16 bits": ("image", picture(mode="I;16")),
    "palette and alpha": ("image", transparent()),
    "gray": ("image", picture(mode="L")),
    "turned": ("image", turned()),
    "animated gif as an image": ("image", animation("GIF")),
    "webp animation": ("video", animation("WEBP")),
    "mp4 with sound": ("video", video(sound=True)),
    "mp4 without sound": ("video", video()),
    "uneven times": ("video", video(5, times=[0, 1, 2, 9, 30])),
    "one frame": ("video", video(1)),
    "data URL": ("image", url(picture())),
    "a hundredth of a second": ("audio", sound(0.01)),
    "stereo": ("audio", sound(channels=2)),
    "8 kHz": ("audio", sound(rate=8000)),
    "48 kHz": ("audio", sound(rate=48000)),
    "mp3": ("audio", sound(form="mp3", codec="libmp3lame")),
    "flac": ("audio", sound(form="flac", codec="flac")),
    "ogg": ("audio", sound(rate=48000, form="ogg", codec="libopus")),
}
REFUSED: dict[str, tuple[str, Any, str]] = {
    "missing": ("image", "none.png", "none.png is not a file below"),
    "a folder": ("image", "folder", "folder is not a file below"),
    "empty": ("image", "empty.png", "empty.png is not an image"),
    "a cut png": ("image", picture(size=(200, 200))[:9000], "cannot be read as an image: image file is truncated"),
    "1 x 20000": ("image", picture(size=(1, 20_000)), "cannot take its images: absolute aspect ratio"),
    "a bomb": ("image", picture(size=(1200, 900)), "has 1200 x 900 pixels, too many to decode"),
    "http": ("video", "http://example.org/a.mp4", "would have to be downloaded"),
    "32 bits": ("image", picture("TIFF", mode="F"), "has pixels of 32 bits, whose black and white are not known"),
    "bad base64": ("image", "data:image/png;base64,@@@@", "a data URL that is not base64"),
    "a text as a video": ("video", "text.mp4", "text.mp4 cannot be read as a video: Invalid data"),
    "a video as a sound": ("audio", video(), "has no sound"),
    "a sound as a video": ("video", sound(), "has no video"),
}
LATE: dict[str, tuple[str, Callable[[Path], bytes], str]] = {
    "a cut jpeg": ("image", lambda _: cut(picture("JPEG", (200, 200))), "cannot be read as an image: .*truncated"),
    "a cut mp4": ("video", lambda at: cut(video(60, path=str(at / "whole.mp4"))), "cannot be read as a video"),
}
"""Media with a valid header: kind, bytes, and the error when they are decoded."""


@cache
def encoder_of(kind: str) -> Encoder:
    processor = PROCESSORS["qwen2_audio" if kind == "audio" else "qwen2_5_vl"]()
    config = from_dict({"data": {"train_path": "x", "data_type": "conversation", "max_seq_len": 2048}})
    return make_encoder(config, processor.tokenizer, vocab_size=4096, processor=processor)


def encode(kind: str, entry: Any, folder: Path) -> Any:
    (folder / "folder").mkdir(exist_ok=True)
    (folder / "empty.png").touch()
    (folder / "text.mp4").write_text("no video at all")
    (folder / "really.png").write_bytes(picture("JPEG"))
    chat = [{"role": "user", "content": f"<{kind}>?"}, {"role": "assistant", "content": "Yes."}]
    (found,) = encoder_of(kind)([Row({"messages": chat, f"{kind}s": [entry]}, str(folder / "rows.jsonl"), 7)])
    return found


@pytest.mark.parametrize("name", READ)
def test_odd_media_are_read(tmp_path: Path, name: str) -> None:
    kind, entry = READ[name]
    found = encode(kind, entry, tmp_path)
    assert isinstance(found, list), found.reason
    extras = encoder_of(kind).extras(found, len(found[0]))
    values = next(extras[key] for key in ("pixel_values", "pixel_values_videos", "input_features") if key in extras)
    assert values.isfinite().all() and (values.std() > 0 or name == "one pixel")


@pytest.mark.parametrize(("form", "mode"), [("PNG", "I;16"), ("TIFF", "I;16B")])
def test_gray_of_16_bits_keeps_its_brightness(form: str, mode: str) -> None:
    buffer = io.BytesIO()
    order = "big" if mode.endswith("B") else "little"
    Image.frombytes(mode, (2, 1), b"".join(value.to_bytes(2, order) for value in (30_000, 2_560))).save(buffer, form)
    assert np.asarray(media.decode_image(buffer.getvalue())).tolist() == [[[117] * 3, [10] * 3]]


@pytest.mark.parametrize("name", REFUSED)
def test_bad_media_are_one_line_when_rows_are_measured(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, entry, reason = REFUSED[name]
    monkeypatch.setattr(media, "MAX_IMAGE_PIXELS", 1_000_000)
    found = encode(kind, entry, tmp_path)
    assert isinstance(found, BadRow) and found.line == 7
    assert reason in found.reason and "\n" not in found.reason


@pytest.mark.parametrize("name", LATE)
def test_broken_media_are_one_line_when_they_are_decoded(tmp_path: Path, name: str) -> None:
    kind, make, reason = LATE[name]
    found = encode(kind, make(tmp_path), tmp_path)
    assert isinstance(found, list), found.reason
    with pytest.raises(RowError, match=reason) as caught:
        encoder_of(kind).extras(found, len(found[0]))
    assert "\n" not in str(caught.value)


def batches(folder: Path, num_workers: int, **data: Any) -> tuple[Any, list[Any]]:
    """The data of six pictures, the fourth of them cut, in order, and its micro batches."""
    lines = []
    for number in range(6):
        whole = picture("JPEG", (120 + 8 * number, 120))
        (folder / f"{number}.jpg").write_bytes(cut(whole) if number == 3 else whole)
        chat = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": f"Number {number}."}]
        lines.append(json.dumps({"messages": chat, "image": f"{number}.jpg"}))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    values = {"data.train_path": str(folder / "rows.jsonl"), "data.num_workers": num_workers, "data.shuffle": False,
              "data.max_seq_len": 512, "train.dyn_bsz": False, "train.global_batch_size": 2} | data  # fmt: skip
    processor = PROCESSORS["qwen2_5_vl"]()
    found = build_data(tiny_config(folder, **values), processor.tokenizer, world=ALONE, dp_rank=0, dp_size=1,
                       vocab_size=4096, processor=processor)  # fmt: skip
    micro_batches = []
    for step in found.train():
        trained = sum(len(micro.target_index) for micro in step.micro_batches)
        assert step.num_targets == step.trained_tokens == sum(step.source_targets.values()) == trained > 0
        micro_batches += step.micro_batches
    return found, micro_batches


@pytest.mark.parametrize("options", [{}, {"data.datasets_type": "iterable", "data.train_sample": 6}],
                         ids=("index", "stream"))  # fmt: skip
@pytest.mark.parametrize("num_workers", [0, 1])
def test_broken_media_are_left_out_and_counted_when_asked(
    tmp_path: Path, num_workers: int, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="tutti"):
        data, found = batches(tmp_path, num_workers, **options, **{"data.silent_exception": True})
    grids = [len(batch.extras["image_grid_thw"]) for batch in found]
    assert grids == [2, 1, 2]
    lost = found[1].cu_seqlens[1]
    assert (found[1].labels[lost:] == IGNORE).all() and (found[1].input_ids[lost:] == found[1].input_ids[-1]).all()
    assert found[1].num_tokens == len(found[1].input_ids) and found[1].num_sequences == 2
    ((reason, count),) = data.report.dropped.items()
    assert count == 1 and "rows.jsonl, line 4: 3.jpg cannot be read as an image" in reason
    assert f"left out, with padding in its place: {reason}" in caplog.text


@pytest.mark.parametrize("num_workers", [0, 1])
def test_broken_media_end_a_run_with_file_and_line(tmp_path: Path, num_workers: int) -> None:
    line = r"^[^\n]*rows\.jsonl, line 4: 3\.jpg cannot be read [^\n]*data\.silent_exception: true[^\n]*$"
    with pytest.raises(ValueError, match=line):
        batches(tmp_path, num_workers)
