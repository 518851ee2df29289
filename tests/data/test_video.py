"""Videos: the right frames are selected and decoded; unreadable files give a one-line error."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.data.recordings import frames, sound, video
from tutti.core.batch import Frames, Media
from tutti.data.media import MediaFolder
from tutti.data.rows import RowError
from tutti.data.video import load_video, measure_video, video_source


def animation(count: int = 5, form: str = "WEBP") -> bytes:
    images = [Image.fromarray(one) for one in frames(count)]
    buffer = io.BytesIO()
    options: dict[str, Any] = {"lossless": True} if form == "WEBP" else {}
    images[0].save(buffer, form, save_all=True, append_images=images[1:], duration=200, **options)
    return buffer.getvalue()


def still(form: str = "PNG", size: tuple[int, int] = (64, 48)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, form)
    return buffer.getvalue()


READ: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "mp4": (video(), ((64, 48), 12, 4.0)),
    "with sound": (video(sound=True), ((64, 48), 12, 4.0)),
    "webm, whose header counts no frames": (video(7, 3, form="webm", codec="libvpx"), ((64, 48), 7, 3.0)),
    "mkv": (video(form="matroska"), ((64, 48), 12, 4.0)),
    "avi": (video(form="avi"), ((64, 48), 12, 4.0)),
    "one frame": (video(1), ((64, 48), 1, 4.0)),
    "uneven times": (video(4, times=[0, 1, 5, 20]), ((64, 48), 4, pytest.approx(16 / 21))),
    "webp": (animation(), ((64, 48), 5, 5.0)),
    "gif": (animation(form="GIF"), ((64, 48), 5, 5.0)),
    "a still image": (still(), ((64, 48), 1, None)),
    "a list of frames": ((still(), still("JPEG")), ((64, 48), 2, None)),
}


@pytest.mark.parametrize("name", READ)
def test_headers_say_what_is_decoded(name: str) -> None:
    source, header = READ[name]
    found = measure_video(source)
    assert found == header
    every = Frames(tuple(range(found.total)), found.total, 1.0)
    assert load_video(Media("video", source, found.size, every), found.size).shape == (found.total, 3, 48, 64)


def test_the_frames_asked_for_are_decoded_and_resized() -> None:
    source = animation(5)
    want = frames(5).transpose(0, 3, 1, 2)
    medium = Media("video", source, (64, 48), Frames((1, 1, 4), 5, 5.0))
    assert np.array_equal(load_video(medium, (64, 48)), want[[1, 1, 4]])
    assert load_video(medium, (32, 24)).shape == (3, 3, 24, 32)
    coded = Media("video", video(12), (64, 48), Frames((0, 7, 11), 12, 4.0))
    every = frames(12).transpose(0, 3, 1, 2).astype(int)
    nearest = [int(np.abs(every - one).mean((1, 2, 3)).argmin()) for one in load_video(coded, (64, 48))]
    assert nearest == [0, 7, 11]


def test_few_frames_that_a_header_counts_too_many_are_the_last_one() -> None:
    source = video(20)
    medium = Media("video", source, (64, 48), Frames((0, 20), 21, 4.0))
    last = Media("video", source, (64, 48), Frames((0, 19), 20, 4.0))
    assert np.array_equal(load_video(medium, (64, 48)), load_video(last, (64, 48)))


BROKEN: dict[str, tuple[Any, str]] = {
    "no video": (b"hello", "a medium of 5 bytes cannot be read as a video: Invalid data"),
    "sound alone": (sound(), "has no video"),
    "a playlist": (b"#EXTM3U\n#EXTINF:1,\nhttp://example.org/a.ts\n", "cannot be read as a video: Invalid data"),
    "no end": (video()[:900], "cannot be read as a video|has no video"),
    "frames that differ": ((still(), still(size=(10, 10))), "frames differ in size"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_read_is_one_line(name: str) -> None:
    source, reason = BROKEN[name]
    with pytest.raises(RowError, match=reason) as caught:
        measure_video(source)
    assert "\n" not in str(caught.value)


def test_a_cut_file_with_a_good_header_is_found_when_it_is_decoded(tmp_path: Path) -> None:
    whole = video(60, path=str(tmp_path / "a.mp4"))
    source = whole[: len(whole) // 2]
    found = measure_video(source)
    assert found.total == 60
    with pytest.raises(RowError, match="cannot be read as a video"):
        load_video(Media("video", source, found.size, Frames((0, 59), 60, 4.0)), found.size)


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ([], "no frames"),
        ({"frames": 3}, "must be a list of images"),
        ({"frames": ["a.png"], "video_fps": 0}, "video_fps must be a number above 0"),
        ({"frames": ["none.png"]}, "is not a file"),
        ("http://example.org/a.mp4", "would have to be downloaded"),
    ],
)
def test_odd_entries(tmp_path: Path, entry: Any, reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        video_source(entry, MediaFolder(str(tmp_path)))


def test_a_playlist_on_disk_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:1/a.ts\n")
    with pytest.raises(RowError, match="cannot be read as a video: Invalid"):
        measure_video(str(tmp_path / "list.m3u8"))
