"""Media in rows: measured by their headers when rows are encoded, and decoded when they are trained on.

A *medium* is an image, a video or a sound. Rows refer to it by a path (relative to the data file's folder, or else to
data.media_root), a `file://` URL, a data URL, encoded bytes, or `{"bytes", "path"}` as in Image and Audio columns of
datasets; a video may also be a list of frames. Nothing is downloaded. Paths must stay below the data file's folder or
data.media_root, so that a row cannot read other files of the machine.

Measuring an image only reads its header, including its orientation tag. A sample contains `Media`, never pixels.
Videos: `tutti.data.video`; sounds: `tutti.data.audio`.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from tutti.core.batch import Media
from tutti.data.rows import RowError, kind_of

Source = str | bytes
"""A path, or encoded bytes."""


class MemberBytes(bytes):
    """The encoded bytes of a medium with a name for messages, such as its path within an archive."""

    name: str = ""


MAX_IMAGE_PIXELS = 2**28
"""An image with more pixels is rejected as a mistake or an attack: decoded it would take a gigabyte."""

_DATA_URL = re.compile(r"data:[\w.+-]+/[\w.+-]+(;[\w=.+-]+)*;base64,", re.ASCII)
_ORIENTATION = 0x0112


LISTED = 3
"""Number of largest media that a summary names."""


@dataclass
class MediaSummary:
    """Statistics of media: the number of each kind, the tokens that they take, and the `largest` ones, each with its
    tokens, kind and name."""

    numbers: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    largest: list[tuple[int, str, str]] = field(default_factory=list)

    def __add__(self, other: MediaSummary) -> MediaSummary:
        both = [*self.largest, *other.largest]
        return MediaSummary(self.numbers + other.numbers, self.tokens + other.tokens, both).shortened()

    def add(self, medium: Media, tokens: int) -> None:
        """Count a medium with this number of tokens."""
        name = name_of(medium.source) if isinstance(medium.source, str | MemberBytes) else ""
        self.numbers[medium.kind] += 1
        self.tokens[medium.kind] += tokens
        self.largest.append((tokens, medium.kind, f"{described(medium)} {name}".strip()))

    def shortened(self) -> MediaSummary:
        """The summary with only as many of the largest as are named."""
        return MediaSummary(self.numbers, self.tokens, sorted(self.largest, key=lambda one: -one[0])[:LISTED])


def described(medium: Media) -> str:
    """The size of a medium for display."""
    if medium.kind == "audio":
        return f"{medium.size[0]:,} samples"
    size = "x".join(map(str, medium.size))
    return size if medium.frames is None else f"{size}, {len(medium.frames.indices)} of {medium.frames.total} frames"


def plural(kind: str) -> str:
    """The name of several media of a kind."""
    return "drawn pictures" if kind == "drawn" else f"{kind}s"


@dataclass(frozen=True)
class MediaFolder:
    """The folders that may contain the media of a data file. root: data.media_root."""

    folder: str
    root: str | None = None

    def path_of(self, name: str) -> str:
        """The file that `name` refers to. RowError: it does not exist, or is outside of the folders."""
        allowed = [_real_folder(base) for base in (self.folder or os.curdir, self.root) if base]
        for base in allowed:
            folder, file = os.path.split(os.path.join(base, name))
            path = os.path.join(_real_folder(folder), file)
            if os.path.islink(path):
                path = os.path.realpath(path)
            if os.path.isfile(path):
                if any(path.startswith(os.path.join(parent, "")) for parent in allowed):
                    return path
                raise RowError(f"{name} lies outside {' and '.join(allowed)}: set data.media_root to a folder above it")
        raise RowError(f"{name} is not a file below {' or '.join(allowed)} (data.media_root)")


_real_folder = lru_cache(4096)(os.path.realpath)
"""The resolved path of a folder, cached, since rows refer to few folders and resolving links is slow."""


def reference(entry: Any, folder: MediaFolder) -> str | bytes:
    """The path or the encoded bytes for an entry of a row. RowError: it is neither."""
    if isinstance(entry, bytes | bytearray):
        if not entry:
            raise RowError("a medium of no bytes")
        return bytes(entry)
    if isinstance(entry, dict):
        if entry.get("bytes") is not None:
            return _member(entry["bytes"], entry.get("path"), folder)
        for key in ("path", "url", "image", "video", "audio"):
            if entry.get(key) is not None:
                return reference(entry[key], folder)
        raise RowError(f"a medium with keys {', '.join(map(str, entry))}: it needs bytes or a path")
    if isinstance(entry, Image.Image):
        buffer = io.BytesIO()
        entry.save(buffer, format="PNG")
        return buffer.getvalue()
    if not isinstance(entry, str) or not entry:
        raise RowError(f"a medium must be a path, a data URL or bytes, not {kind_of(entry)}")
    if (found := _DATA_URL.match(entry)) is not None:
        try:
            return base64.b64decode(entry[found.end() :], validate=True)
        except binascii.Error as error:
            raise RowError(f"a data URL that is not base64: {error}") from None
    if entry.startswith("data:"):
        raise RowError("a data URL that is not in base64")
    if entry.startswith("file://"):
        return folder.path_of(unquote(urlparse(entry).path))
    if re.match(r"[a-zA-Z][\w+.-]*://", entry):
        raise RowError(f"{entry[:60]} would have to be downloaded, which training does not do: give a local file")
    return folder.path_of(entry)


def _member(entry: Any, name: Any, folder: MediaFolder) -> str | bytes:
    """As `reference`, for bytes that may have a name, such as their path within an archive."""
    if not isinstance(name, str) or not isinstance(entry, bytes):
        return reference(entry, folder)
    if not entry:
        raise RowError(f"{name} has no bytes")
    encoded = MemberBytes(entry)
    encoded.name = name
    return encoded


def measure_image(source: Source) -> tuple[int, int]:
    """The upright width and height of an image, from its header. RowError: it cannot be read."""
    with readable(source), opened(source) as image:
        if image.mode in ("I", "F"):
            raise RowError(f"{name_of(source)} has pixels of 32 bits, whose black and white are not known: make 8 bits")
        width, height = image.size
        turned = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
        return (height, width) if turned else (width, height)


def is_image(source: Source) -> bool:
    """True if pillow reads a file, animated or not."""
    try:
        with opened(source):
            return True
    except UnidentifiedImageError:
        return False


def decode_image(source: Source) -> Image.Image:
    """The decoded image, upright, in 8-bit RGB; of 16-bit gray the upper 8 bits. RowError: it cannot be decoded."""
    with readable(source), opened(source) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I;16"):  # pillow would turn everything brighter than 255 white
            upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
        return upright.convert("RGB")


def load_image(medium: Media) -> Image.Image:
    """The decoded image, upright, in RGB. RowError: it cannot be decoded, or its size has changed."""
    assert not isinstance(medium.source, tuple)
    image = decode_image(medium.source)
    if image.size != medium.size:
        raise RowError(f"{name_of(medium.source)} has changed during the run")
    return image


def resized(size: tuple[int, int], least: int | None, most: int | None) -> tuple[int, int]:
    """The size with the same aspect ratio and between `least` and `most` pixels."""
    width, height = size
    pixels = width * height
    bound = min(pixels, most) if most else pixels
    bound = max(bound, least) if least else bound
    if bound == pixels:
        return size
    scale = (bound / pixels) ** 0.5
    rounding = np.floor if bound < pixels else np.ceil
    return max(1, int(rounding(width * scale))), max(1, int(rounding(height * scale)))


def identity(medium: Media) -> bytes:
    """The bytes that identify a medium in a digest of data: its path, size and modification time, or its bytes."""
    sources = medium.source if isinstance(medium.source, tuple) else (medium.source,)
    return b"\0".join([*map(_identity, sources), *([repr(medium.frames).encode()] if medium.frames else ())])


def _identity(source: Source) -> bytes:
    if isinstance(source, bytes):
        return source
    found = os.stat(source)
    return f"{source}\0{found.st_size}\0{found.st_mtime_ns}".encode()


@contextmanager
def opened(source: Source) -> Iterator[Image.Image]:
    """The image, not decoded yet. RowError: it has too many pixels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise RowError(f"{name_of(source)} has {image.width} x {image.height} pixels, too many to decode")
            yield image


@contextmanager
def readable(source: Source, what: str = "an image") -> Iterator[None]:
    """Convert errors of reading a file as `what` to a one-line RowError."""
    try:
        yield
    except UnidentifiedImageError:
        raise RowError(f"{name_of(source)} is not {what}") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, MemoryError, EOFError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise RowError(f"{name_of(source)} cannot be read as {what}: {reason}") from None


def name_of(source: Source) -> str:
    """A source's name in messages."""
    if isinstance(source, bytes):
        size = f"{len(source):,} bytes"
        return f"{source.name} ({size})" if isinstance(source, MemberBytes) and source.name else f"a medium of {size}"
    return Path(source).name
