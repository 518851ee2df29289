"""Media files: sizes read from headers equal decoded sizes, and anything unusual gives a one-line error."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tutti.core.batch import Media
from tutti.data import media
from tutti.data.media import MediaFolder, identity, load_image, measure_image, reference, resized
from tutti.data.rows import RowError


def encoded(size: tuple[int, int] = (30, 20), form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (200, 30, 60)).save(buffer, form, **options)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> MediaFolder:
    inside = tmp_path / "data"
    inside.mkdir()
    (inside / "a.png").write_bytes(encoded())
    (tmp_path / "outside.png").write_bytes(encoded())
    return MediaFolder(str(inside))


def measure(entry: Any, folder: MediaFolder) -> Media:
    source = reference(entry, folder)
    return Media("image", source, measure_image(source))


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(form="JPEG", exif=exif)


def test_every_way_to_name_an_image(folder: MediaFolder) -> None:
    data = encoded()
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    ways = ["a.png", f"file://{folder.folder}/a.png", url, data, {"bytes": data, "path": "x"}, {"path": "a.png"},
            Image.new("RGB", (30, 20))]  # fmt: skip
    for way in ways:
        found = measure(way, folder)
        assert (found.kind, found.size) == ("image", (30, 20))
        assert load_image(found).size == (30, 20) and load_image(found).mode == "RGB"


def test_orientation_is_minded(folder: MediaFolder) -> None:
    found = measure(turned(), folder)
    assert found.size == (20, 30) and load_image(found).size == (20, 30)


def test_the_folder_of_a_file_that_is_named_without_one_is_this_one(
    folder: MediaFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = next(path.name for path in Path(folder.folder).iterdir() if path.suffix == ".png")
    monkeypatch.chdir(folder.folder)
    assert MediaFolder("").path_of(name) == str(Path(folder.folder).resolve() / name)
    with pytest.raises(RowError, match="lies outside"):
        MediaFolder("").path_of("../outside.png")


def test_a_root_beside_the_data(folder: MediaFolder, tmp_path: Path) -> None:
    assert measure("outside.png", MediaFolder(folder.folder, str(tmp_path))).size == (30, 20)


ODD = {
    "missing": ("b.png", "b.png is not a file below"),
    "outside": ("../outside.png", "lies outside"),
    "absolute": ("/etc/hostname", "lies outside"),
    "http": ("https://example.org/a.png", "would have to be downloaded"),
    "empty": (b"", "no bytes"),
    "not an image": (b"hello", "is not an image"),
    "half a header": (encoded()[:20], "image"),
    "base64": ("data:image/png;base64,@@", "not base64"),
    "plain data": ("data:text/plain,hello", "not in base64"),
    "a number": (3, "must be a path"),
    "nothing": ({"detail": "low"}, "needs bytes or a path"),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_media_are_one_line(folder: MediaFolder, name: str) -> None:
    entry, reason = ODD[name]
    with pytest.raises(RowError, match=reason) as caught:
        measure(entry, folder)
    assert "\n" not in str(caught.value)


def test_a_link_to_the_outside_is_outside(folder: MediaFolder, tmp_path: Path) -> None:
    (Path(folder.folder) / "link.png").symlink_to(tmp_path / "outside.png")
    with pytest.raises(RowError, match="lies outside"):
        measure("link.png", folder)


def test_a_truncated_file_is_found_when_it_is_decoded(folder: MediaFolder) -> None:
    whole = encoded((200, 200), "JPEG")
    found = measure(whole[: len(whole) // 2], folder)
    with pytest.raises(RowError, match="cannot be read as an image"):
        load_image(found)


def test_bombs_are_refused_by_their_header(folder: MediaFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(RowError, match="30 x 20 pixels, too many"):
        measure(encoded(), folder)


def test_a_changed_file_is_noticed(folder: MediaFolder) -> None:
    found = measure("a.png", folder)
    before = identity(found)
    Path(folder.folder, "a.png").write_bytes(encoded((31, 20)))
    assert identity(found) != before
    with pytest.raises(RowError, match="has changed"):
        load_image(found)


@pytest.mark.parametrize("size", [(1, 1), (3000, 10), (640, 480), (10, 3000)])
@pytest.mark.parametrize(("least", "most"), [(None, 10_000), (400, None), (400, 10_000)])
def test_bounds_hold_and_aspects_stay(size: tuple[int, int], least: int | None, most: int | None) -> None:
    width, height = resized(size, least, most)
    assert most is None or width * height <= most
    assert least is None or width * height >= least
    if min(width, height) > 20:
        assert width / height == pytest.approx(size[0] / size[1], rel=0.1)


def test_identity_of_bytes_is_the_bytes() -> None:
    assert identity(Media("image", b"abc", (1, 1))) == b"abc"
