"""Rows with one image each, and random variations of images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from tutti.core.batch import pack
from tutti.core.pixels import Square, to_image
from tutti.data.augment import Augment, warp
from tutti.data.images import ImageEncoder
from tutti.data.media_cache import MediaCache
from tutti.data.source import BadRow, Row


def encoder(**changes: object) -> ImageEncoder:
    return ImageEncoder(columns=("image", "picture"), size=Square(4), **changes)  # type: ignore[arg-type]


def test_the_middle_of_an_image_is_cut_and_scaled(tmp_path: Path) -> None:
    image = Image.new("RGB", (24, 8), (255, 0, 0))
    image.paste((0, 0, 255), (8, 0, 16, 8))
    image.save(tmp_path / "a.png")
    encode = encoder()
    ((sample,),) = encode([Row({"picture": "a.png", "caption": "blue"}, str(tmp_path / "rows.jsonl"), 1)])
    assert len(sample) == 1 and sample.labels[0] == 0
    values = encode.extras([sample], 1)["pixel_values"]
    assert values.shape == (1, 3, 4, 4)
    # Both borders lie between pixels: the outer columns have a little of the red beside them.
    assert torch.allclose(values[0, :, :, 1:3], torch.tensor([-1.0, -1, 1])[:, None, None].expand(3, 4, 2), atol=0.05)
    assert to_image(values[0]).getpixel((2, 2)) == pytest.approx((0, 0, 255), abs=6)
    assert dict(encode.notes) == {"an image alone is read; left aside were caption": 1}


def test_an_image_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (9, 8), (255, 0, 0)).save(tmp_path / "a.png")
    encode = encoder(cache=MediaCache(2**20))
    ((sample,),) = encode([Row({"image": "a.png"}, str(tmp_path / "rows.jsonl"), 1)])
    first = encode.extras([sample], 1)["pixel_values"]
    monkeypatch.setattr("tutti.data.images.load_image", None)
    assert encode.extras([sample], 1)["pixel_values"].equal(first)


def test_rows_without_an_image_are_bad(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    file = str(tmp_path / "rows.jsonl")
    rows = [Row({"caption": "a"}, file, 1), Row({"image": "text.png"}, file, 2), Row({"image": "none.png"}, file, 3)]
    found = encoder()(rows)
    assert all(isinstance(row, BadRow) for row in found)
    starts = ["has no image: no column", "text.png is not an image", "none.png is not a file"]
    assert all(start in str(row) for start, row in zip(starts, found, strict=True))


def test_a_batch_of_padding_has_no_images() -> None:
    assert len(pack([]).target_index) == 0 and encoder().extras([], 16) == {}


def test_what_an_image_undergoes_depends_on_its_key_alone() -> None:
    augment = Augment(flip=True, shift=0.1, scale=0.2)
    several = augment.maps(3, 1, [5, 6, 7])
    assert several[1].equal(augment.maps(3, 1, [6])[0])
    for seed, epoch, name in ((4, 1, 6), (3, 2, 6), (3, 1, 7)):
        assert not augment.maps(seed, epoch, [name])[0].equal(several[1])


def test_variations_stay_within_what_is_asked_for() -> None:
    maps = Augment(flip=True, shift=0.1, scale=0.25).maps(0, 0, range(400))
    factors, shifts = maps[:, 0, 0], maps[:, :, 2]
    assert 0.4 < (factors < 0).float().mean() < 0.6
    assert factors.abs().min() >= 0.8 - 1e-6 and factors.abs().max() <= 1.25 + 1e-6
    assert 0.18 < shifts.abs().max() <= 0.2 and factors.abs().equal(maps[:, 1, 1])


def test_an_image_is_mirrored_and_moved() -> None:
    pixels = torch.arange(16.0).view(1, 1, 4, 4)
    mirror = torch.tensor([[[-1.0, 0, 0], [0, 1, 0]]])
    assert warp(pixels, mirror).allclose(pixels.flip(-1))
    moved = torch.tensor([[[1.0, 0, 0.5], [0, 1, 0]]])  # a quarter of the side, which is one pixel
    assert warp(pixels, moved)[0, 0, 0].tolist() == pytest.approx([1, 2, 3, 3])


@pytest.mark.parametrize(
    ("entry", "message"),
    [({"flop": True}, "has no flop"), ({"flip": 1}, "flip must be true"), ({"shift": 1.5}, "shift must be a number")],
)
def test_variations_that_cannot_be_used(entry: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"data.augment: {message}"):
        Augment.read(entry)
