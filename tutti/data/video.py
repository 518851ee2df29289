"""Videos in rows: frames are selected from a video's header, and decoded when it is trained on.

A video is a file, which PyAV reads, an animated image (WebP, GIF), which pillow reads, or a list of images, its frames.

1. `measure_video` reads the header: size, number of frames, and frame rate. If the header has no number of frames, the
   packets of the file are counted, without decoding.
2. The family's processor selects the frames of such a video, or data.video_fps and data.video_max_frames do
   (`tutti.data.media_processor`).
3. `load_video` decodes up to the last of them, and keeps only these, resizing each at once.

Frames are numbered in display order. A number divided by the frame rate is its time, as in transformers; if frames are
unevenly spaced this is an average.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import av
import numpy as np
from PIL import Image, UnidentifiedImageError

from tutti.core.batch import Media
from tutti.data.media import (
    MAX_IMAGE_PIXELS,
    MediaFolder,
    Source,
    decode_image,
    measure_image,
    name_of,
    opened,
    readable,
    reference,
)
from tutti.data.rows import RowError

FRAMES_FPS = 2.0
"""Frame rate of a video given as a list of frames, if the row does not say."""

MAX_VIDEO_PIXELS = 2**29
"""Maximum total pixels of a video's frames; decoded, these take 1.5 GB."""

_TAIL = 0.1
"""Share of a video's frames that may be missing at its end: headers may count frames that were cut off."""

_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,wav,w64,mp3,flac,aac,aiff,amr,caf,au,"
    "ivf,h264,hevc,mjpeg"
)
"""The supported containers: none that refer to other files or URLs."""


class Header(NamedTuple):
    """The upright width and height of a video, its number of frames, and its frame rate (None: not known)."""

    size: tuple[int, int]
    total: int
    fps: float | None


def video_source(entry: Any, folder: MediaFolder) -> tuple[Source | tuple[Source, ...], float | None]:
    """The file, or the frames, in an entry of a row, and the frame rate if the row gives it."""
    fps = None
    if isinstance(entry, dict) and entry.get("frames") is not None:
        fps = entry.get("video_fps", entry.get("fps"))
        entry = entry["frames"]
        if not isinstance(entry, list | tuple | bytes | str):
            raise RowError("the frames of a video must be a list of images, or a file")
    if fps is not None and not (isinstance(fps, int | float) and fps > 0):
        raise RowError(f"video_fps must be a number above 0, not {fps!r}")
    if not isinstance(entry, list | tuple):
        return reference(entry, folder), fps
    if not entry:
        raise RowError("a video of no frames")
    return tuple(reference(frame, folder) for frame in entry), fps


def measure_video(source: Source | tuple[Source, ...]) -> Header:
    """Measure a video without decoding it. RowError: it cannot be read."""
    if isinstance(source, tuple):
        sizes = [measure_image(frame) for frame in source]
        if len(set(sizes)) > 1:
            raise RowError(
                f"a video whose frames differ in size: {sizes[0]} and {next(s for s in sizes if s != sizes[0])}"
            )
        return Header(sizes[0], len(source), None)
    with readable(source, "a video"):
        try:
            with opened(source) as image:
                return _animation(image)
        except UnidentifiedImageError:
            pass
        with open_av(source) as container:
            return _header(container, source)


def load_video(medium: Media, size: tuple[int, int]) -> np.ndarray:
    """The selected frames of a video, uint8 [frames, 3, height, width], resized to `size` (width, height).

    RowError: it cannot be decoded.
    """
    assert medium.frames is not None
    wanted, total = medium.frames.indices, medium.frames.total
    listed = isinstance(medium.source, tuple)
    shown = medium.source[0] if isinstance(medium.source, tuple) else medium.source
    name = name_of(shown)
    found: dict[int, np.ndarray] = {}
    number, last = 0, None
    with readable(shown, "a video"):
        for number, last in enumerate(_decoded(medium.source), start=1):
            if number - 1 in wanted:
                found[number - 1] = _resized(last(), medium.size, size, name)
            if number > wanted[-1]:
                break
        if last is None or (number <= wanted[-1] and (listed or number < total * (1 - _TAIL))):
            raise RowError(f"{name} cannot be read as a video: it ends after {number} of its {total} frames")
        rest = [index for index in wanted if index not in found]
        if rest:
            found |= dict.fromkeys(rest, _resized(last(), medium.size, size, name))
    return np.stack([found[index] for index in wanted]).transpose(0, 3, 1, 2)


def _resized(frame: Image.Image, expected: tuple[int, ...], size: tuple[int, int], name: str) -> np.ndarray:
    if frame.size != expected:
        raise RowError(f"{name} has changed during the run")
    return np.asarray(frame if frame.size == size else frame.resize(size, Image.Resampling.BICUBIC))


@contextmanager
def open_av(source: Source) -> Iterator[Any]:
    """The container of a file with video or sound."""
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    options = {"format_whitelist": _FORMATS, "protocol_whitelist": "file"}
    with av.open(file, options=options) as container:
        yield container


def _header(container: Any, source: Source) -> Header:
    if not container.streams.video:
        raise RowError(f"{name_of(source)} has no video")
    stream = container.streams.video[0]
    width, height = stream.codec_context.width, stream.codec_context.height
    if width * height > MAX_IMAGE_PIXELS:
        raise RowError(f"{name_of(source)} has frames of {width} x {height} pixels, too many to decode")
    first = next(container.decode(stream), None)
    if first is None:
        raise RowError(f"{name_of(source)} is a video of no frames")
    rate = stream.average_rate
    total = stream.frames
    if not total:
        container.seek(0)
        total = sum(1 for packet in container.demux(stream) if packet.size and not packet.is_discard)
    return Header(_upright(first), max(total, 1), float(rate) if rate else None)


def _animation(image: Image.Image) -> Header:
    """The header of an animated image, or a still one, which is a video of one frame."""
    image.load()
    milliseconds = image.info.get("duration")
    return Header(image.size, getattr(image, "n_frames", 1), 1000 / milliseconds if milliseconds else None)


def _decoded(source: Source | tuple[Source, ...]) -> Iterator[Callable[[], Image.Image]]:
    """The frames of a video in order, each as a function that returns the image."""
    if isinstance(source, tuple):
        for frame in source:
            yield partial(decode_image, frame)
        return
    try:
        with opened(source) as image:
            for number in range(getattr(image, "n_frames", 1)):
                image.seek(number)
                yield partial(image.convert, "RGB")
            return
    except UnidentifiedImageError:
        pass
    with open_av(source) as container:
        for frame in container.decode(container.streams.video[0]):
            yield partial(_image, frame)


def _image(frame: Any) -> Image.Image:
    pixels, turns = frame.to_ndarray(format="rgb24"), round(frame.rotation / 90) % 4
    return Image.fromarray(np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels)


def _upright(frame: Any) -> tuple[int, int]:
    turned = round(frame.rotation / 90) % 2
    return (frame.height, frame.width) if turned else (frame.width, frame.height)


def describe_video(total: int, fps: float, width: int, height: int, **more: Any) -> Any:
    """transformers' description of a video, whose module imports torchvision, which rows of text do not need."""
    from tutti.core.compat import VideoMetadata

    return VideoMetadata(total, fps, width, height, total / fps, **more)


def evenly(number: int, total: int) -> list[int]:
    """`number` indices of `total`, evenly spaced from the first to the last, with repetitions if `total` is smaller."""
    return [int(index) for index in np.linspace(0, total - 1, number).round()]
